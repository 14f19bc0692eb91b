"""Which of the ways to multiply by a GGUF weight: ggml's product for few tokens, else expanding the weight.

The crossovers are measured: `benchmarks/gguf_products.py`.
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from ...errors import SpecError
from ...ggml_types import GgmlType
from ...kernels.kernel import Kernel
from ...kernels.scratch import watched
from ...weight import QuantizedWeight
from .ggml import Ggml, library
from .products import Products

# Tokens up to which ggml's product is faster than expanding the weight: fewer where expanding is fast.
FEW_TOKENS = {"Q4_0": 8, "Q4_1": 8, "Q8_0": 12, "Q4_K": 12, "Q5_K": 12, "NVFP4": 16}
FEW_TOKENS_OTHERS = 24
SETTING = "QUANTWIRE_GGML_PRODUCTS"  # environment variable; 0 keeps x at full precision, always


def library_or_reason(device: torch.device) -> tuple[Ggml | None, str]:
    """ggml's library where it can be used for tensors on this device, and else why not."""
    if device.type != "cpu":
        return None, f"ggml's C library computes on the CPU, not on {device.type}"
    watcher = watched()
    if watcher:
        return None, f"{watcher} cannot look into ggml's C library"
    return _library()


@functools.cache
def _library() -> tuple[Ggml | None, str]:
    try:
        return library(), ""
    except (ImportError, OSError, AttributeError, SpecError) as err:  # absent, built for another system, another ABI
        return None, str(err).strip().splitlines()[0]


@functools.cache
def _products(setting: str) -> tuple[Products | None, str]:
    if setting not in ("", "0", "1"):
        raise SpecError(f"{SETTING} is '{setting}', expected 1 (few tokens by ggml's product) or 0.")
    if setting == "0":
        return None, f"{SETTING} is 0"
    ggml, reason = _library()
    try:
        return (None, reason) if ggml is None else (Products(ggml), "")
    except (AttributeError, SpecError) as err:  # no AVX2, or tensors laid out otherwise: expanding needs neither
        return None, str(err).strip().splitlines()[0].rstrip(".")


def few_tokens(kind: GgmlType, device: torch.device, tokens: int) -> tuple[Kernel | None, str]:
    """ggml's product where it wins, else None; and a clause on it for the reasons of other kernels.

    Raises:
        SpecError: the environment variable is neither 0 nor 1.
    """
    if library_or_reason(device)[0] is None:
        return None, ""
    products, reason = _products(os.environ.get(SETTING, ""))
    if products is None:
        return None, reason
    limit = FEW_TOKENS.get(kind.name, FEW_TOKENS_OTHERS)
    if tokens > limit:
        return None, f"up to {limit} tokens ggml's product, which rounds x to 8 bits"

    def run(x: Tensor, q: QuantizedWeight, bias: Tensor | None) -> Tensor:
        k = q.orig_shape[-1]
        flat = x.reshape(-1, k)
        out = products.multiply(kind, flat, q.tensors["qdata"])
        out = out if bias is None else out.add_(bias.to(torch.float32))
        return out.to(x.dtype).reshape(*x.shape[:-1], out.shape[1])

    why = f"up to {limit} tokens it beats expanding the weight; x is rounded to 8 bits ({SETTING}=0 turns it off)"
    return Kernel("ggml mul_mat", why, run), why
