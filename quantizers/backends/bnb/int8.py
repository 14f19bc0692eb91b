"""bnb-int8: see the package docstring."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ...base import Availability, Kernel, Quantizer
from ...weight import FullPrecisionGuard, QuantizedWeight, TensorMeta
from ..probing import probe_package

if TYPE_CHECKING:
    from ...spec import QuantSpec

INSTALL = "Run `pip install bitsandbytes`, or choose quanto-qint8 or gguf-q8-0."
DEFAULT_THRESHOLD = 6.0


class BnbInt8(Quantizer):
    format_id = "bnb-int8"

    def probe(self) -> Availability:
        return probe_package(self, "bitsandbytes", (0, 46), INSTALL)

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
        import bitsandbytes.functional as F

        return F.int8_vectorwise_dequant(q.tensors["qdata"], q.tensors["absmax"]).to(dtype)

    def kernel(self, q: QuantizedWeight, device: torch.device, dtype: torch.dtype, tokens: int) -> Kernel:
        return Kernel("bitsandbytes int8 x int8", "the library's own product", self._w8a8)

    def _w8a8(self, x: Tensor, q: QuantizedWeight, bias: Tensor | None) -> Tensor:
        """The library's W8A8 product; needs no `MatmulLtState`, so nothing is cached between calls.

        With threshold 0 every activation becomes float16 on the way to int8, so values above 65504 overflow; above 0
        such columns are outliers and never leave the dtype of x.
        """
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
