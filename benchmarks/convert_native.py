"""How fast and in how much memory does `convert` write quantized safetensors files, against the bare steps?

    python benchmarks/convert_native.py [--formats comfy-fp8-e4m3fn comfy-nvfp4 ...] [--gib 1] [--slow-blocks 0]
        [--rss-gib 1 4] [--repeats 3] [--threads 2] [--json FILE]

Makes random FLUX-layout files (hidden width 3072, as FLUX.1) in a temporary folder under --folder, after a look at the
free space, and deletes them. The peer maps each tensor, reads it (one pass over its bytes), quantizes it with the same
library call, writes what comes out, and ends with fsync: no check, report, journal, checksum or reading back. Both run
in turn, from a warm page cache, each run in a fresh process that has quantized a small weight before; medians, and the
ratio peer / convert, with and without reading back (`--no-verify`). comfy-w4a8 takes a minute for a layer of this
width, so it is measured on a file of width 512.

Peak memory is the kernel's mark (VmHWM, which counts mapped pages of files) of a process that converts one file; what
the interpreter and its libraries take after a conversion of a tiny file is printed beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
MIB, GIB = 1 << 20, 1 << 30
SLACK_MIB = 400
FORMATS = ("comfy-fp8-e4m3fn", "comfy-nvfp4", "comfy-int8-convrot", "comfy-mxfp8", "bnb-nf4", "comfy-w4a8")
SLOW = ("comfy-w4a8",)
SLOW_WIDTH = 512
ALL = "re:mod"  # modulation too, which would stay bfloat16


class Bar:
    def update(self, n: int, /) -> None:
        pass


def request(source: Path, target: Path, kind: str, threads: int, verify: bool) -> Any:
    from quantwire.quantizers.files.convert_plan import Request
    from quantwire.quantizers.rules import Rule

    rules = (Rule(ALL, kind),)
    return Request(source, target, kind, rules, threads=threads, overwrite=True, verify=verify)


def convert(source: Path, target: Path, kind: str, threads: int, verify: bool) -> float:
    from quantwire.quantizers.files.converting import convert as run

    start = time.perf_counter()
    run(request(source, target, kind, threads, verify), lambda total: nullcontext(Bar()))
    return time.perf_counter() - start


def bare(source: Path, target: Path, kind: str, threads: int) -> dict[str, float]:
    """Seconds of each step and of all. What becomes of which tensor is looked up before the clock starts."""
    import torch
    from quantwire.quantizers.files.quantizing import plan_quantized, quantized_spec
    from quantwire.quantizers.files.sources import Assembled
    from quantwire.quantizers.plan import Action
    from quantwire.quantizers.registry import require

    wanted = request(source, target, kind, threads, False)
    spec = quantized_spec(wanted)
    assert spec is not None
    plan = plan_quantized(wanted, spec)
    torch.set_num_threads(threads)
    quantizer = require(kind)
    times = {"read": 0.0, "quantize": 0.0, "write": 0.0}
    begin = time.perf_counter()
    with open(target, "wb") as out:
        out.seek(plan.room)
        for t, decision in zip(plan.targets, plan.plan.decisions, strict=True):
            a = time.perf_counter()
            w = Assembled(t, plan.source.open).values(0, t.shape[0])[0].reshape(t.shape)
            w.view(-1).view(torch.uint8).max() if w.numel() % 8 else w.view(-1).view(torch.int64).max()
            b = time.perf_counter()
            made = [w] if decision.action is not Action.QUANTIZE else quantizer.quantize(w, spec).tensors.values()
            c = time.perf_counter()
            for tensor in made:
                out.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
            d = time.perf_counter()
            times["read"] += b - a
            times["quantize"] += c - b
            times["write"] += d - c
            del w, made
        last = time.perf_counter()
        out.flush()
        os.fsync(out.fileno())
        times["write"] += time.perf_counter() - last
    return {**times, "all": time.perf_counter() - begin}


def memory_mib() -> dict[str, float]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.startswith(("Vm", "Rss"))}


def child(which: str, source: Path, target: Path, kind: str, threads: int) -> dict[str, Any]:
    import torch
    from quantwire.quantizers.registry import require
    from quantwire.quantizers.spec import QuantSpec

    quantizer, spec = require(kind), QuantSpec(kind)
    weight = quantizer.quantize(torch.randn(256, 256).bfloat16(), spec)
    quantizer.dequantize(weight, torch.float32)
    tiny = source.with_name("tiny.safetensors")
    if which == "base":
        convert(tiny, target, kind, threads, True)
        return memory_mib()
    if which == "bare":
        return bare(source, target, kind, threads)
    seconds = convert(source, target, kind, threads, which == "verified")
    return {"all": seconds, **memory_mib()}


def run(which: str, source: Path, target: Path, kind: str, threads: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", which, str(source), str(target), kind, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    target.unlink(missing_ok=True)
    return json.loads(done.stdout.splitlines()[-1])


def speed(source: Path, folder: Path, kind: str, threads: int, repeats: int) -> dict[str, Any]:
    found: dict[str, list[dict[str, Any]]] = {"bare": [], "plain": [], "verified": []}
    for _ in range(repeats):
        for which, runs in found.items():
            runs.append(run(which, source, folder / "out.safetensors", kind, threads))
    median = {which: statistics.median(r["all"] for r in runs) for which, runs in found.items()}
    steps = {s: statistics.median(r[s] for r in found["bare"]) for s in ("read", "quantize", "write")}
    rss = max(r["VmHWM"] for r in found["verified"])
    return {
        "median_s": median, "steps_s": steps, "rss_mib": rss,
        "ratio": median["bare"] / median["plain"], "ratio_verified": median["bare"] / median["verified"],
    }  # fmt: skip


def write_width(path: Path, width: int, blocks: tuple[int, int]) -> int:
    """A file of random weights; returns bytes of its largest tensor."""
    import torch
    from load import shapes
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    tensors = {n: torch.randn(s, generator=generator).mul_(0.02).bfloat16() for n, s in shapes(width, *blocks).items()}
    save_file(tensors, path)
    return max(t.nbytes for t in tensors.values())


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        which, source, target, kind, threads = sys.argv[2:]
        print(json.dumps(child(which, Path(source), Path(target), kind, int(threads))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="*", default=list(FORMATS))
    parser.add_argument("--gib", type=int, default=1)
    parser.add_argument("--rss-gib", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    import torch
    from gguf_convert import write_model
    from load import shapes
    from quantwire.quantizers.report import versions

    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    largest = max(2 * torch.Size(s).numel() for s in shapes(3072, 1, 1).values())
    bound = SLACK_MIB + 3 * largest / MIB
    result: dict[str, Any] = {"machine": platform.processor(), "cpus": os.cpu_count(), "versions": versions()}
    print(result)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        write_width(folder / "tiny.safetensors", 256, (1, 1))
        sizes = sorted({args.gib, *args.rss_gib})
        for gib in sizes:
            write_model(folder / f"{gib}.safetensors", gib, "bf16")
        write_width(folder / "slow.safetensors", SLOW_WIDTH, (1, 1))
        for kind in args.formats:
            source = folder / ("slow.safetensors" if kind in SLOW else f"{args.gib}.safetensors")
            result[kind] = found = speed(source, folder, kind, args.threads, args.repeats) if args.repeats else {}
            if found:
                s, m = found["steps_s"], found["median_s"]
                print(
                    f"{kind:20} read {s['read']:.2f} + quantize {s['quantize']:.2f} + write {s['write']:.2f} = "
                    f"{m['bare']:.2f} s; convert {m['plain']:.2f} s (ratio {found['ratio']:.2f}), "
                    f"with reading back {m['verified']:.2f} s (ratio {found['ratio_verified']:.2f})"
                )
            base = run("base", folder / "tiny.safetensors", folder / "out.safetensors", kind, args.threads)["VmHWM"]
            marks = {}
            for gib in args.rss_gib if kind not in SLOW else []:
                source = folder / f"{gib}.safetensors"
                marks[gib] = run("verified", source, folder / "out.safetensors", kind, args.threads)
            shown = ", ".join(f"{g} GiB {m['VmHWM']:.0f} MiB in {m['all']:.1f} s" for g, m in marks.items())
            found |= {"base_mib": base, "rss": marks, "bound_mib": bound}
            print(f"{kind:20} peak memory: tiny file {base:.0f} MiB; {shown}; bound {bound:.0f} MiB", flush=True)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
