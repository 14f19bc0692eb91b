"""Conformance cases of layerwise."""

from __future__ import annotations

import torch
from torch import Tensor

from .case import Case, Library


def cast(dtype: torch.dtype) -> Library:
    def make(w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        stored = w.contiguous().to(dtype)
        return {"qdata": stored}, stored.to(torch.float32)

    return make


CASES: list[Case] = [
    Case("layerwise-fp8-e4m3fn", 30.3, cast(torch.float8_e4m3fn), overflow=True),
    Case("layerwise-fp8-e5m2", 24.4, cast(torch.float8_e5m2), overflow=True),
]
