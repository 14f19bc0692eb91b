"""Architectures at their published sizes, with the inputs of one call, for benchmarks/activations.py.

Builders make a module under fake tensors, so a model of any size costs no memory; inputs are those that a host gives.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from quantwire.quantizers.measure.activations import RunShape
from torch import nn

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Arch:
    """One architecture.

    Attributes:
        formula: which it belongs to; several sizes of a family share one.
        title: shown.
        role: diffusion model, text encoder or VAE.
        build: makes the module, under fake tensors, with the default dtype of torch.
        inputs: the inputs of one call, for a batch that guidance has doubled already.
        geometry: pixels a token, frames a latent frame, usual tokens of a prompt.
        shapes: to be measured.
        terms: products that the formula may have.
        call: method to call; the module itself by default.
    """

    formula: str
    title: str
    role: str
    build: Callable[[], nn.Module]
    inputs: Callable[[RunShape, torch.dtype, Arch], Inputs]
    geometry: dict[str, Any]
    shapes: tuple[RunShape, ...]
    terms: tuple[str, ...]
    call: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


IMAGES = (
    RunShape(512, 512),
    RunShape(832, 1216),
    RunShape(1024, 1024),
    RunShape(1024, 1024, batch=2),
    RunShape(1536, 1536),
    RunShape(1024, 1024, text_tokens=64),
    RunShape(768, 768, text_tokens=1024),
)
VIDEOS = (
    RunShape(480, 480, 1),
    RunShape(832, 480, 33),
    RunShape(832, 480, 81),
    RunShape(832, 480, 33, batch=2),
    RunShape(1280, 704, 81),
)


def tokens(shape: RunShape, arch: Arch) -> tuple[int, int, int]:
    """(latent frames, rows, columns) of tokens."""
    g = arch.geometry
    frames = (shape.frames - 1) // g.get("temporal", 1) + 1
    return frames, math.ceil(shape.height / g["spatial"]), math.ceil(shape.width / g["spatial"])


def text(shape: RunShape, arch: Arch) -> int:
    return shape.text_tokens or arch.geometry["text_tokens"]


def flux_inputs(shape: RunShape, dtype: torch.dtype, arch: Arch) -> Inputs:
    _, h, w = tokens(shape, arch)
    b, t = shape.batch, text(shape, arch)
    axes = arch.extra.get("axes", 3)
    out: Inputs = {
        "hidden_states": torch.randn(b, h * w, arch.extra["channels"], dtype=dtype),
        "encoder_hidden_states": torch.randn(b, t, arch.extra["context"], dtype=dtype),
        "timestep": torch.ones(b, dtype=dtype),
        "img_ids": torch.zeros(h * w, axes),
        "txt_ids": torch.zeros(t, axes),
    }
    if arch.formula != "chroma":  # whose mask stays away: ComfyUI has none, and diffusers makes a T x T matrix of it
        out["guidance"] = torch.ones(b, dtype=dtype)
    if arch.formula == "flux":
        out["pooled_projections"] = torch.randn(b, 768, dtype=dtype)
    return out


def made(name: str, library: str = "diffusers", **config: Any) -> Callable[[], nn.Module]:
    """A builder for a class of diffusers, or of transformers with a config class of the same stem."""

    def build() -> nn.Module:
        module = importlib.import_module(library)
        cls: Any = getattr(module, name)
        return cls(cls.config_class(**config)) if library == "transformers" else cls(**config)

    return build


def flux(heads: int, double: int, single: int) -> Callable[[], nn.Module]:
    return made(
        "FluxTransformer2DModel",
        num_layers=double,
        num_single_layers=single,
        num_attention_heads=heads,
        guidance_embeds=True,
    )


DIT = (
    "image*width*dtype",
    "image*width",
    "image*mlp*dtype",
    "all*width*dtype",
    "all*width",
    "all*mlp*dtype",
    "text*width*dtype",
    "text*width",
    "text*mlp*dtype",
    "text*context*dtype",
    "image",
    "text",
    "batch*width*dtype",
)
TEXT = (
    "text*width*dtype",
    "text*width",
    "text*mlp*dtype",
    "text*mlp",
    "heads*square*dtype",
    "heads*square",
    "square",
    "text",
)
VAE = (
    "pixels*width*dtype",
    "pixels*dtype",
    "pixels",
    "picture*width*dtype",
    "picture*dtype",
    "window*width*dtype",
    "image*dtype",
    "one",
)
FLUX = {"spatial": 16, "text_tokens": 512, "guided": True}


def t5(width: int, mlp: int, heads: int, layers: int, name: str = "T5EncoderModel") -> Callable[[], nn.Module]:
    vocabulary = 32128 if name == "T5EncoderModel" else 256384
    sizes = {"d_model": width, "d_ff": mlp, "num_heads": heads, "num_layers": layers, "d_kv": 64}
    return made(name, "transformers", vocab_size=vocabulary, feed_forward_proj="gated-gelu", **sizes)


def clip(width: int, layers: int, heads: int, mlp: int = 4) -> Callable[[], nn.Module]:
    return made(
        "CLIPTextModel",
        "transformers",
        hidden_size=width,
        intermediate_size=mlp * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )


def llm(name: str, width: int, mlp: int, layers: int, heads: int, kv: int, **more: Any) -> Callable[[], nn.Module]:
    return made(
        name,
        "transformers",
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        use_cache=False,
        **more,
    )


def text_inputs(shape: RunShape, dtype: torch.dtype, arch: Arch) -> Inputs:
    return {"input_ids": torch.zeros(shape.batch, text(shape, arch), dtype=torch.int64)}


def kl(channels: int, latent: int) -> Callable[[], nn.Module]:
    return made(
        "AutoencoderKL",
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(channels, channels * 2, channels * 4, channels * 4),
        layers_per_block=2,
        latent_channels=latent,
    )


def vae_inputs(shape: RunShape, dtype: torch.dtype, arch: Arch) -> Inputs:
    f, h, w = tokens(shape, arch)
    size = (shape.batch, arch.extra["latent"], *([f] if arch.extra.get("video") else []), h, w)
    return {arch.extra.get("argument", "z"): torch.randn(size, dtype=dtype)}


PROMPTS = tuple(RunShape(text_tokens=n) for n in (77, 256, 512, 1024)) + (RunShape(batch=2, text_tokens=256),)
CLIP_PROMPTS = (RunShape(text_tokens=77), RunShape(batch=2, text_tokens=77), RunShape(batch=4, text_tokens=77))
PICTURES = (
    RunShape(512, 512),
    RunShape(832, 1216),
    RunShape(1024, 1024),
    RunShape(512, 512, batch=2),
    RunShape(1536, 1536),
)
