"""What to make of a model so that it runs on a device: the formats, the offload mode, and why.

A pure function over candidates (from `measured` and `native`) and trials (from `forecast`). The order is that of
`advise`: of what fits, formats whose measured errors differ by less than one bit of precision (6 dB) count as equal,
and of equals the one that the device multiplies natively is taken. Formats below 4 bits are taken only where nothing
else fits in any mode, as in `auto`. Streaming weights at every step costs far more time than a little quality is worth
to most people, so it comes after every format that stays on the device; `prefer` turns that around.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from ..errors import SpecError
from ..spec import QuantSpec
from .parts import ModelPart, Role
from .units import show_size

SCALES = 0.6  # bits a weight that scales take beyond what some formats name
LITTLE, SMALL = 1.05, 5.0  # of two formats of about 4 bits and one size the one that more people have run is taken
EQUAL = 2.0  # one bit of precision
FEW_BITS = 4.0  # below it a format is the last resort
AS_IS = "as it is"


class Prefer(str, Enum):
    """What to give up first where the best quality does not fit."""

    BALANCED = "balanced"  # quality, down to 4 bits; then speed
    QUALITY = "quality"  # speed: weights may be streamed at every step


@dataclass(frozen=True)
class Candidate:
    """One way to hold a part.

    Attributes:
        spec: what its layers become; None leaves it as the file has it.
        loss: expected relative error, as `Quality.loss` gives it; 0 where nothing is lost.
        bits: of a weight.
        native: the device multiplies in this format, without dequantizing first.
        usual: of the formats that `auto` chooses from, which many people have run; of equals these come first.
        note: how it computes there, and what the loss was measured on.
        label: of a mixed recipe; else the format id.
    """

    spec: QuantSpec | None
    loss: float = 0.0
    bits: float = 16.0
    native: bool = True
    usual: bool = False
    note: str = ""
    label: str = ""

    @property
    def name(self) -> str:
        return self.label or (AS_IS if self.spec is None else self.spec.format_id)

    @property
    def last_resort(self) -> bool:
        return self.spec is not None and self.bits < FEW_BITS


@dataclass(frozen=True)
class Outcome:
    """What a forecast says of one choice of formats.

    Attributes:
        fits: in `mode`; where nothing fits it is False, and the rest is of the mode that comes nearest.
        mode: as the host calls it.
        streams: weights of the diffusion model are copied to the device at every step.
        peak_nbytes: of the device's memory, at the worst moment.
        stage: that moment.
        why: of the verdict, a sentence.
        setting: what the mode is carried out with, for `OffloadSettings`.
    """

    fits: bool
    mode: str
    streams: bool
    peak_nbytes: int
    stage: str = ""
    why: str = ""
    setting: Mapping[str, Any] = field(default_factory=lambda: dict[str, Any]())


Trial = Callable[[Mapping[str, QuantSpec]], Outcome]


@dataclass(frozen=True)
class Pick:
    """What was chosen for one part.

    Attributes:
        nbytes: of its weights then.
        why: a sentence.
    """

    part: ModelPart
    candidate: Candidate
    nbytes: int
    why: str = ""

    def to_dict(self) -> dict[str, Any]:
        c = self.candidate
        return {
            "part": self.part.name,
            "role": self.part.role.value,
            "assumed": self.part.assumed,
            "format": None if c.spec is None else c.spec.format_id,
            "spec": None if c.spec is None else c.spec.to_uri(),
            "name": c.name,
            "loss": c.loss,
            "native": c.native,
            "note": c.note,
            "nbytes": self.nbytes,
            "held_nbytes": self.part.held_nbytes,
            "why": self.why,
        }


@dataclass(frozen=True)
class Tried:
    """A choice that was looked at on the way, for people who ask why not that one."""

    names: Mapping[str, str]
    outcome: Outcome


@dataclass(frozen=True)
class Choice:
    """The picks, one a part, and what is expected of them together."""

    picks: tuple[Pick, ...]
    outcome: Outcome
    tried: tuple[Tried, ...] = ()

    @property
    def model(self) -> Pick:
        return next(pick for pick in self.picks if pick.part.role is Role.DIFFUSION)

    def specs(self) -> dict[str, QuantSpec]:
        return {p.part.name: p.candidate.spec for p in self.picks if p.candidate.spec is not None}


def equals(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Of candidates in the order of their loss those that are as good as the first, the one to take first.

    What loses nothing has no equal.
    """
    head = candidates[0]
    found = [c for c in candidates if c.loss <= head.loss * EQUAL] if head.loss else [head]
    return sorted(found, key=lambda c: (not c.native, not c.usual, c.loss, c.bits))


def choose(
    parts: Sequence[ModelPart],
    candidates: Mapping[str, Sequence[Candidate]],
    trial: Trial,
    prefer: Prefer = Prefer.BALANCED,
    vram_nbytes: int = 0,
) -> Choice:
    """The choice with the least loss that fits.

    Args:
        parts: the diffusion model among them.
        candidates: part -> ways to hold it; a part without any stays as it is.
        trial: the forecast of one choice; formats of parts that stay are absent.
        vram_nbytes: for the message where nothing fits.
    Raises:
        SpecError: no diffusion model among the parts, or nothing fits.
    """
    if not any(part.role is Role.DIFFUSION for part in parts):
        held = ", ".join(f"{part.name} ({part.role.value})" for part in parts)
        raise SpecError(
            f"There is no diffusion model to fit, only {held}.\nGive its file; text encoders go with --text-encoder."
        )
    ways = {p.name: sorted(candidates.get(p.name) or [Candidate(None)], key=lambda c: (c.loss, c.bits)) for p in parts}
    search = _Search(parts, ways, trial)
    found = None
    for last_resort in (False, True):
        for streams in (True,) if prefer is Prefer.QUALITY else (False, True):
            found = found or search.best(last_resort, streams, smallest=streams and prefer is Prefer.BALANCED)
    if found is None:
        raise SpecError(_nothing_fits(search, vram_nbytes))
    return Choice(tuple(search.picks(found)), search.outcome(found), tuple(search.tried.values()))


