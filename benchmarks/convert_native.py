"""How fast and in how much memory does `convert` write quantized safetensors files, against the bare steps?

    python benchmarks/convert_native.py [--formats comfy-fp8-e4m3fn comfy-nvfp4 ...] [--gib 1] [--rss-gib 4]
        [--repeats 3] [--threads 2] [--budget 200] [--json FILE]

Makes random FLUX-layout files (hidden width 3072, as FLUX.1) in a temporary folder under --folder, after a look at the
free space, and deletes them. The peer maps each tensor, reads it (one pass over its bytes), quantizes it with the same
library call, writes what comes out, and ends with fsync: no check, report, journal, checksum or reading back. Both run
in turn, from a warm page cache, each run in a fresh process that has quantized a small weight before; medians of wall
and processor time, and the ratio peer / convert. Convert does all that it does by default, reading back too; with
--plain it is measured without that (`--no-verify`) as well. comfy-w4a8 takes a minute for a layer of this width, so it
is measured on a file of width 512. What does not fit into --budget seconds is left out, and said.

Peak memory is the kernel's mark (VmHWM, which counts mapped pages of files) of a process that converts one file; what
the interpreter and its libraries take after a conversion of a tiny file is printed beside it.
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
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
MIB, GIB = 1 << 20, 1 << 30
SLACK_MIB = 400
FORMATS = ("comfy-fp8-e4m3fn", "comfy-int8-convrot", "bnb-nf4")
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
    cpu, begin = time.process_time(), time.perf_counter()
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
    return {**times, "all": time.perf_counter() - begin, "cpu": time.process_time() - cpu}


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
    cpu = time.process_time()
    seconds = convert(source, target, kind, threads, which == "verified")
    return {"all": seconds, "cpu": time.process_time() - cpu, **memory_mib()}


def run(which: str, source: Path, target: Path, kind: str, threads: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", which, str(source), str(target), kind, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    target.unlink(missing_ok=True)
    return json.loads(done.stdout.splitlines()[-1])


def speed(
    source: Path, folder: Path, kind: str, threads: int, repeats: int, which: tuple[str, ...], until: float
) -> dict[str, Any]:
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in which}
    for i in range(repeats):
        if i and time.monotonic() > until:
            break
        for name in which if i % 2 == 0 else which[::-1]:
            found[name].append(run(name, source, folder / "out.safetensors", kind, threads))
    wall, cpu = ({w: statistics.median(r[key] for r in runs) for w, runs in found.items()} for key in ("all", "cpu"))
    return {
        "runs": len(found["bare"]), "wall_s": wall, "cpu_s": cpu,
        "steps_s": {s: statistics.median(r[s] for r in found["bare"]) for s in ("read", "quantize", "write")},
        "ratio": {w: wall["bare"] / wall[w] for w in which[1:]},
        "cpu_ratio": {w: cpu["bare"] / cpu[w] for w in which[1:]},
        "peak_mib": max(r["VmHWM"] for r in found["verified"]),
        "all": {w: [r["all"] for r in runs] for w, runs in found.items()},
    }  # fmt: skip


def show(kind: str, found: dict[str, Any]) -> None:
    s, wall, cpu = found["steps_s"], found["wall_s"], found["cpu_s"]
    print(
        f"{kind:20} alone: read {s['read']:.2f} + quantize {s['quantize']:.2f} + write {s['write']:.2f} s, "
        f"{wall['bare']:.2f} s (cpu {cpu['bare']:.2f}); {found['runs']} runs each"
    )
    for which, ratio in found["ratio"].items():
        print(
            f"{kind:20} convert, {which}: {wall[which]:.2f} s (cpu {cpu[which]:.2f}); alone / convert {ratio:.2f}, "
            f"in processor time {found['cpu_ratio'][which]:.2f}",
            flush=True,
        )


def write_file(path: Path, gib: int) -> None:
    """A file of about so many GiB; tensors of the same shape are the same."""
    import torch
    from gguf_convert import BLOCKS, HIDDEN
    from load import shapes

    table = shapes(HIDDEN, *BLOCKS[gib])
    header: dict[str, Any] = {}
    at = 0
    for name, shape in table.items():
        end = at + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    if shutil.disk_usage(path.parent).free < 2 * at:
        raise SystemExit(f"{path.parent}: {2 * at / GIB:.1f} GiB needed")
    raw = json.dumps(header).encode()
    raw = raw.ljust(-(-len(raw) // 64) * 64 + 56)
    generator = torch.Generator().manual_seed(0)
    made: dict[tuple[int, ...], Any] = {}
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for shape in table.values():
            if shape not in made:
                made[shape] = torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
            file.write(made[shape].view(-1).view(torch.uint8).numpy())


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
    parser.add_argument("--rss-gib", type=int, nargs="*", default=[4])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plain", action="store_true", help="without reading back, too")
    parser.add_argument("--budget", type=float, default=200.0, help="seconds after which nothing more is begun")
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    import torch
    from load import shapes
    from quantwire.quantizers.report import versions

    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    start = time.monotonic()
    largest = max(2 * torch.Size(s).numel() for s in shapes(3072, 1, 1).values())
    bound = SLACK_MIB + 3 * largest / MIB
    result: dict[str, Any] = {"machine": platform.processor(), "cpus": os.cpu_count(), "versions": versions()}
    print(result)
    which = ("bare", "verified", *(("plain",) if args.plain else ()))
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        out = folder / "out.safetensors"
        write_width(folder / "tiny.safetensors", 256, (1, 1))
        write_width(folder / "slow.safetensors", SLOW_WIDTH, (1, 1))
        write_file(folder / f"{args.gib}.safetensors", args.gib)
        for i, kind in enumerate(args.formats):
            if time.monotonic() > start + args.budget:
                print(f"{kind:20} left out: over {args.budget:.0f} s")
                continue
            source = folder / ("slow.safetensors" if kind in SLOW else f"{args.gib}.safetensors")
            until = start + args.budget * (i + 1) / (len(args.formats) + len(args.rss_gib))
            found = speed(source, folder, kind, args.threads, args.repeats, which, until) if args.repeats else {}
            if found:
                show(kind, found)
                base = run("base", folder / "tiny.safetensors", out, kind, args.threads)["VmHWM"]
                found |= {"base_mib": base, "bound_mib": bound}
                print(f"{kind:20} peak {found['peak_mib']:.0f} MiB, of a tiny file {base:.0f}; bound {bound:.0f}")
            result[kind] = found
        for gib in [g for g in args.rss_gib if g != args.gib or not args.repeats]:
            source = folder / f"{gib}.safetensors"
            if not source.exists():
                write_file(source, gib)
            for kind in [k for k in args.formats if k not in SLOW]:
                if time.monotonic() > start + args.budget:
                    print(f"{kind:20} {gib} GiB left out: over {args.budget:.0f} s")
                    continue
                mark = run("verified", source, out, kind, args.threads)
                result.setdefault(kind, {})[f"{gib} GiB"] = mark
                shown = f"{kind:20} {gib} GiB: peak {mark['VmHWM']:.0f} MiB in {mark['all']:.1f} s; bound {bound:.0f}"
                print(shown, flush=True)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
