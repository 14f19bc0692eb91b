"""Weight-only products: expand the weight block by block into a buffer that is used again, then one `F.linear`.

    y = x @ dequantize(q).T + bias

What dequantizing usually costs on a CPU is memory: each step of eager code writes a fresh tensor as large as the
weight. Here blocks of a few rows go from their stored form to float32, are scaled there, and land in the dtype of x,
all in buffers that stay in the cache. Measured on a 12288 x 3072 weight (2 cores, AVX-512; the bfloat16 `F.linear` of
1,024 tokens takes 176 ms): int8 9.5 ms, float8 13 ms, 4-bit 20 ms.

The values are those of float32 arithmetic rounded once to the dtype of x. Compiled kernels (inductor, numba) were not
chosen: they need a compiler or 40 MB beside the pack, for a part that is now a tenth of the product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .scratch import CAP_NBYTES, scratch

# Values a block: smaller ones lose to the cost of starting threads (25 us an operation), larger ones to the cache.
BLOCK_NUMEL = 1_500_000


@dataclass(frozen=True)
class Expansion:
    """How the rows of one weight come back.

    Attributes:
        shape: (N, K).
        device: of the weight.
        fill: writes rows [start, stop) of the weight into its first argument, (stop - start, K) float32.
        threaded: `fill` takes every float dtype and any number of rows at once, and has threads of its own.
        any_dtype: on devices that are no CPU, and while torch.compile traces, `fill` takes every float dtype, computes
            in float32 and rounds once.
    """

    shape: tuple[int, int]
    device: torch.device
    fill: Callable[[Tensor, int, int], None]
    any_dtype: bool = False
    threaded: bool = False


def expand(source: Expansion, out: Tensor, start: int = 0) -> Tensor:
    """Write rows [start, start + len(out)) of a weight into `out` (rows, K), of any float dtype; returns `out`."""
    rows, k = out.shape
    if source.threaded:
        source.fill(out, start, start + rows)
        return out
    whole = source.device.type != "cpu" or torch.compiler.is_compiling()  # a compiler merges the steps itself
    step = rows if whole else max(1, BLOCK_NUMEL // max(k, 1))
    for first in range(0, rows, max(step, 1)):
        last = min(first + step, rows)
        if out.dtype is torch.float32 or (whole and source.any_dtype):
            source.fill(out[first:last], start + first, start + last)
            continue
        block = scratch("block", (last - first, k), torch.float32, source.device)
        source.fill(block, start + first, start + last)
        out[first:last].copy_(block)
    return out


def dequantized(source: Expansion, dtype: torch.dtype) -> Tensor:
    """The whole weight in a tensor of its own."""
    return expand(source, torch.empty(source.shape, dtype=dtype, device=source.device))


def linear(x: Tensor, source: Expansion, bias: Tensor | None) -> Tensor:
    """`x @ W.T + bias` in the dtype of x; x is (..., K) on the device of the weight.

    Without gradients: the weight lies in a buffer that the next product overwrites.
    """
    n, k = source.shape
    bias = None if bias is None else bias.to(x.dtype)
    rows = max(1, CAP_NBYTES // max(k * x.element_size(), 1))
    if rows >= n:
        return F.linear(x, expand(source, scratch("weight", (n, k), x.dtype, x.device)), bias)
    out = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        part = expand(source, scratch("weight", (stop - start, k), x.dtype, x.device), start)
        out[..., start:stop] = F.linear(x, part, None if bias is None else bias[start:stop])
    return out
