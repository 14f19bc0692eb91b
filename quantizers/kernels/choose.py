"""Which product a weight-only format uses, by device and number of tokens.

The crossovers are measured: `benchmarks/products.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..weight import QuantizedWeight
from . import expand, int8
from .expand import Expansion
from .kernel import Kernel

EXPAND = "expand in blocks, F.linear"
FEW = "aten _weight_int8pack_mm"


def expanding(form: Callable[[QuantizedWeight], Expansion], why: str = "") -> Kernel:
    """Expand the weight into a reused buffer at every product."""

    def run(x: Tensor, q: QuantizedWeight, bias: Tensor | None) -> Tensor:
        return expand.linear(x, form(q), bias)

    return Kernel(EXPAND, why or "weight only; one pass over the packed weight a product", run)


def int8_rows(
    parts: Callable[[QuantizedWeight], tuple[Tensor, Tensor]],
    form: Callable[[QuantizedWeight], Expansion],
    q_shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
) -> Kernel:
    """int8 weights with one scale a row, activations in float.

    Args:
        parts: the (N, K) int8 values and (N,) or (N, 1) scales of a weight.
        form: the same weight as an `Expansion`.
        q_shape: (N, K).
    """
    refusal = int8.few_tokens_refusal(device, dtype, q_shape[1], tokens)
    if refusal:
        return expanding(form, refusal)

    def run(x: Tensor, q: QuantizedWeight, bias: Tensor | None) -> Tensor:
        qdata, scale = parts(q)
        out = int8.few_tokens(x.reshape(-1, x.shape[-1]), qdata, scale.reshape(-1), bias)
        return out.reshape(*x.shape[:-1], qdata.shape[0])

    return Kernel(FEW, f"up to {int8.FEW_TOKENS} tokens it beats expanding the weight", run)
