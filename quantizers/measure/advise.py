"""Which format for this model on this device: every format, ranked, with size, quality, product and offload verdict.

The order: what fits without copying weights at every step, then what fits by copying them (who copies less is faster
and comes first), then formats below 4 bits, then what fits only if the activations are not larger than forecast, what
does not fit (who needs less first), what lacks its library, and what the device cannot run. Among the rest decides the
key of `ranking`, as in `fit`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

from ..auto import DeviceFacts
from ..base import Availability
from ..compat.modes import HostName, VerdictLevel
from ..errors import SpecError
from ..plan import QuantPlan
from ..registry import availability, format_ids, get_entry
from ..spec import QuantSpec
from .activations import RunShape
from .forecast import DOES_NOT_FIT, FITS, Forecast, ModeForecast, forecast, on_device
from .measured import Quality, quality
from .native import IMAGE_TOKENS, TEXT_TOKENS, Running, Runs, check_device, device_note, running
from .parts import ModelPart, Role
from .ranking import FEW_BITS, bands, best_first, mode_of
from .tiers import TIERS, Tier, with_memory
from .units import show_size

FULL = "full precision"
# Formats of text encoders that are tried where those keep a better format of the model from fitting.
ENCODER_FORMATS = ("gguf-q8-0", "gguf-q4-k")


class Place(IntEnum):
    """Groups of the ranking, best first."""

    FITS = 0
    STREAMS = 1
    FEW_BITS = 2
    TIGHT = 3
    TOO_LARGE = 4
    MISSING = 5
    NOT_RUNNABLE = 6


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
        role: of the parts.
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
    role: Role = Role.DIFFUSION

    @property
    def place(self) -> Place:
        if self.running is not None and self.running.level is Runs.NOT:
            return Place.NOT_RUNNABLE
        if not self.state.works:
            return Place.MISSING
        if self.over or not self.forecast.fits:
            return Place.TOO_LARGE
        if mode_of(self.forecast) is None:
            return Place.TIGHT
        if self.bits < FEW_BITS:
            return Place.FEW_BITS
        return Place.STREAMS if self.mode.streams else Place.FITS

    @property
    def mode(self) -> ModeForecast:
        """The mode to use; where none fits the one that comes nearest."""
        return mode_of(self.forecast) or mode_of(self.forecast, strict=False) or self.forecast.nearest

    @property
    def usable(self) -> bool:
        return self.place <= Place.TIGHT

    @property
    def computing_nbytes(self) -> int:
        """The peak while the parts themselves compute; the worst moment may be that of another part."""
        names = {h.part.name for h in self.forecast.held if h.part.role is self.role}
        return max((s.peak for s in self.mode.stages if s.component in names), default=self.mode.peak)

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
        mode = self.mode
        if place is Place.TOO_LARGE:
            return DOES_NOT_FIT
        if mode.streams:
            return f"{FITS} with mode {mode.mode.value}, streams {show_size(mode.streamed)} a step"
        return FITS if mode is self.forecast.modes[0] else f"{FITS} with mode {mode.mode.value}"

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        fits = self.usable
        return {
            "format": self.format_id,
            "place": self.place.name.lower(),
            "usable": self.usable,
            "verdict": self.verdict,
            "bits": self.bits,
            "nbytes": self.nbytes,
            "score_db": _finite(self.score_db),
            "exact": self.format_id == FULL,
            "quality": self.quality.to_dict(),
            "runs": None if self.running is None else self.running.to_dict(),
            "works_here": self.state.works,
            "reason": self.state.reason,
            "remedy": self.state.remedy,
            "version": self.state.version,
            "layers_left": self.left,
            "left_reason": self.left_reason,
            "mode": self.mode.mode.value if fits else None,
            "mode_level": self.mode.level.value if fits else None,
            "mode_cause": self.mode.cause if fits else "",
            "peak_nbytes": self.mode.peak,
            "computing_nbytes": self.computing_nbytes,
            "streamed_nbytes_a_step": self.mode.streamed,
            "headline": self.forecast.headline,
        }


@dataclass(frozen=True)
class Advice:
    """The ranking.

    Attributes:
        targets: names of the parts that the formats are for.
        rows: best first; full precision among them.
        tiers: for each preset the row that would be best there, or None where nothing fits.
        hint: what the text encoders keep from fitting; empty where they do not.
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
    hint: str = ""

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
            "hint": self.hint,
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
    order = ranked(rows)
    notes += [note for note in (device_note(device), _of_mode(order[0])) if note]
    if role is Role.TEXT and any(row.running and row.running.activations for row in rows if row.usable):
        notes.append("What rounded activations cost was measured on the image model alone")
    return Advice(
        tuple(p.name for p in targets),
        role,
        sum(p.full_nbytes for p in targets),
        device,
        host,
        shape,
        tuple(order),
        budget,
        tuple(found),
        tuple(notes),
        check.hint(order),
    )


