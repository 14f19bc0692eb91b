"""GGUF files as the converters in circulation write them, made with the gguf package and ggml's quantizer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import torch

# Beside Q8_0 and Q4_0, of which our own writer makes the files.
OTHER_TYPES = ("Q5_0", "Q4_K", "Q6_K", "IQ4_XS", "Q2_K", "MXFP4")
REARRANGED = 512  # numel from which ComfyUI-GGUF's converter stores tensors as rows of 256
Types = Callable[[str, torch.Tensor], str]


def in_blocks(kind: str) -> Types:
    """Block type for the matrices of blocks, BF16 for other matrices, F32 for the rest."""

    def choose(name: str, t: torch.Tensor) -> str:
        if t.ndim != 2:
            return "F32"
        return kind if "blocks." in name and t.shape[1] % gguf_block(kind) == 0 else "BF16"

    return choose


def gguf_block(kind: str) -> int:
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]


def write_file(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    types: Types,
    arch: str | None,
    *,
    prefix: str = "",
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    keys: Mapping[str, str] | None = None,
    orig_shapes: bool = True,
) -> None:
    """Write a file.

    Args:
        types: name, tensor as it is stored -> ggml type.
        arch: None leaves `general.architecture` out.
        shapes: name -> shape in which it is stored.
        orig_shapes: tell the shapes of those in `comfy.gguf.orig_shape.*`.
    """
    writer = gguf.GGUFWriter(str(path), arch or "")
    if arch is None:
        for shard in writer.kv_data:
            shard.pop("general.architecture", None)
    for key, value in (keys or {}).items():
        writer.add_string(key, value)
    for name, t in tensors.items():
        stored = t.reshape((shapes or {}).get(name, tuple(t.shape)))
        if orig_shapes and stored.shape != t.shape:
            writer.add_array(f"comfy.gguf.orig_shape.{prefix}{name}", list(t.shape))
        kind = gguf.GGMLQuantizationType[types(name, stored)]
        writer.add_tensor(prefix + name, _bytes(stored, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _bytes(t: torch.Tensor, kind: gguf.GGMLQuantizationType) -> Any:
    from quantwire.quantizers.backends.gguf.ggml import library
    from quantwire.quantizers.ggml_types import TYPES

    values = t.float().contiguous()
    if kind.name not in TYPES:
        return gguf.quants.quantize(values.numpy(), kind)
    rows = library().quantize(TYPES[kind.name], values.reshape(-1, t.shape[-1]))
    return rows.reshape(*t.shape[:-1], -1).numpy()


def rearranged(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """What ComfyUI-GGUF's converter stores in other shapes for SD 1 and SDXL: all that is no rows of 256."""
    return {
        n: (t.numel() // 256, 256)
        for n, t in tensors.items()
        if t.ndim > 1 and t.shape[-1] % 256 and t.numel() % 256 == 0 and math.prod(t.shape) >= REARRANGED
    }


def write_sparse(path: Path, shapes: Mapping[str, Sequence[int]], kinds: Sequence[str], arch: str) -> int:
    """A file of zeros that takes no room on the disk, the matrices of whole blocks in these types by turns.

    Returns:
        how many bytes it has.
    """
    writer = gguf.GGUFWriter(str(path), arch)
    turns, total = itertools.cycle(kinds), 0
    for name, shape in shapes.items():
        numel = math.prod(shape)
        kind = next(turns) if len(shape) == 2 else kinds[0]
        size, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        used = kind if len(shape) == 2 and shape[1] % size == 0 else "F32"
        length = numel // size * nbytes if used == kind else 4 * numel
        writer.add_tensor_info(name, shape, None, length, raw_dtype=gguf.GGMLQuantizationType[used])
        total += length + -length % 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size + total + 32)
    return path.stat().st_size
