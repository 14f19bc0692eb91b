"""bnb-nf4 and bnb-fp4: see the package docstring."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...base import Availability, Kernel, Quantizer
from ...errors import SpecError
from ...weight import FullPrecisionGuard, QuantizedWeight, TensorMeta
from ..probing import probe_package

if TYPE_CHECKING:
    from ...spec import QuantSpec

INSTALL = "Run `pip install bitsandbytes`, or choose quanto-qint4 or gguf-q4-0."
BLOCK_SIZE = 64
NESTED_BLOCK_SIZE = 256


class BnbFourBit(Quantizer):
    def __init__(self, quant_type: str) -> None:
        self.quant_type = quant_type
        self.format_id = f"bnb-{quant_type}"

    def probe(self) -> Availability:
        return probe_package(self, "bitsandbytes", (0, 46), INSTALL)

    def refuse(self, spec: QuantSpec, t: TensorMeta) -> str | None:
        if len(t.shape) != 2:
            return f"shape {t.shape} is not (N, K)"
        if t.shape[1] % 2:
            return f"K={t.shape[1]} is odd, and two values share a byte"
        return None

    def predict_nbytes(self, spec: QuantSpec, t: TensorMeta) -> int:
        blocks = math.ceil(t.numel / BLOCK_SIZE)
        packed = math.ceil(t.numel / 2)
        if not spec.option("bits4-use-double-quant", False):
            return packed + 4 * blocks
        return packed + blocks + 4 * math.ceil(blocks / NESTED_BLOCK_SIZE) + 4 * 256 + 4

    def quantize(self, w: Tensor, spec: QuantSpec) -> QuantizedWeight:
        """qdata (N*K/2, 1) uint8; absmax (blocks,) float32, or uint8 with nested_absmax, nested_code and offset."""
        nested = bool(spec.option("bits4-use-double-quant", False))
        qdata, state = _library().functional.quantize_4bit(
            w.contiguous(), blocksize=BLOCK_SIZE, compress_statistics=nested, quant_type=self.quant_type
        )
        tensors: dict[str, Tensor] = {"qdata": qdata, "absmax": state.absmax}
        if nested:
            tensors |= {"nested_absmax": state.state2.absmax, "nested_code": state.state2.code, "offset": state.offset}
        meta = {"compute_dtype": spec.option("bits4-compute-dtype", None)}
        return QuantizedWeight(self.format_id, tensors, tuple(w.shape), w.dtype, meta)

    def _state(self, q: QuantizedWeight, dtype: torch.dtype, shape: tuple[int, ...]) -> Any:
        functional = _library().functional
        t = q.tensors
        state2 = offset = None
        if "nested_absmax" in t:
            state2 = functional.QuantState(
                absmax=t["nested_absmax"], blocksize=NESTED_BLOCK_SIZE, code=t["nested_code"], dtype=torch.float32
            )
            offset = t["offset"]
        return functional.QuantState(
            absmax=t["absmax"],
            shape=torch.Size(shape),
            code=functional.get_4bit_type(self.quant_type, device=t["absmax"].device),
            blocksize=BLOCK_SIZE,
            quant_type=self.quant_type,
            dtype=dtype,
            offset=offset,
            state2=state2,
        )

    def dequantize(self, q: QuantizedWeight, dtype: torch.dtype) -> Tensor:
        # As one row of all values: with (N, K) the library's CPU kernel (0.50.2, AVX-512) takes wrong maxima where K is
        # a multiple of 16 but not of the block size; as one row it equals the formula bit for bit at every shape.
        state = self._state(q, dtype, (1, q.numel))
        return _library().functional.dequantize_4bit(q.tensors["qdata"], state).reshape(q.orig_shape)

    def kernel(self, q: QuantizedWeight, device: torch.device, dtype: torch.dtype, tokens: int) -> Kernel:
        if q.orig_shape[1] % BLOCK_SIZE:
            reason = f"K={q.orig_shape[1]} is not a multiple of {BLOCK_SIZE}, where bitsandbytes' product is wrong"
            return Kernel("dequantize, F.linear", reason, self._dequantized)
        return Kernel("bitsandbytes gemm_4bit", "the library's own product", self._gemm)

    def _dequantized(self, x: Tensor, q: QuantizedWeight, bias: Tensor | None) -> Tensor:
        compute = self._compute_dtype(q, x)
        bias = None if bias is None else bias.to(compute)
        return F.linear(x.to(compute), self.dequantize(q, compute), bias).to(x.dtype)

    def _gemm(self, x: Tensor, q: QuantizedWeight, bias: Tensor | None) -> Tensor:
        compute = self._compute_dtype(q, x)
        bias = None if bias is None else bias.to(compute)
        state = self._state(q, compute, q.orig_shape)
        # Transposed, as versions before 0.50 require and later ones accept.
        packed = q.tensors["qdata"].t()
        return _library().matmul_4bit(x.to(compute), packed, bias=bias, quant_state=state).to(x.dtype)

    def _compute_dtype(self, q: QuantizedWeight, x: Tensor) -> torch.dtype:
        return getattr(torch, q.meta["compute_dtype"]) if q.meta["compute_dtype"] else x.dtype

    def to_native(self, q: QuantizedWeight, bias: Tensor | None) -> nn.Module:
        """`Linear4bit` on the same packed bytes.

        On AVX512-BF16 machines the library repacks its weights at the first forward, which it can do only for N
        divisible by 32 and K divisible by 64; other shapes keep the plain path here.

        Raises:
            SpecError: on a CPU with K no multiple of 64, where the library's product is wrong (see `dequantize`).
        """
        bnb = _library()
        n, k = q.orig_shape
        if k % BLOCK_SIZE and q.tensors["qdata"].device.type == "cpu":
            raise SpecError(
                f"{self.format_id}: K={k} is not a multiple of block size {BLOCK_SIZE}, and bitsandbytes' own layer "
                "computes wrong values for it on a CPU.\nUse carrier `quantwire`."
            )
        compute = getattr(torch, q.meta["compute_dtype"]) if q.meta["compute_dtype"] else None
        layer: Any = bnb.nn.Linear4bit(
            k, n, bias=bias is not None, compute_dtype=compute, quant_type=self.quant_type, device="meta"
        )
        copy = q.with_tensors({name: t.clone() for name, t in q.tensors.items()})
        state = self._state(copy, q.orig_dtype, q.orig_shape)
        layer.weight = bnb.nn.Params4bit(
            copy.tensors["qdata"],
            requires_grad=False,
            quant_state=state,
            blocksize=BLOCK_SIZE,
            compress_statistics=state.nested,
            quant_type=self.quant_type,
            module=layer,
            bnb_quantized=True,
        )
        layer.quant_state = state
        if n % 32 or k % BLOCK_SIZE:
            layer.support_avx512bf16_for_cpu = False
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        layer.register_load_state_dict_pre_hook(FullPrecisionGuard(self.format_id))
        return layer.eval()


def _library() -> Any:
    """bitsandbytes, untyped: its annotations leave most constructor arguments and optional fields out."""
    import bitsandbytes

    return cast(Any, bitsandbytes)
