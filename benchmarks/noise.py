"""Does the noise verdict tell broken quantizations from good ones? 100 good and 100 broken runs, unseen ones.

    python benchmarks/noise.py [--out out] [--drawn DIR] [--quick]

A run is one image of the digits model of `demo/` from one prompt and seed. Good: formats of 2 to 8 bits as they are,
of which nine tenths of the digits are read. Broken: real quantized layers with a real mistake in all of them
(`breakages.py`), and bitsandbytes' wrong order of an 8-bit load. Whether a mistake breaks the model is decided by what
the verdict does not see: the classifier of the demo reads under 30 % of 20 digits. Mistakes that leave digits readable
are listed and left out.

Two sets share no format, prompt or seed, and the second has mistakes that the first lacks; two thirds of the runs are
at 64 x 64, the others at a size of their set's own. The first gives the threshold of the evidence, half way (of the
logarithm) between its worst good and its best broken run; the second is judged with it, and with the one that the pack
has. Beside them, per set: full precision with other seeds, and its images blurred, sharpened and faded, which must
not be called broken; and pieces of photographs at 256 x 256 against one another and altered, beside noise that the
VAE decodes. Writes OUT/noise.json. Exit code 1 when one of these is judged wrongly, or the pack's threshold lies
outside the gap of the first set. `--drawn DIR` keeps the images of both sets there, and judges those that it finds.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from breakages import BREAKAGES, broken_model, fits
from sklearn.datasets import load_sample_images
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
from quantwire.hosts.standalone.vae import load_vae  # noqa: E402
from quantwire.hosts.standalone.workflow import Prompt, apply_overrides, load_workflow, parse_workflow  # noqa: E402
from quantwire.quantizers.measure.noise import NOISE_EVIDENCE, NOISE_STRUCTURE, ImageVerdict, Kind, judge  # noqa: E402
from quantwire.quantizers.registry import availability  # noqa: E402
from quantwire.quantizers.report import versions  # noqa: E402

NONE, WRONG_ORDER = "none", "wrong order load"
READABLE = 0.30  # of the digits, from which on a mistake does not count as one that breaks
READ = 0.90  # from which on a format below 4 bits counts as good
RUNS = 100
OTHER_SEEDS = 500


@dataclass(frozen=True)
class Plan:
    """One set; `prompts` is the first of the ten of `demo.runs()` of which it takes every second one.

    Attributes:
        low: formats below 4 bits, as they are only.
    """

    name: str
    formats: tuple[str, ...]
    low: tuple[str, ...]
    mistakes: tuple[str, ...]
    prompts: int
    seed: int
    size: tuple[int, int]


FIRST = Plan(
    "first",
    ("bnb-int8", "bnb-nf4", "comfy-fp8-e4m3fn", "gguf-q8-0", "quanto-qint8", "sdnq-uint4"),
    ("quanto-qint2", "gguf-q3-k"),
    ("swapped nibbles", "shuffled rows", "nan scale", "inverted scales", "late bytes", WRONG_ORDER),
    0, 5000, (96, 64),
)  # fmt: skip
SECOND = Plan(
    "second",
    ("torchao-int8wo", "bnb-fp4", "comfy-nvfp4", "gguf-q4-0", "quanto-qint4", "sdnq-int8"),
    ("gguf-q2-k", "gguf-iq2-xs"),
    (*BREAKAGES,),
    10, 9000, (80, 128),
)  # fmt: skip
QUICK = (Plan("first", ("quanto-qint8",), ("quanto-qint2",), ("shuffled rows", "nan scale"), 0, 5000, (96, 64)),
         Plan("second", ("quanto-qint4",), (), ("swapped nibbles", "wrong sign"), 10, 9000, (80, 128)))  # fmt: skip


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

    def other_seeds(self) -> Case:
        """Full precision: other compositions of the same prompts."""
        own, self.plan = self.plan, replace(self.plan, seed=self.plan.seed + OTHER_SEEDS)
        case = self._case("", "other seeds", [])
        self.plan = own
        return case

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
    evidence: float | None
    structure: float | None
    likeness: float | None


def draw(plan: Plan, count: int) -> dict[str, Any]:
    """All images of one set: `reference`, `other` and `cases`."""
    sampler = Sampler(plan, count)
    cases: list[Case] = []
    for format_id in (*plan.low, *plan.formats):
        if not availability(format_id).works:
            print(f"{format_id}: not available: {availability(format_id).reason}")
            continue
        mistakes = () if format_id in plan.low else plan.mistakes
        for mistake in (NONE, *(m for m in mistakes if m != WRONG_ORDER and fits(m, format_id))):
            cases.append(sampler.case(format_id, mistake))
            print(f"  {format_id}, {mistake}: {100 * cases[-1].accuracy:.0f} % readable", flush=True)
    if WRONG_ORDER in plan.mistakes:
        cases.append(sampler.case("bnb-int8", WRONG_ORDER))
    return {"reference": sampler.reference, "other": sampler.other_seeds(), "cases": cases}


def drawn(plan: Plan, count: int, folder: Path | None) -> dict[str, Any]:
    """`draw`, or what is in the folder of the same plan."""
    path = None if folder is None else folder / f"{plan.name}.pt"
    if path is not None and path.is_file():
        held = torch.load(path, weights_only=True)
        if held["plan"] != repr((plan, count)):
            raise SystemExit(f"{path} holds the images of another plan.\nName another folder with --drawn.")
        return {k: Case(**held[k]) for k in ("reference", "other")} | {"cases": [Case(**c) for c in held["cases"]]}
    found = draw(plan, count)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        plain = {k: vars(found[k]) for k in ("reference", "other")} | {"cases": [vars(c) for c in found["cases"]]}
        torch.save({"plan": repr((plan, count)), **plain}, path)
    return found


def measure(found: dict[str, Any], runs: int) -> dict[str, Any]:
    """The runs of one set: `good`, `broken`, `changed`, and the cases that were left out."""
    reference: Case = found["reference"]
    print(f"full precision reads {100 * reference.accuracy:.0f} %")
    good: list[Case] = []
    broken: list[Case] = []
    out: list[dict[str, Any]] = []
    whole = {case.format: case for case in found["cases"] if case.mistake == NONE}
    for case in found["cases"]:
        told = {"format": case.format, "mistake": case.mistake, "accuracy": case.accuracy}
        if case.mistake == NONE:
            (good.append(case) if case.accuracy >= READ else out.append(told))
        elif case.mistake != WRONG_ORDER and torch.equal(
            torch.nan_to_num(case.small), torch.nan_to_num(whole[case.format].small)
        ):
            continue  # nothing of this format that the mistake could hit
        else:
            (broken.append(case) if case.accuracy < READABLE else out.append(told))
    changed = [found["other"], *(altered(reference, how) for how in ALTERED)]
    return {
        "good": _runs(good, reference, runs), "broken": _runs(broken, reference, runs),
        "changed": _runs(changed, reference, runs), "left_out": out,
        "cases": [(c.format, c.mistake, c.accuracy) for c in (*good, *broken)],
    }  # fmt: skip


def blurred(images: Tensor) -> Tensor:
    """Binomial 3 x 3."""
    weights = torch.tensor([1.0, 2.0, 1.0])
    kernel = (torch.outer(weights, weights) / 16).expand(3, 1, 3, 3)
    padded = F.pad(images.permute(0, 3, 1, 2), (1, 1, 1, 1), mode="replicate")
    return F.conv2d(padded, kernel, groups=3).permute(0, 2, 3, 1)


def faded(images: Tensor) -> Tensor:
    return 0.5 + 0.5 * (images - 0.5)


def sharpened(images: Tensor) -> Tensor:
    return (2 * images - blurred(images)).clamp(0, 1)


ALTERED = {"blurred": blurred, "faded": faded, "sharpened": sharpened}


def altered(case: Case, how: str) -> Case:
    return Case(case.format, how, case.accuracy, ALTERED[how](case.small), ALTERED[how](case.large))


def photographs() -> dict[str, Any]:
    """Structure of pieces of two photographs and of decoded noise, and verdicts of both beside pieces."""
    whole = [torch.from_numpy(image.copy()).float() / 255 for image in load_sample_images().images]
    pieces = torch.stack([i[y : y + 256, x : x + 256] for i in whole for x in (0, 180, 384) for y in (0, 171)])
    vae = load_vae(demo.MODELS / "vae" / "digits_tae.safetensors")
    latents = torch.randn(len(pieces), vae.latent_channels, 32, 32, generator=torch.Generator().manual_seed(0))
    noise = vae.decode(latents)
    good = [image for k in range(1, len(pieces)) for image in judge(pieces.roll(k, 0), pieces).images]  # each pair
    good += [image for how in ALTERED.values() for image in judge(how(pieces), pieces).images]
    good += [image for how in ALTERED.values() for image in judge(pieces, how(pieces)).images]
    bad = [image for k in range(len(pieces)) for image in judge(noise.roll(k, 0), pieces).images]
    return {
        "pieces": len(pieces), "lowest_structure": min(i.structure for i in good if i.structure is not None),
        "highest_structure_of_noise": max(i.structure for i in bad if i.structure is not None),
        "threshold": NOISE_STRUCTURE, "good": Counter(i.kind.value for i in good),
        "noise": Counter(i.kind.value for i in bad),
        "wrong": sum(i.broken for i in good) + sum(not i.broken for i in bad),
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
    return Run(case.format, case.mistake, size, verdict.kind.value, verdict.score, verdict.evidence, verdict.structure,
               verdict.likeness)  # fmt: skip


def wrong(found: dict[str, Any], threshold: float) -> list[Run]:
    """Runs of a set that a threshold judges wrongly."""

    def is_broken(run: Run) -> bool:
        return run.kind in (Kind.NAN, Kind.FLAT) or (run.evidence is not None and run.evidence > threshold)

    return [r for r in found["good"] + found["changed"] if is_broken(r)] + [
        r for r in found["broken"] if not is_broken(r)
    ]


def gap(found: dict[str, Any]) -> tuple[float, float]:
    """Evidence of the worst good and the best broken run."""
    worst = max(r.evidence for r in found["good"] + found["changed"] if r.evidence is not None)
    return worst, min(r.evidence for r in found["broken"] if r.evidence is not None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--drawn", type=Path, metavar="DIR", help="keep the images here, or judge those that are here")
    parser.add_argument("--quick", action="store_true", help="for tests: two formats, few images")
    args = parser.parse_args()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    start = time.perf_counter()
    plans = QUICK if args.quick else (FIRST, SECOND)
    with torch.inference_mode(), use(StandaloneHost([demo.MODELS], args.out / "noise_images")):
        found = [drawn(plan, 2 if args.quick else 5, args.drawn) for plan in plans]
        sets = [measure(images, 8 if args.quick else RUNS) for images in found]
        photos = photographs()
    worst, best = gap(sets[0])
    threshold = math.sqrt(worst * best)
    for name, found in zip(("first", "second"), sets, strict=True):
        kinds = Counter(run.kind for run in found["broken"])
        low, high = gap(found)
        print(f"{name} set: {len(found['good'])} good up to {low:.3f}, {len(found['broken'])} broken from {high:.3f}"
              f" ({', '.join(f'{n} {k}' for k, n in kinds.items())})")  # fmt: skip
        for case in found["left_out"]:
            print(f"  left out: {case['format']}, {case['mistake']}: {100 * case['accuracy']:.0f} % readable")
    fitted, packs = wrong(sets[1], threshold), wrong(sets[1], NOISE_EVIDENCE)
    print(f"threshold of the first set {threshold:.3f}: {len(fitted)} of the second judged wrongly")
    print(f"threshold of the pack {NOISE_EVIDENCE:g}: {len(packs)} of the second judged wrongly")
    for run in {*fitted, *packs}:
        print(f"  wrong: {run}")
    print(f"photographs: {photos}")
    data = {
        "threshold": threshold, "pack_threshold": NOISE_EVIDENCE, "gap": [worst, best], "wrong": len(fitted),
        "wrong_with_pack_threshold": len(packs), "photographs": photos,
        "seconds": time.perf_counter() - start, "versions": versions(),
        "sets": [{k: [asdict(r) if isinstance(r, Run) else r for r in v] for k, v in s.items()} for s in sets],
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "noise.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(f"{args.out / 'noise.json'}; {data['seconds']:.0f} s")
    right = not fitted and not packs and not wrong(sets[0], NOISE_EVIDENCE) and not photos["wrong"]
    return 0 if right and worst < NOISE_EVIDENCE < best else 1


if __name__ == "__main__":
    sys.exit(main())
