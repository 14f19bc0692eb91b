"""What a graph asks of offloading: the mode, and how it is to be carried out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ..quantizers.compat.modes import HOST_MODES, HostName, OffloadMode
from ..quantizers.errors import SpecError, near

GROUP_LEVELS = ("block", "leaf")
PLACES = ("memory", "disk")
KEEPS = (OffloadMode.SEQUENTIAL, OffloadMode.BALANCED, OffloadMode.GROUP)  # modes that keep layers away from the device
LOW_WATERMARK, HIGH_WATERMARK = 0.2, 0.6


@dataclass(frozen=True)
class OffloadSettings:
    """How the embedded host is to place the weights of a model object while it runs.

    Attributes:
        mode: one of the embedded host's.
        group_level: group: what moves at a time, a leaf module or blocks of the model.
        blocks_per_group: group by block: how many blocks move together.
        use_stream: group: copy the next group while the device computes.
        keep_on: sequential, balanced and group: where weights lie that are not on the device. The graph itself keeps
            the model too: on disk, what runs reads none of those weights, so that the system can take back pages of
            weights that are mapped from their file; weights that were quantized in memory stay there.
        device_gib: balanced: size of the device that the watermarks are shares of; 0 is what it has free.
        low_watermark: balanced: share above which components that are not in use are moved out. At its default it is 0
            on devices of at most 12 GiB, as in SD.Next.
        high_watermark: balanced: share that one component may take; a larger one is split. At its default it is 0.8 on
            devices of at least 24 GiB, as in SD.Next.
    Raises:
        SpecError: values that the mode, or the embedded host, does not have; all of them.
    """

    mode: OffloadMode
    group_level: str = "block"
    blocks_per_group: int = 1
    use_stream: bool = False
    keep_on: str = "memory"
    device_gib: float = 0.0
    low_watermark: float = LOW_WATERMARK
    high_watermark: float = HIGH_WATERMARK

    def __post_init__(self) -> None:
        object.__setattr__(self, "mode", _mode(self.mode))
        if faults := [*self._values(), *self._watermarks(), *self._use()]:
            raise SpecError("\n".join(faults))

    def _values(self) -> Iterator[str]:
        for name, known in (("group_level", GROUP_LEVELS), ("keep_on", PLACES)):
            value = getattr(self, name)
            if value not in known:
                yield f"{name} must be {' or '.join(known)}, got {value!r}."
        if isinstance(self.blocks_per_group, bool) or not isinstance(self.blocks_per_group, int):
            yield f"blocks_per_group must be a whole number, got {self.blocks_per_group!r}."
        elif self.blocks_per_group < 1:
            yield f"blocks_per_group must be at least 1, got {self.blocks_per_group}."
        if not _number(self.device_gib) or self.device_gib < 0:
            yield f"device_gib must be 0 (what the device has free) or more, got {self.device_gib!r}."
        elif self.device_gib and self.mode is not OffloadMode.BALANCED:
            yield (
                f"device_gib {self.device_gib} has no meaning with mode {self.mode.value}, which has no cap.\n"
                "Choose mode balanced, or set device_gib to 0."
            )

    def _watermarks(self) -> Iterator[str]:
        low, high = self.low_watermark, self.high_watermark
        if not (_number(low) and _number(high) and 0 <= low <= 1 and 0 < high <= 1):
            yield f"low_watermark and high_watermark are shares in [0, 1] and (0, 1], got {low!r}, {high!r}."
        elif low > high:
            yield (
                f"low_watermark {low} is above high_watermark {high}.\n"
                "Components are moved out above the low one; the high one caps a single component."
            )

    def _use(self) -> Iterator[str]:
        """Settings of another mode that change what the user expects are refused, not ignored."""
        mode = self.mode
        if self.keep_on == "disk" and mode not in KEEPS:
            yield (
                f"keep_on disk has no meaning with mode {mode.value}, which keeps whole components in memory.\n"
                f"Choose {', '.join(m.value for m in KEEPS)}, or keep_on memory."
            )
        if self.use_stream and mode is not OffloadMode.GROUP:
            yield f"use_stream has no meaning with mode {mode.value}.\nChoose mode group, or turn use_stream off."
        elif self.use_stream and self.keep_on == "disk":
            yield "use_stream copies from memory, and keep_on is disk.\nTurn use_stream off, or choose keep_on memory."
        elif self.use_stream and self.group_level == "block" and self.blocks_per_group != 1:
            yield (
                f"use_stream moves one block at a time, and blocks_per_group is {self.blocks_per_group}.\n"
                "Set blocks_per_group to 1, or turn use_stream off."
            )

    @property
    def variant(self) -> str | None:
        """The variant of the compatibility matrix; None for balanced, which depends on the size of the model."""
        if self.mode is OffloadMode.BALANCED:
            return None
        if self.mode is OffloadMode.SEQUENTIAL:
            return self.keep_on
        if self.mode is OffloadMode.GROUP:
            return self.group_level + ("-disk" if self.keep_on == "disk" else "-stream" if self.use_stream else "")
        return ""

    def low_nbytes(self, device_nbytes: int) -> int:
        """Bytes in use on a device above which idle components are moved out."""
        default = self.low_watermark == LOW_WATERMARK
        return int(device_nbytes * (0.0 if default and device_nbytes <= 12 << 30 else self.low_watermark))

    def high_nbytes(self, device_nbytes: int) -> int:
        """Bytes that one component may take on a device."""
        default = self.high_watermark == HIGH_WATERMARK
        return int(device_nbytes * (0.8 if default and device_nbytes >= 24 << 30 else self.high_watermark))

    def __str__(self) -> str:
        detail = self.variant or ("" if self.keep_on == "memory" else self.keep_on)
        return f"{self.mode.value} ({detail})" if detail else self.mode.value


def _mode(given: object) -> OffloadMode:
    name = given.value if isinstance(given, OffloadMode) else str(given)
    here = HOST_MODES[HostName.STANDALONE]
    for mode in here:
        if mode.value == name:
            return mode
    known = [m.value for m in here]
    elsewhere = " It is a mode of ComfyUI." if any(name == m.value for m in OffloadMode) else near(name, known)
    raise SpecError(f"The embedded host has no offload mode '{name}'.{elsewhere}\nIt has {', '.join(known)}.")


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
