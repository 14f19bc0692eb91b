"""optimum-quanto, as its layers save it and `QuantizedDiffusersModel` reads it.

8 bit: `X.weight._data` (N, K), `X.weight._scale` (N, 1). 4 and 2 bit: `X.weight._data._data` uint8, `X.weight._scale`,
`X.weight._shift`. Beside each the scales of activations, `X.input_scale` and `X.output_scale`, which are 1 for weights
that alone are quantized. A folder has `quanto_qmap.json`: module -> its types; a single file has that in its metadata.

The reader chooses the groups of 4 and 2 bits itself, by the width of a row; other groups cannot be told.

diffusers' own `QuantoConfig` skips modules by the last part of their names alone, and reads one type a folder. So
`quantization_config` is written only where that says the same.

Sources: optimum/quanto/nn/qmodule.py, tensor/qtensor.py and models/diffusers_models.py at 0.2.7; diffusers
quantizers/quanto/utils.py at 0.42.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...backends.quanto import group_size
from ...errors import SpecError
from ...weight import QuantizedWeight
from .layout import Layout, module_of, modules

QMAP = "quanto_qmap.json"
LARGEST_GROUP = 128
_DIFFUSERS_NAMES = {"qint8": "int8", "qint4": "int4", "qint2": "int2", "qfloat8_e4m3fn": "float8"}


class Quanto(Layout):
    id = "quanto"
    title = "optimum-quanto, as its own models are saved"
    formats = ("quanto-qint8", "quanto-qint4", "quanto-qint2", "quanto-qfloat8-e4m3fn", "quanto-qfloat8-e5m2")
    in_folders = True

    def refuse(self, weight_format: str, options: Mapping[str, Any]) -> str | None:
        chosen = options.get("group-size")
        if chosen is not None and int(chosen) != LARGEST_GROUP:
            return (
                f"quanto's loaders choose the groups themselves ({LARGEST_GROUP}, or the next smaller one that divides "
                f"a row), and group-size {chosen} could not be told; leave it out"
            )
        return super().refuse(weight_format, options)

    def tensors(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        t, (rows, columns) = weight.tensors, weight.orig_shape
        layer = name.removesuffix("weight")
        one = torch.ones((), dtype=t["scale"].dtype)
        activations = {f"{layer}input_scale": one, f"{layer}output_scale": one.clone()}
        if "shift" not in t:
            # A single row has a scale without dimensions in the library.
            scale = t["scale"].reshape(()) if rows == 1 else t["scale"]
            return {f"{name}._data": t["qdata"], f"{name}._scale": scale, **activations}
        group = weight.meta["group_size"] or columns
        if group != group_size(columns):
            raise SpecError(
                f"'{name}': groups of {group}, and quanto's loaders take {group_size(columns)} for rows of {columns}.\n"
                "Convert to the layout `quantwire`, or quantize without group-size."
            )
        packed = {"_data._data": t["qdata"], "_scale": t["scale"], "_shift": t["shift"]}
        return {f"{name}.{key}": value for key, value in packed.items()} | activations

    def note(self, name: str, weight: QuantizedWeight) -> Any:
        return {"type": _type(weight.format_id), "shape": list(weight.orig_shape)}

    def metadata(self, notes: Mapping[str, Any]) -> dict[str, str]:
        """`quanto_qmap.json` for a file that stands alone, with shapes, which packed weights do not tell."""
        layers = {module_of(n): {"weights": note["type"], "shape": note["shape"]} for n, note in notes.items()}
        return {QMAP: json.dumps(layers)} if layers else {}

    def config(self, notes: Mapping[str, Any], plain: tuple[str, ...]) -> dict[str, Any] | None:
        types = {str(note["type"]) for note in notes.values()}
        kept = {module.rpartition(".")[2] for module in modules(plain)}
        done = {module.rpartition(".")[2] for module in modules(tuple(notes))}
        if len(types) != 1 or kept & done or not types <= _DIFFUSERS_NAMES.keys():
            return None
        return {
            "quant_method": "quanto",
            "weights_dtype": _DIFFUSERS_NAMES[types.pop()],
            "modules_to_not_convert": sorted(kept) or None,
        }

    def beside(self, notes: Mapping[str, Any]) -> dict[str, Any]:
        types = {module_of(name): note["type"] for name, note in notes.items()}
        return {QMAP: {module: {"weights": kind, "activations": "none"} for module, kind in types.items()}}


def _type(format_id: str) -> str:
    return format_id.removeprefix("quanto-").replace("-", "_")
