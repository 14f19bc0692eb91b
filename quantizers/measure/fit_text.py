"""A fit as text: the verdict, what each part becomes and why, what is expected, and how to get it in each host."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..compat.modes import HostName
from .fit import Pick
from .parts import Role
from .units import show_size

if TYPE_CHECKING:
    from .fitted import Fit
    from .forecast import ModeForecast

COLUMNS = 118
# ComfyUI's modes as who starts it knows them.
_COMFYUI_MODES = {
    "dynamic": "start ComfyUI without options that change its memory mode (dynamic VRAM)",
    "partial": "start ComfyUI with --disable-dynamic-vram, or as it is where it has no dynamic VRAM",
    "novram": "start ComfyUI with --novram",
    "none": "nothing to set",
}


def text_of(found: Fit) -> str:
    """At most 120 columns, verdict first."""
    lines = [_verdict(found), *(f"WARNING: {w}" for w in found.warnings), *_picks(found), _expected(found)]
    lines += [*_how(found), *_otherwise(found), *found.notes]
    return "\n".join(row for line in lines for row in textwrap.wrap(line, COLUMNS, subsequent_indent="    "))


def _verdict(found: Fit) -> str:
    model = found.choice.model
    mode = f"mode {found.mode}"
    if found.choice.outcome.streams:
        mode += f", {show_size(_mode(found).streamed)} of weights copied at every step"
    shape, d = found.shape, found.device
    video = f", {shape.frames} frames" if shape.frames > 1 else ""
    batch = f", batch {shape.batch}" if shape.batch > 1 else ""
    at = f"{shape.width}x{shape.height}{video}{batch}, cfg {shape.cfg:g}"
    where = f"{d.name}, {show_size(d.total_nbytes)}"
    return f"{called(model)} ({mode}) for {model.part.source} at {at} on {where}"


def _mode(found: Fit) -> ModeForecast:
    return next(m for m in found.found.modes if m.mode.value == found.mode)


def called(pick: Pick) -> str:
    """The format of a pick as people read it."""
    return pick.candidate.name


def _picks(found: Fit) -> Iterator[str]:
    wide = max(len(pick.part.name) for pick in found.choice.picks)
    for pick in found.choice.picks:
        part = pick.part
        of = "" if pick.nbytes == part.held_nbytes else f" of {show_size(part.held_nbytes)}"
        assumed = f", assumed: {part.source}" if part.assumed else ""
        why = f": {pick.why}" if pick.why else ""
        copied = next((s.streamed for s in _mode(found).stages if s.component == part.name), 0)
        if copied and part.role is not Role.DIFFUSION:
            why += f"; {show_size(copied)} of it are copied to the device for each prompt"
        yield f"  {part.name:{wide}}  {called(pick)}, {show_size(pick.nbytes)}{of}{assumed}{why}"
        if pick.candidate.spec is not None:
            yield f"  {'':{wide}}  {pick.candidate.note}"


def _expected(found: Fit) -> str:
    o, room = found.choice.outcome, found.found.room
    error = f" +- {show_size(_mode(found).error_nbytes)}" if _mode(found).error_nbytes else ""
    return f"expected peak {show_size(o.peak_nbytes)}{error} while {o.stage}, of {show_size(room)} that may be used"


def _how(found: Fit) -> Iterator[str]:
    """What to do by hand; FitModel does the same."""
    model = found.choice.model
    spec = model.candidate.spec
    if found.host is HostName.COMFYUI:
        load = "Load Diffusion Model" if not model.part.formats else "Load Quantized"
        node = load if spec is None else f"Load and Quantize with format {spec.format_id}{_rules(model)}"
        texts = [p for p in found.choice.picks if p.part.role is Role.TEXT and p.candidate.spec is not None]
        more = "".join(f"; Quantize Text Encoder with {called(p)} for {p.part.name}" for p in texts)
        yield f"ComfyUI: Fit Model in the place of Load Diffusion Model, or {node}{more}; {_COMFYUI_MODES[found.mode]}"
        return
    mode = "" if found.mode == "none" else f" and OffloadCompat with mode {found.mode} and set_mode"
    node = ("LoadQuantized" if model.part.formats else "UNETLoader") if spec is None else "LoadAndQuantize"
    with_format = "" if spec is None else f" with format {spec.format_id}{_rules(model)}"
    yield f"quantwire run: FitModel in the place of UNETLoader, or {node}{with_format}{mode}"


def _rules(pick: Pick) -> str:
    spec = pick.candidate.spec
    return " and the rules of the recipe" if spec is not None and spec.rules else ""


def _otherwise(found: Fit) -> Iterator[str]:
    if found.full is None:
        return
    model = found.full.model
    if model.candidate.spec is None:
        yield f"from a full-precision file: it would fit as it is, {show_size(model.nbytes)}"
    else:
        yield (
            f"from a full-precision file: {called(model)}, {show_size(model.nbytes)}, mode {found.full.outcome.mode}; "
            f"{model.candidate.note}"
        )
