"""Is a mixed recipe better than every single format of its size? Output errors and pictures, on held-out runs.

    python benchmarks/recipe.py [--model digits | flux324] [--formats all | ID...] [--everywhere]
        [--candidates] [--float32] [--json FILE]

For each single format the recipe gets exactly that format's bytes as its budget. As FindRecipe does, it measures layers
on some prompts and seeds, checks the mixture on another beside the single formats among its candidates, and takes one
of those where it measured better. The result is compared on runs that none of this saw, with the layers that
QuantizeModel makes: the relative error of the denoiser's output, and on the digits model the PSNR of its pictures
against those of full precision from the same seeds. The recipe is `better` where it is in both, and `level` where
neither is worse by more than rounding: where squared errors differ by less than one rounding in the first layer makes.
`digits` is the trained model of demo/; `flux324` the 324 M parameter FLUX of benchmarks/forward.py with random weights.
A single format follows the default rules, which keep modulation and embedders at full precision; with `--everywhere` it
quantizes every layer that it can hold. Recipes are made of `sensitivity.DEFAULT_FORMATS` alone, and with
`--candidates` of the compared formats too. With `--float32` the comparison (not the sensitivities, nor the sizes)
computes in float32: in bfloat16, rounding covers errors of 8 bits.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from forward import make_inputs, make_model
from quantwire.hosts import use
from quantwire.hosts.modules import with_layers
from quantwire.hosts.sensitivity import Check, Probe, _nudge, changed, check_mixtures, spread
from quantwire.hosts.standalone.core_nodes import CORE_NODES
from quantwire.hosts.standalone.host import StandaloneHost
from quantwire.hosts.standalone.sampling import _velocity, sample
from quantwire.quantizers.apply import OnFailure, planning_slots, quantize_linears
from quantwire.quantizers.choices import OnQuantized
from quantwire.quantizers.measure.recipe import Recipe, checked, find_recipe
from quantwire.quantizers.measure.sensitivity import DEFAULT_FORMATS, Sensitivities
from quantwire.quantizers.plan import make_plan
from quantwire.quantizers.registry import available_formats, get_quantizer
from quantwire.quantizers.report import versions
from quantwire.quantizers.spec import QuantSpec
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
DEFAULT = (
    *("gguf-q8-0", "gguf-q6-k", "gguf-q5-k", "gguf-q4-k", "gguf-iq4-nl", "gguf-q3-k", "gguf-q2-k", "gguf-iq2-xs"),
    *("bnb-int8", "bnb-nf4", "quanto-qint4", "quanto-qint2", "comfy-fp8-e4m3fn", "comfy-nvfp4", "torchao-int8wo"),
    *("sdnq-uint8", "sdnq-uint4", "nncf-int4-asym"),
)
STEPS, BATCH = 4, 4
MEASURED = (("a handwritten seven", 5), ("the number two", 6))
CHECKED = ("the number four", 77)
HELD_OUT = tuple((f"a handwritten {word}", 900 + i) for i, word in enumerate(("zero", "one", "three", "five", "nine")))
HELD_OUT_SIGMAS = (0.95, 0.6, 0.25)
TOKENS = 288


@dataclass(frozen=True)
class Row:
    """One budget. Errors are relative, of the model's output on held-out runs; PSNR in dB, None without pictures."""

    single: str
    budget: int
    single_error: float
    single_psnr: float | None
    recipe_nbytes: int
    recipe_formats: dict[str, int]
    recipe_predicted: float
    recipe_error: float
    recipe_psnr: float | None
    recipe_single: str
    rounding_error: float
    rounding_psnr: float | None

    @property
    def verdict(self) -> str:
        """`better` in everything that was measured, `same` format, `level` within rounding, or `worse`."""
        if self.recipe_single == self.single:
            return "same"
        pairs = [(self.recipe_error**2, self.single_error**2, self.rounding_error**2)]
        if self.recipe_psnr is not None and self.single_psnr is not None and self.rounding_psnr is not None:
            psnrs = (self.recipe_psnr, self.single_psnr, self.rounding_psnr)
            pairs.append(tuple(10 ** (-psnr / 10) for psnr in psnrs))
        if all(mine < other for mine, other, _ in pairs):
            return "better"
        return "level" if all(mine - other < rounding for mine, other, rounding in pairs) else "worse"


