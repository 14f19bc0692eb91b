"""Progress of long work that says how long it will still take, in every host."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from .base import Host

T = TypeVar("T")


def with_eta(host: Host, items: Sequence[T], what: str) -> Iterator[T]:
    """Iterate with the host's progress bar, and the time left as text on the node: `layers 12 of 57, 40 s left`.

    The host's interruption exception passes through.

    Args:
        what: the plural of one step: `layers`, `runs`.
    """
    start = time.perf_counter()
    for done, item in enumerate(host.progress(items, len(items))):
        if done:
            left = (time.perf_counter() - start) / done * (len(items) - done)
            host.show_text(f"{what} {done} of {len(items)}, {show_seconds(left)} left")
        yield item


def show_seconds(seconds: float) -> str:
    """`40 s`, `3 min 20 s`, `1 h 05 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
