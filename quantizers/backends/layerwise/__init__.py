"""Layerwise casting: weights stored as 8-bit floats without a scale, products in the dtype of the activations.

`qdata = w.to(float8)` and back, as diffusers' `apply_layerwise_casting` and ComfyUI's `fp8_e4m3fn` weight dtype do.
Without a scale the range is the format's own: e4m3fn ends at 448 and has no value below 2^-9 but 0, e5m2 ends at 57344.
Weights beyond it become nan here, which callers refuse. A plain cast was not kept for them: what it gives depends on
the torch release (nan, or 448 for 1e8 as in torch 2.13), and the second is a wrong weight without a word.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...base import Availability, Quantizer
from ...errors import SpecError
from ...kernels import forms
from ...kernels.expand import Expansion
from ...weight import QuantizedWeight, TensorMeta
from ..probing import probe_torch_only

if TYPE_CHECKING:
    from ...spec import QuantSpec

STORAGE = {"layerwise-fp8-e4m3fn": torch.float8_e4m3fn, "layerwise-fp8-e5m2": torch.float8_e5m2}


def make(format_id: str) -> Layerwise:
    return Layerwise(format_id)


class Layerwise(Quantizer):
    def __init__(self, format_id: str) -> None:
        self.format_id = format_id
        self.storage_dtype = STORAGE[format_id]

    def probe(self) -> Availability:
        return probe_torch_only(self, "Choose bnb-int8 or gguf-q8-0.")

    def refuse(self, spec: QuantSpec, t: TensorMeta) -> str | None:
        return None if len(t.shape) == 2 else f"shape {t.shape} is not (N, K)"

    def predict_nbytes(self, spec: QuantSpec, t: TensorMeta) -> int:
        return t.numel

    def quantize(self, w: Tensor, spec: QuantSpec) -> QuantizedWeight:
        """qdata (N, K) float8; nan where `w` is beyond the range."""
        w = w.detach().contiguous()
        qdata, limit = w.to(self.storage_dtype), torch.finfo(self.storage_dtype).max
        low, high = torch.aminmax(w)  # one pass without a copy; the mask is made only where it is needed
        if float(low) < -limit or float(high) > limit:
            qdata = w.float().masked_fill(w.abs() > limit, torch.nan).to(self.storage_dtype)
        return QuantizedWeight(self.format_id, {"qdata": qdata}, tuple(w.shape), w.dtype)

    def dequantize(self, q: QuantizedWeight, dtype: torch.dtype) -> Tensor:
        return q.tensors["qdata"].to(dtype)

    def form(self, q: QuantizedWeight) -> Expansion | None:
        return forms.float8(q.tensors["qdata"], None)

    def to_native(self, q: QuantizedWeight, bias: Tensor | None) -> nn.Module:
        raise SpecError(
            f"{self.format_id}: layerwise casting is a hook that diffusers puts on a whole model, and it rounds biases "
            "to 8 bits too; there is no such layer.\nUse carrier `quantwire`."
        )
