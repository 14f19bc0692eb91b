"""What does an offload mode cost in time when the model samples, and what does it hold in main memory?

    python benchmarks/offload_modes.py [--rounds 5] [--steps 4] [--formats full-precision,bnb-nf4] [--json FILE]
                                       [--memory [--hidden 1536]]

Time: the demo's FLUX-layout model with its text encoder and VAE in every mode of the embedded host: prompt, sampling
and decoding, all modes in each round. The first round places the weights and is not counted. The machine's accelerator
is used where there is one. On a CPU nothing crosses a bus, so that what is measured is what the hooks cost.

Memory (`--memory`): a worker process for each mode loads a FLUX of random weights from a file, quantizes it to int8,
samples, and tells what it holds then: memory of its own (RssAnon) and pages of mapped files (RssFile), which the system
takes back when it needs room. Linux only.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from quantwire.hosts import use
from quantwire.hosts.offload import OffloadSettings
from quantwire.hosts.standalone import flux, sampling
from quantwire.hosts.standalone.host import StandaloneHost
from quantwire.hosts.standalone.models import DiffusionModel, load_diffusion_model
from quantwire.hosts.standalone.offload import offload_now, set_offload
from quantwire.hosts.standalone.offload.device import GIB, execution_device, nbytes_of
from quantwire.hosts.standalone.text_encoders import load_text_encoder
from quantwire.hosts.standalone.vae import load_vae
from quantwire.nodes.quantize import QuantizeModel
from quantwire.quantizers.compat.modes import OffloadMode
from timing import interleaved

MODELS = Path(__file__).resolve().parents[1] / "demo" / "models"
FULL = "full-precision"
SPLIT = OffloadSettings(OffloadMode.BALANCED, device_gib=1, high_watermark=0.7)  # of a device as large as the model
MODES: dict[str, OffloadSettings | None] = {
    "not set": None,
    "none": OffloadSettings(OffloadMode.NONE),
    "model": OffloadSettings(OffloadMode.MODEL),
    "sequential": OffloadSettings(OffloadMode.SEQUENTIAL),
    "sequential, disk": OffloadSettings(OffloadMode.SEQUENTIAL, keep_on="disk"),
    "balanced, whole": OffloadSettings(OffloadMode.BALANCED),
    "balanced, split": SPLIT,
    "balanced, split, disk": dataclasses.replace(SPLIT, keep_on="disk"),
    "group by block": OffloadSettings(OffloadMode.GROUP),
    "group by leaf": OffloadSettings(OffloadMode.GROUP, group_level="leaf"),
    "group by block, disk": OffloadSettings(OffloadMode.GROUP, keep_on="disk"),
    "group by leaf, disk": OffloadSettings(OffloadMode.GROUP, group_level="leaf", keep_on="disk"),
}
MEMORY_MODES = ("not set", "sequential", "sequential, disk", "group by block, disk")
PACKAGES = ("torch", "accelerate", "diffusers", "transformers")


def under(obj: Any, settings: OffloadSettings | None, nbytes: int) -> Any:
    """A model object in a mode; a split is sized by the model."""
    if settings is None:
        return obj
    return set_offload(obj, dataclasses.replace(settings, device_gib=nbytes / GIB if settings.device_gib else 0.0))


def image(model: Any, clip: Any, vae: Any, steps: int) -> Callable[[], Any]:
    def run() -> Any:
        with torch.inference_mode():
            context, pooled = clip.encode("a handwritten seven")
            condition: sampling.Conditioning = [(context, {"pooled_output": pooled, "guidance": 3.5})]
            return vae.decode(
                sampling.sample(model, 7, steps, 1.0, "simple", condition, condition, torch.zeros(1, 16, 8, 8))
            )

    return run


def times(format_id: str, rounds: int, steps: int) -> dict[str, float]:
    """Median seconds of one image by mode.

    Raises:
        SystemExit: a mode gave another image than no mode.
    """
    with use(StandaloneHost([MODELS])), torch.inference_mode():
        model = load_diffusion_model(MODELS / "diffusion_models" / "digits_flux.safetensors")
        clip = load_text_encoder([MODELS / "text_encoders" / "digits_clip.safetensors"])
        vae = load_vae(MODELS / "vae" / "digits_tae.safetensors")
        if format_id != FULL:
            model = QuantizeModel().quantize(model, format_id)["result"][0]
    size = nbytes_of(model.transformer)
    runs = {
        name: image(*(under(obj, settings, size) for obj in (model, clip, vae)), steps)
        for name, settings in MODES.items()
    }
    on_device = {name for name in runs if name != "not set"} if execution_device().type != "cpu" else set(runs)
    results = {name: runs[name]() for name in sorted(on_device)}
    wanted = results["none"]
    different = [name for name, found in results.items() if not torch.equal(found, wanted)]
    if different:
        raise SystemExit(f"{format_id}: another image with {', '.join(different)}")
    return interleaved(runs, rounds)


def random_file(path: Path, hidden: int) -> None:
    """A FLUX of one double and three single blocks with random weights, in ComfyUI's layout."""
    from safetensors.torch import save_file

    config = flux.FluxConfig(hidden, 1, 3, 64, 64, 64, True)
    shapes = {name: tuple(p.shape) for name, p in flux.build(config).named_parameters()}
    pieces: dict[str, dict[int, torch.Tensor]] = {}
    for row in flux.key_map(config):
        pieces.setdefault(row.source, {})[row.start or 0] = torch.randn(shapes[row.target]).mul_(0.03).bfloat16()
    save_file({name: torch.cat([parts[i] for i in sorted(parts)]) for name, parts in pieces.items()}, path)


