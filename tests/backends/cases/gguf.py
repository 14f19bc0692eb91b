"""Conformance cases of gguf."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from .case import Case, Library

WHY = "diffusers multiplies scales and values in float16"


def packed(name: str) -> Library:
    """gguf-py's reference quantizer."""

    def make(w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        library: Any = pytest.importorskip("gguf")
        kind = library.GGMLQuantizationType[name]
        blocks = library.quants.quantize(w.float().numpy(), kind)
        return {"qdata": torch.from_numpy(blocks)}, torch.from_numpy(library.quants.dequantize(blocks, kind))

    return make


def refused(k: int) -> dict[tuple[int, ...], str]:
    return {(64, k): f"K={k} is not a multiple of block size 32", (1, 256): "", (33, 64): ""}


CASES: list[Case] = [
    Case("gguf-q8-0", 44, packed("Q8_0"), native=0.003, native_why=WHY, refused=refused(33), overflow=True),
    Case("gguf-q4-0", 19.5, packed("Q4_0"), native=0.003, native_why=WHY, refused=refused(48), overflow=True),
]
