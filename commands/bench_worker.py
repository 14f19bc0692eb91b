"""One variant of a benchmark in a process of its own: `python -m quantwire.commands.bench_worker`.

A process each, so that the memory of one format is not counted with another's. The first line on standard input tells
the workflow; each further line asks for a run, and one line of JSON on standard output answers it. What libraries
print goes to standard error.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TextIO

from ..hosts import bench, use
from ..hosts.bench_graph import KINDS, QUANTIZERS
from ..hosts.standalone.core_nodes import CORE_NODES
from ..hosts.standalone.executor import Executor
from ..hosts.standalone.host import StandaloneHost
from ..hosts.standalone.progress import Listener, Progress
from ..hosts.standalone.workflow import NodeSpec, Prompt, parse_workflow
from ..quantizers.measure.meter import PeakMeter, resident_nbytes

LOADERS = ("Load", "UNET", "FitModel", "CLIPLoader", "DualCLIPLoader", "VAELoader")  # how their names begin
BOTH = ("LoadAndQuantize", "FitModel")  # load and quantize in one


class Watch(Listener):
    """Seconds by node class and by step of one run, and the model objects that ran in any."""

    def __init__(self) -> None:
        self.objects: dict[str, list[Any]] = {kind: [] for kind in KINDS}
        self.clear()

    def clear(self) -> None:
        self.seconds: dict[str, float] = {}
        self.clocks: dict[int, bench.Clock] = {}

    def node_done(self, node: Any, seconds: float, ui: Any) -> None:
        self.seconds[node.class_type] = self.seconds.get(node.class_type, 0.0) + seconds

    def progress(self, node: Any, bar: Progress) -> None:
        if bar.desc != "sampling" or bar.closed:
            return
        clock = self.clocks.setdefault(id(bar), bench.Clock())
        if bar.done:
            clock.tick()
        else:
            clock.start()

    def steps(self) -> list[float]:
        return [step for clock in self.clocks.values() for step in clock.steps()]


def watched(classes: Mapping[str, type], watch: Watch) -> dict[str, type]:
    """Node classes that run anew each time unless they make models, and tell which models they were given."""
    return {name: cls if _makes_models(cls) else _watched(cls, watch) for name, cls in classes.items()}


def _makes_models(cls: Any) -> bool:
    return bool({*KINDS, "QUANT_CONFIG"} & set(map(str, getattr(cls, "RETURN_TYPES", ()))))


def _watched(cls: Any, watch: Watch) -> type:
    def call(self: Any, **inputs: Any) -> Any:
        spec = NodeSpec.of(cls)
        for name, value in inputs.items():
            info = spec.get(name)
            held = watch.objects.get(info.type_name) if info is not None else None
            if held is not None and value is not None and not any(value is other for other in held):
                held.append(value)
        return getattr(cls, cls.FUNCTION)(self, **inputs)

    anew = classmethod(lambda _cls, **_: math.nan)
    return type(cls.__name__, (cls,), {cls.FUNCTION: call, "IS_CHANGED": anew})


class Worker:
    """Runs one workflow again and again; models stay loaded."""

    def __init__(self, asked: Mapping[str, Any]) -> None:
        from .. import nodes

        self.watch = Watch()
        self.classes = watched({**CORE_NODES, **nodes.NODE_CLASS_MAPPINGS}, self.watch)
        self.executor = Executor(self.classes, self.watch)
        self.prompt = parse_workflow(asked["workflow"])
        self.host = StandaloneHost([Path(p) for p in asked["models"]] or None, Path(asked["out"]))
        self.before = _preloaded()
        self.meter: PeakMeter | None = None

    def run(self) -> dict[str, Any]:
        """One generation; the first one loads."""
        self.watch.clear()
        clock = bench.Clock()
        with use(self.host):
            if self.meter is not None:
                self.meter.start()
            clock.start()
            result = self.executor.run(self.prompt)
            if self.meter is not None:
                self.meter.wait()
            clock.stop()
            answer = {"seconds": clock.seconds, "steps": self.watch.steps(), "peak": None, "images": []}
            if self.meter is not None:
                peak = self.meter.read()
                answer["peak"] = [peak.allocated, peak.reserved, peak.method]
            else:
                answer |= self._loaded(result.outputs)
        for ui in result.outputs.values():
            for image in ui.get("images", []):
                folder = self.host.output if image["type"] == "output" else self.host.output / "temp"
                answer["images"].append(str(folder / image["subfolder"] / image["filename"]))
        return answer

    def _loaded(self, outputs: Mapping[str, Any]) -> dict[str, Any]:
        """What the first run alone tells: seconds of loading and quantizing, weights, device."""
        seconds = self.watch.seconds
        load = sum(s for n, s in seconds.items() if _makes_models(self.classes[n]) and n.startswith(LOADERS))
        # Of a node that does both, the report tells how much of its time went into quantizing.
        within = sum(r["seconds"] for r in _reports(outputs, self.prompt, BOTH))
        quantize = sum(seconds.get(n, 0.0) for n in QUANTIZERS) + within
        models = self.watch.objects["MODEL"]
        held: dict[str, int] = {}
        device: dict[str, Any] = {}
        if models:
            held, device = bench.formats(self.host, models[0]), bench.device_dict(self.host, models[0])
            self.meter = PeakMeter(bench.device_of(self.host, models[0]))
        objects = [obj for found in self.watch.objects.values() for obj in found]
        return {
            "load_s": max(0.0, load - within),
            "quantize_s": quantize if within or any(n in seconds for n in QUANTIZERS) else None,
            "reports": _reports(outputs, self.prompt),
            "held": held,
            "device": device,
            "weights": bench.weights(self.host, objects),
            "before": self.before,
        }


def _reports(outputs: Mapping[str, Any], prompt: Prompt, classes: Collection[str] = ()) -> list[dict[str, Any]]:
    """Reports of quantizations that nodes showed, of these classes or of all; Fit Model's hold several."""
    found: list[dict[str, Any]] = []
    for node_id, ui in outputs.items():
        if not classes or prompt.nodes[node_id].class_type in classes:
            for shown in ui.get("report") or []:
                found += [r for r in (shown, *shown.get("loaded", {}).values()) if "entries" in r]
    return found


def _preloaded() -> int | None:
    """What the process holds once the libraries that every model needs are imported."""
    import diffusers.models.transformers.transformer_flux  # noqa: F401
    import transformers.models.clip.modeling_clip  # noqa: F401

    return resident_nbytes()


def serve(questions: TextIO, answers: TextIO) -> None:
    """Answer until the input ends; an error is an answer too, and the last one."""
    from ..cli import quiet_loggers
    from ..quantizers.errors import OffloadConflict, QuantwireError

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    quiet_loggers()
    try:
        worker = Worker(json.loads(questions.readline()))
        for _ in questions:
            print(json.dumps(worker.run()), file=answers, flush=True)
    except Exception as err:  # the boundary of the process: the other side raises it again
        code = 3 if isinstance(err, OffloadConflict) else 2 if isinstance(err, QuantwireError) else 4
        text = str(err).strip() or type(err).__name__
        print(json.dumps({"error": text, "type": type(err).__name__, "code": code}), file=answers, flush=True)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
