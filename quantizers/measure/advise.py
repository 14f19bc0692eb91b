"""Which format for this model on this device: every format, ranked, with size, quality, product and offload verdict.

The order: what fits without copying weights at every step, then what fits by copying them (who copies less is faster
and comes first), then formats below 4 bits, then what does not fit (who needs less first), what lacks its library, and
what the device cannot run. Among the rest, formats whose measured quality differs by less than one bit of precision
(6 dB) count as equal, and of equals those come first that the device multiplies natively, then the better ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

from ..auto import DeviceFacts
from ..base import Availability
from ..compat.modes import HostName
from ..errors import SpecError
from ..plan import QuantPlan
from ..registry import availability, format_ids, get_entry
from ..spec import QuantSpec
from .activations import RunShape
from .forecast import Forecast, forecast, on_device
from .measured import Quality, quality
from .native import IMAGE_TOKENS, TEXT_TOKENS, Running, Runs, check_device, running
from .parts import ModelPart, Role
from .tiers import TIERS, Tier, with_memory
from .units import show_size

FULL = "full precision"
ONE_BIT_DB = 20 * math.log10(2)
FEW_BITS = 4.0  # below it a format is the last resort, as in `auto`
COPIED_STEP, NEED_STEP = 2**28, 2**27  # bytes that are not worth worse quality


class Place(IntEnum):
    """Groups of the ranking, best first."""

    FITS = 0
    STREAMS = 1
    FEW_BITS = 2
    TOO_LARGE = 3
    MISSING = 4
    NOT_RUNNABLE = 5


@dataclass(frozen=True)
class Row:
    """One format for this model, here.

    Attributes:
        format_id: `full precision` stands for the model as it was before quantization.
        nbytes: of the weights of the parts that are quantized.
        score_db: of `quality`, less what the product costs that runs here; infinite for full precision.
        left: layers that stay at full precision, since the format does not hold them; and why the first of them.
        state: whether the library is installed and works on this machine.
        running: None for full precision.
        forecast: with this format.
        over: bytes above the budget for these weights; 0 is within.
    """

    format_id: str
    bits: float
    nbytes: int
    quality: Quality
    score_db: float | None
    running: Running | None
    state: Availability
    forecast: Forecast
    left: int = 0
    left_reason: str = ""
    over: int = 0

    @property
    def place(self) -> Place:
        if self.running is not None and self.running.level is Runs.NOT:
            return Place.NOT_RUNNABLE
        if not self.state.works:
            return Place.MISSING
        if self.over or not self.forecast.fits:
            return Place.TOO_LARGE
        if self.bits < FEW_BITS:
            return Place.FEW_BITS
        best = self.forecast.best
        return Place.STREAMS if best is not None and best.streams else Place.FITS

    @property
    def usable(self) -> bool:
        return self.place <= Place.FEW_BITS

    @property
    def native(self) -> bool:
        return self.running is None or self.running.level is Runs.NATIVE

    @property
    def verdict(self) -> str:
        """A few words: `fits with mode model`, `not runnable`, ..."""
        place = self.place
        if place is Place.NOT_RUNNABLE:
            return Runs.NOT.value
        if place is Place.MISSING:
            return "library missing"
        if self.over:
            return f"{show_size(self.over)} over the budget"
        streams = ", streams" if place is Place.STREAMS or (place is Place.FEW_BITS and self._streams) else ""
        return self.forecast.verdict + streams

    @property
    def _streams(self) -> bool:
        best = self.forecast.best
        return best is not None and best.streams

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        best = self.forecast.best
        return {
            "format": self.format_id,
            "place": self.place.name.lower(),
            "usable": self.usable,
            "verdict": self.verdict,
            "bits": self.bits,
            "nbytes": self.nbytes,
            "score_db": self.score_db,
            "quality": self.quality.to_dict(),
            "runs": None if self.running is None else self.running.to_dict(),
            "works_here": self.state.works,
            "reason": self.state.reason,
            "remedy": self.state.remedy,
            "version": self.state.version,
            "layers_left": self.left,
            "left_reason": self.left_reason,
            "mode": None if best is None else best.mode.value,
            "peak_nbytes": self.forecast.nearest.peak,
            "headline": self.forecast.headline,
        }


@dataclass(frozen=True)
class Advice:
    """The ranking.

    Attributes:
        targets: names of the parts that the formats are for.
        rows: best first; full precision among them.
        tiers: for each preset the row that would be best there, or None where nothing fits.
    """

    targets: tuple[str, ...]
    role: Role
    full_nbytes: int
    device: DeviceFacts
    host: HostName
    shape: RunShape
    rows: tuple[Row, ...]
    budget: int = 0
    tiers: tuple[tuple[Tier, Row | None], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> Row | None:
        """The first that fits and runs; None where none does."""
        return next((row for row in self.rows if row.usable), None)

    @property
    def best_format(self) -> Row | None:
        """The same without full precision."""
        return next((row for row in self.rows if row.usable and row.format_id != FULL), None)

    def spec(self) -> QuantSpec:
        """The best format, for QUANT_CONFIG.

        Raises:
            SpecError: no format fits and runs.
        """
        if self.best_format is None:
            raise SpecError(
                f"No format of this model fits {self.device.name}, in any offload mode.\n"
                "Make the image smaller or the batch 1, or take a device with more memory."
            )
        return QuantSpec(self.best_format.format_id)

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        best, made = self.best, self.best_format
        found = self.rows[0].forecast.to_dict() if self.rows else {}
        return {
            "best": None if best is None else best.format_id,
            "best_format": None if made is None else made.format_id,
            "targets": list(self.targets),
            "role": self.role.value,
            "full_nbytes": self.full_nbytes,
            "budget_nbytes": self.budget,
            "host": self.host.value,
            "device": found.get("device"),
            "shape": found.get("shape"),
            "rows": [row.to_dict() for row in self.rows],
            "tiers": [
                {"gigabytes": tier.gigabytes, "format": row.format_id if row else None} | _short(row)
                for tier, row in self.tiers
            ],
            "notes": list(self.notes),
        }

    def text(self, limit: int = 0) -> str:
        """The ranking as text.

        Args:
            limit: most formats that are listed of the best place, a third of it of others; 0 is all.
        """
        from .advise_text import text

        return text(self, limit)

    def __str__(self) -> str:
        return self.text(12)


def advise(
    parts: Sequence[ModelPart],
    device: DeviceFacts,
    host: HostName,
    shape: RunShape | None = None,
    *,
    role: Role | None = None,
    formats: Iterable[str] | None = None,
    beside: Mapping[str, QuantSpec] | None = None,
    budget: int = 0,
    loras_nbytes: int = 0,
    tiers: bool = False,
    progress: Callable[[Sequence[str]], Iterable[str]] = iter,
) -> Advice:
    """Rank the formats for the parts of one role.

    Args:
        parts: components that run together; text encoders and VAE that are not among them are assumed.
        role: of the parts that get the format; default: the diffusion model, else the text encoder.
        formats: to choose from; default: all that can be made.
        beside: formats of other parts, by name.
        budget: bytes that the weights of these parts may take; 0 is no limit beside the device.
        tiers: tell too what would be best on the same device with each preset of memory.
        progress: wraps the formats as they are looked at.
    Raises:
        SpecError: no part of the role, an unknown format or device, or a part in `beside` that is not there.
    """
    check_device(device)
    shape = shape or RunShape()
    role = role or next((r for r in (Role.DIFFUSION, Role.TEXT) if any(p.role is r for p in parts)), Role.DIFFUSION)
    targets = [p for p in parts if p.role is role]
    if not targets:
        held = ", ".join(f"{p.name} ({p.role.value})" for p in parts) or "nothing"
        raise SpecError(f"There is no {role.value} to choose a format for, only {held}.\nGive the file of one.")
    ids = list(dict.fromkeys(QuantSpec(f).format_id for f in formats)) if formats is not None else format_ids()
    check = _Check(parts, targets, device, host, shape, beside or {}, budget, loras_nbytes)
    rows = [check.full(), *(check.row(format_id) for format_id in progress(ids))]
    found: list[tuple[Tier, Row | None]] = []
    for tier in TIERS if tiers else ():
        there = with_memory(device, str(tier))
        order = ranked([check.again(row, there) for row in rows])
        found.append((tier, next((row for row in order if row.usable), None)))
    notes = list(rows[0].forecast.notes)
    for part in targets:
        if part.formats:
            was = ", ".join(part.formats)
            notes.append(f"{part.name} is quantized already ({was}); quantizing again adds to that error")
    return Advice(
        tuple(p.name for p in targets),
        role,
        sum(p.full_nbytes for p in targets),
        device,
        host,
        shape,
        tuple(ranked(rows)),
        budget,
        tuple(found),
        tuple(notes),
    )


def ranked(rows: Iterable[Row]) -> list[Row]:
    """Best first, as the module docstring says; formats without any measurement are the last of their place."""
    found = sorted(rows, key=lambda row: (row.place, _cost(row), -_score(row), row.nbytes))
    keys: dict[str, tuple[Any, ...]] = {}
    group, head, band = None, math.nan, 0
    for row in found:
        score = _score(row)
        # Nothing is as good as what loses nothing. The first of a group begins a band, whatever it is.
        if (row.place, _cost(row)) != group or math.isinf(head) or head - score >= ONE_BIT_DB:
            group, head, band = (row.place, _cost(row)), score, band + 1
        keys[row.format_id] = (band, not row.native, -score, row.nbytes)
    return sorted(found, key=lambda row: keys[row.format_id])


def _cost(row: Row) -> int:
    """What comes before quality: bytes that every step copies, and of what does not fit, the bytes that it needs; both
    in steps that are not worth worse quality. 0 for others."""
    best = row.forecast.best
    if row.place is Place.TOO_LARGE:
        return row.forecast.nearest.peak // NEED_STEP
    return best.streamed // COPIED_STEP if row.place is Place.STREAMS and best is not None else 0


class _Check:
    """Makes rows; the forecast of each, with everything else as it is."""

    def __init__(
        self,
        parts: Sequence[ModelPart],
        targets: Sequence[ModelPart],
        device: DeviceFacts,
        host: HostName,
        shape: RunShape,
        beside: Mapping[str, QuantSpec],
        budget: int,
        loras_nbytes: int,
    ) -> None:
        self.parts, self.targets, self.device = parts, targets, device
        self.host, self.shape, self.beside = host, shape, beside
        self.budget, self.loras_nbytes = budget, loras_nbytes
        self.role = targets[0].role

    def full(self) -> Row:
        """The model at full precision, whatever it is now."""
        nbytes = sum(p.full_nbytes for p in self.targets)
        found, over = self._forecast(None), self._over(nbytes)
        return Row(FULL, 16, nbytes, Quality(FULL), math.inf, None, Availability(True), found, over=over)

    def row(self, format_id: str) -> Row:
        plans = [part.plan(QuantSpec(format_id)) for part in self.targets]
        nbytes = sum(plan.nbytes_out for plan in plans)
        left, reason = _left(plans)
        known = quality(format_id)
        runs = running(format_id, self.device, self.host, TEXT_TOKENS if self.role is Role.TEXT else IMAGE_TOKENS)
        return Row(
            format_id,
            get_entry(format_id).bits,
            nbytes,
            known,
            known.score_db(self.role, runs.activations),
            runs,
            availability(format_id),
            self._forecast(format_id),
            left,
            reason,
            self._over(nbytes),
        )

    def again(self, row: Row, device: DeviceFacts) -> Row:
        """A row on the same kind of device with other memory."""
        specs = self._specs(None if row.format_id == FULL else row.format_id)
        return replace(row, forecast=on_device(row.forecast, device, specs))

    def _over(self, nbytes: int) -> int:
        return max(0, nbytes - self.budget) if self.budget else 0

    def _forecast(self, format_id: str | None) -> Forecast:
        parts = list(self.parts)
        if format_id is None:
            names = {p.name for p in self.targets}
            parts = [replace(p, held_nbytes=p.full_nbytes, formats={}) if p.name in names else p for p in parts]
        specs = self._specs(format_id)
        return forecast(parts, specs, self.shape, self.device, self.host, self.loras_nbytes)

    def _specs(self, format_id: str | None) -> dict[str, QuantSpec]:
        given = {} if format_id is None else {p.name: QuantSpec(format_id) for p in self.targets}
        return {**self.beside, **given}


def _left(plans: Iterable[QuantPlan]) -> tuple[int, str]:
    refused = [decision for plan in plans for decision in plan.refused]
    return len(refused), f"{refused[0].meta.name}: {refused[0].reason}" if refused else ""


def _score(row: Row) -> float:
    return -math.inf if row.score_db is None else row.score_db


def _short(row: Row | None) -> dict[str, Any]:
    if row is None:
        return {}
    return {"nbytes": row.nbytes, "verdict": row.verdict, "score_db": row.score_db}
