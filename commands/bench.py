"""`quantwire bench WORKFLOW.json`: seconds, memory and quality of a workflow, in its own format and in others."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..quantizers.errors import FileError, OffloadConflict, SpecError, WorkflowError
from .paths import add_json, json_to_output, require_writable

OK, NODE_FAILED = 0, 4


class BenchmarkFailed(Exception):
    """The workflow as it is stopped for a reason that is not its own."""


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add `quantwire bench`."""
    parser = commands.add_parser(
        "bench",
        parents=[common],
        help="measure seconds, memory and quality of a workflow, format by format",
        description=(
            "Run a workflow in API form several times, without ComfyUI, and measure seconds of a generation and of a "
            "step, of loading and quantizing, weights and peak memory. --against does the same in other formats, in "
            "turns, so that a busy moment slows all of them. Each format has a process of its own. Images are compared "
            "with those of full precision where that ran, else with the workflow's own. Writes "
            "benchmark_results.json, quantization_config.json, a sample of each and report.html."
        ),
    )
    parser.add_argument("workflow", type=Path, metavar="WORKFLOW.json")
    parser.add_argument(
        "--against", nargs="+", default=[], metavar="FORMAT",
        help="formats or URIs to compare with, such as bnb-nf4; `full` is full precision",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="measured runs of each (default: 5)")
    parser.add_argument("--warmup", type=int, default=1, metavar="N", help="runs of each before those (default: 1)")
    parser.add_argument(
        "--one-by-one", action="store_true", help="one format after the other, with one in memory at a time"
    )
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="NODE.INPUT=VALUE",
        help="change an input; NODE is an id, a title or a node type that occurs once",
    )  # fmt: skip
    parser.add_argument(
        "--models", type=Path, action="append", metavar="DIR", help="model folder, laid out as ComfyUI's"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out/bench"), metavar="DIR", help="where the results go (default: out/bench)"
    )
    add_json(parser, "the results")
    parser.set_defaults(handler=handle)


@dataclass
class Lane:
    """One variant: its graph, its process while it runs, and what was measured.

    Attributes:
        sample: name of the file that `kept`, its first image, gets beside the results.
    """

    name: str
    graph: dict[str, Any]
    process: Any = None
    first: dict[str, Any] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)
    sample: str = ""
    kept: Path | None = None
    error: str = ""
    code: int = 0


def handle(args: argparse.Namespace, report: dict[str, Any]) -> int:
    """Measure, write, print.

    Raises:
        QuantwireError: a path, a format or the workflow is at fault; nothing ran, or the workflow as it is does not.
    """
    from ..quantizers.measure.html import page
    from ..quantizers.measure.results import write

    to_output = json_to_output(args)
    for name in ("repeats", "warmup"):
        if getattr(args, name) < 1:
            raise SpecError(f"--{name} must be 1 or more, got {getattr(args, name)}.")
    require_writable(args.out, "--out")
    for folder in args.models or []:
        if not folder.is_dir():
            raise FileError(f"--models: '{folder}' is not a folder.")
    lanes = _lanes(args)
    started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    # The folder is this process's: a worker that is killed cannot clean up.
    with tempfile.TemporaryDirectory(prefix="quantwire-", ignore_cleanup_errors=True) as scratch:
        try:
            _measure(args, lanes, Path(scratch))
        finally:
            for lane in lanes:
                _close(lane)
        results = _results(args, lanes, started)
        _keep_samples(args.out, lanes)
    path = write(args.out, results, page(results, args.out))
    if to_output:
        print(json.dumps(results.to_dict(), indent=2))
    else:
        report |= results.to_dict()
        print(f"{results}\n{path}")
    return max((lane.code for lane in lanes), default=OK)


