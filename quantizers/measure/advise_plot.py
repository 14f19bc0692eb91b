"""Advice as a picture: every format by the size of the weights and its measured quality, coloured by its verdict."""

from __future__ import annotations

from typing import Any

from .advise import FULL, Advice, Place, Row
from .plots import BAD, COLOURS, GOOD, WARN, new_figure
from .units import GIB

_LOOKS = {
    Place.FITS: (GOOD, "fits"),
    Place.STREAMS: (WARN, "fits by copying weights"),
    Place.FEW_BITS: (COLOURS[5], "fits, below 4 bits"),
    Place.TIGHT: (COLOURS[3], "fits, if the activations are no larger"),
    Place.TOO_LARGE: (BAD, "does not fit"),
    Place.MISSING: (COLOURS[4], "library missing"),
    Place.NOT_RUNNABLE: (COLOURS[7], "not runnable here"),
}


def scatter(advice: Advice) -> Any:
    """A matplotlib Figure; native products are squares, formats that nothing beats at their size are named.

    Raises:
        BackendUnavailable: matplotlib is not installed.
    """
    figure = new_figure(9.0, 5.4)
    axes = figure.add_subplot()
    rows = [row for row in advice.rows if row.format_id != FULL and row.score_db is not None]
    unit, scale = ("GiB", GIB) if advice.full_nbytes >= GIB / 2 else ("MiB", 2**20)
    for place, (colour, label) in _LOOKS.items():
        for native, marker in ((True, "s"), (False, "o")):
            found = [row for row in rows if row.place is place and row.native is native]
            if found:
                axes.scatter(
                    [row.nbytes / scale for row in found],
                    [row.score_db for row in found],
                    s=34, marker=marker, color=colour, label=f"{label}, native" if native else label,
                )  # fmt: skip
    best = advice.best_format
    for row in _named(rows, best):
        axes.annotate(
            row.format_id, (row.nbytes / scale, row.score_db), (-6, 5), textcoords="offset points", fontsize=7,
            ha="right", fontweight="bold" if row is best else "normal",
        )  # fmt: skip
    if best is not None and best.score_db is not None:
        ring = {"facecolors": "none", "edgecolors": "#000000", "label": "first of the ranking"}
        axes.scatter([best.nbytes / scale], [best.score_db], s=150, **ring)
    if advice.budget:
        axes.axvline(advice.budget / scale, color=BAD, linestyle="--", linewidth=1.2, label="budget")
    left, right = axes.get_xlim()
    axes.set_xlim(left - 0.12 * (right - left), right)
    axes.set_xlabel(f"weights of {', '.join(advice.targets)}, {unit}")
    axes.set_ylabel("measured quality, dB (6 more is half the error)")
    room = advice.device.usable_nbytes / GIB
    axes.set_title(f"{advice.device.name}, {room:.3g} GiB usable, {advice.host.value}", fontsize=10, loc="left")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, loc="lower right", framealpha=0.85)
    return figure


def _named(rows: list[Row], best: Row | None) -> list[Row]:
    """The first of the ranking, and those on the frontier whose names do not run into a named one's."""
    if not rows:
        return []
    sizes, scores = [row.nbytes for row in rows], [_score(row) for row in rows]
    wide, high = (max(sizes) - min(sizes)) or 1, (max(scores) - min(scores)) or 1.0
    found = [best] if best is not None else []
    for row in reversed(_frontier(rows)):
        near = (
            abs(row.nbytes - other.nbytes) < 0.13 * wide and abs(_score(row) - _score(other)) < 0.025 * high
            for other in found
        )
        if row is not best and not any(near):
            found.append(row)
    return found


def _frontier(rows: list[Row]) -> list[Row]:
    """Those that no smaller or equally large one beats, smallest first."""
    found: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.nbytes, -_score(row))):
        if not found or _score(row) > _score(found[-1]):
            found.append(row)
    return found


def _score(row: Row) -> float:
    return row.score_db if row.score_db is not None else float("-inf")
