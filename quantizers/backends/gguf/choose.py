"""Which of the ways to multiply by a GGUF weight: ggml's product for few tokens, else expanding the weight.

The crossovers are measured: `benchmarks/gguf_products.py`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...errors import SpecError
from ...kernels.kernel import Kernel
from ...weight import QuantizedWeight
from .ggml import Ggml, library
from .products import Products
from .types import GgmlType

# Tokens up to which ggml's product is faster than expanding the weight: fewer where expanding is fast.
FEW_TOKENS = {"Q4_0": 8, "Q4_1": 8, "Q8_0": 12, "Q4_K": 12, "Q5_K": 12, "NVFP4": 16}
FEW_TOKENS_OTHERS = 24


def library_or_reason(device: torch.device) -> tuple[Ggml | None, str]:
    """ggml's library where it can be used for tensors on this device, and else why not."""
    if device.type != "cpu":
        return None, f"ggml's C library computes on the CPU, not on {device.type}"
    if torch.compiler.is_compiling():
        return None, "torch.compile cannot look into ggml's C library"
    return _library()


@functools.cache
def _library() -> tuple[Ggml | None, str]:
    try:
        return library(), ""
    except (ImportError, OSError, AttributeError, SpecError) as err:  # absent, built for another system, another ABI
        return None, str(err).strip().splitlines()[0]


@functools.cache
def _products() -> Products | None:
    ggml, _ = _library()
    try:
        return None if ggml is None else Products(ggml)
    except (AttributeError, SpecError):  # no AVX2, or tensors laid out otherwise: expanding the weight needs neither
        return None


def few_tokens(kind: GgmlType, device: torch.device, tokens: int) -> Kernel | None:
    """ggml's product where it wins, else None."""
    limit = FEW_TOKENS.get(kind.name, FEW_TOKENS_OTHERS)
    if tokens > limit or library_or_reason(device)[0] is None:
        return None
    products = _products()
    if products is None:
        return None

    def run(x: Tensor, q: QuantizedWeight, bias: Tensor | None) -> Tensor:
        k = q.orig_shape[-1]
        flat = x.reshape(-1, k)
        out = products.multiply(kind, flat, q.tensors["qdata"])
        out = out if bias is None else out.add_(bias.to(torch.float32))
        return out.to(x.dtype).reshape(*x.shape[:-1], out.shape[1])

    return Kernel("ggml mul_mat", f"up to {limit} tokens it beats expanding the weight; x goes to 8 bits", run)
