"""`quantwire compat`: the compatibility table, and the probes that measure it on this machine."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..quantizers.compat.modes import Carrier, HostName, OffloadMode, VerdictLevel
from ..quantizers.errors import SpecError, near
from .compat_table import detailed, grouped
from .paths import require_file, require_writable, write_json

if TYPE_CHECKING:
    from ..quantizers.compat.probes.cell import Result
    from ..quantizers.compat.row import Cell, Row

OK, BAD = 0, 2
STANDARD_OUTPUT = Path("-")
PERIOD_S = 10.0
SLOWEST = 5  # cells that are named at the end of a run


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "compat",
        parents=[common],
        help="what happens to quantized weights under offload, and probes that measure it here",
        description=(
            "Print the compatibility table: carrier, format, mode and host, with verdict, cause and ways out; formats "
            "that behave alike are one paragraph, and --format shows each cell of one or some. --probe "
            "runs the installed libraries in every cell of accelerate and diffusers that the filters leave; the whole "
            "set takes some minutes. Exit code 2: --check found a cell whose outcome and verdict disagree."
        ),
    )
    parser.add_argument("--carrier", choices=[c.value for c in Carrier], help="quantwire, library or host")
    parser.add_argument("--format", metavar="PATTERN", help="formats such as bnb-nf4 or 'gguf-*'")
    parser.add_argument("--mode", choices=[m.value for m in OffloadMode], help="an offload mode")
    parser.add_argument("--host", choices=[h.value for h in HostName], help="standalone or comfyui")
    parser.add_argument("--verdict", choices=[v.value for v in VerdictLevel], help="only rows with it")
    parser.add_argument(
        "--json", type=Path, nargs="?", const=STANDARD_OUTPUT, metavar="FILE",
        help="the rows as a JSON list, to standard output without FILE",
    )  # fmt: skip
    parser.add_argument("--probe", action="store_true", help="run the probes and show outcomes beside verdicts")
    parser.add_argument("--write", action="store_true", help="with --probe: put what was measured into the table")
    parser.add_argument("--check", action="store_true", help="with --probe: fail where outcome and verdict disagree")
    parser.add_argument(
        "--require-all", action="store_true",
        help="with --check: fail also where a cell that was measured before cannot be probed, as for want of a library",
    )  # fmt: skip
    parser.set_defaults(handler=handle)


def handle(args: argparse.Namespace, report: dict[str, Any]) -> int:
    target, args.json = args.json, None  # a plain list, not the report of `run`
    _check_options(args, target)
    rows = _rows(args)
    if not rows:
        raise SpecError(_nothing(args))
    outcomes: dict[Cell, Result] = {}
    code = OK
    if args.probe:
        outcomes, code = _probe(args, rows)
        rows = _rows(args)
    if target is not None:
        _print_json([_to_dict(row, outcomes) for row in rows], target)
    elif not args.check:  # which names the cells that disagree, and nothing else
        for line in detailed(rows, outcomes) if args.probe or args.format else grouped(rows):
            print(line)
    return code


def _check_options(args: argparse.Namespace, target: Path | None) -> None:
    for name in ("write", "check"):
        if getattr(args, name) and not args.probe:
            raise SpecError(f"--{name} needs --probe: it is about what was just measured.")
    if args.require_all and not args.check:
        raise SpecError("--require-all needs --check.")
    if target is not None and target != STANDARD_OUTPUT:
        require_file(target, "--json")


def _rows(args: argparse.Namespace) -> list[Row]:
    from ..quantizers.compat.matrix import rows

    return [
        row
        for row in rows()
        if args.carrier in (None, row.carrier.value)
        and (args.format is None or fnmatchcase(row.format_id, args.format))
        and args.mode in (None, row.mode.value)
        and args.host in (None, row.host.value)
        and args.verdict in (None, row.verdict.value)
    ]


def _nothing(args: argparse.Namespace) -> str:
    """Why no cell fits: a format that is not in the table, with near names, or filters that exclude each other."""
    from ..quantizers.compat.matrix import rows

    names = dict.fromkeys(row.format_id for row in rows())
    if args.format is not None and not any(fnmatchcase(name, args.format) for name in names):
        return f"--format: no format of the table fits '{args.format}'.{near(args.format, names)}"
    return "No cell of the table fits all of these filters together.\nLeave some out."


def _probe(args: argparse.Namespace, rows: Sequence[Row]) -> tuple[dict[Cell, Result], int]:
    """Run the probes of the rows; their results, and the exit code that follows."""
    from ..quantizers.compat.matrix import MEASURED, forget, probe_cells
    from ..quantizers.compat.probes import record, runner
    from ..quantizers.compat.probes.net import compute_device

    wanted = {row.cell for row in rows if row.host is HostName.STANDALONE}
    everything = probe_cells()
    cells = [cell for cell in everything if cell in wanted]
    if not cells:
        raise SpecError(
            "No probe covers these rows: probes run the modes of host standalone, on layers that libraries make.\n"
            "Rows of host comfyui and of other packs' tensors (comfyui-gguf-*) are measured by tests/comfyui."
        )
    if args.write:
        require_writable(MEASURED.parent, "--write")
    progress = _Progress(len(cells))
    results = runner.run(cells, progress)
    progress.end()
    results = {cell: results[cell] for cell in cells}
    bad = record.disagreements(results, require_all=args.require_all) if args.check else []
    notes = record.reworded(results) if args.check else []
    if args.write:
        record.write(results, str(compute_device().type), everything)
        forget()
    for line in notes:
        print(f"note: {line}", file=sys.stderr)
    for line in bad:
        print(line, file=sys.stderr)
    if args.check:
        print(f"{len(results) - len(bad)} of {len(results)} cells agree with the table.", file=sys.stderr)
    return results, BAD if bad else OK


class _Progress:
    """A line on standard error now and then, and at the end what took longest."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._seconds: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._began = self._said = time.monotonic()

    def __call__(self, cell: Cell, result: Result, seconds: float) -> None:
        self._seconds[cell.key] = seconds
        self._counts[result.outcome] = self._counts.get(result.outcome, 0) + 1
        if time.monotonic() - self._said >= PERIOD_S:
            self._said = time.monotonic()
            self._say(f"{cell.key}: {result.outcome}")

    def end(self) -> None:
        self._say(", ".join(f"{count} {outcome}" for outcome, count in sorted(self._counts.items())))
        slowest = sorted(self._seconds.items(), key=lambda item: -item[1])[:SLOWEST]
        print("longest: " + ", ".join(f"{key} {s:.1f} s" for key, s in slowest), file=sys.stderr)

    def _say(self, text: str) -> None:
        passed = time.monotonic() - self._began
        print(f"{len(self._seconds)} of {self._total} cells after {passed:.0f} s; {text}", file=sys.stderr, flush=True)


def _to_dict(row: Row, outcomes: dict[Cell, Result]) -> dict[str, Any]:
    data = row.to_dict()
    result = outcomes.get(row.cell) if row.host is HostName.STANDALONE else None
    if result is not None:
        data |= {"outcome": result.outcome, "outcome_error": result.error, "outcome_reason": result.reason}
    return data


def _print_json(rows: list[dict[str, Any]], target: Path) -> None:
    if target == STANDARD_OUTPUT:
        print(json.dumps(rows, indent=2))
    else:
        write_json(target, rows, "--json")
