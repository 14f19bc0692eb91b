"""Which product with GGUF weights is fastest on this GPU, by type and number of tokens?

    python benchmarks/gguf_gpu.py [--size N K] [--tokens 1 4 ...] [--types Q8_0 ...] [--dtype bfloat16] [--json FILE]

Ways: sums by threads (to 8 tokens), tensor cores, and a decoded buffer with cuBLAS, each at every number of tokens that
it takes; peers in the same run: `F.linear` on a full-precision weight, and diffusers' eager dequantization with
`F.linear`. Medians, interleaved, the cache of the GPU cleared before each. FEW_TOKENS and FUSED_TOKENS in
quantizers/kernels/triton_gguf/tiles.py are to be read off this table. Ends with status 2 where there is no CUDA GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from quantwire.quantizers.kernels import triton_gguf
from quantwire.quantizers.kernels.triton_gguf import BLOCKS
from quantwire.quantizers.kernels.triton_gguf.tiles import FEW_TOKENS
from quantwire.quantizers.report import versions
from torch import Tensor

TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096]
# Offsets of the float16 numbers of a block (ggml-common.h).
HALVES = {"Q8_0": (0,), "Q4_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_XS": (0,)}
FLUSH_NBYTES = 256 * 1024 * 1024


def random_weight(type_name: str, n: int, k: int) -> Tensor:
    """Random bytes with scales of about 0.01, (n, bytes a row) on the GPU."""
    b = BLOCKS[type_name]
    blocks = torch.randint(0, 256, (n * k // b.size, b.nbytes), dtype=torch.uint8, device="cuda")
    for at in HALVES[type_name]:
        scales = torch.randn(len(blocks), 1, device="cuda").mul_(0.01).half()
        blocks[:, at : at + 2] = scales.view(torch.uint8)
    return blocks.view(n, -1)


def diffusers_values(qdata: Tensor, type_name: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    import gguf
    from diffusers.quantizers.gguf.utils import dequantize_functions

    b = BLOCKS[type_name]
    decode = dequantize_functions[gguf.GGMLQuantizationType[type_name]]
    return decode(qdata.view(-1, b.nbytes), b.size, b.nbytes, dtype).view(shape).to(dtype)


def seconds(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each on the GPU; the first rounds compile, tune and warm up."""
    flush = torch.empty(FLUSH_NBYTES, dtype=torch.uint8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(repeats + 2):
        for name, run in runs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            start.record()
            run()
            end.record()
            end.synchronize()
            if round_ > 1:
                times[name].append(start.elapsed_time(end) / 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def products(type_name: str, n: int, k: int, tokens: int, w: Tensor, repeats: int) -> dict[str, float]:
    from quantwire.quantizers.kernels.triton_gguf import launch

    qdata = random_weight(type_name, n, k)
    x = torch.randn(tokens, k, dtype=w.dtype, device="cuda")
    runs: dict[str, Callable[[], Any]] = {
        "F.linear": lambda: F.linear(x, w),
        "diffusers": lambda: F.linear(x, diffusers_values(qdata, type_name, (n, k), w.dtype)),
        "buffer": lambda: F.linear(x, triton_gguf.dequantize(qdata, type_name, (n, k), w.dtype)),
        "chosen": lambda: triton_gguf.run(x, qdata, type_name, n, k, None),
    }
    if tokens <= FEW_TOKENS:
        runs["threads"] = lambda: launch.few_tokens(x, qdata, type_name, None)
    if w.dtype is not torch.float32:
        runs["tensor cores"] = lambda: launch.fused(x, qdata, type_name, None)
    exact = F.linear(x.float(), diffusers_values(qdata, type_name, (n, k), torch.float32))
    check(runs, exact, type_name)
    return seconds(runs, repeats)


def check(runs: dict[str, Callable[[], Any]], expected: Tensor, type_name: str) -> None:
    """A fast way that is wrong is no result: each must give the float32 product, within the rounding of its dtype."""
    for name in set(runs) - {"F.linear", "diffusers"}:
        error = float((runs[name]().float() - expected).norm() / expected.norm())
        if not error < 0.02:
            raise SystemExit(f"{type_name}, {len(expected)} tokens, {name}: relative error {error:.3g}.")


def dequantizing(type_name: str, n: int, k: int, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """Seconds, and bit-equality with gguf's numpy on the way."""
    import gguf

    qdata = random_weight(type_name, n, k)
    part = qdata[:256].contiguous()
    ours = triton_gguf.dequantize(part, type_name, (len(part), k), torch.float32).cpu()
    numpy: Any = gguf.quants.dequantize(part.cpu().numpy(), gguf.GGMLQuantizationType[type_name])
    if not torch.equal(ours, torch.from_numpy(numpy)):
        raise SystemExit(f"{type_name}: the values are not those of gguf.")
    copied = torch.empty(n, k, dtype=dtype, device="cuda")
    source = torch.zeros_like(copied)
    return seconds(
        {
            "Triton": lambda: triton_gguf.dequantize(qdata, type_name, (n, k), dtype),
            "diffusers": lambda: diffusers_values(qdata, type_name, (n, k), dtype),
            "copy of the result": lambda: copied.copy_(source),
        },
        repeats,
    )


def crossover(rows: list[dict[str, Any]]) -> int:
    """The most tokens at which tensor cores still beat the buffer by geometric mean over types; 0 if at none."""
    best = 0
    for tokens in sorted({row["tokens"] for row in rows}):
        ratios = [
            math.log(row["seconds"]["tensor cores"] / row["seconds"]["buffer"])
            for row in rows
            if row["tokens"] == tokens and "tensor cores" in row["seconds"]
        ]
        if ratios and sum(ratios) < 0:
            best = tokens
    return best


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", type=int, nargs=2, default=[12288, 3072], metavar=("N", "K"))
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--types", nargs="+", default=list(BLOCKS), choices=list(BLOCKS))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    if not torch.cuda.is_available():
        print("gguf_gpu: there is no CUDA GPU here, so nothing was measured.", file=sys.stderr)
        return 2
    (n, k), gpu = args.size, torch.cuda.get_device_name()
    reason = triton_gguf.refusal(torch.device("cuda", torch.cuda.current_device()), dtype, args.types[0], (n, k))
    if reason:
        print(f"gguf_gpu: {reason}.", file=sys.stderr)
        return 2
    print(f"{gpu}, {n} x {k}, {args.dtype}, {versions()}")
    w = torch.randn(n, k, device="cuda").to(dtype)
    expanded = {name: dequantizing(name, n, k, dtype, args.repeats) for name in args.types}
    for name, times in expanded.items():
        print(f"{name:7} dequantize " + "  ".join(f"{way} {1e6 * s:.0f} us" for way, s in times.items()))
    rows: list[dict[str, Any]] = []
    for name in args.types:
        for tokens in args.tokens:
            times = products(name, n, k, tokens, w, args.repeats)
            rows.append({"type": name, "tokens": tokens, "seconds": times})
            line = "  ".join(f"{way} {s / times['F.linear']:.2f}" for way, s in times.items() if way != "F.linear")
            print(f"{name:7} {tokens:5} tokens  F.linear {1e6 * times['F.linear']:.0f} us; ratios: {line}")
    print(f"tensor cores beat the buffer up to {crossover(rows)} tokens")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        found = {"gpu": gpu, "versions": versions(), "size": [n, k], "dtype": args.dtype}
        args.json.write_text(json.dumps(found | {"dequantize": expanded, "products": rows}, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
