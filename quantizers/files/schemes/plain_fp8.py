"""Weights that were cast to float8 without a scale: `X.weight` in F8_E4M3 or F8_E5M2, and nothing beside it.

Only weights (N, K) are layers. Norms, biases and convolutions in float8 stay plain tensors, which a model's own dtype
takes on load, as ComfyUI does with all of them. This scheme comes last: whatever has scales belongs to another one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..model_file import ModelFile
from .base import Fault, Layer
from .scaled_fp8 import find_markers

if TYPE_CHECKING:
    from ...weight import QuantizedWeight
    from .base import Read

TYPES = {"F8_E4M3": "e4m3fn", "F8_E5M2": "e5m2"}


class PlainFp8Scheme:
    id = "plain-fp8"
    title = "fp8 by plain cast"
    library = "torch"

    def find(self, file: ModelFile) -> Iterable[Layer | Fault]:
        # A marker of scales that are not there is no part of the model either, so the first layer takes it.
        markers = () if any("scale_weight" in lasts for lasts in file.groups.values()) else find_markers(file)
        for name, e in file.entries.items():
            if e.dtype not in TYPES or len(e.shape) != 2 or not name.endswith(".weight"):
                continue
            kind = TYPES[e.dtype]
            roles = {"qdata": name} | {f"marker_{i}" if i else "marker": m for i, m in enumerate(markers)}
            markers = ()
            yield Layer(name, self.id, f"float8_{kind}", f"layerwise-fp8-{kind}", roles, e.shape)

    def weight(self, layer: Layer, read: Read) -> QuantizedWeight:
        from ...weight import QuantizedWeight
        from ..quantized_file import DTYPES

        tensors = {"qdata": read(layer.tensors["qdata"])}
        return QuantizedWeight(layer.format_id, tensors, layer.shape, DTYPES[layer.dtype])
