"""The order of formats, the same for `advise` and `fit`.

What streams weights at every step is compared first by the bytes that it copies, in bands from the least on: who copies
at most half a GiB or a tenth more is as fast. Within a band formats whose scores differ by less than one bit of
precision (6 dB) from the best count as equal; scores have the rounding of activations in them. Of equals those come
first that the device multiplies natively, then the better ones, then the smaller ones. Nothing equals what is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TypeVar

from ..compat.modes import OffloadMode
from .forecast import Forecast, ModeForecast

ONE_BIT_DB = 20 * math.log10(2)
FEW_BITS = 4.0  # below it a format is the last resort, as in `auto`
BAND_NBYTES, BAND_SHARE = 2**29, 0.1  # bytes that are not worth worse quality

T = TypeVar("T")
Key = Callable[[T], tuple[float, bool, int]]  # score in dB (infinite: exact; -infinite: unknown), native, bytes


def bands(costs: Iterable[int]) -> dict[int, int]:
    """Cost -> its band; a band begins with the least cost outside of the band before."""
    found: dict[int, int] = {}
    head, band = -1, -1
    for cost in sorted(set(costs)):
        if head < 0 or cost > reach(head):
            head, band = cost, band + 1
        found[cost] = band
    return found


def reach(least: int) -> int:
    """The largest cost that counts as equal to the least one; to nothing, nothing is equal."""
    return least + max(BAND_NBYTES, int(least * BAND_SHARE)) if least else 0


def best_first(items: Iterable[T], key: Key[T]) -> list[T]:
    """Of one place and band: in bands of one bit of precision, natively multiplied ones first in each."""
    found = sorted(items, key=lambda item: _plain(key(item)))
    made: list[tuple[tuple[int, bool, float, int], int]] = []
    head, band = math.nan, 0
    for index, item in enumerate(found):
        score, native, nbytes = key(item)
        if index == 0 or math.isinf(head) or head - score >= ONE_BIT_DB:
            head, band = score, band + 1
        made.append(((band, not native, -score, nbytes), index))
    return [found[index] for _, index in sorted(made)]


def mode_of(found: Forecast, strict: bool = True) -> ModeForecast | None:
    """The mode to use: the first that fits and streams nothing while sampling, else the first that fits.

    Args:
        strict: the peak must fit with the error of its activations on top.
    """
    ok = [m for m in found.modes if m.fits and (not strict or _surely(m) <= found.room)]
    return next((m for m in ok if not m.streams), ok[0] if ok else None)


def _surely(mode: ModeForecast) -> float:
    """Bytes with the error of the activations on top. Where ComfyUI copies weights it fills what is free with them, and
    makes room for what the activations are."""
    adapts = mode.mode in (OffloadMode.DYNAMIC, OffloadMode.PARTIAL)
    return max(s.peak + (0 if adapts and s.streamed else s.activations * s.error_percent / 100) for s in mode.stages)


def _plain(key: tuple[float, bool, int]) -> tuple[float, int]:
    return -key[0], key[2]
