"""How long does `quantwire inspect FILE` take on a file of 20 GiB? Milliseconds of the whole process, by type.

    python benchmarks/inspect_time.py [--repeats 11] [--json FILE] [--types bf16 bnb-nf4 ...]

The files have the header of a FLUX-size model, real scales' metadata, and data of holes: they take no room on a disk
with sparse files, and `inspect` reads none of it. Each repeat is a fresh process, the types interleaved; the floor is
the start of Python alone. On a busy machine the processor's time tells more than the clock.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

LIMIT_MS = 150
LEAST_NBYTES = 20 << 30
DOUBLE, SINGLE = 19, 38
BITS = {"BF16": 16, "F32": 32, "U8": 8, "I8": 8, "F8_E4M3": 8}
Shape = tuple[int, ...]
# name -> (dtype, shape, bytes that are really written)
Tensors = dict[str, tuple[str, Shape, bytes]]


def flux(hidden: int) -> Iterator[tuple[str, Shape]]:
    """Names and shapes of a FLUX transformer of any width."""
    h = hidden
    outer = (
        ("img_in", h, 64), ("txt_in", h, 4096), ("time_in.in_layer", h, 256), ("time_in.out_layer", h, h),
        ("vector_in.in_layer", h, 768), ("vector_in.out_layer", h, h), ("guidance_in.in_layer", h, 256),
        ("guidance_in.out_layer", h, h), ("final_layer.linear", 64, h), ("final_layer.adaLN_modulation.1", 2 * h, h),
    )  # fmt: skip
    double = [
        layer
        for side in ("img", "txt")
        for layer in (
            (f"{side}_mod.lin", 6 * h, h), (f"{side}_attn.qkv", 3 * h, h), (f"{side}_attn.proj", h, h),
            (f"{side}_mlp.0", 4 * h, h), (f"{side}_mlp.2", h, 4 * h),
        )
    ]  # fmt: skip
    single = (("modulation.lin", 3 * h, h), ("linear1", 7 * h, h), ("linear2", h, 5 * h))
    layers = [*outer, *((f"double_blocks.{i}.{name}", n, k) for i in range(DOUBLE) for name, n, k in double)]
    layers += [(f"single_blocks.{i}.{name}", n, k) for i in range(SINGLE) for name, n, k in single]
    for name, n, k in layers:
        yield f"{name}.weight", (n, k)
        yield f"{name}.bias", (n,)
    for i in range(DOUBLE):
        yield from ((f"double_blocks.{i}.{s}_attn.norm.{q}_norm.scale", (128,)) for s in ("img", "txt") for q in "qk")
    for i in range(SINGLE):
        yield from ((f"single_blocks.{i}.norm.{q}_norm.scale", (128,)) for q in ("query", "key"))


def is_quantized(name: str) -> bool:
    return "_blocks." in name and name.endswith(".weight")


def plain(name: str, shape: Shape) -> Tensors:
    return {name: ("BF16", shape, b"")}


def comfy_fp8(name: str, shape: Shape) -> Tensors:
    layer = name.removesuffix(".weight")
    said = json.dumps({"format": "float8_e4m3fn"}).encode()
    return {
        name: ("F8_E4M3", shape, b""),
        f"{layer}.weight_scale": ("F32", (), struct.pack("<f", 0.01)),
        f"{layer}.comfy_quant": ("U8", (len(said),), said),
    }


def scaled_fp8(name: str, shape: Shape) -> Tensors:
    scale = ("F32", (1,), struct.pack("<f", 0.01))
    return {name: ("F8_E4M3", shape, b""), f"{name.removesuffix('.weight')}.scale_weight": scale}


def bnb_nf4(name: str, shape: Shape) -> Tensors:
    numel = math.prod(shape)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(shape)}
    raw = json.dumps(state).encode()
    return {
        name: ("U8", (numel // 2, 1), b""),
        f"{name}.absmax": ("F32", (numel // 64,), b""),
        f"{name}.quant_map": ("F32", (16,), b""),
        f"{name}.quant_state.bitsandbytes__nf4": ("U8", (len(raw),), raw),
    }


def safetensors(path: Path, hidden: int, quantized: Callable[[str, Shape], Tensors], more: Tensors) -> None:
    tensors: Tensors = dict(more)
    for name, shape in flux(hidden):
        tensors |= quantized(name, shape) if is_quantized(name) else plain(name, shape)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at, written = 0, list[tuple[int, bytes]]()
    for name, (dtype, shape, data) in tensors.items():
        end = at + math.prod(shape) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        written.append((at, data))
        at = end
    raw = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for start, data in written:
            if data:
                file.seek(8 + len(raw) + start)
                file.write(data)
    os.truncate(path, 8 + len(raw) + at)


def gguf(path: Path, hidden: int, kind: str) -> None:
    from quantwire.quantizers.files.gguf_layout import layout, text, total_nbytes

    tensors = [(n, kind if is_quantized(n) else "BF16" if len(s) == 2 else "F32", s) for n, s in flux(hidden)]
    header, places = layout([text("general.architecture", "flux")], tensors)
    path.write_bytes(header)
    os.truncate(path, total_nbytes(header, places))


def text_gguf(path: Path, tokens: int, merges: int) -> None:
    """A text encoder of 20 GiB with the vocabulary of Qwen."""
    from quantwire.quantizers.files.gguf_layout import layout, text, total_nbytes

    def array(key: str, items: list[str]) -> bytes:
        raw = b"".join(struct.pack("<Q", len(item)) + item.encode() for item in items)
        return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<IIQ", 9, 8, len(items)) + raw

    h, tensors = 8192, list[tuple[str, str, Shape]]()
    for i in range(64):
        tensors += [(f"blk.{i}.{n}.weight", "Q4_K", (h, h)) for n in ("attn_q", "attn_k", "attn_v", "attn_output")]
        tensors += [(f"blk.{i}.{n}.weight", "Q4_K", (3 * h, h)) for n in ("ffn_up", "ffn_down", "ffn_gate")]
        tensors += [
            (f"blk.{i}.{n}.weight", "F32", (h,)) for n in ("attn_norm", "ffn_norm", "attn_q_norm", "attn_k_norm")
        ]
    tensors.append(("token_embd.weight", "Q6_K", (tokens, h)))
    keys = [
        text("general.architecture", "qwen3"),
        array("tokenizer.ggml.tokens", [f"token{i:06}"[: 3 + i % 9] for i in range(tokens)]),
        array("tokenizer.ggml.merges", [f"ab{i % 997} cd{i % 89}" for i in range(merges)]),
    ]
    header, places = layout(keys, tensors)
    path.write_bytes(header)
    os.truncate(path, total_nbytes(header, places))


# Widths at which each file has 20 GiB.
MAKERS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "bf16": ("safetensors", lambda p: safetensors(p, 3072, plain, {})),
    "comfy-fp8": ("safetensors", lambda p: safetensors(p, 4352, comfy_fp8, {})),
    "scaled-fp8": ("safetensors", lambda p: safetensors(p, 4352, scaled_fp8, {"scaled_fp8": ("F8_E4M3", (2,), b"")})),
    "bnb-nf4": ("safetensors", lambda p: safetensors(p, 5888, bnb_nf4, {})),
    "gguf-Q4_K": ("gguf", lambda p: gguf(p, 5888, "Q4_K")),
    "gguf-text-Q4_K": ("gguf", lambda p: text_gguf(p, 151_936, 151_387)),
}


def environment(folder: Path) -> dict[str, str]:
    """Compiled modules are kept, as they are in any installation, whatever this process was told."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return env | {"PYTHONPYCACHEPREFIX": str(folder / "compiled")}


