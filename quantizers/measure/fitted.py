"""A model fitted to a device: candidates from what was measured, trials from the forecast, and the answer for people.

A choice counts as fitting only where it still does with the activations as large as the forecast's error allows, so
that a graph that was fitted runs; where nothing does, the error is left out and a warning says so.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..auto import DeviceFacts
from ..compat.modes import HostName, VerdictLevel
from ..errors import SpecError
from ..formats import BACKENDS
from ..registry import availability, format_ids, get_entry
from ..rules import KEEP, RuleSet
from ..spec import QuantSpec
from .activations import RunShape
from .assumed import with_assumed
from .fit import Candidate, Choice, Outcome, Prefer, choose
from .fit_text import text_of
from .forecast import Forecast, forecast
from .measured import quality
from .native import IMAGE_TOKENS, TEXT_TOKENS, Runs, device_note, running
from .parts import ModelPart, Role
from .ranking import ONE_BIT_DB, mode_of
from .recipe import find_recipe
from .sensitivity import Sensitivities
from .units import show_size
from .usual import usual_cfg

# Import names of packages that are not called as their package is.
_MODULES = {"optimum-quanto": "optimum.quanto", "libggml-python": "libggml", "comfy-kitchen": "comfy_kitchen"}
SLOW = ("sdnq",)  # tells sizes only after an import of up to 18 s
EQUAL = 10 ** (ONE_BIT_DB / 20)
RECIPE, MIXED = "linked recipe", "mixed recipe"
TRIES = 4


@dataclass(frozen=True)
class Fit:
    """What to use, and why.

    Attributes:
        found: the forecast of the choice.
        full: what the model would become from a full-precision file, where this one is quantized already.
        warnings, notes: for people; warnings first.
    """

    device: DeviceFacts
    host: HostName
    shape: RunShape
    choice: Choice
    found: Forecast
    prefer: Prefer = Prefer.BALANCED
    full: Choice | None = None
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def mode(self) -> str:
        return self.choice.outcome.mode

    def to_dict(self) -> dict[str, Any]:
        outcome = self.choice.outcome
        return {
            "host": self.host.value,
            "prefer": self.prefer.value,
            "mode": outcome.mode,
            "setting": dict(outcome.setting),
            "streams": outcome.streams,
            "streamed_nbytes_a_step": outcome.streamed,
            "why": outcome.why,
            "expected_peak_nbytes": outcome.peak_nbytes,
            "picks": [pick.to_dict() for pick in self.choice.picks],
            "from_full_precision": [pick.to_dict() for pick in self.full.picks] if self.full else None,
            "tried": len(self.choice.tried),
            "forecast": self.found.to_dict(),
            "warnings": list(self.warnings),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        return text_of(self)


def fit(
    parts: Sequence[ModelPart],
    device: DeviceFacts,
    host: HostName,
    shape: RunShape,
    prefer: Prefer = Prefer.BALANCED,
    *,
    config: QuantSpec | RuleSet | None = None,
    loras_nbytes: int = 0,
    assume: Iterable[Role] = (Role.TEXT, Role.VAE),
    sensitivities: Callable[[ModelPart, str], Sensitivities] | None = None,
) -> Fit:
    """Choose for a model, its text encoders and its VAE.

    Args:
        parts: a diffusion model, and what else is known of the graph.
        config: a recipe for the diffusion model; it is taken where it fits.
        sensitivities: of the diffusion model in GGUF's formats and one more, to try a mixed recipe; takes time.
        assume: roles of which the family's usual parts count where none is given.
    Raises:
        SpecError: nothing fits, or a pattern of the config names no layer.
    """
    with_usual, said = with_assumed(parts)
    roles = {p.role for p in parts} | set(assume)
    parts = [p for p in with_usual if p.role in roles]
    notes = [note for note in said if not note.startswith("text encoders") or Role.TEXT in roles]
    job = _Job(parts, device, host, shape, prefer, loras_nbytes)
    model = next((p for p in parts if p.role is Role.DIFFUSION), None)
    warnings: list[str] = []
    if config is not None and model is not None:
        found, why = job.with_config(model, config)
        if found is not None:
            return job.fit(found, [why], notes)
        warnings.append(why)
    found, more = job.best()
    if sensitivities is not None:
        found, said_of_it = job.mixed(found, sensitivities)
        notes.append(said_of_it)
    full = None
    if model is not None and model.formats:
        with contextlib.suppress(SpecError):  # not even that would fit: there is nothing to tell
            full, _ = job.best(replace(model, formats={}, held_nbytes=model.full_nbytes))
    return job.fit(found, [*warnings, *more], notes, full)


def candidates(part: ModelPart, device: DeviceFacts, host: HostName, dropped: Iterable[str] = ()) -> list[Candidate]:
    """The ways to hold a part on a device: as it is, and each format that was measured and runs there.

    Args:
        dropped: formats that turned out not to run here.
    """
    found = [Candidate(None)]
    if part.formats or part.role not in (Role.DIFFUSION, Role.TEXT):
        return found
    tokens = TEXT_TOKENS if part.role is Role.TEXT else IMAGE_TOKENS
    for format_id in format_ids():
        if format_id in dropped or not quality(format_id).measured or not _installed(format_id):
            continue
        how = running(format_id, device, host, tokens)
        loss = quality(format_id).loss(part.role, how.activations)
        if how.level is Runs.NOT or loss is None:
            continue
        entry, native = get_entry(format_id), how.level is Runs.NATIVE
        note = f"{quality(format_id)}; {how}"
        if how.activations and part.role is Role.TEXT:
            note += "; what rounded activations cost was measured on the image model"
        found.append(Candidate(QuantSpec(format_id), loss, entry.bits, native, entry.backend in SLOW, note))
    return found


def _installed(format_id: str) -> bool:
    """Whether the library of a format is there; whether it works is asked of those that are chosen only, since it takes
    seconds for each."""
    package = next(b.package for b in BACKENDS if b.name == get_entry(format_id).backend)
    if not package:
        return True
    try:
        return importlib.util.find_spec(_MODULES.get(package, package.replace("-", "_"))) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


@dataclass(frozen=True)
class _Job:
    parts: Sequence[ModelPart]
    device: DeviceFacts
    host: HostName
    shape: RunShape
    prefer: Prefer
    loras_nbytes: int

    def best(self, model: ModelPart | None = None) -> tuple[Choice, list[str]]:
        """The choice, and what to warn of.

        Args:
            model: in the place of the diffusion model.
        Raises:
            SpecError: nothing fits.
        """
        parts = [model if model is not None and p.role is Role.DIFFUSION else p for p in self.parts]
        dropped: dict[str, str] = {}
        warnings: list[str] = []
        strict = True
        while True:
            try:
                chosen = self._choose(parts, dropped, strict)
            except SpecError:
                if not strict:
                    raise
                strict = False
                continue
            broken = [i for i in _formats(chosen) if not availability(i).works]
            if not broken:
                break
            dropped |= {i: availability(i).reason for i in broken}
        if not strict:
            warnings.append(
                "It fits only if the activations are not larger than forecast; a smaller image would be safe."
            )
        warnings += [f"{name} was passed over: {why}" for name, why in dropped.items()]
        return chosen, warnings

    def _choose(self, parts: Sequence[ModelPart], dropped: Iterable[str], strict: bool) -> Choice:
        ways = {p.name: candidates(p, self.device, self.host, dropped) for p in parts}
        return self._chosen(parts, ways, strict, self.prefer)

    def _chosen(
        self, parts: Sequence[ModelPart], ways: Mapping[str, Sequence[Candidate]], strict: bool, prefer: Prefer
    ) -> Choice:
        def trial(specs: Mapping[str, QuantSpec]) -> Outcome:
            return outcome_of(self.forecast(parts, specs), strict)

        return choose(parts, ways, trial, prefer, self.device.total_nbytes, self.device.kind)

    def forecast(self, parts: Sequence[ModelPart], specs: Mapping[str, QuantSpec]) -> Forecast:
        return forecast(parts, specs, self.shape, self.device, self.host, self.loras_nbytes, assume=False)

    def with_config(self, model: ModelPart, config: QuantSpec | RuleSet) -> tuple[Choice | None, str]:
        """The choice with a linked recipe, or why it was not taken."""
        if model.formats:
            return None, f"The linked recipe was not taken: {model.name} is quantized already."
        spec = config if isinstance(config, QuantSpec) else QuantSpec(_first_format(config), rules=config.rules)
        for format_id in model.plan(spec).format_ids:
            if why := self._refusal(format_id):
                return None, f"The linked recipe was not taken: {format_id} {why}"
        ways = {p.name: candidates(p, self.device, self.host) for p in self.parts}
        ways[model.name] = [Candidate(spec, 1.0, native=False, note="chosen by who linked it", label=RECIPE)]
        try:
            chosen = self._chosen(self.parts, ways, True, self.prefer)
        except SpecError as err:
            return None, f"The linked recipe was not taken: {str(err).splitlines()[0]}"
        if chosen.outcome.streams and self.prefer is not Prefer.QUALITY:
            return None, "The linked recipe was not taken: its weights would be streamed at every step."
        return chosen, ""

    def _refusal(self, format_id: str) -> str:
        """Why a format that somebody asks for does not run here, and what to do; empty where it does."""
        how = running(format_id, self.device, self.host)
        if how.level is Runs.NOT:
            return f"does not run on {self.device.name}: {how.why}. Take one that does; `quantwire advise` lists them."
        state = availability(format_id)
        return "" if state.works else f"does not work here: {state.reason} {state.remedy}".rstrip()

    def mixed(self, chosen: Choice, sensitivities: Callable[[ModelPart, str], Sensitivities]) -> tuple[Choice, str]:
        """The choice with a mixture of formats for the diffusion model where that loses less, and what to say of it.

        What the choice leaves free goes into layers of more bits. A mixture is multiplied in floating point, so a
        native format must lose twice as much to give way to it.
        """
        pick = chosen.model
        spec = pick.candidate.spec
        if spec is None or chosen.outcome.streams:
            return chosen, "No mixed recipe was looked for: there is no memory left, or full precision fits."
        measured = sensitivities(pick.part, spec.format_id)
        single = measured.single(spec.format_id)
        if single is None or not single.error2:
            return chosen, f"No mixed recipe was looked for: {pick.candidate.name} does not hold every layer."
        forecast_now = self.forecast(self.parts, chosen.specs())
        mode = next(m for m in forecast_now.modes if m.mode.value == chosen.outcome.mode)
        room = forecast_now.room - mode.peak - mode.error_nbytes
        others = {p.part.name: [p.candidate] for p in chosen.picks}
        for _ in range(TRIES):
            recipe = find_recipe(measured, pick.nbytes + room)
            room //= 2  # hosts keep memory free beside the peak, so the first budget may be too large
            share = recipe.predicted_error / math.sqrt(single.error2)
            if not recipe.quantizes or share >= (1 / EQUAL if pick.candidate.native else 1.0):
                break
            loss = pick.candidate.loss * share
            mixture = Candidate(recipe.spec(), loss, pick.candidate.bits, False, note=recipe.how, label=MIXED)
            try:
                made = self._chosen(self.parts, {**others, pick.part.name: [mixture]}, True, self.prefer)
            except SpecError:
                continue
            if not made.outcome.streams:
                counts = ", ".join(f"{n} {'kept' if t == KEEP else f'in {t}'}" for t, n in recipe.formats.most_common())
                return made, (
                    f"mixed recipe: {counts}; its weights' error is {share:.2f} of that in {pick.candidate.name}, "
                    f"which takes {show_size(pick.nbytes)}"
                )
        return chosen, f"No mixed recipe that fits loses less than {pick.candidate.name}."

    def fit(self, chosen: Choice, warnings: Sequence[str], notes: Sequence[str], full: Choice | None = None) -> Fit:
        found = self.forecast(self.parts, chosen.specs())
        said = [w for w in warnings if w]
        mode = next(m for m in found.modes if m.mode.value == chosen.outcome.mode)
        if mode.level is not VerdictLevel.OK:
            said.append(f"mode {mode.mode.value} ({mode.level.value}): {mode.cause}")
        notes = [*notes, *(note for note in (device_note(self.device), self._of_cfg()) if note)]
        return Fit(self.device, self.host, self.shape, chosen, found, self.prefer, full, tuple(said), tuple(notes))

    def _of_cfg(self) -> str:
        """Told where guidance takes more than was counted."""
        family = next((p.family for p in self.parts if p.role is Role.DIFFUSION), "")
        if self.host is HostName.STANDALONE or self.shape.cfg > 1 or usual_cfg(family) <= 1:
            return ""
        return (
            f"counted with cfg {self.shape.cfg:g}, though {family} is usually sampled with {usual_cfg(family):g}, "
            "where ComfyUI may run both prompts at once, which takes more memory: give the cfg of the sampler"
        )


def outcome_of(found: Forecast, strict: bool) -> Outcome:
    """The mode to use, as the choice sees it: first those that stream nothing while sampling.

    Args:
        strict: the peak must fit with the error of its activations on top.
    """
    best = mode_of(found, strict)
    shown = best or found.nearest
    return Outcome(
        best is not None,
        shown.mode.value,
        shown.streams,
        shown.peak,
        shown.worst.name,
        shown.cause,
        {"group_level": "block"} if shown.mode.value == "group" else {},
        shown.streamed,
    )


def _formats(chosen: Choice) -> list[str]:
    found: dict[str, None] = {}
    for pick in chosen.picks:
        spec = pick.candidate.spec
        if spec is not None and not pick.part.assumed:
            found |= dict.fromkeys(pick.part.plan(spec).format_ids)
    return list(found)


def _first_format(rules: RuleSet) -> str:
    """A base for rules that name every layer; layers that they leave out get the same."""
    target = next((rule.target for rule in rules.rules if rule.target != "keep"), None)
    if target is None:
        raise SpecError("The linked rules keep every layer that they name, and no format is given for the others.")
    return QuantSpec.from_uri(target).format_id
