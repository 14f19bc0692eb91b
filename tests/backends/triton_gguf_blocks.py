"""Blocks of the GGUF types that the Triton kernels take: random bytes with scales that a file could hold."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from quantwire.quantizers.kernels.triton_gguf import BLOCKS
from torch import Tensor

# Offsets of the float16 numbers of a block (ggml-common.h).
HALVES = {"Q8_0": (0,), "Q4_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_XS": (0,)}
# Zero of both signs, the smallest subnormal and the largest normal float16, and common ones.
EDGES = np.array([0.0, -0.0, 6e-8, -6e-8, 65504.0, -65504.0, 0.01, -0.01], dtype=np.float16)


def random_blocks(type_name: str, n: int, k: int, seed: int = 0) -> Tensor:
    """(n, bytes a row) uint8. Sub-scales and values are any bits, scales normal with deviation 0.01."""
    generator = np.random.default_rng(seed)
    b = BLOCKS[type_name]
    blocks = generator.integers(0, 256, (n * k // b.size, b.nbytes), dtype=np.uint8)
    for at in HALVES[type_name]:
        scales = (generator.standard_normal(len(blocks)) * 0.01).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    return torch.from_numpy(blocks.reshape(n, -1))


def edge_blocks(type_name: str) -> tuple[Tensor, int]:
    """One row for each byte 0x00, 0xFF, 0x0F, 0xF0, 0xAA with a block for each of EDGES; and its K."""
    b = BLOCKS[type_name]
    blocks = np.empty((5, len(EDGES), b.nbytes), dtype=np.uint8)
    blocks[:] = np.array([0x00, 0xFF, 0x0F, 0xF0, 0xAA], dtype=np.uint8)[:, None, None]
    for at in HALVES[type_name]:
        blocks[..., at : at + 2] = EDGES.view(np.uint8).reshape(-1, 2)
    return torch.from_numpy(blocks.reshape(5, -1)), len(EDGES) * b.size


def reference(qdata: Tensor, type_name: str) -> Tensor:
    """gguf's own float32 values."""
    import gguf

    values: Any = gguf.quants.dequantize(qdata.numpy(), gguf.GGMLQuantizationType[type_name])
    return torch.from_numpy(values)


@cache
def weight(type_name: str, n: int, k: int) -> tuple[Tensor, Tensor]:
    """Random bytes and their values."""
    qdata = random_blocks(type_name, n, k)
    return qdata, reference(qdata, type_name)
