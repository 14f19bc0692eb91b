"""What does each GGUF type do to a model? The demo model, converted to every block type and mixed recipe, draws digits.

    python benchmarks/gguf_types.py [--quick] [--out out] [--docs docs/gguf.md]

Each file is made by the functions behind `quantwire convert`, opened by LoadGGUF in the embedded host, and draws the
200 digits of `demo/run.py`: size, error of the weights and of the pictures, digit accuracy, seconds. Three groups:

    types     one ggml type for every quantized weight, no importance matrix
    recipes   the mixed types, no importance matrix; those that decide as one type alone does are named below the table
    low bits  IQ recipes with an importance matrix, recorded here from ten other prompts and seeds

A type that a layer's rows do not fit falls back to another one, which its row says. Seconds to convert are those of the
second conversion: the first makes ggml's tables of the IQ1 and IQ2 types, once for a process.

Writes OUT/gguf_types.json, and the tables between the markers of docs/gguf.md after a full run, else into
OUT/gguf_types.md. `--quick` is for tests: three files, few images. Exit code 1 when a file cannot be made or draws
digits below the bounds of the demo.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from docs_tables import line, write_between
from formats import CLASSES, DIGITS, Size, demo, machine, psnr_db
from quantwire.cli import main as quantwire
from quantwire.hosts import use
from quantwire.hosts.standalone.host import StandaloneHost
from quantwire.hosts.standalone.workflow import load_workflow
from quantwire.quantizers.errors import QuantwireError
from quantwire.quantizers.files.convert_plan import Request
from quantwire.quantizers.files.converting import convert, describe
from quantwire.quantizers.files.recipes import FLOATS, RECIPES
from quantwire.quantizers.ggml_types import TYPES, format_id
from quantwire.quantizers.report import MIB, QuantReport

ROOT = Path(__file__).resolve().parents[1]
QUICK = ("Q8_0", "Q4_K_M", format_id("IQ4_XS"))
HEADS = (
    "type", "bits a quantized weight", "file MiB", "SQNR dB", "PSNR dB", "digit accuracy", "convert s", "sampling s",
    "remarks",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One file: `type` as `quantwire convert --type` takes it."""

    type: str
    group: str
    imatrix: Path | None = None


@dataclass(frozen=True)
class Row:
    """One line of the tables. Not measured are those that failed, and those that are the `same` as an earlier one."""

    type: str
    group: str
    remarks: str
    bits: float | None = None
    nbytes: int | None = None
    sqnr_db: float | None = None
    psnr_db: float | None = None
    accuracy: float | None = None
    convert_s: float | None = None
    first_s: float | None = None
    sampling_s: float | None = None
    failed: str = ""
    same: str = ""


class Silent:
    """A progress bar that nobody sees."""

    def update(self, n: int, /) -> None:
        del n


@contextlib.contextmanager
def silent(total: int) -> Iterator[Silent]:
    del total
    yield Silent()


class Bench:
    """What all files share.

    Attributes:
        folder: where the files go, below the model folder that the host searches.
        images: what full precision draws, (B, 64, 64, 3).
    """

    def __init__(self, size: Size, out: Path, models: Path) -> None:
        self.size, self.out, self.folder = size, out, models / "diffusion_models"
        self.clf, _ = demo.train_classifier()
        self.prompt = load_workflow(demo.WORKFLOWS / "gguf.json")
        full = load_workflow(demo.WORKFLOWS / "full_precision.json")
        sampling = self.draw(demo.Sampling(full, CLASSES, out, ["Save.filename_prefix=full"], size.batch))
        self.images = np.stack(sampling.images)
        self.full_accuracy, self.full_s = sampling.accuracy(self.clf), sampling.sampling_s

    def draw(self, sampling: demo.Sampling) -> demo.Sampling:
        for run in demo.runs()[: self.size.prompts]:
            sampling.run(*run)
        return sampling

    def measure(self, job: Job) -> Row:
        """Convert, load, draw."""
        target = self.folder / f"{job.type}.gguf"
        request = Request(DIGITS, target, job.type, imatrix=job.imatrix, overwrite=True, measure=True)
        first_s, report = timed(request)
        convert_s, _ = timed(Request(DIGITS, target, job.type, imatrix=job.imatrix, overwrite=True))
        changes = [f"LoadGGUF.gguf_name={target.name}", f"Save.filename_prefix={job.type}"]
        sampling = self.draw(demo.Sampling(self.prompt, CLASSES, self.out, changes, self.size.batch))
        quantized = [e for e in report.entries if e.action == "quantize"]
        require_the_same_types(report, sampling.report or {})
        accuracy = sampling.accuracy(self.clf)
        row = Row(
            job.type,
            job.group,
            remarks(report),
            8 * sum(e.nbytes_out for e in quantized) / sum(e.nbytes_in / 2 for e in quantized),
            target.stat().st_size,
            report.sqnr_db,
            psnr_db(np.stack(sampling.images), self.images),
            accuracy,
            convert_s,
            first_s,
            sampling.sampling_s,
            too_low(job.type, accuracy, self.full_accuracy),
        )
        target.unlink()
        return row


