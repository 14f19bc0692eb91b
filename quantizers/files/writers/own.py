"""Layouts of the pack: its own, which holds weights of every format, and plain 8-bit floats.

`quantwire`: see `quantized_file.py`. `plain-fp8`: a weight without scales is its values, cast; nothing tells it from a
tensor that was saved in that dtype, and every loader that takes one takes the other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...errors import WeightError
from ...registry import format_ids
from ...weight import QuantizedWeight
from ..quantized_file import KEY, NAMES, VERSION
from .layout import Layout

LAYERWISE = "layerwise-fp8-"


class Own(Layout):
    id = "quantwire"
    title = "the pack's own layout"
    formats = tuple(format_ids(writable=False))

    def refuse(self, weight_format: str, options: Mapping[str, Any]) -> str | None:
        return None

    def tensors(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        return {name if part == "qdata" else f"{name}.{part}": t for part, t in weight.tensors.items()}

    def note(self, name: str, weight: QuantizedWeight) -> Any:
        layer = {
            "format_id": weight.format_id,
            "orig_shape": list(weight.orig_shape),
            "orig_dtype": NAMES[weight.orig_dtype],
            "tensors": list(weight.tensors),
            "meta": dict(weight.meta),
        }
        if json.loads(json.dumps(layer)) != layer:
            raise WeightError(f"'{name}': the meta of {weight.format_id} is not plain JSON: {dict(weight.meta)}.")
        return layer

    def metadata(self, notes: Mapping[str, Any]) -> dict[str, str]:
        return {name: json.dumps(note) for name, note in notes.items()} | {KEY: json.dumps({"version": VERSION})}


class PlainFloat8(Layout):
    id = "plain-fp8"
    title = "8-bit floats without scales"
    formats = (f"{LAYERWISE}e4m3fn", f"{LAYERWISE}e5m2")

    def tensors(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        return {name: weight.tensors["qdata"]}
