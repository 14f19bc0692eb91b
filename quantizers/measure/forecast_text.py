"""A forecast as text: the verdict, the weights, a table of modes and stages, and notes."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from .forecast import Forecast, ModeForecast
from .stages import Held
from .units import show_size

COLUMNS = 118


def text(found: Forecast) -> str:
    """At most 120 columns, verdict first."""
    return "\n".join([*_wrapped(found.headline), *_weights(found), *_modes(found), *_notes(found)])


def _weights(found: Forecast) -> Iterator[str]:
    yield f"Weights: {show_size(found.nbytes)}"
    wide = max(len(h.part.name) for h in found.held)
    for h in found.held:
        yield f"  {h.part.name[:30]:{min(wide, 30)}}  {show_size(h.nbytes):>10}  {_what(h)}"[:COLUMNS]


def _what(h: Held) -> str:
    words = [h.part.role.value, h.part.family, h.format_id or "as it is"]
    if h.nbytes != h.part.full_nbytes:
        words.append(f"{show_size(h.part.full_nbytes)} at full precision")
    if h.part.assumed:
        words.append(f"assumed: {h.part.source}")
    return ", ".join(w for w in words if w)


def _modes(found: Forecast) -> Iterator[str]:
    heads = ("weights", "unpacked", "LoRAs", "activations", "peak")
    yield f"{'Mode':12}{'stage':15}" + "".join(f" {h:>11}" for h in heads) + "  verdict"
    for mode in found.modes:
        for index, s in enumerate(mode.stages):
            sizes = (s.weights, s.buffer, s.loras, s.activations, s.peak)
            said = _said(found, mode) if index == 0 else ""
            name = mode.mode.value if index == 0 else ""
            yield f"{name:12}{s.name:15}" + "".join(f" {show_size(n):>11}" for n in sizes) + f"  {said}"


def _said(found: Forecast, mode: ModeForecast) -> str:
    if not mode.offered:
        return "breaks these weights"
    if not mode.fits:
        return f"{show_size(mode.peak - found.room)} too much"
    return "fits, streams" if mode.streams else "fits"


def _notes(found: Forecast) -> Iterator[str]:
    for mode in found.modes:
        if mode.cause:
            yield from _wrapped(f"{mode.mode.value}: {mode.level.value}: {mode.cause}")
    said: dict[str, None] = {}
    for s in found.nearest.stages:
        if s.how:
            said[f"activations of {s.component}: +- {s.error_percent:.0f} %, {s.how}"] = None
    for note in (*said, *found.notes):
        yield from _wrapped(note)


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, COLUMNS, subsequent_indent="  ") or [""]
