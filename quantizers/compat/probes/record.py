"""measured.json: what the probes saw, and where it and the table disagree."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..matrix import MEASURED, find_row, measured
from ..modes import HostName, VerdictLevel
from ..row import Cell
from .build import libraries
from .cell import PROBE_ERROR, Result


@dataclass(frozen=True)
class Disagreement:
    """A cell whose probe does not bear out what is written of it."""

    cell: Cell
    verdict: str
    result: Result
    reason: str

    def __str__(self) -> str:
        seen = self.result.error or self.result.reason
        outcome = f"{self.result.outcome}{f' ({seen})' if seen else ''}"
        return f"{self.cell.key}: the table says {self.verdict}, measured {outcome}: {self.reason}"


def disagreements(results: Mapping[Cell, Result], *, require_all: bool = False) -> list[Disagreement]:
    """Cells whose outcome fits neither their verdict nor what was measured before.

    Args:
        require_all: also cells that were skipped here and measured before, so that a check cannot pass by not probing.
    """
    found: list[Disagreement] = []
    for cell, result in results.items():
        row = find_row(cell.carrier, cell.format_id, cell.mode, host=HostName.STANDALONE, variant=cell.variant)
        verdict = row.verdict if row is not None else VerdictLevel.UNKNOWN
        reason = _against(cell, verdict, row.needs if row is not None else "", result, require_all)
        if reason:
            found.append(Disagreement(cell, verdict.value, result, reason))
    return found


def _against(cell: Cell, verdict: VerdictLevel, needs: str, result: Result, require_all: bool) -> str:
    before = measured().get(cell.key)
    if result.outcome == "skipped":
        missing = require_all and before is not None and before.outcome != "skipped"
        return f"measured before as {before.outcome}, and not probed here" if missing and before is not None else ""
    if result.error.startswith(PROBE_ERROR):
        return "the probe itself failed"
    if verdict is VerdictLevel.UNKNOWN:
        return "" if needs else "unknown, although this machine can probe it"
    if verdict is VerdictLevel.OK and result.outcome != "equal":
        return "ok is twice the output of the module without offload, bit by bit"
    if verdict is VerdictLevel.BLOCK and result.outcome != "error":
        return "blocked, although it runs"
    if before is None or before.outcome == "skipped":
        return ""
    if before.outcome != result.outcome:
        return f"measured before as {before.outcome}"
    # Any exception would do otherwise, also one of a probe that broke.
    if _type(before.error) != _type(result.error):
        return f"measured before as {_type(before.error)}"
    return ""


def _type(error: str) -> str:
    return error.partition(":")[0]


def reworded(results: Mapping[Cell, Result]) -> list[str]:
    """Errors of the same type as before with another text, which a new version of a library may bring."""
    return [
        f"{cell.key}: another text than before: {result.error}; before: {before.error}"
        for cell, result in results.items()
        if result.outcome == "error"
        and (before := measured().get(cell.key)) is not None
        and _type(before.error) == _type(result.error)
        and before.error != result.error
    ]


def write(results: Mapping[Cell, Result], device: str, known: Iterable[Cell]) -> None:
    """Put what was seen into measured.json; cells that were skipped here keep what was measured before.

    Args:
        known: every cell of the table; others are dropped from the file.
    """
    data: dict[str, Any] = json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.is_file() else {}
    cells: dict[str, Any] = data.get("cells", {})
    for cell, result in results.items():
        if result.outcome != "skipped" or cells.get(cell.key, {}).get("outcome", "skipped") == "skipped":
            cells[cell.key] = _entry(cell, result, device)
    keep = {cell.key for cell in known}
    cells = {key: entry for key, entry in cells.items() if key in keep}
    named = {name for entry in cells.values() for name in entry["libraries"]}
    used = {name for cell in results for name in packages(cell)}
    versions = {name: version for name, version in data.get("versions", {}).items() if name in named}
    versions |= {name: version for name in used & named if (version := _version(name))}
    _write_json(MEASURED, {"machine": machine(device), "versions": versions, "cells": cells})


def packages(cell: Cell) -> tuple[str, ...]:
    """PyPI packages whose code takes part in a cell."""
    host = {"none": (), "group": ("diffusers",)}.get(cell.mode.value, ("accelerate",))
    return tuple(dict.fromkeys((*libraries(cell.carrier, cell.format_id), *host, "torch")))


def machine(device: str) -> dict[str, str]:
    """What the outcomes may depend on beside versions."""
    return {
        "device": device,
        "python": ".".join(map(str, sys.version_info[:2])),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _entry(cell: Cell, result: Result, device: str) -> dict[str, Any]:
    entry: dict[str, Any] = {"outcome": result.outcome, "libraries": list(packages(cell)), "device": device}
    entry |= {"error": result.error} if result.error else {}
    entry |= {"reason": result.reason} if result.reason else {}
    entry |= {"also": list(result.also)} if result.also else {}
    return entry


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _write_json(path: Path, data: dict[str, Any]) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as out:
        out.write(_text(data))
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(path)


def _text(data: Mapping[str, Any]) -> str:
    """A line for each cell, so that a difference between two measurements can be read."""
    parts = (
        f"{json.dumps(key)}: {_lines(value) if key == 'cells' else json.dumps(value, sort_keys=True)}"
        for key, value in sorted(data.items())
    )
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _lines(cells: Mapping[str, Any]) -> str:
    lines = (f"{json.dumps(key)}: {json.dumps(entry, sort_keys=True)}" for key, entry in sorted(cells.items()))
    return "{\n" + ",\n".join(lines) + "\n}"
