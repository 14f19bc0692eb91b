"""NNCF >= 3.4 (Apache-2.0), OpenVINO's weight compression: int8, int4 and nf4, weight only.

int8-sym `qdata * scale`, int8-asym `(qdata - zero_point) * scale`, one scale a row. int4 the same by groups along K,
two nibbles a byte, even index in the low one; int4-sym stores the value plus 8. nf4: `NF4[nibble] * scale` by groups,
with NNCF's table of 16 values. Scales are float16, and so is the product with them, before the cast to the dtype asked
for: that is what NNCF's torch layers and its OpenVINO graphs compute. Weights above 65504 or with such scales overflow.

Quantizing is NNCF's own `weight_lowering.compress_weight`, which `nncf.compress_weights` calls for each layer (for nf4:
its parts); the packing equals that of its torch layers. `compress_weights` itself was not chosen: it traces the model,
needs data for that, sends telemetry, prints a progress bar, and refuses nf4 for torch models although its arithmetic
takes torch tensors. nf4 is stored here as NNCF stores it for OpenVINO: indices and float16 scales.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...base import Availability, Kernel, Quantizer
from ...errors import SpecError
from ...kernels import forms
from ...kernels.choose import int8_rows
from ...kernels.expand import Expansion
from ...weight import QuantizedWeight, TensorMeta
from ..probing import probe_package, probe_stored, sample_bytes
from .library import load

if TYPE_CHECKING:
    from ...spec import QuantSpec

INSTALL = "Run `pip install nncf`, or choose bnb-int8, bnb-nf4 or a gguf format."
LOWERING = "nncf.quantization.algorithms.weight_compression"
GROUP_SIZE = 128
GROUP_SIZES = (256, 128, 64, 32, 16)
# NNCF's `NF4_QUANTILES`, so that files with nf4 weights need no NNCF to be read.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def make(format_id: str) -> Nncf:
    return Nncf(format_id)


class Nncf(Quantizer):
    def __init__(self, format_id: str) -> None:
        self.format_id = format_id
        self.mode = format_id.removeprefix("nncf-").replace("-", "_")  # NNCF's CompressWeightsMode: int4_sym, nf4, ...
        self.four_bit = not self.mode.startswith("int8")
        self.asymmetric = self.mode.endswith("_asym")

    def probe(self) -> Availability:
        return probe_package(self, "nncf", (3, 4), INSTALL)

    def probe_reading(self) -> Availability:
        groups = 2 if self.four_bit else 1
        qdata = sample_bytes(64, 128 if self.four_bit else 256)
        tensors = {
            "qdata": qdata.view(torch.int8) if self.mode == "int8_sym" else qdata,
            "scale": torch.full((64, groups), 0.125, dtype=torch.float16),
        }
        if self.asymmetric:
            tensors["zero_point"] = sample_bytes(64) if self.four_bit else sample_bytes(64, 1)
        sample = QuantizedWeight(self.format_id, tensors, (64, 256), torch.float32)
        return probe_stored(self, sample, "Choose a gguf format.")

    def refuse(self, spec: QuantSpec, t: TensorMeta) -> str | None:
        ratio = spec.option("ratio", 1.0)
        if ratio != 1.0:
            return f"ratio={ratio:g} needs NNCF's comparison of all layers of a model, which is not made here; use 1"
        if len(t.shape) != 2:
            return f"shape {t.shape} is not (N, K)"
        n, k = t.shape
        if not self.four_bit:
            return None
        if k % 2:
            return f"K={k} is odd, and two values share a byte"
        group = self._group(spec)
        if group != -1 and k % group:
            fit = next((str(size) for size in GROUP_SIZES if k % size == 0), "-1")
            return f"K={k} is not a multiple of group-size {group}; group-size={fit} fits"
        if self.asymmetric and n * self._groups(spec, k) % 2:
            return f"N={n} rows have an odd number of zero points, and two share a byte"
        return None

    def predict_nbytes(self, spec: QuantSpec, t: TensorMeta) -> int:
        n, k = t.shape
        groups = n * self._groups(spec, k)
        if self.four_bit:
            return n * k // 2 + 2 * groups + (groups // 2 if self.asymmetric else 0)
        return n * k + (3 if self.asymmetric else 2) * groups

    def _group(self, spec: QuantSpec) -> int:
        return int(spec.option("group-size", GROUP_SIZE)) if self.four_bit else -1

    def _groups(self, spec: QuantSpec, k: int) -> int:
        group = self._group(spec)
        return 1 if group == -1 else k // group

    def quantize(self, w: Tensor, spec: QuantSpec) -> QuantizedWeight:
        """8-bit: qdata (N, K), scale and zero_point (N, 1). 4-bit: qdata (N, K/2) uint8, scale (N, G), zero_point
        (N*G/2,) uint8, packed too. Scales are float16."""
        n, k = w.shape
        w = w.detach().contiguous()
        config = load(f"{LOWERING}.config").WeightCompressionConfig(
            load("nncf").CompressWeightsMode(self.mode), self._group(spec)
        )
        if self.mode == "nf4":
            nibbles, scale = _nf4(w.to(torch.float32).reshape(n, self._groups(spec, k), -1), config)
            tensors = {"qdata": _pack(nibbles).reshape(n, k // 2), "scale": scale.reshape(n, -1)}
        else:
            tensors = self._integers(w, config)
        tensors["scale"] = tensors["scale"].to(torch.float16)
        return QuantizedWeight(self.format_id, tensors, (n, k), w.dtype)

    def _integers(self, w: Tensor, config: Any) -> dict[str, Tensor]:
        n, k = w.shape
        wrapped = load("nncf.tensor").Tensor(w)
        compressed = load(f"{LOWERING}.weight_lowering").compress_weight(wrapped, (1,), config)
        values: Tensor = compressed.tensor.data
        tensors = {"qdata": values, "scale": compressed.scale.data.reshape(n, -1)}
        if self.asymmetric:
            tensors["zero_point"] = compressed.zero_point.data.to(torch.uint8)
        if self.four_bit:
            nibbles = values if self.asymmetric else (values + 8).to(torch.uint8)
            tensors["qdata"] = _pack(nibbles).reshape(n, k // 2)
            if self.asymmetric:
                tensors["zero_point"] = _pack(tensors["zero_point"])
        return tensors

    def dequantize(self, q: QuantizedWeight, dtype: torch.dtype) -> Tensor:
        n, k = q.orig_shape
        scale = q.tensors["scale"]
        values = (_unpack(q.tensors["qdata"]) if self.four_bit else q.tensors["qdata"]).reshape(n, scale.shape[1], -1)
        if self.mode == "nf4":
            exact = torch.tensor(NF4, dtype=torch.float16, device=scale.device)[values.int()]
        elif self.asymmetric:
            zero_point = q.tensors["zero_point"]
            zero_point = _unpack(zero_point) if self.four_bit else zero_point
            exact = values.to(torch.float16) - zero_point.reshape(n, -1, 1).to(torch.float16)
        else:
            exact = values.to(torch.float16) - (8 if self.four_bit else 0)
        return (exact * scale.unsqueeze(-1)).reshape(n, k).to(dtype)

    def form(self, q: QuantizedWeight) -> Expansion | None:
        t, scale = q.tensors, q.tensors["scale"].to(torch.float32)
        zero_point: Tensor | None = t.get("zero_point")
        if zero_point is not None:
            zero_point = _unpack(zero_point) if self.four_bit else zero_point
            shift = zero_point.reshape(scale.shape).to(torch.float32) * -scale
        else:
            shift = None
        if not self.four_bit:
            return forms.integers(t["qdata"], scale, shift)
        # int4-sym stores the value plus 8.
        values = NF4 if self.mode == "nf4" else range(16) if self.asymmetric else range(-8, 8)
        table = torch.tensor(list(values), dtype=torch.float32, device=scale.device)
        if self.mode == "nf4":
            table = table.to(torch.float16)  # as the library's layers hold it
        return forms.nibbles(t["qdata"], forms.pairs(table, "low first"), scale, shift)

    def kernel(self, q: QuantizedWeight, device: torch.device, dtype: torch.dtype, tokens: int) -> Kernel:
        if self.mode != "int8_sym":
            return super().kernel(q, device, dtype, tokens)
        return int8_rows(_parts, self._form, q.orig_shape, device, dtype, tokens)

    def to_native(self, q: QuantizedWeight, bias: Tensor | None) -> nn.Module:
        raise SpecError(
            f"{self.format_id}: NNCF compresses a whole traced model and has no layer of its own.\n"
            "Use carrier `quantwire`."
        )


def _nf4(w: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    """Indices into `NF4` (N, G, group) uint8 and float32 scales (N, G, 1) of a grouped float32 weight.

    `compress_weight` gives the values of the table instead, and finding their indices again takes as long as all of it.
    """
    wrapped = load("nncf.tensor").Tensor(w)
    scale: Tensor = load(f"{LOWERING}.weight_lowering").calculate_float_quantization_params(wrapped, (2,), config).data
    centers = torch.as_tensor(load(f"{LOWERING}.constants").CENTER_OF_NF4_QUANTILES, device=w.device)
    return torch.searchsorted(centers, w / scale, out_int32=True).to(torch.uint8), scale


def _parts(q: QuantizedWeight) -> tuple[Tensor, Tensor]:
    return q.tensors["qdata"], q.tensors["scale"]


def _pack(nibbles: Tensor) -> Tensor:
    """Two values 0..15 a byte, flattened, the even one low."""
    pairs = nibbles.reshape(-1, 2)
    return pairs[:, 0] | pairs[:, 1] << 4


def _unpack(packed: Tensor) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], dim=-1)