def ranked(rows: Iterable[Row]) -> list[Row]:
    """Best first, as the module docstring says; formats without any measurement are the last of their place."""
    rows = list(rows)
    found: list[Row] = []
    for place in Place:
        here = [row for row in rows if row.place is place]
        band = bands(_cost(row) for row in here)
        for number in sorted(set(band.values())):
            found += best_first([row for row in here if band[_cost(row)] == number], _key)
    return found


def _key(row: Row) -> tuple[float, bool, int]:
    return _score(row), row.native, row.nbytes


def _cost(row: Row) -> int:
    """What comes before quality: bytes that every step copies, and of what does not fit, the bytes that it needs."""
    return row.mode.peak if row.place is Place.TOO_LARGE else row.mode.streamed if row.usable else 0


@dataclass(frozen=True)
class _Check:
    """Makes rows; the forecast of each, with everything else as it is."""

    parts: Sequence[ModelPart]
    targets: Sequence[ModelPart]
    device: DeviceFacts
    host: HostName
    shape: RunShape
    beside: Mapping[str, QuantSpec]
    budget: int
    loras_nbytes: int

    @property
    def role(self) -> Role:
        return self.targets[0].role

    def full(self) -> Row:
        """The model at full precision, whatever it is now."""
        nbytes = sum(p.full_nbytes for p in self.targets)
        found, over = self._forecast(None), self._over(nbytes)
        exact = Quality(FULL), math.inf, None, Availability(True)
        return Row(FULL, 16, nbytes, *exact, found, over=over, role=self.role)

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
            self.role,
        )

    def hint(self, order: Sequence[Row]) -> str:
        """What would be taken with smaller text encoders, where these are what keeps it from fitting."""
        best = order[0]
        texts = [h.part for h in best.forecast.held if h.part.role is Role.TEXT]
        texts = [p for p in texts if not p.formats and p.name not in self.beside]
        if self.role is Role.TEXT or not texts or (best.place is Place.FITS and best.format_id == FULL):
            return ""
        for format_id in ENCODER_FORMATS:
            if not availability(format_id).works:
                continue
            smaller = replace(self, beside={**self.beside, **{p.name: QuantSpec(format_id) for p in texts}})
            found = smaller.better(order)
            if found is not None:
                names = ", ".join(p.name for p in texts)
                return (
                    f"Text encoders ({names}) are what takes the room: with them in {format_id} (--text-format, or "
                    f"Quantize Text Encoder) {found.format_id} {found.verdict}; `quantwire fit` chooses their formats "
                    "too"
                )
        return ""

    def better(self, order: Sequence[Row]) -> Row | None:
        """The best of the rows which comes before the first of an order once it is forecast here."""
        best = order[0]
        wanted = [row for row in order if Place.FITS < row.place <= Place.TOO_LARGE and not row.over]
        wanted = [row for row in wanted if row.bits >= FEW_BITS and row.nbytes <= row.forecast.room]
        for row in best_first(wanted, _key):
            found = replace(row, forecast=self._forecast(None if row.format_id == FULL else row.format_id))
            if found.place is Place.FITS and ranked([best, found])[0] is found:
                return found
        return None

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
    return {"nbytes": row.nbytes, "verdict": row.verdict, "score_db": _finite(row.score_db)}


def _finite(score: float | None) -> float | None:
    """JSON has no infinity."""
    return None if score is None or math.isinf(score) else score


def _of_mode(row: Row) -> str:
    """What to know of the offload mode of the first row."""
    mode = row.mode
    if not row.usable or mode.level is VerdictLevel.OK:
        return ""
    return f"WARNING: mode {mode.mode.value} ({mode.level.value}): {mode.cause}"
