"""Which text encoders and VAEs are diffusion models usually run with, and how large are they?

    python benchmarks/assumed.py

Writes `quantizers/measure/assumed.json`: names and shapes of published models, made by transformers' and diffusers' own
classes on the meta device from the values of their configurations, which stand below with the repository that publishes
them. Prints the number of parameters of each.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

OUT = Path(__file__).resolve().parents[1] / "quantizers" / "measure" / "assumed.json"
TEXT, VAE = "text encoder", "VAE"


def t5(**config: Any) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **config))


def umt5(**config: Any) -> nn.Module:
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(UMT5Config(feed_forward_proj="gated-gelu", **config))


def clip(projection: bool, **config: Any) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(CLIPTextConfig(**config))


def llm(kind: str, **config: Any) -> nn.Module:
    import transformers

    return getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**config))


def qwen_vl(**config: Any) -> nn.Module:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config))


def vae(kind: str, **config: Any) -> nn.Module:
    import diffusers

    return getattr(diffusers, kind)(**config)


KL = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
T5_XXL = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_layers": 24, "num_heads": 64, "vocab_size": 32128}
LLAMA = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
GEMMA = {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8}
QWEN3 = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32}
QWEN_LM = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
QWEN_EYE = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}

# Name -> (role, family, title with the repository, maker).
PARTS: dict[str, tuple[str, str, str, Callable[[], nn.Module]]] = {
    "clip_l": (TEXT, "clip", "CLIP-L (openai/clip-vit-large-patch14)", lambda: clip(False, **_clip_l())),
    "clip_g": (TEXT, "clip", "CLIP-G (laion/CLIP-ViT-bigG-14)", lambda: clip(True, projection_dim=1280, **CLIP_G)),
    "clip_h": (TEXT, "clip", "OpenCLIP-H (stabilityai/stable-diffusion-2-1)", lambda: clip(False, **CLIP_H)),
    "t5xxl": (TEXT, "t5", "T5-XXL encoder (google/t5-v1_1-xxl)", lambda: t5(**T5_XXL)),
    "pile_t5xl": (
        *(TEXT, "t5", "Pile-T5-XL encoder (EleutherAI/pile-t5-xl)"),
        lambda: t5(d_model=2048, d_ff=5120, d_kv=64, num_layers=24, num_heads=32, vocab_size=32128),
    ),
    "umt5xxl": (TEXT, "t5", "umT5-XXL encoder (google/umt5-xxl)", lambda: umt5(**{**T5_XXL, "vocab_size": 256384})),
    "qwen2.5vl": (
        *(TEXT, "qwen-vl", "Qwen2.5-VL-7B (Qwen/Qwen2.5-VL-7B-Instruct)"),
        lambda: qwen_vl(
            text_config={**QWEN_LM, "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
            vision_config=QWEN_EYE,
        ),
    ),
    "llama3-8b": (
        *(TEXT, "llm", "Llama-3-8B (meta-llama/Meta-Llama-3-8B)"),
        lambda: llm("Llama", **LLAMA, num_key_value_heads=8, vocab_size=128256),
    ),
    "gemma2-2b": (
        *(TEXT, "llm", "Gemma-2-2B (google/gemma-2-2b)"),
        lambda: llm("Gemma2", **GEMMA, num_key_value_heads=4, head_dim=256, vocab_size=256000),
    ),
    "qwen3-4b": (
        *(TEXT, "llm", "Qwen3-4B (Qwen/Qwen3-4B)"),
        lambda: llm("Qwen3", **QWEN3, num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=True),
    ),
    "vae_kl4": (
        *(VAE, "image", "AutoencoderKL of 4 channels (stabilityai/sd-vae-ft-mse)"),
        lambda: vae("AutoencoderKL", **KL, latent_channels=4),
    ),
    "vae_kl16": (
        *(VAE, "image", "AutoencoderKL of 16 channels (black-forest-labs/FLUX.1-dev)"),
        lambda: vae("AutoencoderKL", **KL, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False),
    ),
    "vae_wan": (VAE, "video", "Wan 2.1 VAE (Wan-AI/Wan2.1-T2V-14B)", lambda: vae("AutoencoderKLWan")),
    "vae_hyvid": (
        *(VAE, "video", "HunyuanVideo VAE (hunyuanvideo-community/HunyuanVideo)"),
        lambda: vae("AutoencoderKLHunyuanVideo"),
    ),
}
# Family -> what takes the text in (name of the weight), its width there, and what gives it.
FAMILIES: dict[str, list[tuple[str, int, list[str]]]] = {
    "flux": [(r"(^|\.)(txt_in|context_embedder)\.weight$", 4096, ["clip_l", "t5xxl", "vae_kl16"])],
    "sd3": [(r"(^|\.)context_embedder\.weight$", 4096, ["clip_l", "clip_g", "t5xxl", "vae_kl16"])],
    "sdxl": [
        (r"attn2\.to_k\.weight$", 2048, ["clip_l", "clip_g", "vae_kl4"]),
        (r"attn2\.to_k\.weight$", 1280, ["clip_g", "vae_kl4"]),
    ],
    "sd1.5": [
        (r"attn2\.to_k\.weight$", 768, ["clip_l", "vae_kl4"]),
        (r"attn2\.to_k\.weight$", 1024, ["clip_h", "vae_kl4"]),
    ],
    "wan": [(r"(text_embedding\.0|text_embedder\.linear_1)\.weight$", 4096, ["umt5xxl", "vae_wan"])],
    "qwen-image": [(r"(^|\.)txt_in\.weight$", 3584, ["qwen2.5vl", "vae_wan"])],
    "lumina2": [(r"(cap_embedder\.1|caption_embedder\.1)\.weight$", 2304, ["gemma2-2b", "vae_kl16"])],
    "z-image": [(r"cap_embedder\.1\.weight$", 2560, ["qwen3-4b", "vae_kl16"])],
    "hyvid": [
        (r"(txt_in\.input_embedder|context_embedder\.proj_in)\.weight$", 4096, ["clip_l", "llama3-8b", "vae_hyvid"])
    ],
    "aura": [(r"(cond_seq_linear|context_embedder)\.weight$", 2048, ["pile_t5xl", "vae_kl4"])],
    "hidream": [
        (r"caption_projection\.0\.linear\.weight$", 4096, ["clip_l", "clip_g", "t5xxl", "llama3-8b", "vae_kl16"])
    ],
    "pixart": [(r"(y_proj\.fc1|caption_projection\.linear_1)\.weight$", 4096, ["t5xxl", "vae_kl4"])],
    "ltxv": [(r"caption_projection\.linear_1\.weight$", 4096, ["t5xxl"])],
}


def _clip_l() -> dict[str, int]:
    return {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}


def record(module: nn.Module) -> tuple[dict[str, Any], int]:
    """Name, with `{n}` for n equal layers, -> (linear, shape); and the parameters."""
    linear = {f"{name}.weight" for name, m in module.named_modules() if isinstance(m, nn.Linear)}
    found: dict[str, list[Any]] = {}
    count = 0
    for name, p in module.named_parameters():  # tied ones once
        count += p.numel()
        written = re.sub(r"\.\d+\.", ".{}.", name, count=1)
        shape = list(p.shape)
        rows = found.setdefault(f"{written}|{shape}", [])
        rows.append((name, name in linear, shape))
    out: dict[str, Any] = {}
    for key, rows in found.items():
        written = key.rpartition("|")[0]
        numbers = [int(m[1]) for name, *_ in rows if (m := re.search(r"\.(\d+)\.", name))]
        if numbers == list(range(len(rows))) and len(rows) > 1:
            out[written.replace("{}", f"{{{len(rows)}}}", 1)] = rows[0][1:]
        else:
            out |= {name: (is_linear, shape) for name, is_linear, shape in rows}
    assert sum(math.prod(s) * _times(n) for n, (_, s) in out.items()) == count
    return out, count


def _times(written: str) -> int:
    match = re.search(r"\{(\d+)\}", written)
    return int(match[1]) if match else 1


def main() -> int:
    parts: dict[str, Any] = {}
    for name, (role, family, title, make) in PARTS.items():
        with torch.device("meta"):
            tensors, count = record(make())
        print(f"{name:10} {count / 1e6:9.1f} M  {title}")
        parts[name] = {"role": role, "family": family, "title": title, "dtype": "bfloat16", "tensors": tensors}
    families = {
        name: [{"takes": takes, "width": width, "parts": list(names)} for takes, width, names in rows]
        for name, rows in FAMILIES.items()
    }
    lines = json.dumps({"families": families, "parts": parts}, indent=1)
    # One tensor a line.
    lines = re.sub(
        r"\[\s+(true|false),\s+\[([\d,\s]*)\]\s+\]", lambda m: f"[{m[1]}, [{' '.join(m[2].split())}]]", lines
    )
    OUT.write_text(lines + "\n", encoding="utf-8")
    print(f"{OUT}: {OUT.stat().st_size / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