class Digits:
    """The trained demo model: sampling runs, and held-out ones to compare pictures and outputs on."""

    name = "digits"

    def __init__(self, host: StandaloneHost, float32: bool) -> None:
        def node(kind: str) -> Any:
            return CORE_NODES[kind]()

        self.host = host
        self.model = node("UNETLoader").load_unet("digits_flux.safetensors")[0]
        clip = node("CLIPLoader").load_clip("digits_clip.safetensors")[0]
        self.vae = node("VAELoader").load_vae("digits_tae.safetensors")[0]
        encode, guide = node("CLIPTextEncode"), node("FluxGuidance")
        prompts = [text for text, _ in (*MEASURED, CHECKED, *HELD_OUT)]
        self.conditions = {text: guide.append(encode.encode(clip, text)[0], 3.5)[0] for text in prompts}
        self.module: nn.Module = self.model.transformer
        self.measured_model = self.model
        if float32:
            self.model = replace(self.model, dtype=torch.float32, transformer=copy.deepcopy(self.module).float())
        self.reference = [self._sampled(self.model, text, seed) for text, seed in HELD_OUT]
        self.pictures = [self._picture(latent) for latent in self.reference]
        self.velocities = list(self._velocities(self.model))

    def _sampled(self, model: Any, text: str, seed: int) -> Tensor:
        condition = self.conditions[text]
        return sample(model, seed, STEPS, 1.0, "simple", condition, condition, torch.zeros(BATCH, 16, 8, 8))

    def _picture(self, latent: Tensor) -> Tensor:
        return self.vae.decode(latent).clamp(0, 1)

    def _velocities(self, model: Any) -> Iterator[Tensor]:
        """Outputs at noise levels between those of the measured runs, on the pictures of full precision."""
        for (text, seed), latent in zip(HELD_OUT, self.reference, strict=True):
            noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed + 5000))
            image = (latent - 0.1159) * 0.3611
            for sigma in HELD_OUT_SIGMAS:
                yield _velocity(model, sigma * noise + (1 - sigma) * image, sigma, self.conditions[text][0])

    def measure(self, probe: Probe) -> None:
        for text, seed in MEASURED:
            probe.restart()
            self._sampled(self.host.watched(self.measured_model, probe), text, seed)

    def check(self, check: Check) -> None:
        self._sampled(self.host.watched(self.measured_model, check), *CHECKED)

    def compare(self, module: nn.Module) -> tuple[float, float | None]:
        model = self.model.with_transformer(module)
        error = relative(list(self._velocities(model)), self.velocities)
        pictures = [self._picture(self._sampled(model, text, seed)) for text, seed in HELD_OUT]
        mse = sum(float((a - b).pow(2).mean()) for a, b in zip(pictures, self.pictures, strict=True)) / len(pictures)
        return error, (10 * math.log10(1 / mse) if mse else math.inf)


class Flux324:
    """The 324 M parameter model of forward.py: measured on inputs of some seeds and times, compared on others."""

    name = "flux324"

    def __init__(self, host: StandaloneHost, float32: bool) -> None:
        self.module = make_model()
        if float32:
            raise SystemExit("--float32 is for the digits model only")
        self.reference = [self._call(self.module, *which) for which in self.held_out]

    measured = ((1, 0.9), (2, 0.5), (3, 0.1))
    checked = (21, 0.4)
    held_out = ((11, 0.8), (12, 0.35), (13, 0.6))

    def _call(self, module: nn.Module, seed: int, time: float) -> Tensor:
        inputs = make_inputs(module, TOKENS)
        g = torch.Generator().manual_seed(1000 + seed)
        for name in ("hidden_states", "encoder_hidden_states", "pooled_projections"):
            inputs[name] = torch.randn(inputs[name].shape, generator=g).to(torch.bfloat16)
        inputs["timestep"] = torch.tensor([time], dtype=torch.bfloat16)
        return module(**inputs, return_dict=False)[0]

    def measure(self, probe: Probe) -> None:
        for which in self.measured:
            probe.restart()
            with probe.watch(self.module, {}):
                self._call(self.module, *which)

    def check(self, check: Check) -> None:
        with check.watch(self.module, {}):
            self._call(self.module, *self.checked)

    def compare(self, module: nn.Module) -> tuple[float, float | None]:
        return relative([self._call(module, *which) for which in self.held_out], self.reference), None


def relative(made: list[Tensor], exact: list[Tensor]) -> float:
    """Root of the mean relative squared error; what is not finite counts as 1."""
    errors = [
        float((a.float() - b.float()).pow(2).sum() / b.float().pow(2).sum()) for a, b in zip(made, exact, strict=True)
    ]
    return math.sqrt(sum(e if math.isfinite(e) else 1.0 for e in errors) / len(errors))


def quantized(case: Any, spec: QuantSpec) -> tuple[nn.Module, int]:
    """The model to compare with, and its bytes as the model is stored."""
    base: nn.Module = case.model.transformer if case.name == "digits" else case.module
    layers, _ = quantize_linears(base, spec, make_layer=case_host.make_layer, on_failure=OnFailure.FULL_PRECISION)
    slots = planning_slots(case.module, OnQuantized.REFUSE)
    return with_layers(base, layers), make_plan(slots, spec, get_quantizer(spec.format_id)).nbytes_out


case_host = StandaloneHost()


