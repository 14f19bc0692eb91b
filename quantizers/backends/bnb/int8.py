"""bnb-int8: see the package docstring."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ...base import Availability, Kernel, Quantizer
from ...kernels import forms, int8
from ...kernels.choose import expanding
from ...kernels.expand import Expansion
from ...kernels.scratch import scratch
from ...weight import FullPrecisionGuard, QuantizedWeight, TensorMeta
from ..probing import is_installed, probe_package, probe_stored, sample_bytes

if TYPE_CHECKING:
    from ...spec import QuantSpec

INSTALL = "Run `pip install bitsandbytes`, or choose quanto-qint8 or gguf-q8-0."
DEFAULT_THRESHOLD = 6.0
RECIPROCAL = 7.874015718698502e-3  # 1 / 127 as the library writes it
INVERSE_SQUARE = 6.200124e-05  # 1 / 127**2 as the library writes it


class BnbInt8(Quantizer):
    format_id = "bnb-int8"

    def probe(self) -> Availability:
        return probe_package(self, "bitsandbytes", (0, 46), INSTALL)

    def probe_reading(self) -> Availability:
        tensors = {"qdata": sample_bytes(64, 256).view(torch.int8), "absmax": torch.ones(64)}
        meta = {"threshold": DEFAULT_THRESHOLD}
        sample = QuantizedWeight(self.format_id, tensors, (64, 256), torch.float32, meta)
        return probe_stored(self, sample, "Choose gguf-q8-0.")

    def refuse(self, spec: QuantSpec, t: TensorMeta) -> str | None:
        if len(t.shape) != 2:
            return f"shape {t.shape} is not (N, K)"
        return None

    def predict_nbytes(self, spec: QuantSpec, t: TensorMeta) -> int:
        return t.numel + 4 * t.shape[0]

    def quantize(self, w: Tensor, spec: QuantSpec) -> QuantizedWeight:
        """qdata (N, K) int8; absmax (N,) float32. Computed in float16, as the library does."""
        import bitsandbytes.functional as F

        qdata, absmax, _ = F.int8_vectorwise_quant(w.contiguous().to(torch.float16))
        threshold = float(spec.option("int8-threshold", DEFAULT_THRESHOLD))
        return QuantizedWeight(
            self.format_id, {"qdata": qdata, "absmax": absmax}, tuple(w.shape), w.dtype, {"threshold": threshold}
        )

    def dequantize(self, q: QuantizedWeight, dtype: torch.dtype) -> Tensor:
        if not is_installed("bitsandbytes"):
            # The library's formula, operation by operation.
            return (q.tensors["qdata"] * q.tensors["absmax"].view(-1, 1) * RECIPROCAL).to(dtype)
        import bitsandbytes.functional as F

        return F.int8_vectorwise_dequant(q.tensors["qdata"], q.tensors["absmax"]).to(dtype)

    def form(self, q: QuantizedWeight) -> Expansion | None:
        return forms.integers(q.tensors["qdata"], q.tensors["absmax"].reshape(-1, 1) / 127)

    def kernel(self, q: QuantizedWeight, device: torch.device, dtype: torch.dtype, tokens: int) -> Kernel:
        if device.type == "cuda" and is_installed("bitsandbytes"):
            return Kernel("bitsandbytes int8 x int8", "the library's fused product", self._by_library)
        refusal = int8.refusal(device, q.orig_shape, tokens)
        if refusal:
            return expanding(self._form, refusal)
        reason = "activations are quantized row by row, as the library does, which multiplies in float32 here"
        return Kernel("int8 x int8, torch._int_mm", reason, self._w8a8)

    def _w8a8(self, x: Tensor, q: QuantizedWeight, bias: Tensor | None) -> Tensor:
        """LLM.int8 as the library computes it: rows of x in int8, outlier columns in the dtype of x.

        With threshold 0 every activation becomes float16 on the way to int8, so values above 65504 overflow; above 0
        such columns are outliers and never leave the dtype of x.
        """
        qdata, absmax = q.tensors["qdata"], q.tensors["absmax"]
        threshold = float(q.meta["threshold"])
        flat = x.reshape(-1, x.shape[-1])
        half = flat.to(torch.float16)
        columns = _outlier_columns(half, threshold)
        x8, row_max = _quantize_rows(half, columns, threshold)
        out = int8.scaled_mm(x8, row_max * INVERSE_SQUARE, qdata, absmax, bias, x.dtype)
        if columns is not None:
            weights = (qdata[:, columns] * (absmax.unsqueeze(1) / 127)).to(x.dtype)
            out.addmm_(flat[:, columns], weights.t())
        return out.reshape(*x.shape[:-1], qdata.shape[0])

    def _by_library(self, x: Tensor, q: QuantizedWeight, bias: Tensor | None) -> Tensor:
        """Needs no `MatmulLtState`, so nothing is cached between calls."""
        import bitsandbytes.functional as F

        qdata, absmax = q.tensors["qdata"], q.tensors["absmax"]
        threshold = float(q.meta["threshold"])
        flat = x.reshape(-1, x.shape[-1])
        bias = None if bias is None else bias.to(x.dtype)
        x8, x_absmax, outliers = F.int8_vectorwise_quant(flat.to(torch.float16), threshold=threshold)
        if threshold > 0.0:
            out, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(flat, x8, qdata, x_absmax, absmax, outliers, bias)
        else:
            out = torch.ops.bitsandbytes.int8_scaled_mm.default(x8, qdata, x_absmax, absmax, bias=bias, dtype=x.dtype)
        return out.reshape(*x.shape[:-1], qdata.shape[0])

    def to_native(self, q: QuantizedWeight, bias: Tensor | None) -> nn.Module:
        """`Linear8bitLt` that holds these int8 values from the start, so there is no moment at which a load of
        full-precision values could be taken for the right order; later ones are refused."""
        import bitsandbytes

        bnb = cast(Any, bitsandbytes)  # its annotations leave most constructor arguments out
        n, k = q.orig_shape
        layer: Any = bnb.nn.Linear8bitLt(
            k, n, bias=bias is not None, has_fp16_weights=False, threshold=float(q.meta["threshold"]), device="meta"
        )
        qdata, absmax = q.tensors["qdata"].clone(), q.tensors["absmax"].clone()
        layer.weight = bnb.nn.Int8Params(qdata, requires_grad=False, has_fp16_weights=False, CB=qdata, SCB=absmax)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        layer.register_load_state_dict_pre_hook(FullPrecisionGuard(self.format_id))
        return layer.eval()


def _outlier_columns(x: Tensor, threshold: float) -> Tensor | None:
    """Indices of the columns of x (M, K) with a value of at least `threshold`, or None."""
    if threshold <= 0.0 or not x.numel():
        return None
    largest = torch.zeros(x.shape[1], dtype=torch.float32, device=x.device)
    for _, _, sizes in _blocks(x):
        torch.maximum(largest, sizes.amax(dim=0), out=largest)
    columns = torch.nonzero(largest >= threshold).view(-1)
    return columns if columns.numel() else None


def _quantize_rows(x: Tensor, outliers: Tensor | None, threshold: float) -> tuple[Tensor, Tensor]:
    """int8 values (M, K), 0 in the outlier columns, and the largest |x| below `threshold` of each row (M, 1), float32.

    Values below the threshold in outlier columns count for the largest, as the library has it.
    """
    x8 = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    row_max = torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)
    for start, values, sizes in _blocks(x):
        largest = row_max[start : start + len(values)]
        if outliers is not None:
            apart = sizes[:, outliers]
            largest.copy_(apart.masked_fill_(apart >= threshold, 0).amax(dim=1, keepdim=True))
            values.index_fill_(1, outliers, 0)
            sizes.index_fill_(1, outliers, 0)
            torch.maximum(largest, sizes.amax(dim=1, keepdim=True), out=largest)
        else:
            torch.amax(sizes, dim=1, keepdim=True, out=largest)
        factor = (127.0 / largest).masked_fill(largest == 0, 0)
        x8[start : start + len(values)].copy_(values.mul_(factor).round_().clamp_(-127, 127))
    return x8, row_max


def _blocks(x: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """First row, float32 values and their sizes, for blocks of rows that fit the cache; both may be overwritten."""
    step = max(1, int8.PART_NUMEL // max(x.shape[1], 1))
    for start in range(0, x.shape[0], step):
        rows = x[start : start + step]
        values = scratch("rows", tuple(rows.shape), torch.float32, x.device).copy_(rows)
        sizes = scratch("sizes", tuple(rows.shape), torch.float32, x.device)
        yield start, values, torch.abs(values, out=sizes)
