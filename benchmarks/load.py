"""What does LoadAndQuantize cost: peak memory of the first load, and time of the next one?

    python benchmarks/load.py [--formats ID ...] [--sizes HIDDEN DOUBLE SINGLE] [--repeats 15]
        [--json FILE]

Makes a random FLUX-layout file (bfloat16, by default 325 M parameters and 650 MB) tensor by tensor under out/bench.
Each measurement is a fresh process. The first load quantizes: its peak is the kernel's own mark (VmHWM of
/proc/self/status, which counts file pages too), against the quantized size + 3 x the largest tensor + 300 MiB, in which
the interpreter and its libraries are included; what they take alone is printed beside it. The next load comes from the
cache: its time, in turn with that of opening the same ready file by its name and filling the same model and a report;
medians, without the first of each, in one process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FORMATS = ("gguf-q8-0", "bnb-nf4", "comfy-fp8-e4m3fn")
MIB = 1 << 20
SLACK_MIB = 300
RATIO = 1.1
SIZES = (1024, 5, 8)  # hidden, double and single blocks: 325 M parameters


def shapes(hidden: int, double: int, single: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a FLUX file in ComfyUI's layout."""
    h, mlp = hidden, 4 * hidden
    linear: dict[str, tuple[int, int]] = {
        "img_in": (h, 64),
        "txt_in": (h, 4096),
        "time_in.in_layer": (h, 256),
        "time_in.out_layer": (h, h),
        "vector_in.in_layer": (h, 768),
        "vector_in.out_layer": (h, h),
        "guidance_in.in_layer": (h, 256),
        "guidance_in.out_layer": (h, h),
        "final_layer.linear": (64, h),
        "final_layer.adaLN_modulation.1": (2 * h, h),
    }
    norms: list[str] = []
    for i in range(double):
        for stream in ("img", "txt"):
            b = f"double_blocks.{i}.{stream}"
            linear |= {f"{b}_mod.lin": (6 * h, h), f"{b}_attn.qkv": (3 * h, h), f"{b}_attn.proj": (h, h)}
            linear |= {f"{b}_mlp.0": (mlp, h), f"{b}_mlp.2": (h, mlp)}
            norms += [f"{b}_attn.norm.{k}_norm.weight" for k in ("query", "key")]
    for i in range(single):
        b = f"single_blocks.{i}"
        linear |= {f"{b}.modulation.lin": (3 * h, h), f"{b}.linear1": (3 * h + mlp, h), f"{b}.linear2": (h, h + mlp)}
        norms += [f"{b}.norm.{k}_norm.weight" for k in ("query", "key")]
    out: dict[str, tuple[int, ...]] = {f"{n}.weight": s for n, s in linear.items()}
    return out | {f"{n}.bias": s[:1] for n, s in linear.items()} | dict.fromkeys(norms, (128,))


