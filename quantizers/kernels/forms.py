"""The forms in which weights are stored, each as an `Expansion`: int8 rows, packed 4-bit groups, float8.

Groups lie along K. Scales multiply; a `shift` is added after them: `value * scale + shift`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .expand import Expansion
from .scratch import scratch

Order = Literal["low first", "high first"]


def integers(qdata: Tensor, scale: Tensor, shift: Tensor | None = None) -> Expansion:
    """int8 or uint8 (N, K) with float scales (N, G) or (1, 1), and shifts of the same shape."""

    def fill(out: Tensor, start: int, stop: int) -> None:
        out.copy_(qdata[start:stop])
        _scale(out, scale, shift, start, stop)

    return Expansion((qdata.shape[0], qdata.shape[1]), qdata.device, fill)


def float8(qdata: Tensor, scale: Tensor | None, shape: tuple[int, int] | None = None) -> Expansion:
    """float8_e4m3fn or float8_e5m2 (>= N, >= K) with float scales (N, G) or (1, 1), or none.

    torch converts float8 value by value (67 ms for 37.7 M values); shifted into the bits of a float16 it takes 13 ms.
    e5m2 is the upper byte of a float16; e4m3 has an exponent bias of 7 instead of 15, so its float16 is 2**-8 of the
    value, subnormals included. nan and inf, which no checked weight has, would come back as numbers.
    """
    n, k = shape or (qdata.shape[0], qdata.shape[1])
    e4m3 = qdata.dtype is torch.float8_e4m3fn
    bits = qdata.view(torch.int8)[:, :k]

    def fill(out: Tensor, start: int, stop: int) -> None:
        wide = scratch("float8", (stop - start, k), torch.int16, qdata.device)
        wide.copy_(bits[start:stop])
        if e4m3:
            wide.bitwise_left_shift_(7).bitwise_and_(~0x4000)
        else:
            wide.bitwise_left_shift_(8)
        out.copy_(wide.view(torch.float16))
        if scale is not None:
            _scale(out, scale * 256.0 if e4m3 else scale, None, start, stop)
        elif e4m3:
            out.mul_(256.0)

    return Expansion((n, k), qdata.device, fill)


def pairs(values: Tensor, order: Order) -> Tensor:
    """The two float32 values that each byte stands for, in memory order, as (256,) int64.

    Args:
        values: (16,) float; index -> value, as in a codebook, or 0 .. 15, or -8 .. 7.
        order: which half of a byte holds the even index.
    """
    byte = torch.arange(256, device=values.device)
    low, high = values.float()[byte & 15], values.float()[byte >> 4]
    pair = (low, high) if order == "low first" else (high, low)
    return torch.stack(pair, dim=1).contiguous().view(torch.int64).view(-1)


def nibbles(
    packed: Tensor,
    table: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    shape: tuple[int, int] | None = None,
) -> Expansion:
    """Two 4-bit indices a byte along K, and what each index stands for.

    Args:
        packed: uint8 or int8 (>= N, >= K / 2).
        table: of `pairs`, on the device of `packed`.
        scale, shift: (N, G) or (1, 1) float.
        shape: (N, K), where `packed` is padded.
    """
    n, k = shape or (packed.shape[0], 2 * packed.shape[1])
    data = packed.view(torch.uint8)[:, : k // 2]

    def fill(out: Tensor, start: int, stop: int) -> None:
        index = scratch("nibbles", (stop - start, k // 2), torch.int32, packed.device)
        index.copy_(data[start:stop])
        torch.index_select(table, 0, index.view(-1), out=out.view(torch.int64).view(-1))
        _scale(out, scale, shift, start, stop)

    return Expansion((n, k), packed.device, fill)


def halves(packed: Tensor, bits: int, shape: tuple[int, int], scale: Tensor, shift: Tensor | None) -> Expansion:
    """quanto's packing: the groups of all rows in 8 / bits parts, part i in bits [i * bits, ...) of each byte.

    Args:
        packed: uint8 (ceil(groups / parts), group).
        bits: 4 or 2.
        shape: (N, K).
        scale, shift: (groups, 1) float.
    """
    n, k = shape
    part, group = packed.shape
    groups = n * k // group
    per_row, mask = k // group, (1 << bits) - 1
    scale = scale.reshape(n, per_row)
    shift = None if shift is None else shift.reshape(n, per_row)

    def fill(out: Tensor, start: int, stop: int) -> None:
        first, last = start * per_row, stop * per_row
        rows = out.view(-1, group)
        for i in range(8 // bits):
            a, b = max(first, i * part), min(last, (i + 1) * part, groups)
            if a < b:
                taken = scratch("halves", (b - a, group), torch.uint8, packed.device)
                torch.bitwise_right_shift(packed[a - i * part : b - i * part], i * bits, out=taken)
                rows[a - first : b - first].copy_(taken.bitwise_and_(mask))
        _scale(out, scale, shift, start, stop)

    return Expansion((n, k), packed.device, fill)


def _scale(out: Tensor, scale: Tensor, shift: Tensor | None, start: int, stop: int) -> None:
    """In place on rows [start, stop) in float32."""
    if scale.numel() == 1:
        grouped, part = out, slice(None)
    else:
        grouped, part = out.view(stop - start, scale.shape[-1], -1), slice(start, stop)
    grouped.mul_(scale[part].float().unsqueeze(-1) if scale.numel() > 1 else scale.float().reshape(()))
    if shift is not None:
        grouped.add_(shift[part].float().unsqueeze(-1) if shift.numel() > 1 else shift.float().reshape(()))
