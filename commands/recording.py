"""Run a workflow in the embedded host and record the inputs of its linear layers, for the commands that do."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ..quantizers.errors import FileError, WorkflowError
from .paths import require_writable

if TYPE_CHECKING:
    from ..hosts.standalone.record import Recording


def add_workflow_arguments(parser: argparse.ArgumentParser) -> None:
    """What `record` reads: the workflow, what of it to record, and the folders."""
    parser.add_argument("workflow", type=Path, metavar="WORKFLOW.json")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="NODE.INPUT=VALUE",
        help="change an input; NODE is an id, a title or a node type that occurs once",
    )  # fmt: skip
    parser.add_argument(
        "--component", dest="components", action="append", choices=("transformer", "clip_l", "t5xxl"),
        help="what to record; may be repeated (default: transformer)",
    )  # fmt: skip
    parser.add_argument(
        "--models", type=Path, action="append", metavar="DIR", help="model folder, laid out as ComfyUI's"
    )
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="keep the images of the run here (default: not kept)"
    )


def record(args: argparse.Namespace) -> Recording:
    """Run the workflow.

    Raises:
        WorkflowError: a component that was asked for did not run.
        Interrupted: cancelled.
    """
    from .. import nodes
    from ..hosts import use
    from ..hosts.standalone.core_nodes import CORE_NODES
    from ..hosts.standalone.executor import Executor
    from ..hosts.standalone.host import StandaloneHost
    from ..hosts.standalone.progress import TqdmListener
    from ..hosts.standalone.record import TRANSFORMER, Recording, recording
    from ..hosts.standalone.workflow import apply_overrides, load_workflow

    classes = {**CORE_NODES, **nodes.NODE_CLASS_MAPPINGS}
    for folder in args.models or []:
        if not folder.is_dir():
            raise FileError(f"--models: '{folder}' is not a folder.")
    if args.images is not None:
        require_writable(args.images, "--images")
    wanted = Recording(tuple(dict.fromkeys(args.components or [TRANSFORMER])))
    with (
        tempfile.TemporaryDirectory(prefix="quantwire-") as scratch,
        use(StandaloneHost(args.models, args.images or Path(scratch))),
        recording(wanted),
    ):
        prompt = apply_overrides(load_workflow(args.workflow), args.overrides, classes)
        # An executor of its own: one that had run this workflow would take results from its cache, and run nothing.
        Executor(classes, TqdmListener()).run(prompt)
    missing = [c for c in wanted.components if c not in wanted.seen]
    if missing:
        ran = ", ".join(sorted(wanted.seen)) or "no model"
        raise WorkflowError(
            f"{args.workflow}: {missing[0]} did not run, so there is nothing to record of it (what ran: {ran}).\n"
            "The workflow needs a node that runs it: KSampler for the transformer, CLIPTextEncode for text encoders."
        )
    return wanted
