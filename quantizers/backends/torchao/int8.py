"""torchao-int8wo and torchao-int8dyn: see the package docstring."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...base import Kernel
from ...kernels import forms, int8
from ...kernels.choose import expanding, int8_rows
from ...kernels.expand import Expansion
from ...weight import QuantizedWeight, TensorMeta
from ..probing import sample_bytes
from .library import load
from .shared import Torchao, scaled

if TYPE_CHECKING:
    from ...spec import QuantSpec


class TorchaoInt8(Torchao):
    def __init__(self, format_id: str) -> None:
        self.format_id = format_id
        self.dynamic = format_id == "torchao-int8dyn"

    def sample(self) -> dict[str, Tensor]:
        return {"qdata": sample_bytes(64, 256).view(torch.int8), "scale": torch.full((64, 1), 0.01)}

    def predict_nbytes(self, spec: QuantSpec, t: TensorMeta) -> int:
        return t.numel + 4 * self.groups(spec, t)

    def quantize(self, w: Tensor, spec: QuantSpec) -> QuantizedWeight:
        """qdata (N, K) int8, scale (N, groups) float32. The library's zero points, all 0, are left out."""
        quantization = load("torchao.quantization")
        q = quantization.Int8Tensor.from_hp(w.detach().contiguous(), granularity=self.granularity(spec))
        return QuantizedWeight(self.format_id, {"qdata": q.qdata, "scale": q.scale}, tuple(w.shape), w.dtype)

    def dequantize(self, q: QuantizedWeight, dtype: torch.dtype) -> Tensor:
        return scaled(q.tensors["qdata"], q.tensors["scale"], dtype)

    def form(self, q: QuantizedWeight) -> Expansion | None:
        return _form(q)

    def kernel(self, q: QuantizedWeight, device: torch.device, dtype: torch.dtype, tokens: int) -> Kernel:
        if not self.dynamic:
            if q.tensors["scale"].shape[1] > 1:
                return super().kernel(q, device, dtype, tokens)
            return int8_rows(_parts, _form, q.orig_shape, device, dtype, tokens)
        refusal = int8.refusal(device, q.orig_shape, tokens)
        if refusal:
            return expanding(_form, refusal)
        return Kernel("int8 x int8, torch._int_mm", "activations are quantized row by row, as the library does", _w8a8)

    def to_native(self, q: QuantizedWeight, bias: Tensor | None) -> nn.Module:
        """`nn.Linear` on an `Int8Tensor` with these values."""
        module = load("torchao.quantization.quantize_.workflows.int8.int8_tensor")
        qdata, scale = q.tensors["qdata"].clone(), q.tensors["scale"].clone()
        activations = module.QuantizeTensorToInt8Kwargs(granularity=module.PerRow()) if self.dynamic else None
        weight = module.Int8Tensor(
            qdata,
            scale,
            [1, q.orig_shape[1] // scale.shape[1]],
            q.orig_dtype,
            zero_point=torch.zeros_like(scale, dtype=torch.int8),
            act_quant_kwargs=activations,
        )
        return self.native_layer(q, weight, bias)


def _form(q: QuantizedWeight) -> Expansion:
    return forms.integers(q.tensors["qdata"], q.tensors["scale"])


def _parts(q: QuantizedWeight) -> tuple[Tensor, Tensor]:
    return q.tensors["qdata"], q.tensors["scale"]


def _w8a8(x: Tensor, q: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """The library's product, except that nothing is rounded between the two scales: with activations in float16 the
    library's intermediate result, not yet multiplied by the weight's scale, exceeds 65504 for larger values."""
    flat = x.reshape(-1, x.shape[-1])
    # Activations as `Int8Tensor.from_hp` per row.
    smallest = torch.finfo(torch.float32).eps
    scale = (flat.abs().amax(dim=-1, keepdim=True) / 127.5).clamp(min=smallest).to(torch.float32)
    x8 = int8.round_rows(flat, 1.0 / scale)
    out = int8.scaled_mm(x8, scale, q.tensors["qdata"], q.tensors["scale"].reshape(-1), bias, x.dtype)
    return out.reshape(*x.shape[:-1], q.orig_shape[0])
