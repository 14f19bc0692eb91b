"""How fast and in how much memory does `convert` write GGUF files, against bare calls of ggml?

    python benchmarks/gguf_convert.py [--types Q8_0 Q4_K] [--dtypes bf16 f32] [--gib 1] [--rss-gib 1 4] [--repeats 3]
        [--threads 2] [--json FILE]

Makes random FLUX-layout files (hidden width 3072, as FLUX.1) in a temporary folder under --folder, after a look at the
free space, and deletes them. The peer is a loop without any check, report, journal or layout: map the tensor, float32,
`ggml_quantize_chunk` in as many threads over rows, write. Both write the same types of the same tensors, both end with
fsync, in turn, from a warm page cache, each run in a fresh process; medians, and the ratio peer / convert. The blocks
must be the same. Peak memory is the kernel's mark (VmHWM, which counts mapped pages of files) of a process that
converts one file; what the interpreter and its libraries take alone is printed beside it.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import mmap
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
MIB, GIB = 1 << 20, 1 << 30
HIDDEN = 3072
BLOCKS = {1: (1, 1), 2: (2, 2), 4: (4, 5)}  # GiB of bfloat16 -> double and single blocks
SLACK_MIB = 400


def write_model(path: Path, gib: int, dtype: str) -> None:
    """Random weights; float32 files hold the same tensors at twice the size, so of half the blocks."""
    import torch
    from load import shapes
    from quantwire.quantizers.files.quantized_file import NAMES

    kind = {"bf16": torch.bfloat16, "f32": torch.float32}[dtype]
    table = shapes(HIDDEN, *BLOCKS[gib])
    if dtype == "f32":
        table = {n: s for n, s in table.items() if not n.startswith("single_blocks") or gib > 1}
    entries: dict[str, Any] = {}
    at = 0
    for name, shape in table.items():
        end = at + kind.itemsize * torch.Size(shape).numel()
        entries[name] = {"dtype": NAMES[kind], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    free = shutil.disk_usage(path.parent).free
    if 2 * at > free:
        raise SystemExit(f"{path.parent}: {2 * at / GIB:.1f} GiB needed, {free / GIB:.1f} GiB free.")
    header = json.dumps(entries).encode()
    header = header.ljust(-(-len(header) // 64) * 64 + 56)
    generator = torch.Generator().manual_seed(0)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for shape in table.values():
            w = torch.randn(shape, generator=generator).mul_(0.02).to(kind)
            file.write(w.view(-1).view(torch.uint8).numpy())


def request(source: Path, target: Path, kind: str, threads: int) -> Any:
    from quantwire.quantizers.files.convert_plan import Request
    from quantwire.quantizers.rules import Rule

    # Modulation too, which would stay bfloat16 in a model of this size.
    rules = (Rule("re:mod", kind),)
    return Request(source, target, f"gguf-{kind.lower().replace('_', '-')}", rules, threads=threads, overwrite=True)


def convert(source: Path, target: Path, kind: str, threads: int) -> float:
    from quantwire.quantizers.files.convert import run_conversion
    from quantwire.quantizers.files.convert_plan import plan_conversion

    start = time.perf_counter()
    run_conversion(plan_conversion(request(source, target, kind, threads)))
    return time.perf_counter() - start


def bare(source: Path, target: Path, kind: str, threads: int) -> float:
    """The peer. What becomes of which tensor, and where it lies, is looked up before the clock starts."""
    import torch
    from quantwire.quantizers.backends.gguf.ggml import _open
    from quantwire.quantizers.files.convert_plan import plan_conversion
    from quantwire.quantizers.files.safetensors_header import read_safetensors_header
    from quantwire.quantizers.ggml_types import TYPES

    plan = plan_conversion(request(source, target, kind, threads))
    header = read_safetensors_header(source)
    torch.set_num_threads(threads)
    library = _open("ggml-base")
    quantize = library.ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    dtypes = {"BF16": torch.bfloat16, "F32": torch.float32}
    start = time.perf_counter()
    with open(source, "rb") as file, open(target, "wb") as out, ThreadPoolExecutor(threads) as pool:
        base = 8 + int.from_bytes(file.read(8), "little")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        out.write(plan.head)
        for choice, place in zip(plan.choices, plan.places, strict=True):
            entry = header[choice.target.pieces[0].source]
            first, last = entry["data_offsets"]
            w = torch.frombuffer(data, dtype=torch.uint8, count=last - first, offset=base + first)
            w = w.view(dtypes[entry["dtype"]])
            out.seek(place.start)
            if choice.kind not in TYPES:
                out.write(w.to(dtypes[choice.kind]).view(torch.uint8).numpy())
                continue
            values, rows, k = w.float(), place.shape[0], place.shape[1]
            packed = torch.empty(place.nbytes, dtype=torch.uint8)
            number, ends = TYPES[choice.kind].number, [rows * i // threads for i in range(threads + 1)]

            def part(i: int, v: Any = values, p: Any = packed, k: int = k, n: int = number, e: Any = ends) -> None:
                quantize(n, v.data_ptr(), p.data_ptr(), e[i] * k, e[i + 1] - e[i], k, None)

            list(pool.map(part, range(threads)))
            out.write(packed.numpy())
        out.truncate(plan.total)
        out.flush()
        os.fsync(out.fileno())
    return time.perf_counter() - start


def memory_mib() -> dict[str, float]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.startswith(("Vm", "Rss"))}


def child(which: str, source: Path, target: Path, kind: str, threads: int) -> dict[str, Any]:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from quantwire.quantizers.backends.gguf import ggml
    from quantwire.quantizers.files import convert as _  # noqa: F401 - imports are not part of the time
    from quantwire.quantizers.registry import require

    require(f"gguf-{kind.lower().replace('_', '-')}")
    version = ggml.library().version
    before = memory_mib()
    cpu = time.process_time()
    seconds = (convert if which == "convert" else bare)(source, target, kind, threads)
    cpu = time.process_time() - cpu
    return {
        "seconds": seconds,
        "cpu_s": cpu,
        "start_mib": before["VmRSS"],
        "peak_mib": memory_mib()["VmHWM"],
        "ggml": version,
    }


def run_child(which: str, source: Path, target: Path, kind: str, threads: int) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", __file__, "--threads", str(threads)]
    command += ["--child", which, str(source), str(target), kind]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def digest(path: Path) -> str:
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            sha.update(block)
    return sha.hexdigest()


def speed(folder: Path, source: Path, dtype: str, kind: str, args: argparse.Namespace) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {"convert": [], "bare": []}
    cpu: dict[str, list[float]] = {"convert": [], "bare": []}
    digests: dict[str, str] = {}
    for i in range(args.repeats):
        order = ("convert", "bare") if i % 2 == 0 else ("bare", "convert")
        for which in order:
            target = folder / f"{which}.gguf"
            run = run_child(which, source, target, kind, args.threads)
            seconds[which].append(run["seconds"])
            cpu[which].append(run["cpu_s"])
            if i == 0:
                digests[which] = digest(target)
            target.unlink()
    if digests["convert"] != digests["bare"]:
        raise SystemExit(f"{kind}: the files differ")
    ours, theirs = (statistics.median(seconds[w]) for w in ("convert", "bare"))
    cpu_ratio = statistics.median(cpu["bare"]) / statistics.median(cpu["convert"])
    size = source.stat().st_size
    found = {
        "source": dtype, "type": kind, "gib": size / GIB, "convert_s": ours, "bare_s": theirs,
        "ratio": theirs / ours, "mb_s": size / ours / 1e6, "all": seconds, "cpu_ratio": cpu_ratio, "cpu": cpu,
    }  # fmt: skip
    print(
        f"{dtype:5} -> {kind:6} {size / GIB:5.2f} GiB: convert {ours:6.2f} s ({found['mb_s']:5.0f} MB/s), "
        f"bare {theirs:6.2f} s, bare / convert {found['ratio']:.3f}, "
        f"in processor time {cpu_ratio:.3f}",
        flush=True,
    )
    return found


def rss(folder: Path, source: Path, gib: int, kind: str, args: argparse.Namespace) -> dict[str, Any]:
    from quantwire.quantizers.files.stream import TensorFile

    target = folder / "rss.gguf"
    found = run_child("convert", source, target, kind, args.threads)
    target.unlink()
    largest = max(t.nbytes for t in TensorFile(source).shapes.values()) / MIB
    bound = SLACK_MIB + 3 * largest
    print(
        f"peak  -> {kind:6} {source.stat().st_size / GIB:5.2f} GiB: {found['peak_mib']:.0f} MiB, of which "
        f"{found['start_mib']:.0f} at the start; bound 400 + 3 x {largest:.0f} = {bound:.0f} MiB",
        flush=True,
    )
    return {"gib": gib, "type": kind, "largest_mib": largest, "bound_mib": bound, **found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--types", nargs="+", default=["Q8_0", "Q4_K"])
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "f32"], choices=["bf16", "f32"])
    parser.add_argument("--gib", type=int, default=1, choices=list(BLOCKS))
    parser.add_argument("--rss-gib", type=int, nargs="*", default=[1, 4], choices=list(BLOCKS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=None, help="where there is room (default: the system's)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        which, source, target, kind = args.child
        print(json.dumps(child(which, Path(source), Path(target), kind, args.threads)))
        return 0
    from quantwire.quantizers.report import versions

    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {args.threads} threads; {versions()}")
    speeds: list[dict[str, Any]] = []
    peaks: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="quantwire-convert-", dir=args.folder) as name:
        folder = Path(name)
        for dtype in args.dtypes:
            source = folder / f"{dtype}.safetensors"
            write_model(source, args.gib, dtype)
            speeds += [speed(folder, source, dtype, kind, args) for kind in args.types]
            source.unlink()
        for gib in args.rss_gib:
            source = folder / f"{gib}.safetensors"
            write_model(source, gib, "bf16")
            peaks += [rss(folder, source, gib, kind, args) for kind in args.types]
            source.unlink()
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"versions": versions(), "speed": speeds, "peak": peaks}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