def timed(request: Request) -> tuple[float, QuantReport]:
    start = time.perf_counter()
    report = convert(request, silent)
    return time.perf_counter() - start, report


def require_the_same_types(made: QuantReport, loaded: dict[str, Any]) -> None:
    """Raise ValueError where the model that drew is not in the blocks of the file: the host may cut fused layers."""
    wrote = {e.format_id for e in made.entries if e.action == "quantize"}
    held = {e["format_id"] for e in loaded.get("entries", []) if e["action"] == "quantize"}
    plain = [e["name"] for e in loaded.get("entries", []) if e["action"] == "dequantize"]
    if wrote != held or plain:
        raise ValueError(f"{made.title}: written in {sorted(wrote)}, held in {sorted(held)}; dequantized: {plain}")


def remarks(report: QuantReport) -> str:
    """What else than the base type is in the file, and why."""
    quantized = [e for e in report.entries if e.action == "quantize"]
    others = Counter(e.format_id for e in quantized if e.format_id != report.format_id)
    mixed = [f"{n} of {len(quantized)} layers in {ggml_name(kind)}" for kind, n in others.most_common()]
    fallen = [w for w in report.warnings if "fall back" in w]
    return "; ".join([*mixed, *fallen])


def ggml_name(id_: str) -> str:
    return id_.removeprefix("gguf-").upper().replace("-", "_")


def too_low(name: str, accuracy: float, full: float) -> str:
    """The demo's bounds, by the bits of the base type; types below 4 bits have none."""
    base = ggml_name(name) if name.startswith("gguf-") else RECIPES[name].base
    bits = TYPES[base].bits
    allowed = demo.LOSS_8_BIT if bits >= 8 else demo.LOSS_4_BIT if bits >= 4 else 1.0
    return "" if accuracy >= full - allowed - 1e-9 else f"accuracy {accuracy:.3f}, full precision {full:.3f}"


def jobs(matrix: Path | None) -> list[Job]:
    """Everything; without a matrix, what needs none."""
    mixed = [r for r in RECIPES.values() if r.base not in FLOATS]
    low = [r.name for r in mixed if r.name.startswith("IQ")] if matrix else []
    found = [Job(format_id(kind), "types") for kind in TYPES]
    found += [Job(r.name, "recipes") for r in mixed if not r.name.startswith("IQ")]
    return found + [Job(name, "low bits", matrix) for name in low]


def decisions(job: Job) -> list[tuple[str, str]]:
    """(tensor, type) of the file, without making it."""
    plan = describe(Request(DIGITS, Path("any.gguf"), job.type, imatrix=job.imatrix)).to_dict()
    return [(t["name"], t["type"]) for t in plan["tensors"]]


def record(folder: Path) -> Path:
    """An importance matrix of ten prompts, with seeds that draw no digit of the tables."""
    target = folder / "digits.imatrix.gguf"
    for digit, word in enumerate(demo.WORDS):
        sets = [f"Prompt.text=a handwritten {word}", f"Sampler.seed={3000 + digit}"]
        command = ["imatrix", str(demo.WORKFLOWS / "full_precision.json"), "--out", str(target)]
        command += ["--models", str(demo.MODELS), *(f"--set={s}" for s in sets)]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as shown:
            code = quantwire([*command, *(["--merge", str(target)] if digit else [])])
        if code:
            raise RuntimeError(f"{' '.join(command)}: exit code {code}\n{shown.getvalue()}")
    return target


