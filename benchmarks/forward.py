"""What does a quantized forward pass cost? Seconds against bfloat16, and against each library's own layers.

    python benchmarks/forward.py [--formats ID...] [--tokens 1024] [--repeats 5] [--no-peers] [--json FILE]

The model is diffusers' FLUX transformer with 324 M parameters, random weights with outlier channels; every linear layer
is quantized. Each repeat runs bfloat16, ours and the library's own layers one after the other, so that a busy machine
slows all three. The ratio is of medians.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from quantwire.hosts.modules import with_layers
from quantwire.hosts.standalone.host import StandaloneHost
from quantwire.quantizers.apply import OnFailure, quantize_linears
from quantwire.quantizers.compat.modes import Carrier
from quantwire.quantizers.errors import QuantwireError
from quantwire.quantizers.registry import available_formats, get_quantizer
from quantwire.quantizers.report import versions
from quantwire.quantizers.spec import QuantSpec
from torch import Tensor, nn

TEXT_TOKENS = 256


def make_model() -> nn.Module:
    """324 M parameters: 2 double and 4 single blocks, hidden size 1536."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    with torch.device("meta"):
        model: Any = FluxTransformer2DModel(
            num_layers=2,
            num_single_layers=4,
            attention_head_dim=128,
            num_attention_heads=12,
            joint_attention_dim=4096,
            pooled_projection_dim=768,
            guidance_embeds=True,
        )
    model = model.to(torch.bfloat16).to_empty(device="cpu").eval()
    for name, p in model.named_parameters():
        p.requires_grad_(False)
        if p.ndim < 2:
            p.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        p.normal_(0, p.shape[1] ** -0.5)
        p[:, torch.randperm(p.shape[1])[: p.shape[1] // 256]] *= 4  # outlier channels, as trained models have them
    return model


def make_inputs(model: Any, tokens: int) -> dict[str, Tensor]:
    image, g = tokens - TEXT_TOKENS, torch.Generator().manual_seed(1)
    dtype = torch.bfloat16
    return {
        "hidden_states": torch.randn(1, image, 64, generator=g).to(dtype),
        "encoder_hidden_states": torch.randn(1, TEXT_TOKENS, 4096, generator=g).to(dtype),
        "pooled_projections": torch.randn(1, 768, generator=g).to(dtype),
        "timestep": torch.tensor([0.5], dtype=dtype),
        "guidance": torch.tensor([3.5], dtype=dtype),
        "img_ids": torch.zeros(image, 3),
        "txt_ids": torch.zeros(TEXT_TOKENS, 3),
    }


def quantized(model: nn.Module, spec: QuantSpec, carrier: Carrier) -> tuple[nn.Module, float]:
    """The model with every linear layer quantized, and the seconds it took."""
    start = time.perf_counter()
    # Formats whose groups are longer than the 64 input channels leave that one embedder at full precision.
    # The host's layers, because gguf itself has none: diffusers has.
    maker = StandaloneHost().make_layer
    layers, _ = quantize_linears(model, spec, carrier=carrier, on_failure=OnFailure.FULL_PRECISION, make_layer=maker)
    return with_layers(model, layers), time.perf_counter() - start


def interleaved(runs: dict[str, Callable[[], Tensor]], repeats: int) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Median seconds and the last output of each; the first round warms up and is not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    outputs: dict[str, Tensor] = {}
    for round_ in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            outputs[name] = run()
            if round_:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}, outputs


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def measure(model: nn.Module, inputs: dict[str, Tensor], uri: str, repeats: int, peers: bool) -> dict[str, Any]:
    spec = QuantSpec.from_uri(f"{uri};include=*")
    ours, seconds = quantized(model, spec, Carrier.QUANTWIRE)
    modules = {"bf16": model, "ours": ours}
    why = ""
    if peers:
        try:
            modules["library"], _ = quantized(model, spec, Carrier.LIBRARY)
        except QuantwireError as err:
            why = str(err).splitlines()[0]
    runs = {name: (lambda m=m: m(**inputs, return_dict=False)[0]) for name, m in modules.items()}
    medians, outputs = interleaved(runs, repeats)
    layer = next(m for n, m in ours.named_modules() if n.endswith("proj_mlp"))
    tokens = inputs["hidden_states"].shape[1] + TEXT_TOKENS
    kernel = get_quantizer(spec.format_id).kernel(layer.quantized_weight, torch.device("cpu"), torch.bfloat16, tokens)
    row: dict[str, Any] = {
        "format": uri,
        "quantize_s": seconds,
        "bf16_s": medians["bf16"],
        "ours_s": medians["ours"],
        "ours_ratio": medians["ours"] / medians["bf16"],
        "relative_error": relative(outputs["ours"], outputs["bf16"]),
        "kernel": kernel.name,
    }
    if "library" in medians:
        row["library_s"] = medians["library"]
        row["library_ratio"] = medians["library"] / medians["bf16"]
        row["relative_to_library"] = relative(outputs["ours"], outputs["library"])
    elif peers:
        row["no_library"] = why
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--formats", nargs="+", help="format ids or URIs; default: all that run here")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-peers", action="store_true", help="leave the libraries' own layers out")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("quantwire").setLevel(logging.ERROR)
    model = make_model()
    count = sum(p.numel() for p in model.parameters())
    print(f"{count / 1e6:.0f} M parameters, {args.tokens} tokens, {torch.get_num_threads()} threads")
    print(
        "| format | ours / bf16 | library / bf16 | relative error | quantize s | product |\n|---|---|---|---|---|---|"
    )
    rows: list[dict[str, Any]] = []
    inputs = make_inputs(model, args.tokens)
    with torch.inference_mode():
        for uri in args.formats or available_formats():
            row = measure(model, inputs, uri, args.repeats, not args.no_peers)
            rows.append(row)
            library = f"{row['library_ratio']:.2f}" if "library_ratio" in row else "-"
            print(
                f"| {uri} | {row['ours_ratio']:.2f} | {library} | {row['relative_error']:.4f} | "
                f"{row['quantize_s']:.1f} | {row['kernel']} |",
                flush=True,
            )
    result = {
        "parameters": count,
        "tokens": args.tokens,
        "repeats": args.repeats,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "versions": versions(),
        "rows": rows,
    }
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
