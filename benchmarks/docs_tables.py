"""Tables in Markdown, and the places of a page of docs/ that a script of this folder keeps up to date."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def write_between(page: Path, name: str, body: str) -> None:
    """Replace what stands between `<!-- NAME: start -->` and `<!-- NAME: stop -->`.

    Raises:
        ValueError: the page has not exactly one such place.
    """
    start, stop = f"<!-- {name}: start -->", f"<!-- {name}: stop -->"
    text = page.read_text(encoding="utf-8")
    if text.count(start) != 1 or text.count(stop) != 1 or text.index(stop) < text.index(start):
        raise ValueError(f"{page}: needs the lines '{start}' and '{stop}', once each and in this order.")
    before, after = text.partition(start)[0], text.partition(stop)[2]
    page.write_text(f"{before}{start}\n\n{body}\n\n{stop}{after}", encoding="utf-8")
