"""optimum-quanto >= 0.2.7 (Apache-2.0): weight-only int8, float8, 4-bit and 2-bit.

8-bit: row i is `qdata[i] * scale[i]`. qint4 and qint2: groups of up to 128 along K; value = `scale[g] * code -
shift[g]`. The library packs along the first axis: of P codes a byte, the lowest bits hold group row g, the next ones
group row g + G/P, and so on. Scales and shifts have the weight's dtype, as the library makes them.

Quantizing is the library's own (the optimizers and `quantize_weight` that `QLinear.freeze` calls), except that a scale
of 0 becomes 1: a row of equal values has the scale 0 there, and dividing by it makes nan of float8 rows of zeros. The
8-bit product on CUDA is the library's `quanto::qbytes_mm`. 4 and 2 bits are unpacked here with torch operations,
bit-equal to the library's: its own unpacking compiles a C++ extension at the first forward pass (48 s measured) and
fails without a compiler.
"""

# pyright: reportMissingTypeStubs=false
# optimum-quanto ships neither annotations nor stubs.

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ...base import Availability, Kernel, Quantizer
from ...errors import SpecError
from ...kernels import forms
from ...kernels.choose import int8_rows
from ...kernels.expand import Expansion
from ...weight import FullPrecisionGuard, QuantizedWeight, TensorMeta
from ..probing import is_installed, probe_package, probe_stored, sample_bytes

if TYPE_CHECKING:
    from ...spec import QuantSpec

# torch._weight_int8pack_mm (2.13), to which quanto sends bfloat16 products of int8 weights on a CPU, reads past the end
# of the weight where K is no multiple of this: wrong values, or the process dies.
INT8PACK_MULTIPLE = 16
INSTALL = "Run `pip install optimum-quanto`, or choose bnb-int8, bnb-nf4 or a gguf format."


def make(format_id: str) -> Quanto:
    return Quanto(format_id)


