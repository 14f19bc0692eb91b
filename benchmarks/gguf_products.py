"""Up to how many tokens does ggml's own product win? Time against bfloat16 `F.linear` in the same run, by type.

    python benchmarks/gguf_products.py [--size N K] [--tokens 1 2 4 ...] [--types Q8_0 ...] [--repeats 5] [--json FILE]

The crossovers in quantizers/backends/gguf/choose.py are read off this table.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from quantwire.quantizers.backends.gguf.ggml import library
from quantwire.quantizers.backends.gguf.products import Products
from quantwire.quantizers.ggml_types import TYPES, format_id
from quantwire.quantizers.kernels.expand import linear
from quantwire.quantizers.registry import get_quantizer
from quantwire.quantizers.report import versions
from quantwire.quantizers.spec import QuantSpec
from timing import interleaved

TOKENS = [1, 2, 4, 8, 12, 16, 24, 32]


def measure(name: str, w: torch.Tensor, tokens: int, products: Products, repeats: int) -> dict[str, Any]:
    (n, k), quantizer = w.shape, get_quantizer(format_id(name))
    # Quantizing 37.7 M values to an IQ type takes a minute; a few rows again and again are as good here.
    few = quantizer.quantize(w[:256], QuantSpec(format_id(name)))
    qdata = few.tensors["qdata"].repeat(n // 256, 1)
    form = quantizer.form(few.with_tensors({"qdata": qdata}, (n, k)))
    x = torch.randn(tokens, k, dtype=torch.bfloat16)
    seconds = interleaved(
        {
            "bf16": lambda: F.linear(x, w),
            "ggml": lambda: products.multiply(TYPES[name], x, qdata).to(x.dtype),
            "expand": lambda: linear(x, form, None),
        },
        repeats,
    )
    ratios = {way: seconds[way] / seconds["bf16"] for way in ("ggml", "expand")}
    return {"tokens": tokens, "bf16_ms": 1e3 * seconds["bf16"], **ratios}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", type=int, nargs=2, default=(12288, 3072), metavar=("N", "K"))
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--types", nargs="+", default=list(TYPES), choices=list(TYPES), metavar="TYPE")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    n, k = args.size
    torch.manual_seed(0)
    w = torch.randn(n, k, dtype=torch.bfloat16)
    products = Products(library())
    print(
        f"{n} x {k}, {torch.get_num_threads()} threads; each cell: ggml's product, expanding the weight, over bfloat16"
    )
    print("| type | " + " | ".join(map(str, args.tokens)) + " | ggml wins up to |")
    print("| --- |" + " --- |" * (len(args.tokens) + 1))
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for name in args.types:
            cells = [measure(name, w, tokens, products, args.repeats) for tokens in args.tokens]
            lost = next((i for i, c in enumerate(cells) if c["ggml"] >= c["expand"]), len(cells))
            wins = cells[lost - 1]["tokens"] if lost else 0
            rows.append({"type": name, "wins_up_to": wins, "cells": cells})
            text = " | ".join(f"{c['ggml']:.1f}, {c['expand']:.1f}" for c in cells)
            print(f"| {name} | {text} | {wins} |", flush=True)
    if args.json:
        result = {"size": args.size, "repeats": args.repeats, "versions": versions(), "rows": rows}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
