"""Do real runs on CPU take what `measure/activations` says? Three measures of each run, in a process of its own.

    python benchmarks/activations_check.py [--json FILE]

`live`: storages alive at once, counted in the real run. `allocator`: the high-water mark of torch's CPU allocator,
which sees scratch tensors inside operators too (profiler, `profile_memory`). `process`: VmHWM less what was resident
before a second run of the same shape. malloc is told to map what is larger than 64 KiB and to give it back; by default
glibc raises that threshold to 32 MiB as it goes and keeps holes, which `--default-malloc` shows. Linux only. Models:
the demo's files, and random weights.
"""

from __future__ import annotations

import argparse
import ctypes
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
from quantwire.quantizers.measure.activations import RunShape, activations
from quantwire.quantizers.measure.live import LiveBytes
from quantwire.quantizers.measure.parts import Role, parts_of_modules
from torch import nn

DEMO = Path(__file__).resolve().parents[1] / "demo" / "models"
MIB = 2**20
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
Inputs = Callable[[RunShape], dict[str, Any]]
CASES: dict[str, tuple[RunShape, ...]] = {
    "FLUX layout, 324 M": tuple(RunShape(n, n, text_tokens=256) for n in (384, 512, 768, 1024)),
    "demo, denoising": tuple(RunShape(n, n, batch=b, text_tokens=16) for n, b in ((64, 10), (256, 1), (512, 1))),
    "demo, text": (RunShape(text_tokens=16, batch=16), RunShape(text_tokens=16, batch=256)),
    "demo, decoding": (RunShape(64, 64, batch=10), RunShape(256, 256), RunShape(512, 512)),
    "AutoencoderKL, half as wide": (RunShape(128, 128), RunShape(256, 256), RunShape(512, 512)),
    # On a CPU their convolutions take scratch space that the formulas lack: `stages.CPU_SCRATCH_PERCENT`.
    "HunyuanVideo VAE": (RunShape(64, 64, 5),),
    "sd1.5, half as wide": (RunShape(256, 256),),
    "sdxl, half as wide": (RunShape(256, 256),),
    "T5-base": (RunShape(text_tokens=256), RunShape(text_tokens=512), RunShape(text_tokens=1024)),
}


