"""Which product is fastest for one weight, by number of tokens? Time against bfloat16 `F.linear` in the same run.

    python benchmarks/products.py [--size 12288 3072] [--tokens 1 4 16 ...] [--repeats 5] [--json FILE]

The crossovers in quantizers/kernels are read off this table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from quantwire.quantizers.kernels import expand, forms, int8
from quantwire.quantizers.report import versions
from torch import Tensor

TOKENS = [1, 4, 16, 32, 64, 256, 1024, 4096]


def products(w: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Every product, on the same weight in the form that it takes."""
    n, k = w.shape
    scale = w.abs().amax(1, keepdim=True).float() / 127
    q8 = (w / scale).round().to(torch.int8)
    row = scale.reshape(-1)
    f8 = (w / (scale * 127 / 448)).to(torch.float8_e4m3fn)
    groups = w.float().view(n, -1, 64)
    group_scale = groups.abs().amax(2) / 7
    codes = ((groups / group_scale.unsqueeze(-1)).round() + 8).clamp(0, 15).to(torch.uint8).view(n, k)
    packed = codes[:, ::2] | codes[:, 1::2] << 4
    table = forms.pairs(torch.arange(-8.0, 8.0), "low first")
    expansions = {
        "int8 rows": forms.integers(q8, scale),
        "float8": forms.float8(f8, scale * 127 / 448),
        "4-bit groups": forms.nibbles(packed, table, group_scale),
    }
    found: dict[str, Callable[[Tensor], Tensor]] = {"bfloat16": lambda x: F.linear(x, w)}
    for name, source in expansions.items():
        found[f"expand {name}"] = lambda x, source=source: expand.linear(x, source, None)
    found["eager int8"] = lambda x: F.linear(x, (q8.float() * scale).to(x.dtype))
    found["_weight_int8pack_mm"] = lambda x: int8.few_tokens(x, q8, row, None)
    found["int8 x int8"] = lambda x: _w8a8(x, q8, row)
    return found


def _w8a8(x: Tensor, q8: Tensor, row: Tensor) -> Tensor:
    x_scale = x.abs().amax(1, keepdim=True).float() / 127
    return int8.scaled_mm(int8.round_rows(x, 1 / x_scale), x_scale, q8, row, None, x.dtype)


def measure(ways: dict[str, Callable[[Tensor], Tensor]], x: Tensor, repeats: int) -> dict[str, float]:
    """Median seconds of each, interleaved, without a first round. Slow at many tokens: left out there."""
    taken = {n: run for n, run in ways.items() if not (n == "_weight_int8pack_mm" and len(x) > 256)}
    times: dict[str, list[float]] = {name: [] for name in taken}
    for round_ in range(repeats + 1):
        for name, run in taken.items():
            start = time.perf_counter()
            run(x)
            if round_:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", type=int, nargs=2, default=[12288, 3072], metavar=("N", "K"))
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(*args.size, generator=generator).to(torch.bfloat16)
    ways = products(w)
    print(f"{args.size[0]} x {args.size[1]}, {torch.get_num_threads()} threads; time / bfloat16")
    print("| tokens | bfloat16 ms | " + " | ".join(n for n in ways if n != "bfloat16") + " |")
    print("|---|---|" + "---|" * (len(ways) - 1))
    rows: dict[int, dict[str, float]] = {}
    with torch.inference_mode():
        for tokens in args.tokens:
            x = torch.randn(tokens, args.size[1], generator=generator).to(torch.bfloat16)
            rows[tokens] = measure(ways, x, args.repeats)
            base = rows[tokens]["bfloat16"]
            cells = [f"{rows[tokens][n] / base:.2f}" if n in rows[tokens] else "-" for n in ways if n != "bfloat16"]
            print(f"| {tokens} | {base * 1e3:.1f} | " + " | ".join(cells) + " |", flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        result = {"size": args.size, "threads": torch.get_num_threads(), "versions": versions(), "seconds": rows}
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
