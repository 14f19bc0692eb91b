"""Does the noise verdict tell broken quantizations from good ones? 100 good and 100 broken runs, unseen ones.

    python benchmarks/noise.py [--out out] [--quick]

A run is one image of the digits model of `demo/` from one prompt and seed. Good: formats of 4 bits and more as they
are. Broken: real quantized layers with a real mistake in all of them (`breakages.py`), and bitsandbytes' wrong order of
an 8-bit load. Whether a mistake breaks the model is decided by what the verdict does not see: the classifier of the
demo reads under 30 % of 20 digits. Mistakes that leave digits readable are listed and left out.

Two sets share no format, prompt or seed, and the second has mistakes that the first lacks; two thirds of the runs are
at 64 x 64, the others at a size of their set's own. The first gives the threshold, half way (of the logarithm) between
its worst good and its best broken run; the second is judged with it, and with the one that the pack has. Writes
OUT/noise.json. Exit code 1 when a run of the second set is judged wrongly, or the pack's threshold lies outside the gap
of the first.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from breakages import BREAKAGES, broken_model, fits
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "demo"))

import run as demo  # noqa: E402
from digits import read_digits, train_classifier  # noqa: E402
from quantwire import nodes  # noqa: E402
from quantwire.hosts import use  # noqa: E402
from quantwire.hosts.standalone.core_nodes import CORE_NODES  # noqa: E402
from quantwire.hosts.standalone.executor import Executor  # noqa: E402
from quantwire.hosts.standalone.host import StandaloneHost  # noqa: E402
from quantwire.hosts.standalone.workflow import Prompt, apply_overrides, load_workflow, parse_workflow  # noqa: E402
from quantwire.quantizers.measure.noise import NOISE_SCORE, ImageVerdict, Kind, judge  # noqa: E402
from quantwire.quantizers.registry import availability  # noqa: E402
from quantwire.quantizers.report import versions  # noqa: E402

NONE, WRONG_ORDER = "none", "wrong order load"
READABLE = 0.30  # of the digits, from which on a mistake does not count as one that breaks
RUNS = 100


@dataclass(frozen=True)
class Plan:
    """One set; `prompts` is the first of the ten of `demo.runs()` of which it takes every second one."""

    formats: tuple[str, ...]
    mistakes: tuple[str, ...]
    prompts: int
    seed: int
    size: tuple[int, int]


FIRST = Plan(
    ("bnb-int8", "bnb-nf4", "comfy-fp8-e4m3fn", "gguf-q8-0", "quanto-qint8", "sdnq-uint4"),
    ("swapped nibbles", "shuffled rows", "nan scale", "inverted scales", "late bytes", WRONG_ORDER),
    0, 5000, (96, 64),
)  # fmt: skip
SECOND = Plan(
    ("torchao-int8wo", "bnb-fp4", "comfy-nvfp4", "gguf-q4-0", "quanto-qint4", "sdnq-int8"),
    (*BREAKAGES,),
    10, 9000, (80, 128),
)  # fmt: skip
QUICK = (Plan(("quanto-qint8",), ("shuffled rows", "nan scale"), 0, 5000, (96, 64)),
         Plan(("quanto-qint4",), ("swapped nibbles", "wrong sign"), 10, 9000, (80, 128)))  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Images of one format with one mistake, or none: (N, H, W, 3) each, at 64 x 64 and at the set's own size."""

    format: str
    mistake: str
    accuracy: float
    small: Tensor
    large: Tensor


