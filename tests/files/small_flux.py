"""A small FLUX in ComfyUI's layout, with odd shapes where they matter."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

QKV = "double_blocks.0.img_attn.qkv.weight"
MLP = "double_blocks.0.img_mlp.0.weight"


def whole_numbers(*shape: int, step: int) -> Tensor:
    """Values that every machine forms alike: multiples of 1/32 from -50/32 to 50/32."""
    return ((torch.arange(torch.Size(shape).numel()) * step) % 101 - 50).reshape(shape) / 32


def flux(blocks: int = 2, width: int = 256, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {"img_in.weight": (width, 64), "img_in.bias": (width,)}
    shapes |= {"txt_in.weight": (width, 128), "final_layer.linear.weight": (64, width)}
    for i in range(blocks):
        b = f"double_blocks.{i}"
        shapes |= {f"{b}.img_attn.qkv.weight": (3 * width, width), f"{b}.img_attn.qkv.bias": (3 * width,)}
        shapes |= {f"{b}.img_attn.norm.query_norm.scale": (128,), f"{b}.img_mlp.0.weight": (2 * width, width)}
        shapes |= {f"{b}.img_mlp.2.weight": (width, 2 * width)}
        shapes |= {f"single_blocks.{i}.linear1.weight": (3 * width, width)}
    return {n: whole_numbers(*s, step=7 + 2 * i).to(dtype) for i, (n, s) in enumerate(shapes.items())}


def odd() -> dict[str, Tensor]:
    """With tensors, kept and quantized, whose sizes would misalign those that follow."""
    tensors = flux() | {QKV: whole_numbers(771, 271, step=7).bfloat16()}
    tensors |= {"txt_in.weight": whole_numbers(331, 131, step=9)}
    return tensors | {"img_in.weight": whole_numbers(333, 133, step=11).bfloat16()}


def save(path: Path, tensors: dict[str, Tensor], **metadata: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, path, metadata or None)
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def names_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())
