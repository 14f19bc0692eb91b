"""Which components are on the device now: one table for the process, and who leaves when another one comes in.

model: every other component leaves. balanced: those used longest ago leave while more than the low watermark is in use.
A component whose mode is none stays, since that mode promises it; one whose mode is model leaves whoever comes.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING

import torch

from ....quantizers.compat.modes import OffloadMode
from .device import device_nbytes

if TYPE_CHECKING:
    from .placed import Placed


class Residency:
    """Components on devices, the one used last at the end. Holds none of them alive."""

    def __init__(self) -> None:
        self._inside: list[weakref.ref[Placed]] = []
        self._lock = threading.RLock()

    def inside(self, device: torch.device | None = None) -> list[Placed]:
        """The components that have weights on a device, or on any."""
        with self._lock:
            found = [p for ref in self._inside if (p := ref()) is not None and not p.closed]
        return [p for p in found if device is None or p.device == device]

    def held(self, device: torch.device) -> int:
        """Bytes of weights that lie on a device between uses."""
        return sum(p.nbytes for p in self.inside(device))

    def enter(self, placed: Placed) -> None:
        """A component is about to compute: make room for it, and bring it in."""
        with self._lock:
            self.make_room(placed)
            placed.move_in()
            self.note(placed)

    def note(self, placed: Placed) -> None:
        """A component is on its device now."""
        with self._lock:
            self._forget(placed)
            if placed.nbytes:
                self._inside.append(weakref.ref(placed))

    def make_room(self, placed: Placed) -> None:
        """Move out who leaves for a component; it need not be inside."""
        with self._lock:
            others = [p for p in self.inside(placed.device) if p is not placed]
            for leaving in self._leaving(placed, others):
                self.leave(leaving)

    def leave(self, placed: Placed) -> None:
        """Take a component off its device."""
        with self._lock:
            self._forget(placed)
            placed.move_out()

    def _forget(self, placed: Placed) -> None:
        self._inside = [ref for ref in self._inside if (p := ref()) is not None and p is not placed and not p.closed]

    def _leaving(self, coming: Placed, others: list[Placed]) -> list[Placed]:
        movable = [p for p in others if p.settings.mode is not OffloadMode.NONE]
        if coming.settings.mode is OffloadMode.MODEL:
            return movable
        leaving = [p for p in movable if p.settings.mode is OffloadMode.MODEL]
        if coming.settings.mode is not OffloadMode.BALANCED:
            return leaving
        held = coming.nbytes + sum(p.nbytes for p in others)
        low = coming.settings.low_nbytes(device_nbytes(coming.settings, coming.device, self.held(coming.device)))
        in_use = held - sum(p.nbytes for p in leaving)
        for p in movable:
            if in_use > low and p not in leaving:
                leaving.append(p)
                in_use -= p.nbytes
        return leaving


RESIDENCY = Residency()
