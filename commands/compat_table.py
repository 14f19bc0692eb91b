"""The compatibility table as text: formats that behave alike together, or each cell of one format.

What stops comes first, in both: groups with a block before the others, and in a group or format its blocks first.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from ..quantizers.compat.modes import VARIANTS, Carrier, HostName, OffloadMode, VerdictLevel

if TYPE_CHECKING:
    from ..quantizers.compat.probes.cell import Result
    from ..quantizers.compat.row import Cell, Row

WIDTH = 120
EVIDENCE = {"probed": "measured", "documented": "documented", "none": "not measured"}
HINT = "`quantwire compat --format FORMAT` shows each cell of a format: notes, the library's own error, ways out."
_ORDER = (VerdictLevel.BLOCK, VerdictLevel.WARN, VerdictLevel.UNKNOWN, VerdictLevel.OK)
_REASONED = (VerdictLevel.BLOCK, VerdictLevel.WARN)
_Formats = dict[str, list["Row"]]  # format id -> its rows


def grouped(rows: Iterable[Row]) -> Iterator[str]:
    """Lines of the table in which formats with the same verdicts, evidence and causes share a paragraph."""
    for host, own in groupby(rows, key=lambda r: r.host):
        groups = _groups(own)
        for carrier, formats in sorted(groups, key=lambda g: min(map(_rank, next(iter(g[1].values()))))):
            yield from _wrapped(f"{host.value} / {carrier.value} / ", ", ".join(formats), indent=4)
            yield from _group(formats)
            yield ""
    yield from _wrapped("", HINT)


def detailed(rows: Iterable[Row], outcomes: Mapping[Cell, Result]) -> Iterator[str]:
    """Lines of the table with every cell; what neighbouring cells have in common is said once, below them.

    Args:
        outcomes: of probes that just ran, by cell.
    """
    for (host, carrier, format_id), found in groupby(rows, key=lambda r: (r.host, r.carrier, r.format_id)):
        yield f"{host.value} / {carrier.value} / {format_id}"
        for _, alike in groupby(sorted(found, key=_rank), key=_said):
            cells = list(alike)
            yield from (_line(row, outcomes) for row in cells)
            for text in _said(cells[0])[1:]:
                yield from _wrapped(" " * 6, text, 8 if text.startswith("- ") else 6)
        yield ""


# --- groups ---


def _groups(rows: Iterable[Row]) -> list[tuple[Carrier, _Formats]]:
    by_format: dict[tuple[Carrier, str], list[Row]] = {}
    for row in rows:
        by_format.setdefault((row.carrier, row.format_id), []).append(row)
    groups: dict[tuple[object, ...], tuple[Carrier, _Formats]] = {}
    for (carrier, format_id), own in by_format.items():
        library = "" if carrier is Carrier.QUANTWIRE else format_id.partition("-")[0]
        key = (carrier, library, *((r.mode, r.variant, _evidence(r), *_alike(r)) for r in own))
        groups.setdefault(key, (carrier, {}))[1][format_id] = own
    return list(groups.values())


def _group(formats: _Formats) -> Iterator[str]:
    blocks: dict[tuple[object, ...], list[int]] = {}
    first = next(iter(formats.values()))
    for i in sorted(range(len(first)), key=lambda i: _rank(first[i])):
        blocks.setdefault(_alike(first[i]), []).append(i)
    for indices in blocks.values():
        cells = [first[i] for i in indices]
        head = f"  {cells[0].verdict.value:8}"
        cells.sort(key=lambda row: list(EVIDENCE).index(row.evidence))
        known = ((found, list(alike)) for found, alike in groupby(cells, key=_evidence))
        yield from _wrapped(head, "; ".join(f"{_named(alike)} ({found})" for found, alike in known), len(head))
        if cells[0].verdict in _REASONED:
            yield from _wrapped("", f"{cells[0].cause}.", len(head))
    yield from _ways_out([[row for row in own if row.verdict in _REASONED] for own in formats.values()])


def _alike(row: Row) -> tuple[object, ...]:
    """What cells must have in common to be one entry."""
    return row.verdict, row.cause if row.verdict in _REASONED else ""


def _ways_out(formats: Sequence[Sequence[Row]]) -> Iterator[str]:
    """Those that all formats of a group have, first what helps in most cells; the cells are named where not all."""
    offers = [_offers(cells, len(formats) > 1) for cells in formats]
    shared = [text for text in offers[0] if all(text in other for other in offers)]
    if shared:
        yield "  ways out"
    for text in sorted(shared, key=lambda text: -len(offers[0][text])):
        cells = offers[0][text]
        where = "" if len(cells) == len(formats[0]) else f"{_named(cells)}: "
        yield from _wrapped("  - ", where + text, 4)


def _offers(cells: Iterable[Row], several: bool) -> dict[str, list[Row]]:
    offers: dict[str, list[Row]] = {}
    for row in cells:
        for remedy in row.remedies:
            text = remedy.text
            if several and remedy.cell.format_id == row.format_id:
                text = text.replace(f"format {row.format_id}", "the same format")
            offers.setdefault(text, []).append(row)
    return offers


def _named(cells: Iterable[Row]) -> str:
    """Modes, with their variants where these are not all."""
    variants: dict[OffloadMode, list[str]] = {}
    for row in cells:
        variants.setdefault(row.mode, []).append(row.variant)
    return "; ".join(
        mode.value if set(VARIANTS[mode]) == set(found) else f"{mode.value} {', '.join(found)}"
        for mode, found in variants.items()
    )


# --- cells ---


def _said(row: Row) -> tuple[str, ...]:
    """The verdict, and what is said below the cells that have all of it in common."""
    if row.verdict not in _REASONED:
        return (row.verdict.value,)
    error = (f"The library's own error: {row.raw_error}",) if row.raw_error else ()
    cause = f"{row.cause}. {row.note}".strip()
    return (row.verdict.value, cause, *error, *(f"- {remedy.text}" for remedy in row.remedies))


def _line(row: Row, outcomes: Mapping[Cell, Result]) -> str:
    name = f"{row.mode.value} {row.variant}".rstrip()
    line = f"  {name:22} {row.verdict.value:8} {_evidence(row)}"
    result = outcomes.get(row.cell) if row.host is HostName.STANDALONE else None
    if result is None:
        return line
    seen = result.error or result.reason
    return f"{line:52} here: {result.outcome}{f', {seen}' if seen else ''}"


# --- both ---


def _rank(row: Row) -> int:
    return _ORDER.index(row.verdict)


def _evidence(row: Row) -> str:
    needs = f", needs {row.needs}" if row.needs and row.evidence != "probed" else ""
    return EVIDENCE[row.evidence] + needs


def _wrapped(head: str, text: str, indent: int = 0) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=head or " " * indent,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
