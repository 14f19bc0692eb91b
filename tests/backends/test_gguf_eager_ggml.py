"""Torch operations, ggml's C and gguf's numpy read the same blocks alike, bit by bit, in every type."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from quantwire.quantizers.backends.gguf import eager
from quantwire.quantizers.ggml_types import TYPES
from torch import Tensor

pytest.importorskip("libggml")
gguf: Any = pytest.importorskip("gguf")
ggml: Any = pytest.importorskip("quantwire.quantizers.backends.gguf.ggml")


def in_c(name: str, qdata: Tensor, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return ggml.library().dequantize(TYPES[name], qdata, torch.empty(len(qdata), k, dtype=dtype))


def differing(a: Tensor, b: Tensor) -> int:
    bits = torch.int32 if a.dtype is torch.float32 else torch.int16
    return int(((a.view(bits) != b.view(bits)) & ~(a.isnan() & b.isnan())).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", list(TYPES))
def test_weights_that_ggml_quantized(name: str, dtype: torch.dtype) -> None:
    w = torch.randn(37, 512, generator=torch.Generator().manual_seed(0)) * 0.05
    w[3] = 0
    qdata = ggml.library().quantize(TYPES[name], w)
    got = eager.dequantize(name, qdata, (37, 512), dtype)
    assert differing(got, in_c(name, qdata, 512, dtype)) == 0
    error = (got.float() - w).norm() / w.norm()
    assert error < 0.9, "the worst are ternary, 0.81; other weights would be beyond 1"


@pytest.mark.parametrize("name", list(TYPES))
def test_random_bytes(name: str) -> None:
    t = TYPES[name]
    qdata = torch.randint(0, 256, (2000, t.nbytes), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    got, c = eager.dequantize(name, qdata, (2000, t.block), torch.float32), in_c(name, qdata, t.block)
    with np.errstate(all="ignore"):
        numpy = torch.from_numpy(gguf.quants.dequantize(qdata.numpy(), gguf.GGMLQuantizationType[name]))
    assert differing(got, numpy) == 0
    assert differing(got, c) == 0
