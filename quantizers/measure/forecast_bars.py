"""A forecast as a picture: for each mode a bar a stage, stacked by what takes the memory, against what is there."""

from __future__ import annotations

from typing import Any

from .forecast import Forecast
from .plots import BAD, COLOURS, GOOD, WARN, new_figure
from .units import GIB

_PARTS = (("weights", 0), ("LoRAs", 4), ("unpacked layer", 1), ("activations", 5))
_SHORT = {"text encoding": "text", "sampling": "sampling", "decoding": "decoding"}


def bars(found: Forecast) -> Any:
    """A matplotlib Figure of a forecast.

    Raises:
        BackendUnavailable: matplotlib is not installed.
    """
    rows = [(mode, stage) for mode in found.modes for stage in mode.stages]
    figure = new_figure(9.0, 1.8 + 0.3 * len(rows) + 0.15 * len(found.modes))
    axes = figure.add_subplot()
    unit, scale = ("GiB", GIB) if max(m.peak for m in found.modes) >= GIB / 2 else ("MiB", 2**20)
    places: list[float] = []
    at = 0.0
    for index, (mode, _) in enumerate(rows):
        at += 0.45 if index and rows[index - 1][0] is not mode else 0.0
        places.append(at + index)
    lefts = [0.0] * len(rows)
    for name, colour in _PARTS:
        widths = [_size(stage, name) / scale for _, stage in rows]
        if any(widths):
            axes.barh(places, widths, left=lefts, height=0.8, color=COLOURS[colour], label=name)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    errors = [stage.activations * stage.error_percent / 100 / scale for _, stage in rows]
    axes.errorbar(lefts, places, xerr=errors, fmt="none", ecolor="#333333", capsize=2, linewidth=1)
    axes.set_yticks(places, [f"{m.mode.value}: {_SHORT.get(s.name, s.name)}" for m, s in rows])
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    _limits(axes, found, scale, max(x + e for x, e in zip(lefts, errors, strict=True)))
    for place, (mode, stage), end in zip(places, rows, lefts, strict=True):
        fits = mode.offered and stage.peak <= found.room
        colour = (WARN if stage.streamed else GOOD) if fits else BAD
        word = (
            ("fits" if not mode.streams else "fits, streams") if fits else "breaks" if not mode.offered else "too much"
        )
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.9}
        said = f"{stage.peak / scale:.3g} {word}"
        axes.annotate(
            said, (end, place), (7, 0), textcoords="offset points", va="center", fontsize=7, color=colour, bbox=box
        )
    axes.set_title(_title(found), fontsize=10, loc="left")
    axes.legend(fontsize=7, loc="lower right", framealpha=0.85)
    return figure


def _size(stage: Any, name: str) -> int:
    return {
        "weights": stage.weights,
        "LoRAs": stage.loras,
        "unpacked layer": stage.buffer,
        "activations": stage.activations,
    }[name]


def _limits(axes: Any, found: Forecast, scale: float, longest: float) -> None:
    """Lines at what is usable and what the device has, where they are near enough to be seen beside the bars."""
    room, total = found.room / scale, found.device.total_nbytes / scale
    right = longest * 1.35
    if room <= longest * 4:
        axes.axvline(room, color=BAD, linewidth=1.2, linestyle="--", label=f"usable {room:.3g}")
        right = max(right, room * 1.1)
    if total <= right * 1.05:
        axes.axvline(total, color="#333333", linewidth=1.0, label=f"device {total:.3g}")
        right = max(right, total * 1.05)
    axes.set_xlim(0, right)


def _title(found: Forecast) -> str:
    s = found.shape
    frames = f", {s.frames} frames" if s.frames > 1 else ""
    batch = f", batch {s.batch}" if s.batch > 1 else ""
    size = f"{s.width} x {s.height}{frames}{batch}"
    return f"{found.headline.split(';')[0]}\n{size}, {found.host.value}, {found.device.name}"
