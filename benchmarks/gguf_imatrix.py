"""How much does an importance matrix help, by GGUF block type?

    python benchmarks/gguf_imatrix.py [--formats gguf-q4-k,gguf-q2-k,...] [--json FILE] [--markdown FILE]

The matrix is recorded from the demo's FLUX-layout model on ten prompts and one set of seeds, and judged on others.
Everything computes in float32, so that nothing but the quantization differs. Two errors, without the matrix and with:

    weights   sum of importance * (w - w')^2 / sum of importance * w^2 over all quantized weights, with the importance
              of the judging run: what the products of the layers lose to the rounding, if columns are uncorrelated
    output    relative error of the model's velocities over the judging run, at every step of it

Quantized are the weights that a plan would quantize and whose rows are whole blocks. Types that ggml makes only with a
matrix (IQ1_S, IQ2_XXS, IQ2_XS) get one of ones where there is none.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import torch
from quantwire.hosts import use
from quantwire.hosts.record import Recorder
from quantwire.hosts.standalone import flux
from quantwire.hosts.standalone.host import StandaloneHost
from quantwire.hosts.standalone.loaders import CLIPLoader
from quantwire.hosts.standalone.models import DiffusionModel, load_diffusion_model
from quantwire.hosts.standalone.record import transformer_layers
from quantwire.hosts.standalone.sampling import sigmas
from quantwire.quantizers.apply import quantize_tensor
from quantwire.quantizers.files.checkpoint import read_safetensors
from quantwire.quantizers.files.imatrix import Imatrix
from quantwire.quantizers.ggml_types import TYPES, format_id, type_name
from quantwire.quantizers.plan import sensitive_reason
from quantwire.quantizers.registry import require
from quantwire.quantizers.spec import QuantSpec
from safetensors.torch import save_file
from torch import Tensor

MODEL = Path(__file__).resolve().parents[1] / "demo" / "models" / "diffusion_models" / "digits_flux.safetensors"
SAMPLING_STEPS = 8
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DEFAULT = ("Q4_K", "Q3_K", "Q2_K", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S")


@dataclass(frozen=True)
class Result:
    """Relative errors, without an importance matrix and with it."""

    format_id: str
    bits: float
    weights_without: float
    weights_with: float
    output_without: float
    output_with: float


class Runs:
    """Sampling runs of ten prompts at once: "a handwritten zero" to "nine".

    Attributes:
        steps: (sigma, (10, 16, 8, 8) latent) along the trajectories of the full-precision model.
    """

    def __init__(self, model: DiffusionModel, seeds: range) -> None:
        (clip,) = CLIPLoader().load_clip("digits_clip.safetensors", "flux")
        conditions = [clip.encode(f"a handwritten {word}") for word in WORDS]
        self.context, self.pooled = (torch.cat(parts) for parts in zip(*conditions, strict=True))
        self.steps: list[tuple[float, Tensor]] = []
        for seed in seeds:
            x = torch.randn(10, 16, 8, 8, generator=torch.Generator().manual_seed(seed))
            for sigma, following in pairwise(sigmas("simple", SAMPLING_STEPS, 1.0, model.shift_mu).tolist()):
                self.steps.append((sigma, x))
                x = x + (following - sigma) * self.velocity(model, sigma, x)

    def velocity(self, model: DiffusionModel, sigma: float, x: Tensor) -> Tensor:
        return flux.velocity(model.transformer, x, sigma, self.context, self.pooled, 3.5, model.dtype)

    def output(self, model: DiffusionModel) -> Tensor:
        """All velocities as one vector."""
        return torch.cat([self.velocity(model, sigma, x).flatten() for sigma, x in self.steps])

    def record(self, model: DiffusionModel) -> tuple[Imatrix, float]:
        """The importance matrix of these runs, and how many times the time of the runs alone recording takes."""
        recorder, seconds = Recorder(), {"plain": 0.0, "recorded": 0.0}
        for sigma, x in self.steps:  # interleaved
            start = time.perf_counter()
            self.velocity(model, sigma, x)
            middle = time.perf_counter()
            with recorder.watch(model.transformer, transformer_layers(model)):
                self.velocity(model, sigma, x)
            seconds["plain"] += middle - start
            seconds["recorded"] += time.perf_counter() - middle
        return recorder.matrix("demo"), seconds["recorded"] / seconds["plain"]


def quantized(
    tensors: Mapping[str, Tensor], id_: str, matrix: Imatrix | None, judge: Imatrix
) -> tuple[dict[str, Tensor], float]:
    """The tensors with the quantized ones dequantized again, and the relative weighted error."""
    result, lost, total = dict(tensors), 0.0, 0.0
    for name, w in tensors.items():
        if w.ndim != 2 or w.shape[1] % TYPES[type_name(id_)].block or sensitive_reason(name.removesuffix(".weight")):
            continue
        importance = None if matrix is None else matrix.find(name)
        weight, _ = quantize_tensor(name, w, QuantSpec(id_), importance)
        result[name] = require(id_).dequantize(weight, torch.float32)
        judged = judge.find(name)
        assert judged is not None
        lost += float((judged * (result[name] - w).double() ** 2).sum())
        total += float((judged * w.double() ** 2).sum())
    return result, lost / total


def loaded(tensors: Mapping[str, Tensor]) -> DiffusionModel:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "digits_flux.safetensors"
        save_file(dict(tensors), path)
        return load_diffusion_model(path, torch.float32)


def measure(
    tensors: Mapping[str, Tensor], id_: str, matrix: Imatrix, judge: Imatrix, runs: Runs, wanted: Tensor
) -> Result:
    weights: list[float] = []
    outputs: list[float] = []
    for given in (None, matrix):
        made, error = quantized(tensors, id_, given, judge)
        weights.append(error)
        outputs.append(float((runs.output(loaded(made)) - wanted).norm() / wanted.norm()))
    return Result(id_, TYPES[type_name(id_)].bits, *weights, *outputs)


def table(results: list[Result]) -> str:
    lines = [
        "| format | bits | weights without | with | ratio | output without | with | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in sorted(results, key=lambda r: (-r.bits, r.format_id)):
        lines.append(
            f"| `{r.format_id}` | {r.bits:.4g} | {r.weights_without:.5f} | {r.weights_with:.5f} | "
            f"{r.weights_with / r.weights_without:.2f} | {r.output_without:.4f} | {r.output_with:.4f} | "
            f"{r.output_with / r.output_without:.2f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--formats", help=f"comma-separated; default: {', '.join(map(format_id, DEFAULT))}")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    ids = args.formats.split(",") if args.formats else [format_id(name) for name in DEFAULT]
    results: list[Result] = []
    with use(StandaloneHost([MODEL.parents[1]])), torch.inference_mode():
        model = load_diffusion_model(MODEL, torch.float32)
        matrix, slower = Runs(model, range(100, 102)).record(model)
        runs = Runs(model, range(2))
        judge, _ = runs.record(model)
        wanted = runs.output(model)
        tensors = {n: t.float() for n, t in read_safetensors(MODEL).tensors.items() if isinstance(t, Tensor)}
        print(f"recording takes {slower:.2f} times as long as the run alone (hidden size 256)", flush=True)
        for id_ in ids:
            results.append(measure(tensors, id_, matrix, judge, runs, wanted))
            print(table(results[-1:]).splitlines()[-1], flush=True)
    print(f"\n{table(results)}")
    packages = {name: version(name) for name in ("torch", "libggml-python", "diffusers")}
    data = {
        "recording_time": slower,
        "results": [asdict(r) for r in results],
        "versions": packages,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {platform.system()}",
    }
    for path, text in ((args.json, json.dumps(data, indent=2)), (args.markdown, table(results))):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