Held = dict[str, Candidate]


class _Search:
    """Tries choices; what a choice gives is remembered."""

    def __init__(self, parts: Sequence[ModelPart], candidates: Mapping[str, list[Candidate]], trial: Trial) -> None:
        order = (Role.DIFFUSION, Role.TEXT)
        # What of the quality is decided first: the model, then what reads the prompt, the larger ones before.
        self.parts = sorted(
            parts, key=lambda p: (order.index(p.role) if p.role in order else len(order), -p.full_nbytes)
        )
        self.candidates = candidates
        self.trial = trial
        self.tried: dict[tuple[int, ...], Tried] = {}
        self.passed: dict[str, list[tuple[Candidate, Outcome]]] = {}
        self._nbytes: dict[tuple[str, int], int] = {}

    def best(self, last_resort: bool, streams: bool, smallest: bool) -> Held | None:
        """The first choice that fits, part by part, the later ones at their smallest until it is their turn.

        Args:
            last_resort: formats below 4 bits may be taken.
            streams: weights may be streamed at every step.
            smallest: of the diffusion model the fewest bytes are wanted, not the least loss.
        """
        allowed = {p.name: self._allowed(p, last_resort) for p in self.parts}
        held: Held = {name: ways[0] for name, ways in allowed.items()}
        if self._fits(held, streams=False):
            return held
        held = {name: self._smallest(name, ways) for name, ways in allowed.items()}
        if not self._fits(held, streams):
            return None
        for part in self.parts:
            name, ways = part.name, allowed[part.name]
            if smallest and part.role is Role.DIFFUSION:
                most = LITTLE * self.nbytes(name, held[name])
                usual = [c for c in ways if c.usual and c.bits < SMALL and self.nbytes(name, c) <= most]
                if usual and self._fits({**held, name: usual[0]}, streams):
                    held = {**held, name: usual[0]}
                continue
            first = next(i for i, c in enumerate(ways) if self._fits({**held, name: c}, streams))
            self.passed[name] = [(c, self.outcome({**held, name: c})) for c in ways[:first]]
            best = next(c for c in equals(ways[first:]) if self._fits({**held, name: c}, streams))
            held = {**held, name: best}
        return held

    def _smallest(self, name: str, ways: Sequence[Candidate]) -> Candidate:
        """Sizes are asked of the few that can be it, since the first question to a backend may import its library."""
        least = min(c.bits for c in ways)
        return min((c for c in ways if c.bits <= least + SCALES), key=lambda c: self.nbytes(name, c))

    def _allowed(self, part: ModelPart, last_resort: bool) -> list[Candidate]:
        found = self.candidates[part.name]
        return [c for c in found if last_resort or not c.last_resort] or found

    def _fits(self, held: Held, streams: bool) -> bool:
        outcome = self.outcome(held)
        return outcome.fits and (streams or not outcome.streams)

    def outcome(self, held: Held) -> Outcome:
        key = tuple(id(held[p.name]) for p in self.parts)
        if key not in self.tried:
            specs = {name: c.spec for name, c in held.items() if c.spec is not None}
            self.tried[key] = Tried({name: c.name for name, c in held.items()}, self.trial(specs))
        return self.tried[key].outcome

    def nbytes(self, name: str, candidate: Candidate) -> int:
        key = (name, id(candidate))
        if key not in self._nbytes:
            part = next(p for p in self.parts if p.name == name)
            self._nbytes[key] = part.nbytes(candidate.spec)
        return self._nbytes[key]

    def picks(self, held: Held) -> Iterable[Pick]:
        for part in self.parts:
            candidate = held[part.name]
            yield Pick(part, candidate, self.nbytes(part.name, candidate), self._why(part, candidate))

    def _why(self, part: ModelPart, chosen: Candidate) -> str:
        """What loses less and does not fit."""
        if part.formats and chosen.spec is None:
            return f"quantized already ({', '.join(part.formats)})"
        if len(self.candidates[part.name]) < 2:
            return ""
        if chosen.spec is None:
            return "full precision"
        passed = self.passed.get(part.name)
        if not passed:
            return "the smallest of at least 4 bits" if not chosen.last_resort else "nothing larger fits"
        first, last = (
            f"{'full precision' if c.spec is None else c.name} ({show_size(self.nbytes(part.name, c))})"
            for c, _ in (passed[0], passed[-1])
        )
        if passed[-1][1].fits:
            still = f", and still with {last}" if len(passed) > 1 else ""
            return f"weights would have to be copied at every step with {first}{still}"
        return f"{first} does not fit{f', nor does {last}' if len(passed) > 1 else ''}"


def _nothing_fits(search: _Search, vram_nbytes: int) -> str:
    tried = min(search.tried.values(), key=lambda t: t.outcome.peak_nbytes)
    made = ", ".join(f"{part} {name}" for part, name in tried.names.items())
    limit = f" of {show_size(vram_nbytes)}" if vram_nbytes else ""
    at = f" while it does: {tried.outcome.stage}" if tried.outcome.stage else ""
    return (
        f"Nothing fits the device's memory{limit}: the smallest choice ({made}) takes "
        f"{show_size(tried.outcome.peak_nbytes)} in mode {tried.outcome.mode}{at}. {tried.outcome.why}\n"
        "Make the image smaller or the batch 1, run text encoders on the CPU, or take a device with more memory."
    )
