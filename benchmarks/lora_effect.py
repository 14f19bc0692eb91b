"""How much of a LoRA's effect is left on a quantized model, for each way of applying it?

    python benchmarks/lora_effect.py [--formats bnb-nf4,quanto-qint8] [--json FILE] [--markdown FILE]

The effect is what the LoRA changes in the model's output: output with it minus output without it. It is compared with
the effect at full precision by the cosine, on the demo's FLUX-layout model, in float32 so that nothing but the
quantization differs. Three ways, interleaved format by format:

    exact     the LoRA beside the quantized layer in floating point (`lora="exact"`)
    later     merged into the quantized weight: dequantized, added, quantized again (`lora="requantize"`)
    before    merged into the full-precision weight, which is then quantized (`lora="requantize"`, LoRA upstream)

The LoRA is trained first, in about half a minute: rank 16 on every linear layer of the blocks but modulation, towards
velocities a fifth of the way to those of the next digit's prompt. The teacher is the model itself, so no data is
needed. Trained and not random, because training puts a small update where the model reacts to it: a random one of 3 %
of the weights' norm moves the output by 1 % only, and of that requantizing at 4 bits left a cosine of 0.08 to 0.15.

`later` and `before` are against the plain quantized model: what they lose is also what rounding anew changes elsewhere.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from quantwire.hosts import use
from quantwire.hosts.standalone import flux
from quantwire.hosts.standalone.host import StandaloneHost
from quantwire.hosts.standalone.loaders import CLIPLoader
from quantwire.hosts.standalone.lora import LoraLinear, apply_lora
from quantwire.hosts.standalone.models import DiffusionModel, load_diffusion_model
from quantwire.hosts.standalone.sampling import sigmas
from quantwire.nodes.quantize import QuantizeModel
from quantwire.quantizers.errors import QuantwireError
from quantwire.quantizers.registry import available_formats, get_entry
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

MODELS = Path(__file__).resolve().parents[1] / "demo" / "models"
RANK = 16
TRAINING_STEPS = 200
SHARE = 0.2  # of the way from a prompt's velocity to its successor's: a LoRA of style and not of content
SAMPLING_STEPS = 8
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PACKAGES = ("torch", "bitsandbytes", "optimum-quanto", "comfy-kitchen", "sdnq", "torchao", "nncf", "gguf")


@dataclass(frozen=True)
class Result:
    """Cosines of the LoRA's effect with the effect at full precision."""

    format_id: str
    bits: float
    exact: float
    later: float
    before: float


class States:
    """Latents on the way to images, ten prompts at once, and the conditions of the prompts.

    Attributes:
        context, pooled: of "a handwritten zero" to "nine".
        steps: (sigma, (10, 16, 8, 8) latent) along the trajectory of each prompt.
    """

    def __init__(self, model: DiffusionModel, seeds: range) -> None:
        (clip,) = CLIPLoader().load_clip("digits_clip.safetensors", "flux")
        with torch.no_grad():
            conditions = [clip.encode(f"a handwritten {word}") for word in WORDS]
        self.context, self.pooled = (torch.cat(parts) for parts in zip(*conditions, strict=True))
        self.steps: list[tuple[float, Tensor]] = []
        noise_levels = sigmas("simple", SAMPLING_STEPS, 1.0, model.shift_mu).tolist()
        for seed in seeds:
            x = torch.randn(10, 16, 8, 8, generator=torch.Generator().manual_seed(seed))
            for sigma, following in pairwise(noise_levels):
                self.steps.append((sigma, x))
                with torch.no_grad():
                    x = x + (following - sigma) * self.velocity(model, sigma, x)

    def velocity(self, model: DiffusionModel, sigma: float, x: Tensor, shift: int = 0) -> Tensor:
        """Row k gets the prompt of digit k + shift."""
        context, pooled = self.context.roll(-shift, 0), self.pooled.roll(-shift, 0)
        return flux.velocity(model.transformer, x, sigma, context, pooled, 3.5, model.dtype)

    @torch.inference_mode()
    def output(self, model: DiffusionModel) -> Tensor:
        """All velocities as one vector."""
        return torch.cat([self.velocity(model, sigma, x).flatten() for sigma, x in self.steps])


