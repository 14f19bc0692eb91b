"""How large is a GGUF file of a published model, and which one fits a graphics card? By dry runs, without any weights.

    python benchmarks/gguf_sizes.py [--quick] [--out out] [--docs docs/gguf.md]

Each model is made by diffusers or transformers at its published size on torch's meta device. A file with its header and
no data (sparse: it takes no disk) is what `quantwire convert --dry-run` plans from, which gives sizes to the byte.

The second table names for each card the first recipe of that list whose file takes at most three quarters of its
memory. The quarter for activations, LoRAs and the host is an assumption, not a measurement.

Writes OUT/gguf_sizes.json, and the tables between the markers of docs/gguf.md; with `--quick` OUT/gguf_sizes.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from docs_tables import line, write_between
from quantwire.quantizers.files.convert_plan import Request
from quantwire.quantizers.files.converting import describe
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
GIB = 1 << 30
# From the most bits to the fewest. Q3_K_L is left out: of image models it makes larger files than Q4_K_S.
RECIPES = ("BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "IQ4_XS", "Q3_K_M", "Q3_K_S", "Q2_K")
CARDS_GIB = (6, 8, 10, 12, 16, 24)
SHARE = 0.75


def flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(guidance_embeds=True)


def sd35_large() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    sizes = {"num_layers": 38, "num_attention_heads": 38, "pos_embed_max_size": 192, "qk_norm": "rms_norm"}
    return SD3Transformer2DModel(sample_size=128, caption_projection_dim=2432, out_channels=16, **sizes)


def wan_14b() -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel()


def qwen_image() -> nn.Module:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel()


def t5_xxl() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=24, feed_forward_proj="gated-gelu", vocab_size=32128
    )
    return T5EncoderModel(config)


MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "FLUX.1 dev": flux,
    "SD 3.5 Large": sd35_large,
    "Wan 2.1 14B": wan_14b,
    "Qwen-Image": qwen_image,
    "T5-XXL encoder": t5_xxl,
}


def write_header(path: Path, make: Callable[[], nn.Module]) -> int:
    """Write a safetensors file of bfloat16 tensors without their data; returns the number of weights."""
    with torch.device("meta"):
        tensors = make().state_dict()
    tensors.pop("encoder.embed_tokens.weight", None)  # T5's table under its second name, which files leave out
    at, header = 0, dict[str, Any]()
    for name, t in tensors.items():
        header[name] = {"dtype": "BF16", "shape": list(t.shape), "data_offsets": [at, at + 2 * t.numel()]}
        at += 2 * t.numel()
    raw = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + at)
    return at // 2


def sizes(recipes: tuple[str, ...], models: Mapping[str, Callable[[], nn.Module]]) -> dict[str, dict[str, Any]]:
    """Model -> weights, and bytes by recipe."""
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for model, make in models.items():
            source = Path(folder) / "model.safetensors"
            weights = write_header(source, make)
            plans = {r: describe(Request(source, Path(folder) / "x.gguf", r)).to_dict() for r in recipes}
            found[model] = {
                "weights": weights,
                "architecture": plans[recipes[0]]["architecture"],
                "nbytes": {r: p["nbytes"] for r, p in plans.items()},
            }
    return found


def tables(command: str, recipes: tuple[str, ...], found: Mapping[str, dict[str, Any]]) -> str:
    heads = [f"{model} ({d['weights'] / 1e9:.1f} B)" for model, d in found.items()]
    lines = [f"Made by `{command}`; GiB, from dry runs at the published sizes, without an importance matrix.", ""]
    lines += [line(["type", *heads]), line(["---"] * (1 + len(heads)))]
    for recipe in recipes:
        lines.append(line([recipe, *(f"{d['nbytes'][recipe] / GIB:.2f}" for d in found.values())]))
    lines += ["", "The first of them whose file takes at most three quarters of a card's memory:", ""]
    lines += [line(["card", *found]), line(["---"] * (1 + len(found)))]
    lines += [line([f"{card} GiB", *(best(d["nbytes"], card) for d in found.values())]) for card in CARDS_GIB]
    return "\n".join(lines)


def best(nbytes: Mapping[str, int], card_gib: int) -> str:
    return next((recipe for recipe, size in nbytes.items() if size <= SHARE * card_gib * GIB), "none")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="one model and three types: does it run?")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--docs", type=Path, help="the page whose tables are replaced (default: docs/gguf.md)")
    args = parser.parse_args()
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree", "diffusers"):  # reports of what they do without
        logging.getLogger(name).setLevel(logging.ERROR)
    recipes = RECIPES[:3] if args.quick else RECIPES
    models = {"FLUX.1 dev": flux} if args.quick else MODELS
    docs: Path | None = args.docs or (None if args.quick else ROOT / "docs" / "gguf.md")
    args.out.mkdir(parents=True, exist_ok=True)
    found = sizes(recipes, models)
    (args.out / "gguf_sizes.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    body = tables(" ".join(["python", "benchmarks/gguf_sizes.py", *sys.argv[1:]]), recipes, found)
    if docs is None:
        (args.out / "gguf_sizes.md").write_text(body + "\n", encoding="utf-8")
    else:
        write_between(docs, "gguf_sizes", body)
    print(body)
    return 0


if __name__ == "__main__":
    sys.exit(main())
