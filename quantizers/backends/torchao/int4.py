"""torchao-int4wo: see the package docstring.

The library's `Int4OpaqueTensor` holds nibbles in the order of torch's CPU kernel, which differs with the instruction
set that torch was built for or found, so its bytes may mean something else on another machine. Kept instead are the
nibbles in row order, even index in the high one: what `Int4TilePackedTo4dTensor` hands to torch's packing on CUDA.
`to_native` packs them for this CPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...errors import SpecError
from ...kernels import forms
from ...kernels.expand import Expansion
from ...weight import QuantizedWeight, TensorMeta
from ..probing import sample_bytes
from .library import load
from .shared import Torchao

if TYPE_CHECKING:
    from ...spec import QuantSpec

MINIMAL_SCALE = 1e-6  # as in `Int4OpaqueTensor.from_hp`
ROWS = 16


class TorchaoInt4(Torchao):
    format_id = "torchao-int4wo"
    default_group = 128

    def refuse(self, spec: QuantSpec, t: TensorMeta) -> str | None:
        reason = super().refuse(spec, t)
        if reason is None and t.shape[0] % ROWS:
            return f"N={t.shape[0]} is not a multiple of {ROWS}, which torch's int4 product needs"
        return reason

    def sample(self) -> dict[str, Tensor]:
        return {"qdata": sample_bytes(64, 128), "scale": torch.full((64, 2), 0.1), "zero_point": torch.zeros(64, 2)}

    def predict_nbytes(self, spec: QuantSpec, t: TensorMeta) -> int:
        return t.numel // 2 + 2 * self.groups(spec, t) * t.dtype.itemsize

    def quantize(self, w: Tensor, spec: QuantSpec) -> QuantizedWeight:
        """qdata (N, K/2) uint8, even index in the high nibble; scale and zero_point (N, groups) in the dtype of w."""
        primitives = load("torchao.quantization.quant_primitives")
        w = w.detach().contiguous()
        block = (1, self.group(spec))
        scale, zero_point = primitives._choose_qparams_affine_tinygemm(
            w, primitives.MappingType.ASYMMETRIC, block, torch.int32, 0, 15, MINIMAL_SCALE, None, w.dtype
        )
        values = primitives._quantize_affine_tinygemm(w, block, scale, zero_point, torch.int32, 0, 15).to(torch.uint8)
        tensors = {
            "qdata": values[:, ::2] << 4 | values[:, 1::2],
            "scale": scale.reshape(w.shape[0], -1),
            "zero_point": zero_point.reshape(w.shape[0], -1),
        }
        return QuantizedWeight(self.format_id, tensors, tuple(w.shape), w.dtype)

    def dequantize(self, q: QuantizedWeight, dtype: torch.dtype) -> Tensor:
        scale, zero_point = (q.tensors[name].to(torch.float32).unsqueeze(-1) for name in ("scale", "zero_point"))
        values = _unpack(q).to(torch.float32).reshape(q.orig_shape[0], scale.shape[1], -1) - 8
        return (values * scale + zero_point).reshape(q.orig_shape).to(dtype)

    def form(self, q: QuantizedWeight) -> Expansion | None:
        t = q.tensors
        table = forms.pairs(torch.arange(-8.0, 8.0, device=t["qdata"].device), "high first")
        return forms.nibbles(t["qdata"], table, t["scale"], t["zero_point"])

    def to_native(self, q: QuantizedWeight, bias: Tensor | None) -> nn.Module:
        """`nn.Linear` on an `Int4OpaqueTensor` with these values; its product takes activations in `q.orig_dtype`.

        Raises:
            SpecError: on a device other than the CPU.
        """
        scale, zero_point = q.tensors["scale"], q.tensors["zero_point"]
        if scale.device.type != "cpu":
            raise SpecError(
                f"{self.format_id}: torchao's layer for these values is for the CPU, not {scale.device.type}.\n"
                "Use carrier `quantwire`."
            )
        opaque = load("torchao.prototype.quantization.int4").Int4OpaqueTensor
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(_unpack(q).to(torch.int32), 1)
        both = torch.stack([scale.t(), zero_point.t()], dim=-1).contiguous()  # (groups, N, 2)
        block = [1, q.orig_shape[1] // scale.shape[1]]
        return self.native_layer(q, opaque(packed, both, block, torch.Size(q.orig_shape)), bias)


def _unpack(q: QuantizedWeight) -> Tensor:
    """Nibbles (N, K) uint8."""
    packed = q.tensors["qdata"]
    return torch.stack([packed >> 4, packed & 15], dim=-1).reshape(q.orig_shape)