class Tamper:
    """The model of a graph, broken."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "tamper"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL", {}), "mistake": ("STRING", {"default": NONE})}}

    def tamper(self, model: Any, mistake: str) -> tuple[Any]:
        if mistake == NONE:
            return (model,)
        if mistake == WRONG_ORDER:
            return (demo.WrongInt8Load().load(model)["result"][0],)
        return (broken_model(model, mistake)[0],)


class Sampler:
    """Draws images of one case after the other with the embedded host; `reference` is full precision."""

    def __init__(self, plan: Plan, count: int) -> None:
        self.plan = plan
        self.prompts = demo.runs()[plan.prompts : plan.prompts + 10][::2][:count]
        self.classifier = train_classifier()[0]
        classes = {**CORE_NODES, **nodes.NODE_CLASS_MAPPINGS, "Tamper": Tamper}
        self.classes = {name: c for name, c in classes.items() if name not in ("SaveImage",)} | {"SaveImage": _Keep}
        self.executor = Executor(self.classes)
        self.quantized, self.full = _graph("quantized"), _graph("full_precision")
        self.reference = self._case("", NONE, [])

    def case(self, format_id: str, mistake: str) -> Case:
        sets = [f"Tamper.mistake={mistake}"]
        return self._case(
            format_id, mistake, sets if mistake == WRONG_ORDER else [*sets, f"Quantize.format={format_id}"]
        )

    def _case(self, format_id: str, mistake: str, sets: list[str]) -> Case:
        prompt = self.quantized if format_id and mistake != WRONG_ORDER else self.full
        small, digits = self._draw(prompt, sets, (64, 64), 4)
        large, _ = self._draw(prompt, sets, self.plan.size, 2)
        accuracy = float((read_digits(torch.nan_to_num(small).numpy(), self.classifier) == digits).mean())
        return Case(format_id, mistake, accuracy, small, large)

    def _draw(self, prompt: Prompt, sets: list[str], size: tuple[int, int], batch: int) -> tuple[Tensor, np.ndarray]:
        images: list[Tensor] = []
        digits: list[int] = []
        for number, (text, _, digit) in enumerate(self.prompts):
            own = [f"Prompt.text={text}", f"Sampler.seed={self.plan.seed + number}", f"Sampler.steps={demo.STEPS}"]
            own += [f"Latent.width={size[0]}", f"Latent.height={size[1]}", f"Latent.batch_size={batch}"]
            known = {node.title for node in prompt.nodes.values()}
            own += [s for s in sets if s.partition(".")[0] in known]
            result = self.executor.run(apply_overrides(prompt, own, self.classes))
            images.append(next(iter(result.results.values()))[0].clone())
            digits += [digit] * batch
        return torch.cat(images), np.array(digits)


class _Keep:
    """SaveImage's place in a graph: hands the images out as they are, nan included."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "keep"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        prefix = ("STRING", {"default": ""})
        return {"required": {"images": ("IMAGE", {})}, "optional": {"filename_prefix": prefix}}

    def keep(self, images: Tensor, filename_prefix: str = "") -> tuple[Tensor]:
        return (images,)


def _graph(name: str) -> Prompt:
    """A shipped workflow with `Tamper` between model and sampler."""
    data = load_workflow(demo.WORKFLOWS / f"{name}.json").to_json()
    for node_id in [i for i, n in data.items() if n["class_type"] in ("PreviewAny", "OffloadCompat")]:
        del data[node_id]
    sampler = next(n for n in data.values() if n["class_type"] == "KSampler")
    source = next(i for c in ("QuantizeModel", "UNETLoader") for i, n in data.items() if n["class_type"] == c)
    inputs = {"model": [source, 0], "mistake": NONE}
    data["tamper"] = {"class_type": "Tamper", "inputs": inputs, "_meta": {"title": "Tamper"}}
    sampler["inputs"]["model"] = ["tamper", 0]
    return parse_workflow(data)


@dataclass(frozen=True)
class Run:
    format: str
    mistake: str
    size: str
    kind: str
    score: float | None
    structure: float | None
    likeness: float | None


def measure(plan: Plan, count: int, runs: int) -> dict[str, Any]:
    """The runs of one set: `good`, `broken`, and the cases that were left out."""
    sampler = Sampler(plan, count)
    print(f"full precision reads {100 * sampler.reference.accuracy:.0f} %")
    good: list[Case] = []
    broken: list[Case] = []
    out: list[dict[str, Any]] = []
    for format_id in plan.formats:
        if not availability(format_id).works:
            print(f"{format_id}: not available: {availability(format_id).reason}")
            continue
        whole = sampler.case(format_id, NONE)
        good.append(whole)
        for mistake in (m for m in plan.mistakes if m != WRONG_ORDER and fits(m, format_id)):
            case = sampler.case(format_id, mistake)
            if torch.equal(torch.nan_to_num(case.small), torch.nan_to_num(whole.small)):
                continue  # nothing of this format that the mistake could hit
            told = {"format": format_id, "mistake": mistake, "accuracy": case.accuracy}
            (broken.append(case) if case.accuracy < READABLE else out.append(told))
            print(f"  {format_id}, {mistake}: {100 * case.accuracy:.0f} % readable", flush=True)
    if WRONG_ORDER in plan.mistakes:
        broken.append(sampler.case("bnb-int8", WRONG_ORDER))
    return {
        "good": _runs(good, sampler.reference, runs), "broken": _runs(broken, sampler.reference, runs),
        "left_out": out, "cases": [(c.format, c.mistake, c.accuracy) for c in (*good, *broken)],
    }  # fmt: skip


