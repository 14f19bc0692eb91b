"""Conformance cases of gguf: ggml's C library and gguf's numpy are the references, each by a path of its own."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from .case import Case, Library

WHY = "diffusers multiplies scales and values in float16"
# Types whose scales reach 1e8: 6-bit and 8-bit factors beside the float16 scale, or a power of two.
FAR = ("Q5_K", "Q6_K", "IQ4_XS", "MXFP4")
# ggml's product of few tokens takes x in 8 bits a block, as llama.cpp does.
FEW = 0.01

# Type -> (dB on normal values less 1, values a block, difference of diffusers' layer where it has one).
TYPES: dict[str, tuple[float, int, float | None]] = {
    "Q8_0": (44, 32, 0.012),
    "Q4_0": (19.5, 32, 0.012),
    "Q4_1": (20.5, 32, 0.012),
    "Q5_0": (26, 32, 0.012),
    "Q5_1": (27, 32, 0.012),
    "Q2_K": (9.5, 256, 0.012),
    "Q3_K": (15.5, 256, 0.012),
    "Q4_K": (21.5, 256, 0.012),
    "Q5_K": (27.5, 256, 0.012),
    "Q6_K": (34, 256, 0.012),
    "IQ1_S": (5, 256, None),
    "IQ1_M": (3.5, 256, None),
    "IQ2_XXS": (8, 256, None),
    "IQ2_XS": (9.5, 256, None),
    "IQ2_S": (10, 256, None),
    "IQ3_XXS": (12.5, 256, None),
    "IQ3_S": (14.5, 256, None),
    "IQ4_NL": (21, 32, 0.012),
    "IQ4_XS": (21, 256, 0.012),
    "TQ1_0": (1, 256, None),
    "TQ2_0": (1, 256, None),
    "MXFP4": (17.5, 32, None),
    "NVFP4": (19, 64, None),
}


@functools.cache
def c_library() -> Any:
    spec = importlib.util.find_spec("libggml")
    if spec is None:
        pytest.skip("libggml-python is not installed")
    (folder,) = spec.submodule_search_locations or []
    path = next(p for p in Path(folder).rglob("*ggml-base.*") if p.suffix in (".so", ".dylib", ".dll"))
    library = ctypes.CDLL(str(path))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    return library


def packed(name: str) -> Library:
    """ggml's quantizer in one call, the same weight for all columns where it needs one, and gguf's numpy back."""

    def make(w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        library: Any = pytest.importorskip("gguf")
        kind = library.GGMLQuantizationType[name]
        block, nbytes = library.GGML_QUANT_SIZES[kind]
        values, (n, k) = w.float().contiguous(), w.shape
        blocks = torch.empty(n, k // block * nbytes, dtype=torch.uint8)
        ones = torch.ones(k)
        matrix = ones.data_ptr() if c_library().ggml_quantize_requires_imatrix(int(kind)) else None
        c_library().ggml_quantize_chunk(int(kind), values.data_ptr(), blocks.data_ptr(), 0, n, k, matrix)
        return {"qdata": blocks}, torch.from_numpy(library.quants.dequantize(blocks.numpy(), kind))

    return make


def refused(block: int) -> dict[tuple[int, ...], str]:
    k = block + block // 2
    return {(64, k): f"K={k} is not a multiple of block size {block}", (1, 256): "", (33, 512): ""}


CASES: list[Case] = [
    Case(
        "gguf-" + name.lower().replace("_", "-"),
        sqnr_db,
        packed(name),
        product=FEW,
        native=native,
        native_why=WHY if native else "",
        refused=refused(block),
        overflow=name not in FAR,
    )
    for name, (sqnr_db, block, native) in TYPES.items()
]
