"""Processes side by side, one for each group of cells that share a library, and what became of those that died."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..row import Cell
from .cell import PROBE_ERROR, Result
from .worker import AGAIN

SIDE_BY_SIDE = 2  # processes: one a core on the smallest machines that run this
CELL_S = 240.0  # the longest that one cell may take; quanto compiles C++ for a minute
POLL_S = 0.1
TAIL = 2000  # characters of what a process printed that are searched for its last words
ROOT = Path(__file__).parents[3]
# Types of GGUF whose tables take seconds to make, so that they do not all fall to one process.
SLOW = ("gguf-iq1", "gguf-iq2", "gguf-iq3")
# Largest first, so that the last process to end is a short one.
ORDER = ("gguf-slow", "quanto", "gguf", "nncf", "sdnq", "torchao", "bnb", "comfy", "layerwise")
# The package may be a folder of ComfyUI's custom nodes, under any name, and is found by its path.
START = """
import sys, types
package = types.ModuleType("quantwire")
package.__path__ = [sys.argv.pop(1)]
sys.modules["quantwire"] = package
from quantwire.quantizers.compat.probes.worker import main
sys.exit(main(sys.argv[1:]))
"""

Progress = Callable[[Cell, Result, float], None]


@dataclass
class _Job:
    """Cells that share a process; `left` are those without a result."""

    name: str
    left: deque[Cell]
    folder: Path
    process: subprocess.Popen[bytes] | None = None
    read: int = 0
    tries: int = 0
    in_flight: Cell | None = None
    since: float = 0.0


def run(
    cells: Iterable[Cell], progress: Progress | None = None, *, side_by_side: int = SIDE_BY_SIDE, cell_s: float = CELL_S
) -> dict[Cell, Result]:
    """Run cells in processes of their own.

    A process that ends in the middle of a cell, or takes longer than `cell_s` seconds for it, makes that cell an error;
    the cells after it run in a new process.

    Args:
        progress: called with each cell, its result and the seconds it took.
    """
    results: dict[Cell, Result] = {}
    with tempfile.TemporaryDirectory(prefix="quantwire-probes-") as folder:
        waiting = deque(_jobs(cells, Path(folder)))
        running: list[_Job] = []
        try:
            while waiting or running:
                while waiting and len(running) < side_by_side:
                    running.append(waiting.popleft())
                    _start(running[-1])
                for job in list(running):
                    if not _poll(job, results, progress, cell_s):
                        running.remove(job)
                time.sleep(POLL_S)
        finally:
            for job in running:
                if job.process is not None:
                    _end(job.process)
    return results


def group_of(cell: Cell) -> str:
    """The process that a cell belongs to."""
    backend = cell.format_id.partition("-")[0]
    return f"{backend}-slow" if cell.format_id.startswith(SLOW) else backend


def _jobs(cells: Iterable[Cell], folder: Path) -> list[_Job]:
    jobs: dict[str, _Job] = {}
    for cell in cells:
        name = group_of(cell)
        jobs.setdefault(name, _Job(name, deque(), folder / name)).left.append(cell)
    known = {name: i for i, name in enumerate(ORDER)}
    return sorted(jobs.values(), key=lambda job: known.get(job.name, len(known)))


def _start(job: _Job) -> None:
    job.tries += 1
    job.folder.mkdir(exist_ok=True)
    job.read, job.in_flight, job.since = 0, None, time.monotonic()
    given, lines = job.folder / f"cells{job.tries}.json", job.folder / f"lines{job.tries}"
    given.write_text(json.dumps([[c.carrier.value, c.format_id, c.mode.value, c.variant] for c in job.left]))
    lines.touch()
    environment = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1", **os.environ}
    with (job.folder / f"log{job.tries}").open("wb") as log:
        job.process = subprocess.Popen(
            [sys.executable, "-c", START, str(ROOT), str(given), str(lines)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and those that it started, such as compilers."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def _poll(job: _Job, results: dict[Cell, Result], progress: Progress | None, cell_s: float) -> bool:
    """Take in what a job wrote; False when it has no cells left."""
    assert job.process is not None
    code = job.process.poll()  # before reading: what a process wrote before it ended is then all there
    for line in _lines(job):
        _take(job, line, results, progress)
    if code is None and time.monotonic() - job.since > cell_s:
        _end(job.process)
        _charge(job, f"Timeout: no result after {cell_s:.0f} s", results, progress)
    elif code is None:
        return True
    elif job.left and (code != AGAIN or job.in_flight is not None):
        _charge(job, f"Crash: the process {_ending(code)}{_last_words(job)}", results, progress)
    if job.left:
        _start(job)
    return bool(job.left)


def _lines(job: _Job) -> list[dict[str, Any]]:
    with (job.folder / f"lines{job.tries}").open("rb") as lines:
        lines.seek(job.read)
        text = lines.read()
    complete = text[: text.rfind(b"\n") + 1]
    job.read += len(complete)
    return [json.loads(line) for line in complete.splitlines()]


def _take(job: _Job, line: dict[str, Any], results: dict[Cell, Result], progress: Progress | None) -> None:
    took, job.since = time.monotonic() - job.since, time.monotonic()
    if "start" in line:
        job.in_flight = job.left[0]
        return
    cell = job.left.popleft()
    given = line["result"]
    results[cell] = Result(given["outcome"], given["error"], given["reason"], tuple(given["also"]))
    job.in_flight = None
    if progress is not None:
        progress(cell, results[cell], took)


def _charge(job: _Job, text: str, results: dict[Cell, Result], progress: Progress | None) -> None:
    """Make the cell in flight an error; all that are left, where the process could not even begin with one."""
    charged = [job.left.popleft()] if job.in_flight is not None else list(job.left)
    if job.in_flight is None:
        job.left.clear()
        text = f"{PROBE_ERROR}: before any cell began, {text}"
    for cell in charged:
        results[cell] = Result("error", text)
        if progress is not None:
            progress(cell, results[cell], time.monotonic() - job.since)


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


def _last_words(job: _Job) -> str:
    text = (job.folder / f"log{job.tries}").read_bytes()[-TAIL:].decode("utf-8", "replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f": {lines[-1][:200]}" if lines else ""
