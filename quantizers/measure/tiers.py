"""The sizes of GPU memory that people have, as presets."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..auto import DeviceFacts
from ..errors import SpecError
from .units import GIB, parse_vram, show_size

TIERS_GB = (6, 8, 12, 16, 24)
THIS_DEVICE = "this device"


@dataclass(frozen=True)
class Tier:
    """A card of so many GB; all of it counts as free, less the reserve of `DeviceFacts.usable_nbytes`."""

    gigabytes: int

    @property
    def nbytes(self) -> int:
        return self.gigabytes * GIB

    def __str__(self) -> str:
        return f"{self.gigabytes} GB"


TIERS = tuple(Tier(gb) for gb in TIERS_GB)


def names() -> list[str]:
    """For a widget: this device, then the presets."""
    return [THIS_DEVICE, *map(str, TIERS)]


def with_memory(device: DeviceFacts, text: str) -> DeviceFacts:
    """The same device with so much memory, all of it free; `this device` leaves it as it is.

    Raises:
        SpecError: no size.
    """
    if text.strip().lower() in ("", THIS_DEVICE):
        return device
    try:
        nbytes = parse_vram(text)
    except SpecError as err:
        presets = ", ".join(map(str, TIERS))
        raise SpecError(f"vram: {str(err).splitlines()[0]}\nPresets: {presets}; any size such as 10GB goes.") from err
    return replace(device, name=f"{device.name} with {show_size(nbytes)}", free_nbytes=nbytes, total_nbytes=nbytes)
