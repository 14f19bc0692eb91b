"""One cell: the module twice, once without offload and once under the mode, two passes each, compared bit by bit."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..modes import Carrier, OffloadMode
from ..row import Cell
from .build import build, widths
from .held import KeptNear, require_away, spoil
from .moving import move
from .net import compute_device, has_streams, inputs
from .optional import Unavailable
from .place import ProbeError, place

Outcome = Literal["equal", "differs", "error", "skipped"]
PASSES = 2
PROBE_ERROR = ProbeError.__name__  # an outcome that begins so says nothing about the library
LENGTH = 300  # of an error's first line
# quanto compiles its unpacking at the first forward pass of some formats.
NO_COMPILER = "Error building extension"


@dataclass(frozen=True)
class Result:
    """What became of a cell.

    Attributes:
        error: `Type: first line of the message`.
        reason: why it was skipped.
        also: further errors, where the layers of other widths have others.
    """

    outcome: Outcome
    error: str = ""
    reason: str = ""
    also: tuple[str, ...] = ()


def probe(cell: Cell) -> Result:
    """Run one cell in this process."""
    device = compute_device()
    if cell.variant.endswith("stream") and not has_streams(device):
        return Result("skipped", reason="copying on a stream of its own needs an accelerator, which this machine lacks")
    results = [_probe(cell.carrier, cell.format_id, width, cell.mode, cell.variant) for width in _widths(cell)]
    worst = next(r for outcome in ("skipped", "error", "differs", "equal") for r in results if r.outcome == outcome)
    also = dict.fromkeys(r.error for r in results if r.error and not r.error.startswith(PROBE_ERROR))
    return Result(worst.outcome, worst.error, worst.reason, tuple(e for e in also if e != worst.error))


def control(mode: OffloadMode, variant: str, width: int) -> Result:
    """The same calls on layers in full precision, which every mode must leave as they are."""
    return _probe(None, "", width, mode, variant)


def _widths(cell: Cell) -> tuple[int, ...]:
    return widths(cell.carrier, cell.format_id)


def _probe(carrier: Carrier | None, format_id: str, width: int, mode: OffloadMode, variant: str) -> Result:
    try:
        with torch.no_grad():
            if carrier is not None:
                _require_control(mode, variant, width)
            expected = _expected(carrier, format_id, width)
            with _folder() as folder:
                same = _run(carrier, format_id, width, mode, variant, folder, expected)
    except Unavailable as err:
        return Result("skipped", reason=str(err))
    except (MemoryError, torch.OutOfMemoryError) as err:
        return Result("skipped", reason=f"out of memory: {_first_line(err)}")
    except Exception as err:  # whatever a library raises is what the probe is for
        return Result("error", _first_line(err))
    return Result("equal" if same else "differs")


def _run(
    carrier: Carrier | None,
    format_id: str,
    width: int,
    mode: OffloadMode,
    variant: str,
    folder: Path,
    expected: Tensor,
) -> bool:
    device = compute_device()
    x = inputs(width).to(device)
    move(build(carrier, format_id, width), x, format_id, mode, variant, device, folder / "moving")
    kept = folder / "kept"
    kept.mkdir()
    placed = place(build(carrier, format_id, width), mode, variant, device, kept)
    placed.check()
    same = True
    for _ in range(PASSES):
        same &= torch.equal(placed.module(x).to("cpu"), expected)
        placed.rest()
        placed.check()
        require_away(placed.module, mode, variant, device)
    # A pass that does not use what is kept away offloads nothing, although its output is right.
    if spoil(placed.module, variant, kept) and torch.equal(placed.module(x).to("cpu"), expected):
        raise KeptNear("what was offloaded was set to zeros, and the output stayed the same")
    return same


@functools.cache
def _expected(carrier: Carrier | None, format_id: str, width: int) -> Tensor:
    """The output without offload, on the CPU.

    Raises:
        Unavailable: the layers do not run at all without a compiler, and there is none.
    """
    device = compute_device()
    net = build(carrier, format_id, width).to(device)
    try:
        return net(inputs(width).to(device)).to("cpu")
    except RuntimeError as err:
        if NO_COMPILER in str(err):
            raise Unavailable(f"its first forward pass compiles C++, which fails here: {_first_line(err)}") from err
        raise


@functools.cache
def _control(mode: OffloadMode, variant: str, width: int) -> Result:
    return control(mode, variant, width)


def _require_control(mode: OffloadMode, variant: str, width: int) -> None:
    result = _control(mode, variant, width)
    if result.outcome == "skipped":
        raise Unavailable(result.reason)
    if result.outcome != "equal":
        raise ProbeError(f"layers in full precision do not pass either: {result.error or result.outcome}")


@contextmanager
def _folder() -> Generator[Path]:
    with tempfile.TemporaryDirectory(prefix="quantwire-probe-", ignore_cleanup_errors=True) as name:
        yield Path(name)


def _first_line(err: BaseException) -> str:
    lines = str(err).strip().splitlines()
    return f"{type(err).__name__}: {lines[0] if lines else ''}".rstrip(": ")[:LENGTH]
