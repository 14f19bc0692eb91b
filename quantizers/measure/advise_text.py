"""Advice as text: the verdict, the ranking as a table, what is missing, the presets, and how to read it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator

from .advise import FULL, Advice, Place, Row
from .measured import how_measured
from .parts import Role
from .units import show_size

COLUMNS = 118
_SECTIONS = {
    Place.FITS: "Fits, and stays on the device",
    Place.STREAMS: "Fits by copying weights at every step, which is slow",
    Place.FEW_BITS: "Fits, below 4 bits: the last resort",
    Place.TIGHT: "Fits only if the activations are not larger than forecast",
    Place.TOO_LARGE: "Does not fit",
}


def text(advice: Advice, limit: int = 0) -> str:
    """At most 120 columns, verdict first; at most `limit` formats of the best place, 0 being all."""
    hint = _wrapped(advice.hint) if advice.hint else []
    lines = [*_wrapped(headline(advice)), *hint, *_table(advice, limit), *_missing(advice), *_not_runnable(advice)]
    return "\n".join([*lines, *_tiers(advice), *_reading(advice, limit)])


def headline(advice: Advice) -> str:
    """What to take, and why that one."""
    what = f"{', '.join(advice.targets)} ({show_size(advice.full_nbytes)} at full precision)"
    room = f"{advice.device.name}, {show_size(advice.device.usable_nbytes)} usable, {advice.host.value}"
    best = advice.best
    if best is None:
        least = min((row for row in advice.rows if row.place is Place.TOO_LARGE), key=_peak, default=None)
        more = f": {least.format_id} comes nearest, {least.forecast.headline}" if least else ""
        return f"Nothing fits for {what} on {room}{more}"
    made = advice.best_format
    if best.format_id == FULL:
        beside = f"; of the formats {made.format_id} is best, {_of(made, advice.role)}" if made else ""
        return f"{FULL} {best.verdict} for {what} on {room}{beside}"
    return f"{best.format_id} for {what} on {room}: {_of(best, advice.role)}"


def _of(row: Row, role: Role) -> str:
    runs = f", {row.running.level.value}" if row.running else ""
    return f"{show_size(row.nbytes)}, {row.verdict}{_quality(row, role)}{runs}"


def _quality(row: Row, role: Role) -> str:
    if row.format_id == FULL:
        return ""
    q = row.quality
    if not q.measured:
        return ", never measured"
    if role is Role.TEXT and q.output_db(role) is not None:
        return f", cosine error {q.cosine_error:.4f}"
    seen = f", measured PSNR {q.psnr_db:.1f} dB" if role is not Role.TEXT and q.psnr_db is not None else ""
    return seen or f", measured SQNR {q.sqnr_db:.1f} dB"


def _peak(row: Row) -> int:
    return row.mode.peak


def _table(advice: Advice, limit: int) -> Iterator[str]:
    text_model = advice.role is Role.TEXT
    seen = "cos. error" if text_model else "PSNR"
    computing = "encoding" if text_model else "sampling"  # the peak then: that of the whole run may be of another part
    yield f"{'':3} {'format':23}{'weights':>10}{computing:>11}{seen:>11}{'SQNR':>6}{'score':>7}  {'runs':12} offload"
    number, most = 0, limit
    for place, title in _SECTIONS.items():
        rows = [row for row in advice.rows if row.place is place]
        if not rows:
            continue
        yield f"{title}:"
        for index, row in enumerate(rows):
            number += row.usable
            if not limit or index < most:
                yield _line(row, number if row.usable else 0, text_model)
        if limit and len(rows) > most:
            yield f"{'':3} and {len(rows) - most} more"
        most = -(-limit // 3)  # whoever has something better wants less of the rest


def _line(row: Row, number: int, text_model: bool) -> str:
    q = row.quality
    if text_model:
        seen = "-" if q.output_db(Role.TEXT) is None else f"{q.cosine_error:.4f}"
    else:
        seen = "-" if q.psnr_db is None else f"{q.psnr_db:.1f}"
    sqnr = "-" if q.sqnr_db is None else f"{q.sqnr_db:.1f}"
    exact = row.format_id == FULL
    score = "exact" if exact else "-" if row.score_db is None else f"{row.score_db:.1f}"
    runs = "16 bits" if row.running is None else row.running.level.value
    left = f"; {row.left} layers stay" if row.left else ""
    unmeasured = "" if exact or q.measured else "; never measured"
    head = f"{number or '':>3} {row.format_id:23}{show_size(row.nbytes):>10}{show_size(row.computing_nbytes):>11}"
    return f"{head}{seen:>11}{sqnr:>6}{score:>7}  {runs:12} {_offload(row)}{left}{unmeasured}"[:COLUMNS]


def _offload(row: Row) -> str:
    """The verdict, shorter where the section says the rest."""
    if not row.usable or not row.mode.streams:
        return row.verdict
    return f"{row.mode.mode.value}, {show_size(row.mode.streamed)} a step"


def _missing(advice: Advice) -> Iterator[str]:
    groups: dict[tuple[str, str], list[str]] = {}
    for row in advice.rows:
        if row.place is Place.MISSING:
            groups.setdefault((row.state.reason, row.state.remedy), []).append(row.format_id)
    if groups:
        yield "Not to be had on this machine:"
    for (reason, remedy), ids in groups.items():
        yield from _wrapped(f"  {', '.join(ids)}: {reason} {remedy}".rstrip(), "    ")


def _not_runnable(advice: Advice) -> Iterator[str]:
    groups: dict[str, list[str]] = {}
    for row in advice.rows:
        if row.place is Place.NOT_RUNNABLE and row.running is not None:
            groups.setdefault(f"{row.running.why} ({row.running.source})", []).append(row.format_id)
    if groups:
        yield f"Not runnable on {advice.device.name}:"
    for why, ids in groups.items():
        yield from _wrapped(f"  {', '.join(ids)}: {why}", "    ")


def _tiers(advice: Advice) -> Iterator[str]:
    if advice.tiers:
        yield "Best by memory, on the same kind of device:"
    for tier, row in advice.tiers:
        said = "nothing fits" if row is None else f"{row.format_id}, {show_size(row.nbytes)}, {row.verdict}"
        yield f"  {tier!s:>6}  {said}"


def _reading(advice: Advice, limit: int) -> Iterator[str]:
    usable = [row for row in advice.rows if row.usable]
    yield from _products(usable[: limit or None])
    costs = [row for row in usable[: limit or None] if row.running and row.quality.rounding_db(row.running.activations)]
    if costs:
        said = (f"{row.format_id} {row.quality.rounding_db(_activations(row)):.1f} dB" for row in costs)
        yield from _wrapped(f"Scores count what rounded activations cost in native products: {', '.join(said)}")
    yield from _wrapped(
        "Score in dB, 6 more is half the error: mean of what was seen at the output of a small trained model and what "
        "the SQNR lets expect there. They rank formats, and do not foretell the numbers of this model. "
        f"Measured by {how_measured()}."
    )
    left = next((row for row in advice.rows if row.left), None)
    if left is not None:
        yield from _wrapped(
            f"Layers that stay at full precision in {left.format_id}: {left.left}, as {left.left_reason}"
        )
    for note in advice.notes:
        yield from _wrapped(note)


def _activations(row: Row) -> str:
    return row.running.activations if row.running else ""


def _products(rows: Iterable[Row]) -> Iterator[str]:
    """Which product the formats take here, those of one kind together."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        if row.running is not None:
            groups.setdefault(str(row.running), []).append(row.format_id)
    for said, ids in groups.items():
        more = f" and {len(ids) - 4} more" if len(ids) > 5 else ""
        yield from _wrapped(f"{', '.join(ids[:4] if more else ids)}{more}: {said}")


def _wrapped(line: str, indent: str = "  ") -> list[str]:
    return textwrap.wrap(line, COLUMNS, subsequent_indent=indent) or [""]
