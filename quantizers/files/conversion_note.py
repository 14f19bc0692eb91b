"""What a converted file tells of where it comes from, in its metadata."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from .sources import Source

PROVENANCE = "quantwire_conversion"
EARLIER = 3  # conversions before this one that are told of


def conversion_note(
    source: Source,
    path: Path,
    spec: str,
    layout: str,
    rules: list[str],
    scales: Path | None = None,
    values_crc32: str = "",
    versions: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """JSON value of the key `PROVENANCE`; without `versions` it follows from the files alone.

    Args:
        path: of the source, for its name.
        scales: the calibration that was used.
        values_crc32: checksum of the source's values.
    """
    files = [{k: v for k, v in f.items() if k in ("file", "size", "header")} for f in source.identity()]
    told: dict[str, Any] = {"name": path.name, "headers": files}
    if values_crc32:
        told["values_crc32"] = values_crc32
    found: dict[str, Any] = {"source": told, "spec": spec, "layout": layout, "rules": rules}
    if versions is not None:
        found["versions"] = dict(versions)
    if scales is not None:
        found["scales"] = {"name": scales.name, "sha256": hashlib.sha256(scales.read_bytes()).hexdigest()}
    before = _before(source.strings)
    return {**found, "before": before} if before else found


def _before(strings: Mapping[str, str]) -> list[Any]:
    """The source's own note and those in it, the latest first; a few, so that files do not grow by being converted."""
    note, found = _object(strings.get(PROVENANCE, "")), list[Any]()
    if not note:
        return []
    older: object = note.pop("before", None)
    found.append(note)
    if isinstance(older, str) and (one := _object(older)):  # a text in a text, as it was written once
        one.pop("before", None)
        found.append(one)
    elif isinstance(older, list):
        found += [n for n in cast("list[Any]", older) if isinstance(n, dict)]
    return found[:EARLIER]


def _object(text: str) -> dict[str, Any]:
    try:
        value: object = json.loads(text) if text else None
    except (ValueError, RecursionError):
        return {}
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}