def chosen(case: Any, found: Sensitivities, budget: int, known: dict[str, float]) -> Recipe:
    """What FindRecipe hands out; `known` keeps the measured errors of single formats for other budgets."""
    recipe = find_recipe(found, budget)
    wanted = {n: targets for n, targets in check_mixtures(recipe, found).items() if n not in known}
    check = Check(case_host, spread(STEPS, 2) if case.name == "digits" else frozenset({0}), wanted)
    case.check(check)
    errors = check.errors()
    known |= {name: error for name, error in errors.items() if name != "recipe"}
    return checked(recipe, found, known | errors, "a run of its own")


def rounding_of(case: Any, found: Sensitivities) -> tuple[float, float | None]:
    """Error and PSNR of the model at full precision, with one rounding more in its first layer."""
    base: nn.Module = case.model.transformer if case.name == "digits" else case.module
    with changed(base, {found.units[0].layers[0]: _nudge}):
        return case.compare(base)


def compare(
    case: Any, found: Sensitivities, formats: list[str], everywhere: bool, rounding: tuple[float, float | None]
) -> Iterator[Row]:
    known: dict[str, float] = {}
    done: dict[str, tuple[float, float | None]] = {}
    for format_id in formats:
        module, budget = quantized(case, QuantSpec(format_id, include=("*",) if everywhere else ()))
        single = case.compare(module)
        recipe = chosen(case, found, budget, known)
        if recipe.rules not in done:
            module, nbytes = quantized(case, recipe.spec())
            if nbytes != recipe.nbytes or nbytes > budget:
                raise SystemExit(f"the recipe says {recipe.nbytes} bytes, and it has {nbytes}; budget {budget}")
            done[recipe.rules] = case.compare(module)
        made = done[recipe.rules]
        mixture = dict(recipe.formats)
        shared = ("" if everywhere else recipe.single, *rounding)
        yield Row(format_id, budget, *single, recipe.nbytes, mixture, recipe.predicted_error, *made, *shared)


def show(row: Row) -> str:
    psnr = (
        ""
        if row.single_psnr is None or row.recipe_psnr is None
        else f" {row.single_psnr:.1f} | {row.recipe_psnr:.1f} |"
    )
    mixture = ", ".join(f"{n} {t.removeprefix('gguf-')}" for t, n in row.recipe_formats.items())
    return (
        f"| {row.single} | {row.budget / 2**20:.2f} | {100 * row.single_error:.2f} | {100 * row.recipe_error:.2f} |"
        f"{psnr} {row.verdict} | {mixture} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=("digits", "flux324"), default="digits")
    parser.add_argument("--formats", nargs="+", default=list(DEFAULT), metavar="ID", help="`all`, or format ids")
    parser.add_argument("--everywhere", action="store_true", help="single formats quantize every layer they can hold")
    parser.add_argument("--candidates", action="store_true", help="recipes may use the compared formats too")
    parser.add_argument("--float32", action="store_true", help="compare in float32, where rounding covers nothing")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    formats = available_formats() if args.formats == ["all"] else args.formats
    logging.disable(logging.WARNING)
    start = time.perf_counter()
    with torch.inference_mode(), use(case_host):
        case: Any = (Digits if args.model == "digits" else Flux324)(case_host, args.float32)
        looked = spread(STEPS, STEPS) if args.model == "digits" else frozenset({0})
        probe = Probe(case_host, looked, (*DEFAULT_FORMATS, *formats) if args.candidates else None)
        case.measure(probe)
        found = probe.result(args.model)
        seconds = time.perf_counter() - start
        print(f"{args.model}: {found.how}; {seconds:.0f} s; rounding {100 * found.floor:.2f} %")
        rounding = rounding_of(case, found)
        psnr = "" if rounding[1] is None else f", PSNR {rounding[1]:.1f} dB"
        print(f"one rounding in the comparison: error {100 * rounding[0]:.2f} %{psnr}")
        rows: list[Row] = []
        heads = "| single PSNR | recipe PSNR |" if args.model == "digits" else "|"
        print(f"| single format | MiB | single error % | recipe error % {heads} verdict | recipe |")
        for row in compare(case, found, formats, args.everywhere, rounding):
            rows.append(row)
            print(show(row), flush=True)
    counts = Counter(row.verdict for row in rows)
    said = ", ".join(f"{verdict} at {n}" for verdict, n in counts.items())
    print(f"of {len(rows)} sizes the recipe is {said}; {time.perf_counter() - start:.0f} s")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        data = {
            "model": args.model,
            "everywhere": args.everywhere,
            "candidates": list(found.formats),
            "float32": args.float32,
            "floor": found.floor,
            "measure_seconds": seconds,
            "versions": versions(),
            "rows": [{**asdict(row), "verdict": row.verdict} for row in rows],
        }
        args.json.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    return 1 if counts["worse"] else 0


if __name__ == "__main__":
    sys.exit(main())