def memory_of(mode: str, path: Path) -> dict[str, Any]:
    """MiB that this process holds after sampling in a mode, above what it held before it loaded the model; and the
    variant of the mode."""
    before = _resident()
    with use(StandaloneHost([MODELS])), torch.inference_mode():
        model: DiffusionModel = QuantizeModel().quantize(load_diffusion_model(path), "quanto-qint8")["result"][0]
        size = nbytes_of(model.transformer)
        model = under(model, MODES[mode], size)
        context, pooled = torch.zeros(1, 8, 64), torch.zeros(1, 64)
        condition: sampling.Conditioning = [(context, {"pooled_output": pooled})]
        sampling.sample(model, 7, 2, 1.0, "simple", condition, condition, torch.zeros(1, 16, 8, 8))
        gc.collect()
        held = {name: (value - before[name]) / 1024 for name, value in _resident().items()}
        return {**held, "weights": size / 2**20, "variant": str(offload_now(model)[1])}


def _resident() -> dict[str, int]:
    status = Path("/proc/self/status").read_text()
    return {name: int(value) for name, value in re.findall(r"^(RssAnon|RssFile):\s+(\d+) kB$", status, re.MULTILINE)}


def memory(hidden: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.safetensors"
        random_file(path, hidden)
        found: dict[str, Any] = {}
        for mode in MEMORY_MODES:
            command = [sys.executable, __file__, "--worker", mode, "--file", str(path)]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found[mode] = json.loads(said.splitlines()[-1])
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--formats", default=f"{FULL},bnb-nf4,gguf-q8-0")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(memory_of(args.worker, args.file)))
        return
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    machine = {
        "device": str(execution_device()),
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "load before": busy,
        "versions": {name: version(name) for name in PACKAGES},
    }
    print(json.dumps(machine))
    seconds = {f: times(f, args.rounds, args.steps) for f in args.formats.split(",") if f}
    _print_times(seconds)
    held = memory(args.hidden) if args.memory else {}
    for mode, found in held.items():
        print(f"{mode:24} {found['weights']:8.0f} MiB of weights, own {found['RssAnon']:7.0f} MiB, mapped "
              f"{found['RssFile']:7.0f} MiB")  # fmt: skip
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"machine": machine, "seconds": seconds, "memory_mib": held}, indent=2) + "\n")


def _print_times(seconds: dict[str, dict[str, float]]) -> None:
    print(f"{'mode':24}" + "".join(f"{format_id:>24}" for format_id in seconds))
    for mode in MODES:
        cells = (f"{s[mode] * 1000:9.0f} ms {s[mode] / s['not set']:7.2f} x" for s in seconds.values())
        print(f"{mode:24}" + "".join(f"{cell:>24}" for cell in cells))


if __name__ == "__main__":
    main()