def train_lora(model: DiffusionModel, path: Path) -> tuple[float, float]:
    """Write the LoRA that the module docstring describes.

    Returns:
        Loss without the LoRA and at the end: squared distance of velocities from the wanted ones.
    """
    torch.manual_seed(11)
    tensors: dict[str, Tensor] = {}
    for name, layer in model.transformer.named_modules():
        if isinstance(layer, nn.Linear) and "transformer_blocks." in name and "norm" not in name:
            n, k = layer.weight.shape
            tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(RANK, k) / k**0.5
            tensors[f"transformer.{name}.lora_B.weight"] = torch.zeros(n, RANK)
    save_file(tensors, path)
    student = apply_lora(model, path, 1.0)
    loras = {n: m for n, m in student.transformer.named_modules() if isinstance(m, LoraLinear)}
    parameters = [p.requires_grad_() for m in loras.values() for p in (m.down, m.up)]
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.0)
    states = States(model, range(100, 112))
    losses: list[float] = []
    for index in torch.randint(len(states.steps), (TRAINING_STEPS,)).tolist():
        sigma, x = states.steps[index]
        with torch.no_grad():
            own, other = (states.velocity(model, sigma, x, shift) for shift in (0, 1))
            wanted = own + SHARE * (other - own)
        loss = (states.velocity(student, sigma, x) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    for name, module in loras.items():
        tensors[f"transformer.{name}.lora_A.weight"] = module.down.detach().clone()
        tensors[f"transformer.{name}.lora_B.weight"] = module.up.detach().clone()
    save_file(tensors, path)
    count = 2 * SAMPLING_STEPS
    return sum(losses[:5]) / 5, sum(losses[-count:]) / count


def update_size(model: DiffusionModel, path: Path) -> float:
    """Median over layers of the norm of the update / norm of the weight."""
    tensors = load_file(path)
    sizes: list[float] = []
    for name, down in tensors.items():
        if name.endswith(".lora_A.weight"):
            layer = name.removeprefix("transformer.").removesuffix(".lora_A.weight")
            weight: Any = model.transformer.get_submodule(layer).weight
            up = tensors[name.replace("lora_A", "lora_B")]
            sizes.append(float((up @ down).norm() / weight.norm()))
    return statistics.median(sizes)


def quantized(model: DiffusionModel, format_id: str, lora: str) -> DiffusionModel:
    return QuantizeModel().quantize(model, format_id, lora=lora)["result"][0]


def measure(model: DiffusionModel, path: Path, states: States, format_id: str, wanted: Tensor) -> Result:
    base = quantized(model, format_id, "exact")
    without = states.output(base)
    ways = {
        "exact": apply_lora(base, path, 1.0),
        "later": apply_lora(quantized(model, format_id, "requantize"), path, 1.0),
        "before": quantized(apply_lora(model, path, 1.0), format_id, "requantize"),
    }
    cosine = {
        name: float(torch.nn.functional.cosine_similarity(states.output(m) - without, wanted, dim=0))
        for name, m in ways.items()
    }
    return Result(format_id, get_entry(format_id).bits, **cosine)


def table(results: list[Result]) -> str:
    lines = ["| format | bits | exact | requantized later | merged before |", "| --- | --- | --- | --- | --- |"]
    for r in sorted(results, key=lambda r: (-r.bits, r.format_id)):
        lines.append(f"| `{r.format_id}` | {r.bits:g} | {r.exact:.4f} | {r.later:.4f} | {r.before:.4f} |")
    return "\n".join(lines)


def versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--formats", help="comma-separated; default: all that run here")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    formats = args.formats.split(",") if args.formats else available_formats()
    results: list[Result] = []
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder, use(StandaloneHost([MODELS])):
        lora = Path(folder) / "lora.safetensors"
        model = load_diffusion_model(MODELS / "diffusion_models" / "digits_flux.safetensors", torch.float32)
        first, last = train_lora(model, lora)
        states = States(model, range(1))
        full = states.output(model)
        wanted = states.output(apply_lora(model, lora, 1.0)) - full
        size, moved = update_size(model, lora), float(wanted.norm() / full.norm())
        print(
            f"trained LoRA of rank {RANK}: loss {first:.3f} -> {last:.3f}; update {size:.1%} of a weight's norm "
            f"(median of the layers); moves the output by {moved:.1%}",
            flush=True,
        )
        for format_id in formats:
            try:
                results.append(measure(model, lora, states, format_id, wanted))
                r = results[-1]
                print(f"{format_id:24} exact {r.exact:.4f}  later {r.later:.4f}  before {r.before:.4f}", flush=True)
            except QuantwireError as err:
                failed[format_id] = str(err).splitlines()[0]
                print(f"{format_id:24} {failed[format_id]}", flush=True)
    print(f"\n{table(results)}")
    data = {
        "update_size": size,
        "rank": RANK,
        "training_loss": [first, last],
        "output_moved": moved,
        "results": [asdict(r) for r in results],
        "failed": failed,
        "versions": versions(),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {platform.system()}",
    }
    if args.json:
        write(args.json, json.dumps(data, indent=2))
    if args.markdown:
        write(args.markdown, table(results))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
