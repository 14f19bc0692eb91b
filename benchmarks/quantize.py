"""How long does quantizing take against the library's own way? Seconds for one weight, medians, interleaved.

    python benchmarks/quantize.py [--formats URI...] [--size 3072] [--repeats 7] [--json FILE]

`ours` is the quantizer alone, `with checks` is what a node runs for each layer: nan and inf looked for before, the
quantized form compared with the original (SQNR, largest error), finiteness checked after. The library's way is the one
that the conformance suite compares bits with, without its dequantizing.
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
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from quantwire.quantizers.apply import quantize_tensor
from quantwire.quantizers.registry import get_quantizer
from quantwire.quantizers.report import versions
from quantwire.quantizers.spec import QuantSpec
from torch import Tensor, nn

LIMIT = 1.2
Way = Callable[[Tensor], Any]


def bnb_int8(w: Tensor) -> Any:
    import bitsandbytes as bnb

    return bnb.nn.Int8Params(w, requires_grad=False, has_fp16_weights=False).to("cpu")


def bnb_4bit(quant_type: str) -> Way:
    def run(w: Tensor) -> Any:
        import bitsandbytes as bnb

        return bnb.nn.Params4bit(w, requires_grad=False, quant_type=quant_type, compress_statistics=False).to("cpu")

    return run


def quanto(qtype: str) -> Way:
    def run(w: Tensor) -> Any:
        import optimum.quanto as library

        layer = linear(w)
        made = library.QLinear.from_module(layer, weights=library.qtypes[qtype])
        made.freeze()
        return made

    return run


def comfy(layout: str, **options: Any) -> Way:
    def run(w: Tensor) -> Any:
        from comfy_kitchen.tensor import QuantizedTensor

        return QuantizedTensor.from_float(w, layout, **options)

    return run


def sdnq(weights_dtype: str) -> Way:
    def run(w: Tensor) -> Any:
        from quantwire.quantizers.backends.sdnq.library import library  # imports sdnq without compiling

        return library().quantizer.sdnq_quantize_layer_weight(w, layer_class_name="Linear", weights_dtype=weights_dtype)

    return run


def torchao(name: str) -> Way:
    def run(w: Tensor) -> Any:
        from torchao.quantization import Float8Tensor, Int8Tensor, PerRow

        return (Int8Tensor if name == "int8" else Float8Tensor).from_hp(w, granularity=PerRow())

    return run


def gguf(name: str) -> Way:
    def run(w: Tensor) -> Any:
        import gguf as library

        return library.quants.quantize(w.float().numpy(), library.GGMLQuantizationType[name])

    return run


def linear(w: Tensor) -> nn.Linear:
    layer = nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype, device="meta")
    layer.weight = nn.Parameter(w, requires_grad=False)
    return layer


WAYS: dict[str, Way] = {
    "bnb-int8": bnb_int8,
    "bnb-nf4": bnb_4bit("nf4"),
    "bnb-fp4": bnb_4bit("fp4"),
    **{f"quanto-{t.replace('_', '-')}": quanto(t) for t in ("qint8", "qint2", "qfloat8_e4m3fn", "qfloat8_e5m2")},
    "comfy-fp8-e4m3fn": comfy("TensorCoreFP8Layout", dtype=torch.float8_e4m3fn),
    "comfy-fp8-e5m2": comfy("TensorCoreFP8Layout", dtype=torch.float8_e5m2),
    "comfy-nvfp4": comfy("TensorCoreNVFP4Layout"),
    "comfy-mxfp8": comfy("TensorCoreMXFP8Layout"),
    "comfy-int8": comfy("TensorWiseINT8Layout", per_channel=True),
    "comfy-int8-convrot": comfy("TensorWiseINT8Layout", per_channel=True, convrot=True),
    "comfy-w4a4-convrot": comfy("TensorCoreConvRotW4A4Layout"),
    "comfy-w4a8": comfy("AsymW4A8Int8Layout"),
    **{f"sdnq-{t}": sdnq(t) for t in ("int8", "uint8", "int4", "uint4")},
    "torchao-int8wo": torchao("int8"),
    "torchao-float8wo": torchao("float8"),
    "gguf-q8-0": gguf("Q8_0"),
    "gguf-q4-0": gguf("Q4_0"),
}


def measure(uri: str, w: Tensor, repeats: int) -> dict[str, Any]:
    spec = QuantSpec.from_uri(uri)
    quantizer, library = get_quantizer(spec.format_id), WAYS[uri]
    ways: dict[str, Callable[[], Any]] = {
        "library": lambda: library(w),
        "ours": lambda: quantizer.quantize(w, spec),
        "with_checks": lambda: quantize_tensor("w", w, spec),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for round_ in range(repeats + 1):
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                if round_:  # the first round warms up
                    times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "format": uri,
        **{f"{name}_s": value for name, value in medians.items()},
        "ratio": medians["ours"] / medians["library"],
        "ratio_with_checks": medians["with_checks"] / medians["library"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--formats", nargs="+", choices=list(WAYS), default=list(WAYS), metavar="URI")
    parser.add_argument("--size", type=int, default=3072)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    w = torch.randn(args.size, args.size, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    print(f"{args.size} x {args.size} bfloat16, {torch.get_num_threads()} threads, medians of {args.repeats}")
    print("| format | library ms | ours / library | with checks / library |\n|---|---|---|---|")
    rows: list[dict[str, Any]] = []
    for uri in args.formats:
        row = measure(uri, w, args.repeats)
        rows.append(row)
        print(
            f"| {uri} | {row['library_s'] * 1e3:.1f} | {row['ratio']:.2f} | {row['ratio_with_checks']:.2f} |",
            flush=True,
        )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        result = {"size": args.size, "threads": torch.get_num_threads(), "versions": versions(), "rows": rows}
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if all(row["ratio"] <= LIMIT for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