def _runs(cases: list[Case], reference: Case, most: int) -> list[Run]:
    """Up to `most` runs, one of each case in turn, so that all take part; every third at the set's own size."""
    found: list[Run] = []
    judged = [(c, judge(c.small, reference.small).images, judge(c.large, reference.large).images) for c in cases]
    for number in range(sum(len(s) + len(g) for _, s, g in judged)):
        for case, small, large in judged:
            images, index, picture = (
                (large, number // 3, case.large) if number % 3 == 2 else (small, number, case.small)
            )
            if index < len(images) and len(found) < most:
                found.append(_run(case, images[index], f"{picture.shape[2]}x{picture.shape[1]}"))
    return found


def _run(case: Case, verdict: ImageVerdict, size: str) -> Run:
    return Run(case.format, case.mistake, size, verdict.kind.value, verdict.score, verdict.structure, verdict.likeness)


def wrong(found: dict[str, Any], threshold: float) -> list[Run]:
    """Runs of a set that a threshold judges wrongly."""

    def is_broken(run: Run) -> bool:
        return run.kind in (Kind.NAN, Kind.FLAT) or (run.score is not None and run.score > threshold)

    return [r for r in found["good"] if is_broken(r)] + [r for r in found["broken"] if not is_broken(r)]


def gap(found: dict[str, Any]) -> tuple[float, float]:
    """Scores of the worst good and the best broken run."""
    worst = max(r.score for r in found["good"] if r.score is not None)
    return worst, min(r.score for r in found["broken"] if r.score is not None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--quick", action="store_true", help="for tests: two formats, few images")
    args = parser.parse_args()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    start = time.perf_counter()
    plans = QUICK if args.quick else (FIRST, SECOND)
    with torch.inference_mode(), use(StandaloneHost([demo.MODELS], args.out / "noise_images")):
        sets = [measure(plan, 2 if args.quick else 5, 8 if args.quick else RUNS) for plan in plans]
    worst, best = gap(sets[0])
    threshold = math.sqrt(worst * best)
    for name, found in zip(("first", "second"), sets, strict=True):
        kinds = Counter(run.kind for run in found["broken"])
        low, high = gap(found)
        print(f"{name} set: {len(found['good'])} good up to {low:.3f}, {len(found['broken'])} broken from {high:.3f}"
              f" ({', '.join(f'{n} {k}' for k, n in kinds.items())})")  # fmt: skip
        for case in found["left_out"]:
            print(f"  left out: {case['format']}, {case['mistake']}: {100 * case['accuracy']:.0f} % readable")
    fitted, packs = wrong(sets[1], threshold), wrong(sets[1], NOISE_SCORE)
    print(f"threshold of the first set {threshold:.3f}: {len(fitted)} of the second judged wrongly")
    print(f"threshold of the pack {NOISE_SCORE:g}: {len(packs)} of the second judged wrongly")
    for run in {*fitted, *packs}:
        print(f"  wrong: {run}")
    data = {
        "threshold": threshold, "pack_threshold": NOISE_SCORE, "gap": [worst, best], "wrong": len(fitted),
        "wrong_with_pack_threshold": len(packs), "seconds": time.perf_counter() - start, "versions": versions(),
        "sets": [{k: [asdict(r) if isinstance(r, Run) else r for r in v] for k, v in s.items()} for s in sets],
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "noise.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(f"{args.out / 'noise.json'}; {data['seconds']:.0f} s")
    return 0 if not fitted and not packs and worst < NOISE_SCORE < best else 1


if __name__ == "__main__":
    sys.exit(main())