class Quanto(Quantizer):
    def __init__(self, format_id: str) -> None:
        self.format_id = format_id
        self.qtype_name = format_id.removeprefix("quanto-").replace("-", "_")  # qint8, qint4, qfloat8_e4m3fn
        self.bits = {"qint4": 4, "qint2": 2}.get(self.qtype_name, 8)

    @property
    def _packed(self) -> bool:
        return self.bits < 8

    def _group(self, spec: QuantSpec, k: int) -> int | None:
        """Elements a group, or None where no group fits."""
        chosen = spec.option("group-size", None)
        if chosen is None:
            return group_size(k)
        return int(chosen) if k % int(chosen) == 0 else None

    def probe(self) -> Availability:
        return probe_package(self, "optimum-quanto", (0, 2, 7), INSTALL)

    def probe_reading(self) -> Availability:
        if self._packed:
            scale = torch.full((128, 1), 0.1)
            tensors = {"qdata": sample_bytes(128 * self.bits // 8, 128), "scale": scale, "shift": scale}
            sample = QuantizedWeight(self.format_id, tensors, (64, 256), torch.float32, {"group_size": 128})
        else:
            dtype = torch.int8 if self.qtype_name == "qint8" else getattr(torch, self.qtype_name[1:])
            qdata = (sample_bytes(64, 256).to(torch.float32) / 2 - 63).to(dtype)
            tensors = {"qdata": qdata, "scale": torch.full((64, 1), 0.1)}
            sample = QuantizedWeight(self.format_id, tensors, (64, 256), torch.float32)
        return probe_stored(self, sample, "Choose a gguf format.")

    def refuse(self, spec: QuantSpec, t: TensorMeta) -> str | None:
        if len(t.shape) != 2:
            return f"shape {t.shape} is not (N, K)"
        if not self._packed:
            return None
        n, k = t.shape
        group, chosen = self._group(spec, k), spec.option("group-size", None)
        if group is None:
            return f"K={k} is not a multiple of {f'group-size {chosen}' if chosen else '32, the smallest group'}"
        if n * k == group:
            return f"N=1 with K={k} is a single group, for which quanto stores one scale a value"
        return None

    def predict_nbytes(self, spec: QuantSpec, t: TensorMeta) -> int:
        n, k = t.shape
        if not self._packed:
            return n * k + n * t.dtype.itemsize
        group = self._group(spec, k) or k
        groups = n * k // group
        return -(-groups * self.bits // 8) * group + 2 * groups * t.dtype.itemsize

    def quantize(self, w: Tensor, spec: QuantSpec) -> QuantizedWeight:
        """8-bit: qdata (N, K), scale (N, 1). P codes a byte: qdata (ceil(G/P), group) uint8, scale and shift (G, 1)."""
        quanto = _library()
        n, k = w.shape
        w, qtype = w.detach().contiguous(), quanto.qtypes[self.qtype_name]
        # optimized=False below: the plain packing that files hold, not one chosen for this device.
        if self._packed:
            group = self._group(spec, k)
            group = None if group == k else group  # None is the library's word for one group a row
            scale, shift = quanto.MaxOptimizer()(w, qtype=qtype, axis=0, group_size=group)
            scale = _without_zeros(scale)
            q: Any = quanto.quantize_weight(w, qtype, 0, scale, shift, group_size=group, optimized=False)
            tensors: dict[str, Tensor] = {"qdata": q._data._data, "scale": scale, "shift": shift}
            return QuantizedWeight(self.format_id, tensors, (n, k), w.dtype, {"group_size": group})
        scale = _without_zeros(quanto.AbsmaxOptimizer()(w, qtype=qtype, axis=0))
        q = quanto.quantize_weight(w, qtype, 0, scale, optimized=False)
        # A single row has a scale without dimensions in the library.
        return QuantizedWeight(self.format_id, {"qdata": q._data, "scale": scale.reshape(n, 1)}, (n, k), w.dtype)

    def dequantize(self, q: QuantizedWeight, dtype: torch.dtype) -> Tensor:
        t = q.tensors
        if not self._packed:
            return (t["scale"] * t["qdata"].to(t["scale"].dtype)).to(dtype)
        packed = t["qdata"]
        rows = t["scale"].shape[0]
        codes = [(packed >> shift) & (2**self.bits - 1) for shift in range(0, 8, self.bits)]
        values = torch.cat(codes)[:rows]
        return (t["scale"] * values - t["shift"]).reshape(q.orig_shape).to(dtype)

    def form(self, q: QuantizedWeight) -> Expansion | None:
        t = q.tensors
        if self._packed:
            return forms.halves(t["qdata"], self.bits, (q.orig_shape[0], q.orig_shape[1]), t["scale"], -t["shift"])
        if self.qtype_name == "qint8":
            return forms.integers(t["qdata"], t["scale"])
        return forms.float8(t["qdata"], t["scale"])

    def kernel(self, q: QuantizedWeight, device: torch.device, dtype: torch.dtype, tokens: int) -> Kernel:
        # The library's product wants activations in the dtype of the scales; casting scales to the dtype of x instead
        # would lose up to 0.4 % of each row in bfloat16, or the row where float16 underflows. On a CPU it is slower
        # than expanding at every number of tokens, and for float8 it dequantizes as eager code does.
        here = is_installed("optimum-quanto")
        if here and device.type == "cuda" and not self._packed and dtype == q.tensors["scale"].dtype:
            return Kernel("quanto qbytes_mm", "the library's fused product", self._qbytes_mm)
        if self.qtype_name == "qint8":
            return int8_rows(_parts, self._form, q.orig_shape, device, dtype, tokens)
        return super().kernel(q, device, dtype, tokens)

    def _overruns(self, k: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether quanto's product reads past the weight: see `INT8PACK_MULTIPLE`."""
        return (
            self.qtype_name == "qint8"
            and dtype is torch.bfloat16
            and device.type == "cpu"
            and k % INT8PACK_MULTIPLE != 0
        )

    def _qbytes_mm(self, x: Tensor, q: QuantizedWeight, bias: Tensor | None) -> Tensor:
        _library()  # registers quanto::qbytes_mm
        out = torch.ops.quanto.qbytes_mm(x.reshape(-1, x.shape[-1]), q.tensors["qdata"], q.tensors["scale"])
        out = out.reshape(*x.shape[:-1], q.orig_shape[0]).to(x.dtype)
        return out if bias is None else out + bias.to(x.dtype)

    def to_native(self, q: QuantizedWeight, bias: Tensor | None) -> nn.Module:
        """A frozen `QLinear` on the same quantized values.

        In bfloat16 with groups of 128, quanto repacks 4-bit weights for PyTorch's int4 kernel, which rounds differently
        (relative difference up to 0.01) and needs N divisible by 16; other N keep the plain packing here. The plain
        packing of 4 and 2 bits compiles C++ at the first forward pass.

        Raises:
            SpecError: qint8 in bfloat16 on a CPU with a K for which quanto's product overruns (`INT8PACK_MULTIPLE`).
        """
        from optimum.quanto.tensor.packed import PackedTensor

        quanto = _library()
        n, k = q.orig_shape
        if self._overruns(k, q.orig_dtype, q.tensors["qdata"].device) and k % 4 == 0:  # it checks for 4 itself
            raise SpecError(
                f"{self.format_id}: K={k} is not a multiple of {INT8PACK_MULTIPLE}, and quanto's own bfloat16 product "
                "on a CPU then reads past the weight.\nUse carrier `quantwire`."
            )
        t = {name: tensor.clone() for name, tensor in q.tensors.items()}
        qtype = quanto.qtypes[self.qtype_name]
        source = nn.Linear(k, n, bias=bias is not None, device="meta", dtype=q.orig_dtype)
        layer: Any = quanto.QLinear.qcreate(source, weights=qtype, device="meta").to_empty(device=t["qdata"].device)
        for name in ("input_scale", "output_scale"):
            setattr(layer, name, torch.ones_like(getattr(layer, name)))
        if self._packed:
            group = q.meta["group_size"]
            grouped = torch.Size((n * k // (group or k), group or k))
            layer.weight_group_size = group  # what a later load of a state dict goes by
            data = PackedTensor(t["qdata"], self.bits, grouped, (grouped[1], 1))
            weight: Any = quanto.WeightQBitsTensor(
                qtype, 0, group, torch.Size((n, k)), (k, 1), data, t["scale"], t["shift"]
            )
            if self.bits == 4 and n % 16 == 0:
                weight = weight.optimize()  # the device's own packing, as `QLinear.freeze` would choose
        else:
            axis, scale = (0, t["scale"]) if n > 1 else (None, t["scale"].reshape(()))
            weight = quanto.WeightQBytesTensor.create(qtype, axis, torch.Size((n, k)), (k, 1), t["qdata"], scale)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        layer.register_load_state_dict_pre_hook(FullPrecisionGuard(self.format_id))
        return layer.eval()


def _parts(q: QuantizedWeight) -> tuple[Tensor, Tensor]:
    return q.tensors["qdata"], q.tensors["scale"]


def _library() -> Any:
    import optimum.quanto

    return cast(Any, optimum.quanto)


def _without_zeros(scale: Tensor) -> Tensor:
    return scale.masked_fill(scale == 0, 1)


def group_size(k: int) -> int | None:
    """Elements a group for a row of `k`, by the rule of quanto's `QModuleMixin`.

    Rows up to 128 are one group, longer ones take the first of 128, 96, 64, 32 that divides them; None where none does
    (quanto would use one scale a row).
    """
    if k <= 128:
        return k
    return next((size for size in (128, 96, 64, 32) if k % size == 0), None)
