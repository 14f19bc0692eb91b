"""How fast do GGUF weights come back? Dequantizing one weight to bfloat16, against diffusers, gguf's numpy and memcpy.

    python benchmarks/gguf_dequantize.py [--size 12288 3072] [--types Q8_0 ...] [--repeats 7] [--no-numpy] [--json FILE]

Each repeat runs ours (into a buffer that is used again, as a product does), diffusers' eager code, gguf's numpy and a
memcpy one after the other. *Share of memcpy*: bytes read and written a second over those of `Tensor.copy_` between two
buffers of 256 MiB, in the same run. Targets: geometric means of at least 6 x diffusers and 25 % of memcpy.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import gguf
import torch
from diffusers.quantizers.gguf.utils import dequantize_functions
from quantwire.quantizers.ggml_types import TYPES, format_id
from quantwire.quantizers.kernels.expand import expand
from quantwire.quantizers.registry import get_quantizer
from quantwire.quantizers.report import versions
from quantwire.quantizers.spec import QuantSpec
from timing import interleaved

NAMES = ["Q8_0", "Q4_0", "Q5_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"]
COPIED = 256 << 20


def measure(name: str, size: tuple[int, int], repeats: int, numpy: bool) -> dict[str, Any]:
    n, k = size
    torch.manual_seed(0)
    quantizer = get_quantizer(format_id(name))
    # Quantizing 37.7 M values to an IQ type takes a minute; a few rows again and again are as good here.
    rows = quantizer.quantize(torch.randn(256, k), QuantSpec(format_id(name)))
    qdata = rows.tensors["qdata"].repeat(n // 256, 1)
    weight = rows.with_tensors({"qdata": qdata}, size)
    form, kind = quantizer.form(weight), gguf.GGMLQuantizationType[name]
    out = torch.empty(n, k, dtype=torch.bfloat16)
    block, nbytes = TYPES[name].block, TYPES[name].nbytes
    blocks = qdata.view(-1, nbytes)
    source = torch.ones(COPIED, dtype=torch.uint8)
    target = torch.empty_like(source)
    runs: dict[str, Callable[[], Any]] = {
        "ours": lambda: expand(form, out),
        "diffusers": lambda: dequantize_functions[kind](blocks, block, nbytes, dtype=torch.bfloat16),
        "memcpy": lambda: target.copy_(source),
    }
    if numpy:
        runs["numpy"] = lambda: gguf.quants.dequantize(qdata.numpy(), kind)
    seconds = interleaved(runs, repeats)
    reference = torch.from_numpy(gguf.quants.dequantize(qdata[:512].numpy(), kind)).to(torch.bfloat16)
    assert torch.equal(out[:512], reference), f"{name}: not gguf's values"
    bandwidth = 2 * COPIED / seconds["memcpy"]
    moved = qdata.nbytes + out.nbytes
    return {
        "type": name,
        "ms": {run: 1e3 * s for run, s in seconds.items()},
        "memcpy_gb_s": bandwidth / 1e9,
        "times_diffusers": seconds["diffusers"] / seconds["ours"],
        "times_numpy": seconds["numpy"] / seconds["ours"] if numpy else None,
        "memcpy_share": moved / seconds["ours"] / bandwidth,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", type=int, nargs=2, default=(12288, 3072), metavar=("N", "K"))
    parser.add_argument("--types", nargs="+", default=NAMES, choices=[t for t in TYPES if t in NAMES], metavar="TYPE")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no-numpy", action="store_true", help="leave gguf's numpy out, which takes seconds a weight")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(f"{args.size[0]} x {args.size[1]} to bfloat16, {torch.get_num_threads()} threads")
    print("| type | ours ms | diffusers ms | numpy ms | x diffusers | x numpy | share of memcpy |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    rows: list[dict[str, Any]] = []
    for name in args.types:
        row = measure(name, tuple(args.size), args.repeats, not args.no_numpy)
        rows.append(row)
        ms = row["ms"]
        numpy, times = (f"{ms['numpy']:.0f}", f"{row['times_numpy']:.0f}") if "numpy" in ms else ("-", "-")
        print(
            f"| {name} | {ms['ours']:.1f} | {ms['diffusers']:.0f} | {numpy} | {row['times_diffusers']:.1f} | {times} | "
            f"{row['memcpy_share']:.0%} |",
            flush=True,
        )
    means = {key: statistics.geometric_mean([r[key] for r in rows]) for key in ("times_diffusers", "memcpy_share")}
    print(f"geometric means: {means['times_diffusers']:.1f} x diffusers, {means['memcpy_share']:.0%} of memcpy")
    if args.json:
        result = {"size": args.size, "repeats": args.repeats, "versions": versions(), "means": means, "rows": rows}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
