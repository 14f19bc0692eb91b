"""What does each format cost? Size, error, quality and time of every format on two trained models.

    python benchmarks/formats.py [--formats bnb-nf4 gguf-q8-0 ...] [--quick] [--out out] [--docs docs/formats.md]

The digits model of `demo/`: digit accuracy, PSNR of the images against those of full precision from the same seeds,
bytes, SQNR, seconds to quantize, and sampling time as a ratio to full precision. Both are sampled in turn, prompt by
prompt, so that a busy machine slows both. The text encoder of `sentences.py`: how far the cosines of 20 sentence pairs
move from those of full precision.

Writes OUT/formats.json and a table in Markdown: docs/formats.md after a full run, else OUT/formats.md. A full run in
which no format fails also writes quantizers/measure/formats.json, from which formats are ranked, and runs `rounded.py`.
`--quick` is for tests: two formats, few images. Exit code 1 when a format that works here fails.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from formats_page import page, progress
from sentences import Missing, SentenceEncoder
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "demo"))

import run as demo  # noqa: E402
from digits import train_classifier  # noqa: E402
from quantwire import nodes  # noqa: E402
from quantwire.hosts import use  # noqa: E402
from quantwire.hosts.modules import with_layers  # noqa: E402
from quantwire.hosts.standalone.core_nodes import CORE_NODES  # noqa: E402
from quantwire.hosts.standalone.host import StandaloneHost  # noqa: E402
from quantwire.hosts.standalone.models import load_diffusion_model  # noqa: E402
from quantwire.hosts.standalone.workflow import load_workflow  # noqa: E402
from quantwire.quantizers.apply import OnFailure, quantize_linears  # noqa: E402
from quantwire.quantizers.errors import SpecError  # noqa: E402
from quantwire.quantizers.formats import BACKENDS  # noqa: E402
from quantwire.quantizers.measure import measured  # noqa: E402
from quantwire.quantizers.registry import availability, format_ids, get_entry  # noqa: E402
from quantwire.quantizers.report import MIB, QuantReport  # noqa: E402
from quantwire.quantizers.spec import QuantSpec  # noqa: E402

QUICK = ("bnb-nf4", "gguf-q8-0")
CLASSES = {**CORE_NODES, **nodes.NODE_CLASS_MAPPINGS}
DIGITS = ROOT / "demo" / "models" / "diffusion_models" / "digits_flux.safetensors"


@dataclass(frozen=True)
class Size:
    """How much work: prompts of `demo.runs()`, images a prompt, repeats of quantizing."""

    prompts: int = 20
    batch: int = 10
    repeats: int = 3


@dataclass(frozen=True)
class Digits:
    """The digits model in one format. `psnr_db` None: not one pixel differs; `sqnr_db` None: not one weight does."""

    layers: int
    layers_left: int
    left_reason: str
    mib: float
    percent_of_bf16: float
    sqnr_db: float | None
    accuracy: float
    psnr_db: float | None
    quantize_s: float
    sampling_s: float
    sampling_ratio: float


@dataclass(frozen=True)
class Sentences:
    """The text encoder in one format; errors are |cosine - cosine of full precision| over the pairs."""

    layers: int
    layers_left: int
    left_reason: str
    percent_of_fp32: float
    sqnr_db: float | None
    cosine_error_mean: float
    cosine_error_max: float


class Refused(Exception):
    """The format holds no layer of a model; the message is its reason."""


def measure_digits(format_id: str, size: Size, out: Path, clf: Any) -> tuple[Digits, float]:
    """One format on the digits model; also the accuracy of full precision from the same run."""
    model: nn.Module = load_diffusion_model(DIGITS).transformer
    seconds, report = quantize_seconds(model, format_id, size.repeats)
    layers, left, reason = counts(report)
    full = sampling("full_precision", ["Save.filename_prefix=full"], size, out)
    changes = [f"Quantize.format={format_id}", "Quantize.on_failure=full precision"]
    quantized = sampling("quantized", [*changes, f"Save.filename_prefix={format_id}"], size, out)
    ratios: list[float] = []
    for index, run in enumerate(demo.runs()[: size.prompts]):
        pair = [full, quantized] if index % 2 else [quantized, full]
        took = {id(side): side.run(*run) for side in pair}
        ratios.append(took[id(quantized)] / took[id(full)])
    result = Digits(
        layers, left, reason,
        report.nbytes_out / MIB,
        100 * report.nbytes_out / report.nbytes_in,
        report.sqnr_db,
        quantized.accuracy(clf),
        psnr_db(np.stack(quantized.images), np.stack(full.images)),
        seconds,
        quantized.sampling_s,
        statistics.median(ratios[1:]),  # the first has what a library compiles or loads once
    )  # fmt: skip
    return result, full.accuracy(clf)


def sampling(workflow: str, changes: list[str], size: Size, out: Path) -> demo.Sampling:
    prompt = load_workflow(demo.WORKFLOWS / f"{workflow}.json")
    return demo.Sampling(prompt, CLASSES, out, changes, size.batch)


def measure_sentences(format_id: str, encoder: SentenceEncoder) -> Sentences:
    report, quantized = quantize(encoder.module, format_id)
    layers, left, reason = counts(report)
    error = (encoder.cosines(quantized) - encoder.cosines(encoder.module)).abs()
    percent = 100 * report.nbytes_out / report.nbytes_in
    return Sentences(layers, left, reason, percent, report.sqnr_db, float(error.mean()), float(error.max()))


def quantize(model: nn.Module, format_id: str) -> tuple[QuantReport, nn.Module]:
    """Quantize by the default rules; layers that the format cannot hold stay as they are.

    Raises:
        Refused: it holds none of them.
    """
    layers, report = quantize_linears(model, QuantSpec(format_id), on_failure=OnFailure.FULL_PRECISION)
    if not layers:
        raise Refused(counts(report)[2])
    return report, with_layers(model, layers)


def quantize_seconds(model: nn.Module, format_id: str, repeats: int) -> tuple[float, QuantReport]:
    """The median; the library is imported by then."""
    reports = [quantize(model, format_id)[0] for _ in range(repeats)]
    return statistics.median(r.seconds for r in reports), reports[0]


def counts(report: QuantReport) -> tuple[int, int, str]:
    """Layers quantized, layers that the format could not hold, and why the first of them."""
    left = [e for e in report.entries if e.action == "full precision"]
    return sum(e.action == "quantize" for e in report.entries), len(left), left[0].reason if left else ""


def psnr_db(images: np.ndarray, reference: np.ndarray) -> float | None:
    """Peak signal-to-noise ratio of (B, 64, 64, 3) images in [0, 1]; None when they are equal."""
    mse = float(np.square(images - reference, dtype=np.float64).mean())
    return -10 * math.log10(mse) if mse else None


def bfloat16_sentences(encoder: SentenceEncoder) -> tuple[float, float]:
    """(mean, max) cosine error of the encoder when it is cast to bfloat16 and not quantized."""
    full = encoder.cosines(encoder.module)
    error = (encoder.cosines(copy.deepcopy(encoder.module).to(torch.bfloat16)) - full).abs()
    return float(error.mean()), float(error.max())


def check_encoder(encoder: SentenceEncoder) -> None:
    """Errors of a model that does not tell the similar pairs from the others would say nothing: raise ValueError."""
    cosines = encoder.cosines(encoder.module)
    similar, others = cosines[: len(cosines) // 2], cosines[len(cosines) // 2 :]
    if similar.min() <= others.max():
        raise ValueError(f"least similar pair {similar.min():.3f}, most similar of the others {others.max():.3f}")


def machine() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cores": cores,
        "threads": torch.get_num_threads(),
        "instruction_sets": instruction_sets(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def instruction_sets() -> list[str]:
    """What torch uses, and the units for small numbers that /proc/cpuinfo names where there is one."""
    found = [torch.backends.cpu.get_cpu_capability()]
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return found
    return found + [f for f in ("avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8") if f in flags]


def measure(formats: list[str], size: Size, images: Path, encoder: SentenceEncoder | None) -> Iterator[dict[str, Any]]:
    """One dict a format: `digits` and `sentences`, or `not_here`, `failed`; `refused` by the model's name."""
    clf, _ = train_classifier()
    for format_id in formats:
        entry, state = get_entry(format_id), availability(format_id)
        package = next(b.package for b in BACKENDS if b.name == entry.backend) or "torch"
        library = f"{package} {state.version}".strip()
        row: dict[str, Any] = {"format": format_id, "bits": entry.bits, "library": library}
        if not state.works:
            yield {**row, "not_here": f"{state.reason} {state.remedy}".strip()}
            continue
        row["refused"] = {}
        try:
            try:
                digits, row["full_accuracy"] = measure_digits(format_id, size, images, clf)
                row["digits"] = asdict(digits)
            except Refused as err:
                row["refused"]["digits"] = str(err)
            try:
                if encoder is not None:
                    row["sentences"] = asdict(measure_sentences(format_id, encoder))
            except Refused as err:
                row["refused"]["sentences"] = str(err)
        except Exception as err:  # one broken format must not cost the others' results; the exit code tells
            logging.getLogger(__name__).exception("%s failed", format_id)
            row["failed"] = f"{type(err).__name__}: {str(err).splitlines()[0] if str(err) else ''}"
        yield row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--formats", nargs="+", metavar="FORMAT", help="default: every format that can be made")
    parser.add_argument("--quick", action="store_true", help="two formats, few images: does it run?")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--docs", type=Path, help="where the table goes")
    args = parser.parse_args()
    try:
        formats = [QuantSpec(f).format_id for f in args.formats or (QUICK if args.quick else format_ids())]
    except SpecError as err:
        parser.error(str(err))
    partial = bool(args.formats or args.quick)
    docs: Path = args.docs or (args.out if partial else ROOT / "docs") / "formats.md"
    args.out.mkdir(parents=True, exist_ok=True)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("quantwire.quantizers.apply").setLevel(logging.ERROR)  # layers left stand in the table
    start = time.perf_counter()

    encoder, absent = None, ""
    try:
        encoder = SentenceEncoder()
        check_encoder(encoder)
    except Missing as err:
        absent = str(err)
        print(f"no sentence pairs: {absent}", file=sys.stderr)
    rows: list[dict[str, Any]] = []
    with use(StandaloneHost([demo.MODELS], args.out / "formats_images")) as host:
        size = Size(prompts=4, batch=2, repeats=1) if args.quick else Size()
        for row in measure(formats, size, host.output, encoder):
            rows.append(row)
            print(progress(row), flush=True)
    result = {
        "command": " ".join(["python", "benchmarks/formats.py", *sys.argv[1:]]),
        "machine": machine(),
        "seconds": time.perf_counter() - start,
        "prompts": size.prompts,
        "images_a_prompt": size.batch,
        "repeats": size.repeats,
        "no_sentences": absent,
        "bfloat16_cosine_error": bfloat16_sentences(encoder) if encoder else None,
        "rows": rows,
    }
    (args.out / "formats.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    docs.parent.mkdir(parents=True, exist_ok=True)
    docs.write_text(page(result), encoding="utf-8")
    print(f"{args.out / 'formats.json'}, {docs}; {result['seconds']:.0f} s in all")
    failed = any("failed" in r for r in rows)
    if not partial and not failed and encoder is not None:
        measured.DATA.write_text(json.dumps(measured.trimmed(result), indent=1) + "\n", encoding="utf-8")
        return subprocess.run([sys.executable, str(Path(__file__).with_name("rounded.py"))], check=False).returncode
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