def _lanes(args: argparse.Namespace) -> list[Lane]:
    """The workflow as it is, and in each format; all are checked before anything runs."""
    from .. import nodes
    from ..hosts.bench_graph import named, title_of, with_format
    from ..hosts.lint.catalog import Catalog
    from ..hosts.standalone.core_nodes import CORE_NODES
    from ..hosts.standalone.workflow import apply_overrides, load_workflow
    from ..quantizers.measure.results import FULL
    from ..quantizers.registry import require

    classes = {**CORE_NODES, **nodes.NODE_CLASS_MAPPINGS}
    prompt = apply_overrides(load_workflow(args.workflow), args.overrides, classes)
    catalog = Catalog(nodes.NODE_CLASS_MAPPINGS, CORE_NODES)

    def outputs(name: str) -> tuple[str, ...] | None:
        found = catalog.find(name)
        return found.outputs if found is not None else None

    formats = named(args.against)
    own = title_of(prompt)
    lanes = [Lane(f"{own or 'as it is'}{' (workflow)' if own in formats else ''}", prompt.to_json())]
    for name, spec in formats.items():
        if spec is not None:
            require(spec.format_id)
        elif not own:
            raise SpecError(f"--against {FULL}: nothing in the workflow quantizes its model, so it is that already.")
        lanes.append(Lane(name, with_format(prompt, spec, outputs).to_json()))
    return lanes


def _measure(args: argparse.Namespace, lanes: list[Lane], scratch: Path) -> None:
    from ..hosts.bench import Order, turns
    from ..hosts.eta import show_seconds

    order = Order.ONE_BY_ONE if args.one_by_one else Order.INTERLEAVED
    plan = turns(len(lanes), args.warmup, args.repeats, order)
    begun = time.perf_counter()
    for done, turn in enumerate(plan, 1):
        lane = lanes[turn.variant]
        if not lane.error:
            _take(args, lane, turn, scratch / str(turn.variant), is_base=turn.variant == 0)
        left = (time.perf_counter() - begun) / done * (len(plan) - done)
        said = "failed" if lane.error else "measured" if turn.measured else "warm-up"
        print(f"run {done} of {len(plan)}: {lane.name}, {said}, {show_seconds(left)} left", file=sys.stderr, flush=True)


def _take(args: argparse.Namespace, lane: Lane, turn: Any, scratch: Path, is_base: bool) -> None:
    if lane.process is None:
        lane.process = _start()
        ask = json.dumps(
            {"workflow": lane.graph, "models": [str(m.resolve()) for m in args.models or []], "out": str(scratch)}
        )
    else:
        ask = ""
    answer = _ask(lane.process, f"{ask}\nrun\n" if ask else "run\n")
    if "error" in answer:
        if is_base and not lane.runs:
            kind = {2: WorkflowError, 3: OffloadConflict}.get(answer["code"], BenchmarkFailed)
            raise kind(answer["error"])
        lane.error, lane.code = answer["error"], answer["code"]
        return
    if not lane.first:
        lane.first = answer
    if turn.measured:
        lane.runs.append(answer)
    if turn.first:
        _look(lane, answer["images"])
    if turn.last:
        _close(lane)


def _ask(process: Any, text: str) -> dict[str, Any]:
    """The answer of a worker; of one that is gone, that it is."""
    line = ""
    with contextlib.suppress(OSError):  # the pipe of a process that was killed while it waited
        process.stdin.write(text)
        process.stdin.flush()
        line = process.stdout.readline()
    return json.loads(line) if line.endswith("\n") else {"error": _how_ended(process.wait()), "code": NODE_FAILED}


def _how_ended(code: int) -> str:
    if code >= 0:
        return f"its process ended with exit code {code}\nWhat it printed stands above."
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    if name != "SIGKILL":
        return f"its process was ended by {name}\nA library crashed: what it printed stands above."
    return (
        "its process was killed (SIGKILL)\nUsually the system does so when memory runs out: name fewer formats, or "
        "give --one-by-one, so that one is in memory at a time."
    )


