"""What to make of a model so that it runs on a device: the formats, the offload mode, and why.

A pure function over candidates (from `measured` and `native`) and trials (from `forecast`). The order is that of
`advise`, by the key of `ranking`. Formats below 4 bits are taken only where nothing else fits in any mode, as in
`auto`. Streaming weights at every step costs far more time than a little quality is worth to most people, so it comes
after every format that stays on the device; `prefer` turns that around.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from ..errors import SpecError
from ..spec import QuantSpec
from .parts import ModelPart, Role
from .ranking import FEW_BITS, best_first, reach
from .stages import STAGES
from .units import show_size

SCALES = 0.6  # bits a weight that scales take beyond what some formats name
COLUMNS = 110  # of an error's lines
# What makes the peak smaller, by the stage of it.
_REMEDIES = {
    STAGES[0]: "give a smaller text encoder, or one that is quantized",
    STAGES[1]: "make the image smaller, the batch 1 or the video shorter",
    STAGES[2]: "decode in tiles (VAEDecodeTiled), or make the image smaller or the batch 1",
}
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
        slow: its library takes long to import, which is the price of asking for a size.
        note: how it computes there, and what the loss was measured on.
        label: of a mixed recipe; else the format id.
    """

    spec: QuantSpec | None
    loss: float = 0.0
    bits: float = 16.0
    native: bool = True
    slow: bool = False
    note: str = ""
    label: str = ""

    @property
    def name(self) -> str:
        return self.label or (AS_IS if self.spec is None else self.spec.format_id)

    @property
    def score_db(self) -> float:
        """The loss in dB; infinite where nothing is lost."""
        return -20 * math.log10(self.loss) if self.loss else math.inf

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
        streamed: bytes of them.
        setting: what the mode is carried out with, for `OffloadSettings`.
    """

    fits: bool
    mode: str
    streams: bool
    peak_nbytes: int
    stage: str = ""
    why: str = ""
    setting: Mapping[str, Any] = field(default_factory=lambda: dict[str, Any]())
    streamed: int = 0


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


def choose(
    parts: Sequence[ModelPart],
    candidates: Mapping[str, Sequence[Candidate]],
    trial: Trial,
    prefer: Prefer = Prefer.BALANCED,
    vram_nbytes: int = 0,
    kind: str = "",
) -> Choice:
    """The choice with the least loss that fits.

    Args:
        parts: the diffusion model among them.
        candidates: part -> ways to hold it; a part without any stays as it is.
        trial: the forecast of one choice; formats of parts that stay are absent.
        vram_nbytes, kind: of the device, for the message where nothing fits.
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
        raise SpecError(_nothing_fits(search, vram_nbytes, kind))
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
        self.least = 0  # bytes that the choice copies at every step at least
        self._nbytes: dict[tuple[str, int], int] = {}

    def best(self, last_resort: bool, streams: bool, smallest: bool) -> Held | None:
        """The first choice that fits, part by part, the later ones at their smallest until it is their turn.

        Args:
            last_resort: formats below 4 bits may be taken.
            streams: weights may be streamed at every step.
            smallest: of the diffusion model few streamed bytes are wanted before little loss.
        """
        self.passed, self.least = {}, 0
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
                held = {**held, name: self._streams_least(part, held, ways)}
                continue
            first = self._first(part, held, ways, streams)
            self.passed[name] = [(c, self.outcome({**held, name: c})) for c in ways[:first] if not c.slow]
            best = next(c for c in self._in_order(part, ways[first:]) if self._fits({**held, name: c}, streams))
            held = {**held, name: best}
        return held

    def _first(self, part: ModelPart, held: Held, ways: Sequence[Candidate], streams: bool) -> int:
        """Index of the least loss that fits. Slow ones are asked last, and only where they may be smaller than what did
        not fit."""
        quick = [i for i, c in enumerate(ways) if not c.slow]
        first, floor = len(ways), part.full_nbytes + 1
        for i in quick:
            if self._fits({**held, part.name: ways[i]}, streams):
                first = i
                break
            floor = min(floor, self.nbytes(part.name, ways[i]))
        for i, c in enumerate(ways[:first]):
            if c.slow and self._least(part, c) < floor and self._fits({**held, part.name: c}, streams):
                return i
        return first

    def _streams_least(self, part: ModelPart, held: Held, ways: Sequence[Candidate]) -> Candidate:
        """Of those which copy about as few bytes at every step as the smallest does, the first by the shared key."""
        name = part.name

        def streamed(c: Candidate) -> int | None:
            found = self.outcome({**held, name: c})
            return found.streamed if found.fits else None

        self.least = streamed(held[name]) or 0
        most = self.nbytes(name, held[name]) + reach(self.least) - self.least
        costs = {id(c): n for c in ways if self._least(part, c) <= most and (n := streamed(c)) is not None}
        self.least = min(costs.values())
        near = [c for c in ways if costs.get(id(c), -1) >= 0 and costs[id(c)] <= reach(self.least)]
        return self._in_order(part, near)[0]

    def _smallest(self, name: str, ways: Sequence[Candidate]) -> Candidate:
        """Sizes are asked of the few that can be it, since the first question to a backend may import its library."""
        quick = [c for c in ways if not c.slow] or ways
        least = min(c.bits for c in quick)
        return min((c for c in quick if c.bits <= least + SCALES), key=lambda c: self.nbytes(name, c))

    def _in_order(self, part: ModelPart, ways: Sequence[Candidate]) -> list[Candidate]:
        return best_first(ways, lambda c: (c.score_db, c.native, self._about(part, c)))

    def _about(self, part: ModelPart, c: Candidate) -> int:
        """Bytes without asking a slow library."""
        return int(self._least(part, c)) if c.slow else self.nbytes(part.name, c)

    def _least(self, part: ModelPart, c: Candidate) -> float:
        """Fewer bytes than the part takes so: scales and layers that stay come on top."""
        return part.held_nbytes if c.spec is None else part.parameters * c.bits / 8

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
            return self._why_streamed(chosen) if self.least else "no choice with less loss fits"
        first, last = (
            f"{'full precision' if c.spec is None else c.name} ({show_size(self.nbytes(part.name, c))})"
            for c, _ in (passed[0], passed[-1])
        )
        if passed[-1][1].fits:
            still = f", and still with {last}" if len(passed) > 1 else ""
            return f"weights would have to be copied at every step with {first}{still}"
        return f"{first} does not fit{f', nor does {last}' if len(passed) > 1 else ''}"

    def _why_streamed(self, chosen: Candidate) -> str:
        bits = "" if chosen.last_resort else " of at least 4 bits"
        near = show_size(reach(self.least) - self.least)
        return f"of the formats{bits} that copy at most {near} more than the least at every step, the first by quality"


def _nothing_fits(search: _Search, vram_nbytes: int, kind: str) -> str:
    """The choice that comes nearest and what would help, by the stage which takes the most."""
    tried = min(search.tried.values(), key=lambda t: t.outcome.peak_nbytes)
    o = tried.outcome
    made = ", ".join(f"{part} {name}" for part, name in tried.names.items())
    limit = f" of {show_size(vram_nbytes)}" if vram_nbytes else ""
    at = f" while {o.stage}" if o.stage else ""
    less = [_REMEDIES.get(o.stage, _REMEDIES[STAGES[1]])]
    less += ["run text encoders on the CPU"] if o.stage == STAGES[0] and kind != "cpu" else []
    more = "close what else takes memory, or take a machine with more" if kind == "cpu" else "take a device with more"
    help_ = f"{'; '.join([*less, more])}."
    lines = (
        f"Nothing fits the device's memory{limit}: the smallest choice takes {show_size(o.peak_nbytes)}{at}.",
        f"That is {made} in mode {o.mode}.{f' {o.why}' if o.why else ''}",
        help_[0].upper() + help_[1:],
    )
    return "\n".join(textwrap.fill(line, COLUMNS) for line in lines)
