"""How far a quantized weight is from its original, block by block, without a full-size copy of either."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from .expand import BLOCK_NUMEL, Expansion
from .scratch import scratch

BYTES_AT_ONCE = 1 << 22
RUN = 16  # rows that are sampled together


@dataclass(frozen=True)
class Difference:
    """Sums over a weight, for signal-to-noise ratios.

    Attributes:
        signal: sum of w^2.
        noise: sum of (w - w')^2; not finite where w' is not.
        max_error: largest |w - w'|.
    """

    signal: float
    noise: float
    max_error: float


def compare(w: Tensor, source: Expansion | Tensor, every: int = 1) -> Difference:
    """Compare a weight with what its quantized form expands to.

    Args:
        w: (N, K) float.
        source: the quantized weight, or its dequantized values (N, K).
        every: look at one row in so many, in runs of neighbours where there are enough rows.
    """
    n, k = w.shape
    step = max(1, BLOCK_NUMEL // max(k, 1)) if w.device.type == "cpu" else max(n, 1)
    signal = noise = max_error = 0.0
    for start, stop in _blocks(n, step, every):
        original = scratch("original", (stop - start, k), torch.float32, w.device)
        original.copy_(w[start:stop])
        if isinstance(source, Tensor):
            restored = source[start:stop].to(torch.float32)
        else:
            restored = scratch("block", (stop - start, k), torch.float32, w.device)
            source.fill(restored, start, stop)
        # float32 within a block (3e-5 off, which is 0.0002 dB), float64 over blocks.
        signal += _square_sum(original)
        error = original.sub_(restored)
        noise += _square_sum(error)
        low, high = torch.aminmax(error) if error.numel() else (error.sum(), error.sum())
        max_error = max(max_error, -float(low), float(high))
    return Difference(signal, noise, max_error)


def _blocks(n: int, step: int, every: int) -> Iterator[tuple[int, int]]:
    """Rows [start, stop) to look at, at most `step` at a time."""
    if every > 1:
        step = min(step, RUN, max(1, n // (every * every)))
    for start in range(0, n, step * every):
        yield start, min(start + step, n)


def _square_sum(t: Tensor) -> float:
    flat = t.view(-1)
    return float(torch.dot(flat, flat))


def finite(t: Tensor) -> bool:
    """Whether no value is nan or inf; float8 by its bits, which `forms.float8` does not look at.

    e4m3fn has no inf and one nan, all bits set; in e5m2 every exponent of all ones is inf or nan.
    """
    if not t.is_floating_point() or not t.numel():
        return True
    limit = {torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7C}.get(t.dtype)
    if limit is not None:
        parts: tuple[Tensor, ...] = cast(Any, t.contiguous().view(torch.uint8).view(-1)).split(BYTES_AT_ONCE)
        return all(int((part & 0x7F).max()) < limit for part in parts)
    return bool(torch.isfinite(t.to(torch.float32)).all())