def measure(bench: Bench, todo: Sequence[Job]) -> Iterator[Row]:
    alone: dict[tuple[tuple[str, str], ...], str] = {}
    for job in todo:
        try:
            key = tuple(decisions(job))
            if job.group == "types":
                alone[key] = job.type
            elif key in alone and job.imatrix is None:
                yield Row(job.type, job.group, "", same=alone[key])
                continue
            yield bench.measure(job)
        except (QuantwireError, ValueError) as err:  # one broken type must not cost the others' results
            yield Row(job.type, job.group, "", failed=f"{type(err).__name__}: {str(err).splitlines()[0]}")


def cells(row: Row) -> list[str]:
    if row.nbytes is None:
        return [f"`{row.type}`", *["-"] * 7, f"FAILED: {row.failed}" if row.failed else f"as `{row.same}`"]
    numbers = [
        f"{row.bits:.2f}", f"{row.nbytes / MIB:.2f}", text(row.sqnr_db), text(row.psnr_db),
        f"{100 * row.accuracy:.1f} %", f"{row.convert_s:.2f}", f"{row.sampling_s:.1f}",
    ]  # fmt: skip
    return [f"`{row.type}`", *numbers, f"TOO LOW: {row.failed}" if row.failed else row.remarks]


def text(value: float | None) -> str:
    return "exact" if value is None else f"{value:.1f}"


def table(result: dict[str, Any], rows: Sequence[Row]) -> str:
    """The part of the page between the markers."""
    m, full = result["machine"], result["full_precision"]
    lines = [
        f"Made by `{result['command']}` in {result['seconds']:.0f} s; the next run overwrites it. "
        f"Machine: {m['cores']} cores with {', '.join(m['instruction_sets'])}; {m['threads']} torch threads; no GPU. "
        f"torch {m['torch']}, gguf {version('gguf')}, libggml-python {version('libggml-python')}.",
        "",
        f"Full precision: {full['mib']:.2f} MiB, digit accuracy {100 * full['accuracy']:.1f} % of {full['images']} "
        f"pictures, sampling {full['sampling_s']:.1f} s.",
    ]
    titles = {
        "types": "One type for every quantized weight, no importance matrix",
        "recipes": "Mixed recipes, no importance matrix",
        "low bits": "Recipes of the IQ types, with an importance matrix of ten prompts",
    }
    for group, title in titles.items():
        found = [r for r in rows if r.group == group]
        if not found:
            continue
        lines += ["", f"### {title}", "", line(HEADS), line(["---"] * len(HEADS))]
        lines += [line(cells(r)) for r in found if not r.same]
        same = ", ".join(f"`{r.type}` (`{r.same}`)" for r in found if r.same)
        lines += ["", f"Of this model the same files as one type alone makes: {same}."] if same else []
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="three files, few images: does it run?")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--docs", type=Path, help="the page whose tables are replaced (default: docs/gguf.md)")
    args = parser.parse_args()
    docs: Path | None = args.docs or (None if args.quick else ROOT / "docs" / "gguf.md")
    models = args.out / "gguf_types"
    (models / "diffusion_models").mkdir(parents=True, exist_ok=True)
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree", "diffusers"):  # reports of what they do without
        logging.getLogger(name).setLevel(logging.ERROR)
    start = time.perf_counter()
    rows: list[Row] = []
    size = Size(prompts=4, batch=2) if args.quick else Size()
    with use(StandaloneHost([models, demo.MODELS], args.out / "gguf_types_images")) as host:
        bench = Bench(size, host.output, models)
        todo = [Job(name, "recipes" if name in RECIPES else "types") for name in QUICK]
        for row in measure(bench, todo if args.quick else jobs(record(models))):
            rows.append(row)
            print(" | ".join(cells(row)), flush=True)
    result = {
        "command": " ".join(["python", "benchmarks/gguf_types.py", *sys.argv[1:]]),
        "machine": machine(),
        "seconds": time.perf_counter() - start,
        "full_precision": {
            "mib": DIGITS.stat().st_size / MIB,
            "accuracy": bench.full_accuracy,
            "sampling_s": bench.full_s,
            "images": len(bench.images),
        },
        "rows": [asdict(r) for r in rows],
    }
    (args.out / "gguf_types.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    body = table(result, rows)
    if docs is None:
        docs = args.out / "gguf_types.md"
        docs.write_text(body + "\n", encoding="utf-8")
    else:
        write_between(docs, "gguf_types", body)
    print(f"{args.out / 'gguf_types.json'}, {docs}; {result['seconds']:.0f} s in all")
    return 1 if any(r.failed for r in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
