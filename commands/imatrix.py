"""`quantwire imatrix WORKFLOW.json --out FILE.gguf`: run a workflow, and measure which columns of its weights matter.

The workflow runs in the embedded host as `quantwire run` runs it. The file is written when the run is complete, so an
interrupted one leaves none, or the one that was there. What was recorded and does not add up with the files of
`--merge` is written beside it.
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
    """Add `quantwire imatrix`."""
    parser = commands.add_parser(
        "imatrix", parents=[common], help="record an importance matrix while a workflow runs",
        description="Run a workflow and record how large the inputs of each linear layer are, column by column: an "
        "importance matrix, which `quantwire convert --imatrix` and llama-quantize use to round the columns that "
        "matter more exactly.",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.gguf", help="the importance matrix")
    add_workflow_arguments(parser)
    parser.add_argument(
        "--merge", type=Path, action="append", default=[], metavar="OTHER.gguf",
        help="add what this file holds, so that several runs make one matrix; may be repeated, and may be FILE.gguf",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace the importance matrix that FILE.gguf is now")
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace, report: dict[str, Any]) -> int:
    """Record, merge, write.

    Raises:
        QuantwireError: a path, the workflow or the run is at fault; FILE.gguf is as it was.
    """
    from ..hosts.record import describe
    from ..hosts.standalone.progress import Interrupted
    from ..quantizers.files.imatrix import Imatrix, merge, read_imatrix, write_imatrix

    if args.out.suffix.lower() != ".gguf":
        raise FileError(f"--out: '{args.out}' is no .gguf file.\nImportance matrices are GGUF files; name it so.")
    require_writable(args.out.parent, "--out")
    _refuse_loss(args)
    others = [read_imatrix(path) for path in args.merge]
    merge([*others, Imatrix({})])  # whatever will not add up is found before the run; it counts inputs as a run does
    try:
        found = record(args)
    except Interrupted:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
    matrix = found.recorder.matrix(" ".join([args.workflow.name, *(f"--set {o}" for o in args.overrides)]))
    print(describe(matrix, sorted(found.recorder.idle)))
    if not matrix.entries:
        raise WorkflowError(f"{args.workflow}: no linear layer got an input, so nothing was recorded.")
    try:
        merged = merge([*others, matrix])
        write_imatrix(args.out, merged)
    except FileError as err:
        if not others:
            raise
        alone = args.out.with_name(f"{args.out.stem}.recorded{args.out.suffix}")
        write_imatrix(alone, matrix)
        raise FileError(f"{err}\nWhat this run recorded is in {alone}, by itself.") from err
    print(f"{args.out}: {len(merged.entries)} weights from {', '.join(merged.datasets)}")
    return 0


def _refuse_loss(args: argparse.Namespace) -> None:
    """Raises:
    FileError: FILE.gguf is there and no importance matrix, or one that is neither merged nor to be replaced.
    """
    from ..quantizers.files.imatrix import read_imatrix

    out: Path = args.out
    if not os.path.lexists(out):
        return
    try:
        read_imatrix(out)
    except FileError as err:
        first = str(err).splitlines()[0]
        raise FileError(
            f"--out: {out} is there already, and no importance matrix that could be replaced.\n{first}\n"
            "Give the new file another name."
        ) from err
    if not args.overwrite and not any(out.samefile(other) for other in args.merge if other.exists()):
        raise FileError(
            f"--out: {out} is there already.\n--merge {out} adds to it, --overwrite replaces it; or give another name."
        )
