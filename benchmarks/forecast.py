"""How far is the memory forecast from what real runs take?

    python benchmarks/forecast.py [--models demo flux-324m] [--only N...] [--json out/forecast.json]

Each run quantizes a model, puts it under an offload mode, generates once to warm up and once to be measured. Weights
are those of the modules. The peak of a stage is what lies on the device by the host's own count, and by how far the
process's resident memory rises while the stage runs (VmHWM against VmRSS). The runs of one model share a process, in
which malloc maps what is larger than 64 KiB and gives it back when it is freed: with its own threshold, which grows,
the heap of glibc keeps holes.

On a CPU weights never move, so modes that stream them are run with `keep_on disk`: what they bring in is read from
files then, and counts where it would on a device; of a group every page is read when it comes in, as a copy to a
device would. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import functools
import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from quantwire.hosts.modules import with_layers
from quantwire.hosts.offload import OffloadSettings
from quantwire.hosts.standalone.host import StandaloneHost
from quantwire.hosts.standalone.models import DiffusionModel, load_diffusion_model
from quantwire.hosts.standalone.offload import running
from quantwire.hosts.standalone.offload.device import CPU, nbytes_of
from quantwire.hosts.standalone.offload.residency import RESIDENCY
from quantwire.quantizers.apply import OnFailure, quantize_linears
from quantwire.quantizers.auto import DeviceFacts
from quantwire.quantizers.compat.modes import Carrier, HostName, OffloadMode
from quantwire.quantizers.kernels import scratch
from quantwire.quantizers.measure.activations import RunShape
from quantwire.quantizers.measure.forecast import forecast
from quantwire.quantizers.measure.parts import ModelPart, Role, parts_of_modules
from quantwire.quantizers.report import versions
from quantwire.quantizers.spec import QuantSpec

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "demo" / "models"
# Read when a process starts: of those that are started here.
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
FULL = "full precision"
GIB = 2**30
WEIGHTS_WITHIN, PEAK_WITHIN = 1.0, 15.0  # percent
DISK = (OffloadMode.SEQUENTIAL, OffloadMode.GROUP, OffloadMode.BALANCED)

# (model, format, pixels a side, mode, size of the device in GiB that balanced takes shares of; 0: plenty)
CASES: tuple[tuple[str, str, int, str, float], ...] = (
    *(("demo", f, 512, "none", 0.0) for f in (FULL, "bnb-nf4", "gguf-q8-0", "quanto-qint8", "torchao-int8dyn")),
    *(("demo", "bnb-nf4", size, "none", 0.0) for size in (256, 768, 1024)),
    *(("demo", f, 512, mode, 0.0) for f in (FULL, "bnb-nf4") for mode in ("model", "group", "sequential")),
    *(
        ("flux-324m", f, 512, "none", 0.0)
        for f in (FULL, "bnb-nf4", "comfy-fp8-e4m3fn", "gguf-q4-k", "quanto-qint4", "sdnq-uint5", "torchao-int8dyn")
    ),
    *(("flux-324m", "comfy-fp8-e4m3fn", size, "none", 0.0) for size in (256, 1024)),
    *(("flux-324m", f, 512, mode, 0.0) for f in (FULL, "gguf-q8-0") for mode in ("model", "group", "sequential")),
    *(("flux-324m", f, 512, "balanced", gib) for f, gib in ((FULL, 0.7), ("gguf-q8-0", 0.4))),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", default=["demo", "flux-324m"])
    parser.add_argument("--only", nargs="+", type=int, help="numbers of runs, as they are shown")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    wanted = [i for i, case in enumerate(CASES) if case[0] in args.models and (not args.only or i in args.only)]
    if args.here:
        read_groups_whole()
        for index in wanted:
            print(json.dumps({"run": index, **measure(*CASES[index])}), flush=True)
        return 0
    rows: list[dict[str, Any]] = []
    print("| # | model | format | size | mode | weights MiB | error | stage | peak MiB | forecast MiB | error |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for name in args.models:
        mine = [str(i) for i in wanted if CASES[i][0] == name]
        command = [sys.executable, __file__, "--here", "--models", name, "--only", *mine]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **MALLOC}) as child:
            assert child.stdout is not None
            for line in child.stdout:
                rows.append(json.loads(line))
                show(rows[-1])
        if child.returncode:
            return 1
    weights = max((abs(r["weights_error_percent"]) for r in rows), default=0.0)
    peak = max((abs(r["peak_error_percent"]) for r in rows), default=0.0)
    print(f"\n{len(rows)} runs: weights within {weights:.3f} %, peak within {peak:.1f} %")
    result = {"rows": rows, "weights_error_percent": weights, "peak_error_percent": peak, "versions": versions()}
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if weights < WEIGHTS_WITHIN and peak < PEAK_WITHIN else 1


def show(row: dict[str, Any]) -> None:
    mib = 2**20
    print(
        f"| {row['run']} | {row['model']} | {row['format']} | {row['size']} | {row['mode']} | "
        f"{row['weights_nbytes'] / mib:.2f} | {row['weights_error_percent']:+.3f} % | {row['stage']} | "
        f"{row['peak_nbytes'] / mib:.1f} | {row['forecast_nbytes'] / mib:.1f} | {row['peak_error_percent']:+.1f} % |",
        flush=True,
    )


def measure(name: str, format_id: str, size: int, mode: str, device_gib: float) -> dict[str, Any]:
    """One run and its forecast."""
    settings = OffloadSettings(
        OffloadMode(mode),
        keep_on="disk" if OffloadMode(mode) in DISK else "memory",
        device_gib=device_gib if OffloadMode(mode) is OffloadMode.BALANCED else 0.0,
    )
    spec = None if format_id == FULL else QuantSpec(format_id)
    make = _demo if name == "demo" else _flux
    parts, specs, weights, runs, shape = make(spec, size, settings)
    device = DeviceFacts("cpu", "this machine", int((device_gib or 64) * GIB), int((device_gib or 64) * GIB))
    found = forecast(parts, specs, shape, device, HostName.STANDALONE, assume=False, own_memory=True)
    expected = next(m for m in found.modes if m.mode is settings.mode)
    for run in runs.values():
        run()  # fills caches, starts threads, writes the weights that are kept on disk
    # A mode that keeps components on the device has them all there from now on.
    stages: dict[str, Any] = {}
    for stage, run in runs.items():
        rise = risen(run)
        held = RESIDENCY.held(CPU)
        predicted = next(s for s in expected.stages if s.name == stage)
        stages[stage] = {"held_nbytes": held, "risen_nbytes": rise, "forecast_nbytes": predicted.peak}
    worst = max(stages, key=lambda s: stages[s]["held_nbytes"] + stages[s]["risen_nbytes"])
    peak = stages[worst]["held_nbytes"] + stages[worst]["risen_nbytes"]
    predicted = sum(h.nbytes for h in found.held)
    return {
        "model": name,
        "format": format_id,
        "size": size,
        "mode": mode,
        "weights_nbytes": weights,
        "weights_forecast_nbytes": predicted,
        "weights_error_percent": 100 * (predicted / weights - 1),
        "stage": worst,
        "peak_nbytes": peak,
        "forecast_nbytes": expected.peak,
        "peak_error_percent": 100 * (expected.peak / peak - 1),
        "stages": stages,
    }


Made = tuple[list[ModelPart], dict[str, QuantSpec], int, dict[str, Callable[[], Any]], RunShape]


def _demo(spec: QuantSpec | None, size: int, settings: OffloadSettings) -> Made:
    from quantwire.hosts.standalone.sampling import sample
    from quantwire.hosts.standalone.text_encoders import load_text_encoder
    from quantwire.hosts.standalone.vae import load_vae

    model = load_diffusion_model(MODELS / "diffusion_models" / "digits_flux.safetensors")
    clip = load_text_encoder([MODELS / "text_encoders" / "digits_clip.safetensors"])
    vae = load_vae(MODELS / "vae" / "digits_tae.safetensors")
    encoders = {n: e.module for n, e in clip.encoders.items()}
    parts = [
        *parts_of_modules({"transformer": model.transformer}, Role.DIFFUSION, "demo"),
        *parts_of_modules(encoders, Role.TEXT, "demo"),
        *parts_of_modules({"vae": vae.decoder}, Role.VAE, "demo"),
    ]
    # The decoder alone: its names are those of a whole TAESD below `decoder.`.
    parts[-1] = dataclasses.replace(parts[-1], slots=tuple(_below(s, "decoder.") for s in parts[-1].slots))
    model = model.with_transformer(_quantized(model.transformer, spec))
    modules = [model.transformer, *encoders.values(), vae.decoder]
    model, clip, vae = (dataclasses.replace(m, offload=dataclasses.replace(settings)) for m in (model, clip, vae))
    state: dict[str, Any] = {"n": 0, "latent": torch.zeros(1, 16, size // 8, size // 8)}

    def encode() -> None:
        state["n"] += 1  # another prompt each time, since encodings are kept
        context, pooled = clip.encode(f"a handwritten seven {state['n']}")
        state["text"] = [(context, {"pooled_output": pooled})]

    def denoise() -> None:
        state["latent"] = sample(model, 1, 2, 1.0, "simple", state["text"], state["text"], state["latent"] * 0)

    runs = {"text encoding": encode, "sampling": denoise, "decoding": lambda: vae.decode(state["latent"])}
    specs = {"transformer": spec} if spec else {}
    return parts, specs, sum(map(nbytes_of, modules)), runs, RunShape(size, size, text_tokens=77)


@functools.cache
def _made() -> torch.nn.Module:
    from forward import make_model

    return make_model()


def _flux(spec: QuantSpec | None, size: int, settings: OffloadSettings) -> Made:
    from forward import TEXT_TOKENS, make_inputs

    module = _made()
    parts = list(parts_of_modules({"transformer": module}, Role.DIFFUSION, "324 M"))
    module = _quantized(module, spec)
    config: Any = None  # of the file; running a module with inputs of its own asks for none
    model = DiffusionModel(module, config, "324 M", torch.bfloat16, offload=settings)
    inputs = make_inputs(module, TEXT_TOKENS + (size // 16) ** 2)

    def denoise() -> None:
        with running(model) as placed:
            placed.transformer(**inputs, return_dict=False)

    specs = {"transformer": spec} if spec else {}
    shape = RunShape(size, size, text_tokens=TEXT_TOKENS)
    return parts, specs, nbytes_of(module), {"sampling": denoise}, shape


def _below(slot: Any, prefix: str) -> Any:
    return dataclasses.replace(slot, meta=dataclasses.replace(slot.meta, name=prefix + slot.meta.name))


def _quantized(module: torch.nn.Module, spec: QuantSpec | None) -> torch.nn.Module:
    if spec is None:
        return module
    maker = StandaloneHost().make_layer
    layers, _ = quantize_linears(
        module, spec, carrier=Carrier.QUANTWIRE, on_failure=OnFailure.FULL_PRECISION, make_layer=maker
    )
    return with_layers(module, layers)


def read_groups_whole() -> None:
    """Files are mapped, and a page counts once it is read: read one value of each when a group comes in."""
    from diffusers.hooks.group_offloading import ModuleGroup

    bring_in = ModuleGroup.onload_

    def onload(group: Any) -> None:
        bring_in(group)
        tensors = [*group.parameters, *group.buffers, *(p for m in group.modules for p in m.parameters())]
        for t in tensors:
            t.detach().reshape(-1).view(torch.uint8)[::4096].sum()

    ModuleGroup.onload_ = onload


def risen(run: Callable[[], Any]) -> int:
    """By how many bytes the process's resident memory rises at most while something runs."""
    scratch.release()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark becomes what is resident now
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    sys.exit(main())
