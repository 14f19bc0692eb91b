"""Products of int8 activations and int8 weights, and int8 weights with few tokens.

    y[m, n] = (sum_k x8[m, k] * w8[n, k]) * x_scale[m] * w_scale[n] + bias[n]

`torch._int_mm` takes the weight as it is stored; oneDNN's packed product is as fast here and wants a second copy of the
weight (134 ms to make for 12288 x 3072). The integer sums go to float in parts that stay in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .scratch import scratch

# int32 sums a part. Smaller parts start the product too often, larger ones leave the cache.
PART_NUMEL = 1_500_000
# Tokens up to which PyTorch's own int8 weight-only product beats expanding the weight (measured crossover: 40).
FEW_TOKENS = 32
# torch 2.13 on AVX-512: this product of int8 weights that begin elsewhere ends in a segmentation fault. Tensors mapped
# from a safetensors file begin at multiples of 8.
ALIGNMENT = 16


def refusal(device: torch.device, shape: tuple[int, ...], tokens: int) -> str | None:
    """Why `torch._int_mm` cannot multiply here, or None. On CUDA it wants more than 16 rows and multiples of 8."""
    n, k = shape
    if device.type == "cuda" and (tokens <= 16 or n % 8 or k % 8):
        return f"CUDA's int8 product wants more than 16 tokens and multiples of 8, got {tokens} x {n} x {k}"
    if device.type not in ("cpu", "cuda"):
        return f"there is no int8 product on {device.type}"
    return None


def scaled_mm(
    x8: Tensor, x_scale: Tensor, qdata: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """See the module docstring.

    Args:
        x8: (M, K) int8.
        x_scale: (M, 1) float32.
        qdata: (N, K) int8.
        w_scale: (N,) float32.
    Returns:
        (M, N) in `dtype`.
    """
    m, n = x8.shape[0], qdata.shape[0]
    out = torch.empty(m, n, dtype=dtype, device=x8.device)
    if not m or not x8.shape[1]:
        return out.zero_() if bias is None else out.copy_(bias.expand(m, n))
    step = max(256, PART_NUMEL // m // 64 * 64) if x8.device.type == "cpu" else n
    pure = torch.compiler.is_compiling()
    for start in range(0, n, step):
        stop = min(start + step, n)
        weight = qdata[start:stop].t()
        if pure or x8.device.type != "cpu":
            values = torch.ops.aten._int_mm(x8, weight).to(torch.float32)
        else:
            sums = scratch("sums", (m, stop - start), torch.int32, x8.device)
            torch.ops.aten._int_mm.out(x8, weight, out=sums)
            values = scratch("sums", (m, stop - start), torch.float32, x8.device).copy_(sums)
        values.mul_(x_scale).mul_(w_scale[start:stop])
        if bias is not None:
            values.add_(bias[start:stop])
        out[:, start:stop].copy_(values)
    return out


def round_rows(x: Tensor, factor: Tensor, low: int = -128) -> Tensor:
    """int8 of `x * factor`, rounded to even, between `low` and 127; x is (M, K), factor (M, 1) float32."""
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return (x * factor).round().clamp(low, 127).to(torch.int8)
    x8 = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    step = max(1, PART_NUMEL // max(x.shape[1], 1))
    for start in range(0, x.shape[0], step):
        rows = x[start : start + step]
        wide = scratch("rows", tuple(rows.shape), torch.float32, x.device).copy_(rows)
        x8[start : start + step].copy_(wide.mul_(factor[start : start + step]).round_().clamp_(low, 127))
    return x8


def few_tokens_refusal(device: torch.device, dtype: torch.dtype, k: int, tokens: int) -> str | None:
    """Why `few_tokens` cannot or should not multiply here, or None."""
    if device.type != "cpu" or dtype is not torch.bfloat16:
        # In float16 the scales, which it wants in the dtype of x, would lose digits below 6e-5 and vanish below 6e-8.
        return "weight only; one pass over the packed weight a product"
    if tokens > FEW_TOKENS:
        return f"above {FEW_TOKENS} tokens it beats PyTorch's int8 weight-only product"
    if k % 32:
        # torch 2.13 on AVX-512: K = 33 ends in a segmentation fault, K = 40 in values that are 25 % off.
        return f"K={k} is not a multiple of 32, where PyTorch's int8 weight-only product reads past the rows"
    return None


def few_tokens(x: Tensor, qdata: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Weight-only product of a few (M, K) rows with int8 (N, K) weights on a CPU, scales (N,) rounded to x's dtype."""
    if not torch.compiler.is_compiling() and qdata.data_ptr() % ALIGNMENT:
        qdata = qdata.clone()
    out = torch.ops.aten._weight_int8pack_mm(x.contiguous(), qdata, w_scale.to(x.dtype))
    return out if bias is None else out.add_(bias.to(x.dtype))