def write_model(path: Path, sizes: tuple[int, int, int]) -> None:
    """A random bfloat16 model."""
    import torch
    from quantwire.quantizers.files.checkpoint import replace_file
    from quantwire.quantizers.files.quantized_file import NAMES

    entries: dict[str, Any] = {}
    at = 0
    table = shapes(*sizes)
    for name, shape in table.items():
        end = at + 2 * torch.Size(shape).numel()
        entries[name] = {"dtype": NAMES[torch.bfloat16], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    header = json.dumps(entries).encode()
    header = header.ljust(-(-len(header) // 64) * 64 + 56)

    def write(temporary: Path) -> None:
        generator = torch.Generator().manual_seed(0)
        with open(temporary, "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for shape in table.values():
                w = torch.randn(shape, generator=generator).mul_(0.02).to(torch.bfloat16)
                file.write(w.view(-1).view(torch.uint8).numpy())

    replace_file(path, write)


def child(action: str, format_id: str, path: Path, repeats: int) -> dict[str, Any]:
    """One measurement, in this process; `action` is `make` or `time`."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from quantwire.hosts.standalone import flux
    from quantwire.quantizers.registry import require
    from quantwire.quantizers.spec import QuantSpec

    require(format_id)
    flux.build(flux.FluxConfig(128, 1, 1, 64, 64, 64, True))  # imports diffusers
    spec = QuantSpec(format_id)
    return measured_make(path, spec) if action == "make" else measured_times(path, spec, repeats)


def measured_times(path: Path, spec: Any, repeats: int) -> dict[str, Any]:
    """Median seconds of `hit`, a load from the cache, and of `ready`, the same file opened by its name."""
    from quantwire.hosts.standalone import flux, load, models
    from quantwire.quantizers.compat.modes import Carrier
    from quantwire.quantizers.files.quantized_file import read_quantized
    from quantwire.quantizers.files.stream import TensorFile
    from quantwire.quantizers.weight import QuantizedWeight

    config = flux.config_of(TensorFile(path).shapes, path.name)
    load.load_and_quantize(path, spec)  # makes it anew where the pack's code was edited meanwhile
    file = max(Path(os.environ["QUANTWIRE_CACHE"]).glob("*.safetensors"), key=lambda p: p.stat().st_mtime_ns)

    def hit() -> Any:
        model, report = load.load_and_quantize(path, spec)
        assert any(note.startswith("From the cache") for note in report.notes), report.notes
        return model

    def ready() -> Any:
        tensors = read_quantized(file).tensors
        quantized = {n.removesuffix(".weight"): v for n, v in tensors.items() if isinstance(v, QuantizedWeight)}
        state = {n: v for n, v in tensors.items() if not isinstance(v, QuantizedWeight)}
        model = flux.build(config)
        models.fill(model, state, quantized, Carrier.QUANTWIRE)
        return model, models.entries_of(state, quantized)  # every loader gives a report

    seconds: dict[str, list[float]] = {"hit": [], "ready": []}
    for _ in range(repeats + 1):
        for run in (hit, ready):
            start = time.perf_counter()
            model = run()
            seconds[run.__name__].append(time.perf_counter() - start)
            del model
    return {f"{name}_s": statistics.median(found[1:]) for name, found in seconds.items()}


def measured_make(path: Path, spec: Any) -> dict[str, Any]:
    from quantwire.hosts.standalone import load
    from quantwire.quantizers.files.stream import TensorFile

    before = memory_mib()
    start = time.perf_counter()
    model, report = load.load_and_quantize(path, spec)
    seconds = time.perf_counter() - start
    after = memory_mib()
    assert any(note.startswith("Made now") for note in report.notes), report.notes
    assert model.transformer is not None
    largest = max(t.nbytes for t in TensorFile(path).shapes.values())
    return {
        "seconds": seconds,
        "quantized_mib": report.nbytes_out / MIB,
        "largest_mib": largest / MIB,
        "start_mib": before["VmRSS"],
        "peak_mib": after["VmHWM"],
        "anonymous_after_mib": after["RssAnon"],
        "source_mib": path.stat().st_size / MIB,
    }


def memory_mib() -> dict[str, float]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.startswith(("Vm", "Rss"))}


def run_child(action: str, format_id: str, path: Path, cache: Path, repeats: int) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", __file__, "--repeats", str(repeats)]
    command += ["--child", action, format_id, str(path)]
    environment = {**os.environ, "QUANTWIRE_CACHE": str(cache)}
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def measure(format_id: str, path: Path, folder: Path, repeats: int) -> dict[str, Any]:
    cache = folder / f"cache-{format_id}"
    shutil.rmtree(cache, ignore_errors=True)
    made = run_child("make", format_id, path, cache, repeats)
    times = run_child("time", format_id, path, cache, repeats)
    shutil.rmtree(cache)
    bound = made["quantized_mib"] + 3 * made["largest_mib"] + SLACK_MIB
    own = made["peak_mib"] - made["start_mib"]
    ratios = {"memory_ratio": made["peak_mib"] / bound, "time_ratio": times["hit_s"] / times["ready_s"]}
    return {**made, "bound_mib": bound, "own_peak_mib": own, **times, **ratios}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    parser.add_argument("--sizes", nargs=3, type=int, default=list(SIZES), metavar=("HIDDEN", "DOUBLE", "SINGLE"))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child[0], args.child[1], Path(args.child[2]), args.repeats)))
        return 0
    folder = ROOT / "out" / "bench"
    path = folder / f"random_flux_{'_'.join(map(str, args.sizes))}.safetensors"
    if not path.exists():
        write_model(path, tuple(args.sizes))
    time.sleep(3)  # a file of this moment is hashed at each load, since it may still change
    rows = {f: measure(f, path, folder, args.repeats) for f in args.formats}
    for name, r in rows.items():
        print(
            f"{name:18} made in {r['seconds']:.1f} s; peak {r['peak_mib']:.0f} MiB (libraries alone "
            f"{r['start_mib']:.0f}, own {r['own_peak_mib']:.0f}) of {r['bound_mib']:.0f} allowed (quantized "
            f"{r['quantized_mib']:.0f} + 3 x {r['largest_mib']:.0f} + {SLACK_MIB}): ratio {r['memory_ratio']:.2f}"
        )
        print(
            f"{'':18} from the cache {r['hit_s'] * 1e3:.0f} ms, ready file {r['ready_s'] * 1e3:.0f} ms: "
            f"ratio {r['time_ratio']:.2f} (at most {RATIO})"
        )
    import torch

    result = {"rows": rows, "sizes": args.sizes, "repeats": args.repeats, "torch": torch.__version__}
    result["machine"] = f"{platform.machine()}, {platform.system()}, {os.cpu_count()} cores"
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    kept = all(r["memory_ratio"] <= 1 and r["time_ratio"] <= RATIO for r in rows.values())
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