def flux_inputs(channels: int, context: int, pooled: int, dtype: torch.dtype) -> Inputs:
    def inputs(shape: RunShape) -> dict[str, Any]:
        tokens, b = (shape.width // 16) * (shape.height // 16), shape.batch
        return {
            "hidden_states": torch.randn(b, tokens, channels).to(dtype),
            "encoder_hidden_states": torch.randn(b, shape.text_tokens, context).to(dtype),
            "pooled_projections": torch.randn(b, pooled).to(dtype),
            "timestep": torch.full((b,), 0.5, dtype=dtype),
            "guidance": torch.full((b,), 3.5, dtype=dtype),
            "img_ids": torch.zeros(tokens, 3),
            "txt_ids": torch.zeros(shape.text_tokens, 3),
        }

    return inputs


def words(shape: RunShape) -> dict[str, Any]:
    return {"input_ids": torch.ones(shape.batch, shape.text_tokens, dtype=torch.int64)}


def load(case: str) -> tuple[nn.Module, Callable[..., Any], Inputs, Role, str]:
    """(module, what is called, its inputs, role, family)."""
    if case == "FLUX layout, 324 M":
        from forward import make_model

        model = make_model()
        return model, model, flux_inputs(64, 4096, 768, torch.bfloat16), Role.DIFFUSION, ""
    if case == "demo, denoising":
        from quantwire.hosts.standalone.models import load_diffusion_model

        model = load_diffusion_model(DEMO / "diffusion_models" / "digits_flux.safetensors").transformer
        c: Any = model.config
        sizes = (c.in_channels, c.joint_attention_dim, c.pooled_projection_dim)
        return model, model, flux_inputs(*sizes, next(model.parameters()).dtype), Role.DIFFUSION, ""
    if case == "demo, text":
        from quantwire.hosts.standalone.text_encoders import load_text_encoder

        module = load_text_encoder([DEMO / "text_encoders" / "digits_clip.safetensors"]).encoders["clip_l"].module
        return module, module, words, Role.TEXT, "clip"
    if case == "demo, decoding":
        from quantwire.hosts.standalone.vae import load_vae

        vae = load_vae(DEMO / "vae" / "digits_tae.safetensors")

        def latent(shape: RunShape) -> dict[str, Any]:
            size = (shape.batch, vae.latent_channels, shape.height // 8, shape.width // 8)
            return {"latent": torch.randn(size)}

        return vae.decoder, vae.decode, latent, Role.VAE, ""
    torch.set_default_dtype(torch.bfloat16)
    from activation_list import archs

    arch = next(a for a in archs() if case in (a.title, f"{a.formula}, {a.title}"))
    module = arch.build().eval()
    torch.set_default_dtype(torch.float32)
    call = getattr(module, arch.call) if arch.call else module
    return module, call, lambda s: arch.inputs(s, torch.bfloat16, arch), Role(arch.role), arch.formula


def resident(what: str) -> int:
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, f"no {what} in /proc/self/status; this check needs Linux"
    return int(found[1]) * 1024


def settle() -> int:
    """Give freed memory back, set the high-water mark back, and return what is resident."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def allocator_peak(run: Callable[[], Any]) -> int:
    """Bytes at the high-water mark of torch's CPU allocator."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events: Any = profiler.profiler
    now = most = 0
    for event in sorted(
        (e for e in events.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        now += event.nbytes()
        most = max(most, now)
    return most


def run_case(case: str, number: int) -> dict[str, Any]:
    torch.manual_seed(0)
    module, call, inputs, role, family = load(case)
    module.requires_grad_(False)
    part = parts_of_modules({"model": module}, role, case)[0]
    shape = CASES[case][number]
    size = next(module.parameters()).dtype.itemsize
    expected = activations(role, family or part.family, part.slots, shape, size)

    def run() -> None:
        call(**inputs(shape))

    with torch.no_grad():
        run()  # code, kernels and tables of first use
        before = settle()
        run()
        process = resident("VmHWM") - before
        allocator = allocator_peak(run)
        live = LiveBytes([*module.parameters(), *module.buffers()])
        with live:
            run()
    return {
        "model": case,
        "shape": f"{shape.width}x{shape.height} x{shape.batch}"
        if role is not Role.TEXT
        else f"{shape.text_tokens} x{shape.batch}",
        "forecast": expected.nbytes,
        "live": live.peak,
        "allocator": allocator,
        "process": process,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="*", metavar="MODEL", help="some of the models")
    parser.add_argument("--default-malloc", action="store_true", help="leave glibc's threshold to itself")
    parser.add_argument("--one", nargs=2, metavar=("CASE", "NUMBER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run_case(args.one[0], int(args.one[1]))))
        return 0
    rows: list[dict[str, Any]] = []
    environment = dict(os.environ)
    if not args.default_malloc:
        environment |= MALLOC
    heads = f"{'model':28}{'shape':>14}{'forecast':>10}{'live':>10}{'allocator':>11}{'process':>10}"
    print(f"{heads}  MiB; forecast against each")
    for case, shapes in CASES.items():
        if args.only and case not in args.only:
            continue
        for number in range(len(shapes)):
            command = [sys.executable, __file__, "--one", case, str(number)]
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                raise SystemExit(done.stderr)
            row = json.loads(done.stdout.splitlines()[-1])
            rows.append(row)
            sizes = [row[k] for k in ("forecast", "live", "allocator", "process")]
            off = " ".join(f"{100 * (sizes[0] / s - 1):+6.1f} %" for s in sizes[1:])
            print(f"{case:28}{row['shape']:>14}" + "".join(f"{s / MIB:10.1f}" for s in sizes) + f"   {off}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
