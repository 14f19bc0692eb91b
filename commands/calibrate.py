"""`quantwire calibrate WORKFLOW.json --out FILE.json`: run a workflow, and measure how large the inputs of layers get.

As `quantwire imatrix`, the workflow runs in the embedded host and the file is written when the run is complete.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from ..quantizers.errors import FileError, WorkflowError
from .paths import require_writable
from .recording import add_workflow_arguments, record

INTERRUPTED = 130


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add `quantwire calibrate`."""
    parser = commands.add_parser(
        "calibrate", parents=[common], help="record activation scales while a workflow runs",
        description="Run a workflow and record the largest input of each linear layer, from which "
        "`quantwire convert --scales` writes the input_scale of comfy-fp8-* and comfy-nvfp4 files. ComfyUI then need "
        "not look for the largest value of each input.",
    )  # fmt: skip
    add_workflow_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json", help="the calibration")
    parser.add_argument(
        "--merge", type=Path, action="append", default=[], metavar="OTHER.json",
        help="take the larger values of this file and the run; may be repeated, and may be FILE.json",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace the calibration that FILE.json is now")
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace, report: dict[str, Any]) -> int:
    """Record, merge, write.

    Raises:
        QuantwireError: a path, the workflow or the run is at fault; FILE.json is as it was.
    """
    from ..hosts.standalone.progress import Interrupted
    from ..quantizers.files.calibration import describe, merge, read_calibration, write_calibration

    if args.out.suffix.lower() != ".json":
        raise FileError(f"--out: '{args.out}' is no .json file.\nCalibrations are JSON files; name it so.")
    require_writable(args.out.parent, "--out")
    _refuse_loss(args)
    others = [read_calibration(path) for path in args.merge]
    merge(others)  # whatever does not go together is found before the run
    try:
        found = record(args)
    except Interrupted:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
    recorded = found.recorder.calibration(" ".join([args.workflow.name, *(f"--set {o}" for o in args.overrides)]))
    if not recorded.layers:
        raise WorkflowError(f"{args.workflow}: no linear layer got an input, so nothing was recorded.")
    merged = merge([*others, recorded])
    write_calibration(args.out, merged)
    text = describe(recorded, sorted(found.recorder.idle))
    report |= {"layers": len(merged.layers), "calls": merged.calls, "idle": sorted(found.recorder.idle)}
    print(f"{text}\n{args.out}: {len(merged.layers)} weights from {', '.join(merged.runs)}")
    return 0


def _refuse_loss(args: argparse.Namespace) -> None:
    """Raises:
    FileError: FILE.json is there and no calibration, or one that is neither merged nor to be replaced.
    """
    from ..quantizers.files.calibration import read_calibration

    out: Path = args.out
    if not os.path.lexists(out):
        return
    try:
        read_calibration(out)
    except FileError as err:
        raise FileError(
            f"--out: {out} is there already, and no calibration that could be replaced.\n"
            f"{str(err).splitlines()[0]}\nGive the new file another name."
        ) from err
    if not args.overwrite and not any(out.samefile(other) for other in args.merge if other.exists()):
        raise FileError(
            f"--out: {out} is there already.\n--merge {out} adds to it, --overwrite replaces it; or give another name."
        )
