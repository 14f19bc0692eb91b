"""Text encoder files as llama.cpp's converter makes them, for tests: its names, gguf's own writer and quantizers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from quantwire.quantizers.files.layouts.llama_cpp import Heads, hyperparameters, transformers_to_llama_cpp
from quantwire.quantizers.files.layouts.target import assemble
from quantwire.quantizers.weight import TensorMeta
from torch import Tensor


def metas_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorMeta]:
    return {n: TensorMeta(n, tuple(t.shape), t.dtype) for n, t in tensors.items()}


def write_text_encoder(
    path: Path,
    architecture: str,
    tensors: Mapping[str, Tensor],
    kind: str = "Q8_0",
    heads: Heads | None = None,
    keys: Mapping[str, Any] | None = None,
) -> None:
    """Write transformers' tensors: matrices in blocks, vectors in float32.

    Args:
        keys: more metadata; a list becomes an array.
    """
    metas = metas_of(tensors)
    targets = transformers_to_llama_cpp(architecture, metas, heads)
    named = {t.name: assemble(t, tensors.__getitem__) for t in targets}
    write_gguf(path, architecture, named, kind, {**hyperparameters(architecture, metas, heads), **(keys or {})})


def write_gguf(
    path: Path, architecture: str, tensors: Mapping[str, Any], kind: str = "Q8_0", keys: Mapping[str, Any] | None = None
) -> None:
    """Write tensors under the names that they have."""
    writer = gguf.GGUFWriter(path, architecture)
    adders = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, list: writer.add_array}
    for key, value in (keys or {}).items():
        adders[type(value)](key, value)
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]
    for name, tensor in tensors.items():
        values = tensor.detach().float().contiguous().numpy()
        if tensor.ndim == 2 and tensor.shape[1] % block == 0 and "rel_b" not in name:
            packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType[kind])
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_tensors(model: torch.nn.Module, seed: int = 3) -> dict[str, Tensor]:
    """Tensors for a model (which may be on the meta device): norms about one, weights that keep the scale."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, t in model.named_parameters():
        spread = 0.1 if t.ndim < 2 else t.shape[1] ** -0.5
        around = float(t.ndim < 2 and not name.endswith("bias"))
        tensors[name] = torch.randn(t.shape, generator=generator).mul_(spread).add_(around)
    return tensors
