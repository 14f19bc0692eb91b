"""torchao-float8wo: see the package docstring."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...kernels import forms
from ...kernels.expand import Expansion
from ...weight import QuantizedWeight, TensorMeta
from ..probing import sample_bytes
from .library import load
from .shared import Torchao, scaled

if TYPE_CHECKING:
    from ...spec import QuantSpec


class TorchaoFloat8(Torchao):
    format_id = "torchao-float8wo"

    def sample(self) -> dict[str, Tensor]:
        return {
            "qdata": (sample_bytes(64, 256).float() - 126).to(torch.float8_e4m3fn),
            "scale": torch.full((64, 1), 0.01),
        }

    def predict_nbytes(self, spec: QuantSpec, t: TensorMeta) -> int:
        return t.numel + 4 * self.groups(spec, t)

    def quantize(self, w: Tensor, spec: QuantSpec) -> QuantizedWeight:
        """qdata (N, K) float8 e4m3, scale (N, groups) float32."""
        quantization = load("torchao.quantization")
        q = quantization.Float8Tensor.from_hp(w.detach().contiguous(), granularity=self.granularity(spec))
        qdata: Tensor = q.qdata
        if bool((q.scale == 0).any()):
            # The library divides zeros by their scale of 0, which gives nan.
            values = qdata.to(torch.float32)
            qdata = values.masked_fill(values.isnan(), 0.0).to(qdata.dtype)
        return QuantizedWeight(self.format_id, {"qdata": qdata, "scale": q.scale}, tuple(w.shape), w.dtype)

    def dequantize(self, q: QuantizedWeight, dtype: torch.dtype) -> Tensor:
        return scaled(q.tensors["qdata"], q.tensors["scale"], dtype)

    def form(self, q: QuantizedWeight) -> Expansion | None:
        return forms.float8(q.tensors["qdata"], q.tensors["scale"])

    def to_native(self, q: QuantizedWeight, bias: Tensor | None) -> nn.Module:
        """`nn.Linear` on a `Float8Tensor` with these values."""
        qdata, scale = q.tensors["qdata"].clone(), q.tensors["scale"].clone()
        block = [1, q.orig_shape[1] // scale.shape[1]]
        weight = load("torchao.quantization").Float8Tensor(qdata, scale, block_size=block, dtype=q.orig_dtype)
        return self.native_layer(q, weight, bias)
