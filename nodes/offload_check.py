"""What OffloadCompat does when it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..hosts import current
from ..hosts.objects import components_of
from ..hosts.offload import OffloadSettings
from ..quantizers.compat.guard import Action, Guard, Verdicts
from ..quantizers.compat.modes import HOST_MODES, Carrier, HostName, OffloadMode, VerdictLevel
from ..quantizers.compat.remedies import RemedyKind, Space
from ..quantizers.compat.rules import Verdict, described
from ..quantizers.errors import SpecError

Now = tuple[OffloadMode, str | None]


@dataclass
class OffloadReport:
    """What OffloadCompat found and did.

    Attributes:
        mode: the chosen one, or with auto what the host does.
        host: that the verdicts are for.
        now: component -> mode and variant that the host has in force for it.
        set_to: what set_mode set; empty when it was off.
    """

    mode: OffloadMode
    host: HostName
    verdicts: Verdicts = field(default_factory=lambda: Verdicts())
    now: dict[str, Now] = field(default_factory=lambda: dict[str, Now]())
    set_to: str = ""
    notes: list[str] = field(default_factory=lambda: list[str]())

    def to_dict(self) -> dict[str, Any]:
        return {
            "mode": self.mode.value,
            "host": self.host.value,
            "verdicts": {c: [v.to_dict() for v in vs] for c, vs in self.verdicts.items()},
            "now": {c: {"mode": mode.value, "variant": variant} for c, (mode, variant) in self.now.items()},
            "set": self.set_to,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        lines: list[str] = []
        for component, verdicts in self.verdicts.items():
            for v in verdicts:
                lines.append(f"{component}: {v.level.value}: {v.headline}")
                if v.row is not None and v.row.evidence != "none":
                    lines.append(f"  {v.row.evidence}: {v.row.versions or v.row.source}")
                lines += [f"  - {remedy.text}" for remedy in v.remedies]
        if not lines and self.now:
            lines = [f"No quantized layers; offload mode {self.mode.value} is safe."]
        return "\n".join([*lines, *([f"Set: {self.set_to}."] if self.set_to else []), *self.notes])


def run(
    objects: Mapping[str, Any],
    chosen: OffloadMode | None,
    action: str,
    settings: Mapping[str, Any],
    wanted: OffloadSettings | None,
) -> tuple[dict[str, Any], OffloadReport]:
    """Check model objects, set their mode where that is wanted, and put guards on them.

    Args:
        objects: by the name of the input.
        chosen: None is what the host does now.
        settings: of the node's widgets; they tell the variant of the chosen mode.
        wanted: the mode to set; None only checks.
    Returns:
        The objects to hand on, by the name of the input.
    Raises:
        SpecError: nothing to check, or a mode that the host does not have, and the action is not to report.
        OffloadConflict: action is block, and a component cannot run so.
    """
    if not objects:
        raise SpecError("OffloadCompat has nothing to check: no input is linked.\nLink model, clip, vae or pipeline.")
    host, does = current(), Action(action)
    here = HostName(host.name)
    of = next(h for h in (here, *HostName) if chosen is None or chosen in HOST_MODES[h])
    if wanted is not None:
        objects = {key: host.set_offload(obj, wanted) for key, obj in objects.items()}
        chosen = None  # a mode that is set is what the host does from here on
    variant = _variant(chosen, settings) if chosen is not None else None
    foreign = _not_here(chosen, here) if chosen is not None and of is not here else ""
    guard = Guard(of, does, chosen, variant)
    later = guard if of is here else Guard(here, does)
    report = OffloadReport(chosen or OffloadMode.NONE, of, set_to=str(wanted) if wanted is not None else "")
    out: dict[str, Any] = {}
    spaces: dict[str, Space | None] = {}
    for key, obj in objects.items():
        components = components_of(obj)
        if components:
            now = host.components_now(obj)
            space = None if foreign else host.offload_space(obj)
            for name, module in components.items():
                shown = _unique(report, name, key)
                report.now[shown], spaces[shown] = now[name], space
                at = (chosen, variant) if chosen and foreign else now[name]
                report.verdicts |= guard.examine({shown: module}, *at, space)
                if of is here:
                    guard.passed({name: module}, *now[name])
            out[key] = _guarded(host, key, obj, later, report)
        else:
            kind = f"{type(obj).__module__}.{type(obj).__qualname__}"
            report.notes.append(f"{key}: no module was found in a {kind}, so nothing in it was checked.")
            out[key] = obj
    if chosen is None:
        report.mode = _worst(report.now.values())
    if wanted is not None:
        report.notes += _told(wanted, report.now, spaces, objects)
    elif chosen is not None:
        report.notes += _runs_otherwise(chosen, report)
    if foreign and does is not Action.REPORT:
        report.verdicts = {name: [_followed_here(v) for v in vs] for name, vs in report.verdicts.items()}
    guard.act(report.verdicts, foreign)
    if foreign and does is not Action.REPORT:
        todo = "Choose one of these or auto, or set action to report to ask about another host's mode."
        raise SpecError(f"{foreign}\n{todo}")
    return out, report


def _not_here(chosen: OffloadMode, here: HostName) -> str:
    called = "ComfyUI" if here is HostName.COMFYUI else "The embedded host"
    has = ", ".join(m.value for m in HOST_MODES[here])
    return f"{called} has no offload mode {chosen.value}; it has {has}."


def _followed_here(verdict: Verdict) -> Verdict:
    """Without the ways out that are options, modes or tensors of the host that is not this one."""
    own = (RemedyKind.CARRIER, RemedyKind.FORMAT)
    kept = tuple(r for r in verdict.remedies if r.kind in own and r.cell.carrier is not Carrier.HOST)
    return replace(verdict, remedies=kept)


def _told(
    wanted: OffloadSettings, now: Mapping[str, Now], spaces: Mapping[str, Space | None], objects: Mapping[str, Any]
) -> list[str]:
    """What a mode that was set comes to, and what it leaves alone."""
    said: list[str] = []
    if wanted.mode is OffloadMode.BALANCED:
        place = "in memory" if wanted.keep_on == "memory" else "on disk"
        split = f"is larger than its share of the device, so layers that do not fit wait {place}"
        whole = "fits its share of the device and is not split"
        for name, (_, variant) in now.items():
            space = spaces[name]
            how = f" ({space})" if space is not None else ""
            said.append(f"{name} {whole if variant == 'whole' else split}{how}.")
    alone = [name for name in ("model", "clip", "vae") if name not in objects]
    return [*said, *([f"Not linked here, so no mode was set for: {', '.join(alone)}."] if alone else [])]


def _runs_otherwise(chosen: OffloadMode, report: OffloadReport) -> list[str]:
    """Of conflicts that do not stop the graph: what it does instead of the mode that was asked about."""
    return [
        f"{name}: the verdict is about mode {chosen.value}; this graph runs it {described(*report.now[name])}."
        for name, verdicts in report.verdicts.items()
        if report.now[name][0] is not chosen and any(v.level is not VerdictLevel.OK for v in verdicts)
    ]


def _variant(chosen: OffloadMode, settings: Mapping[str, Any]) -> str | None:
    """How the chosen mode would be carried out, by the node's widgets; None where they do not tell."""
    if chosen is OffloadMode.PARTIAL:
        return None
    if chosen is OffloadMode.BALANCED:
        return "split-disk" if settings.get("keep_on") == "disk" else "split"
    if chosen in (OffloadMode.SEQUENTIAL, OffloadMode.GROUP):
        named = {k: v for k, v in settings.items() if k in ("keep_on", "group_level", "use_stream")}
        if chosen is OffloadMode.SEQUENTIAL:
            named = {k: v for k, v in named.items() if k == "keep_on"}
        return OffloadSettings(chosen, **named).variant
    return ""


def _guarded(host: Any, key: str, obj: Any, guard: Guard, report: OffloadReport) -> Any:
    try:
        return host.guarded(obj, guard)
    except SpecError as err:
        report.notes.append(f"{key}: checked here, and not again before it runs: {' '.join(str(err).splitlines())}")
        return obj


def _unique(report: OffloadReport, name: str, key: str) -> str:
    """Components of two inputs may have one name."""
    return f"{key}.{name}" if name in report.now else name


def _worst(now: Any) -> OffloadMode:
    """The mode of the first component that the host keeps away from the device, if any."""
    return next((mode for mode, _ in now if mode is not OffloadMode.NONE), OffloadMode.NONE)