def _start() -> Any:
    # In a session of its own: Ctrl-C reaches this process alone, which then ends the others.
    return subprocess.Popen(
        [sys.executable, "-m", f"{__package__}.bench_worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )


def _close(lane: Lane) -> None:
    """End the process of a lane; it ends by itself where it waits for a question."""
    process, lane.process = lane.process, None
    if process is None:
        return
    with contextlib.suppress(OSError):  # it is gone already
        process.stdin.close()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()


def _look(lane: Lane, paths: list[str]) -> None:
    """Read the images of the first measured run."""
    import numpy as np
    import torch
    from PIL import Image

    for path in paths:
        with Image.open(path) as image:
            lane.images.append(torch.from_numpy(np.asarray(image.convert("RGB"), np.float32) / 255))
    if paths:
        lane.sample = f"sample-{re.sub(r'[^0-9A-Za-z_.-]+', '_', lane.name)}.png"
        lane.kept = Path(paths[0])


def _keep_samples(out: Path, lanes: list[Lane]) -> None:
    """Put the first image of each beside the results; with them and not before, so that none lies there alone.

    Raises:
        FileError: the folder cannot be written in.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        for lane in lanes:
            if lane.kept is not None:
                shutil.copyfile(lane.kept, out / lane.sample)
    except OSError as err:
        raise FileError(f"--out: samples cannot be written to '{out}': {err.strerror or err}.") from err


def _results(args: argparse.Namespace, lanes: list[Lane], started: str) -> Any:
    from ..quantizers.measure.results import FULL, BenchmarkResults
    from ..quantizers.report import versions

    base = lanes[0]
    if base.name == "as it is":
        held = base.first["held"]
        found = max(held, key=lambda f: held[f]) if held else FULL
        base.name = found if found not in {lane.name for lane in lanes} else f"{found} (workflow)"
    order = "one by one" if args.one_by_one else "interleaved"
    settings = {"repeats": args.repeats, "warmup": args.warmup, "order": order}
    if args.overrides:
        settings["set"] = " ".join(args.overrides)
    # What is quantized is compared with what is not, wherever that ran.
    reference = next((lane for lane in lanes if lane.name == FULL and lane.runs), base)
    return BenchmarkResults(
        title=args.workflow.stem,
        host="standalone",
        device=base.first["device"],
        settings=settings,
        versions=versions(),
        started=started,
        variants=tuple(_variant(lane, reference) for lane in lanes),
        notes=("Each format ran in a process of its own.",),
        reference=reference.name,
    )


def _variant(lane: Lane, reference: Lane) -> Any:
    from ..hosts.bench import difference
    from ..quantizers.measure.results import Memory, Seconds, Variant, summarize

    first, runs = lane.first, lane.runs
    layers, config = summarize(first.get("reports", []))
    steps = tuple(s for run in runs for s in run["steps"])
    peaks = [run["peak"] for run in runs if run["peak"]]
    reserved = [p[1] for p in peaks if p[1] is not None]
    allocated = [p[0] for p in peaks if p[0] is not None]
    memory = Memory(
        first.get("weights", {}),
        max(allocated, default=None),
        max(reserved, default=None),
        first.get("before") if peaks and "process" in peaks[0][2] else None,
        peaks[0][2] if peaks else "",
    )
    apart = None
    if lane is not reference and lane.images and len(lane.images) == len(reference.images):
        import torch

        if all(a.shape == b.shape for a, b in zip(lane.images, reference.images, strict=True)):
            flat = [torch.cat([i.flatten() for i in x.images]) for x in (lane, reference)]
            apart = difference(*flat)
    return Variant(
        name=lane.name,
        uri=first["reports"][0]["uri"] if first.get("reports") else "",
        generation=Seconds(tuple(r["seconds"] for r in runs)) if runs else None,
        step=Seconds(steps) if steps else None,
        load_s=first.get("load_s"),
        quantize_s=first.get("quantize_s"),
        memory=memory,
        layers=layers,
        difference=apart,
        sample=lane.sample,
        config=config,
        error=lane.error,
    )