def once_ms(command: list[str], env: dict[str, str]) -> tuple[float, float]:
    """Milliseconds of a process by the clock, and of the processor's time that it used."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True, env=env)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall * 1e3, (after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime) * 1e3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--types", nargs="+", choices=list(MAKERS), default=list(MAKERS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        env = environment(Path(folder))
        commands = {"floor (python)": [sys.executable, "-c", "pass"]}
        sizes: dict[str, dict[str, int]] = {}
        for name in args.types:
            suffix, make = MAKERS[name]
            path = Path(folder) / f"{name}.{suffix}"
            make(path)
            commands[name] = [sys.executable, "-m", "quantwire.cli", "inspect", str(path)]
            said = json.loads(
                subprocess.run([*commands[name], "--json"], capture_output=True, check=True, env=env).stdout
            )
            if not said["nbytes"] >= LEAST_NBYTES:
                raise SystemExit(f"{name}: {said['nbytes']} bytes, expected {LEAST_NBYTES} or more.")
            sizes[name] = {"nbytes": said["nbytes"], "tensors": said["tensors"], "warnings": len(said["warnings"])}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for _ in range(args.repeats):
            for name, command in commands.items():
                times[name].append(once_ms(command, env))
    walls = {name: statistics.median(wall for wall, _ in values) for name, values in times.items()}
    cpus = {name: statistics.median(cpu for _, cpu in values) for name, values in times.items()}
    for name, values in times.items():
        at = sizes.get(name)
        what = f"  {at['nbytes'] / 2**30:5.1f} GiB  {at['tensors']:5} tensors" if at else ""
        least = min(wall for wall, _ in values)
        print(f"{name:16} median {walls[name]:6.1f} ms  min {least:6.1f}  processor {cpus[name]:6.1f}{what}")
    result = {
        "median_ms": walls,
        "least_ms": {name: min(wall for wall, _ in values) for name, values in times.items()},
        "processor_ms": cpus,
        "load": os.getloadavg()[0],
        "limit_ms": LIMIT_MS,
        "files": sizes,
        "repeats": args.repeats,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {platform.system()}, {os.cpu_count()} cores",
    }
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if max(walls.values()) <= LIMIT_MS else 1


if __name__ == "__main__":
    sys.exit(main())
