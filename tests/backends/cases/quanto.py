"""Conformance cases of quanto."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .case import ROUNDING, Case, Library

ANY = {(64, 33): "", (1, 256): "", (1, 33): ""}
GROUPED = {
    (64, 161): "K=161 is not a multiple of 32, the smallest group",
    (1, 64): "N=1 with K=64 is a single group, for which quanto stores one scale a value",
    (64, 33): "",
    (1, 256): "",
}
REPACKED = "in bfloat16 with groups of 128, quanto repacks for PyTorch's int4 kernel, which rounds differently"


def frozen(qtype: str) -> Library:
    """8 bits: `QLinear.from_module` and `freeze`."""

    def make(w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        layer = unfrozen(w, qtype)
        layer.freeze()
        weight = layer.weight
        # A single row has a scale without dimensions there.
        return {"qdata": weight._data, "scale": weight._scale.reshape(-1, 1)}, weight.dequantize().float()

    return make


def packed(qtype: str, group_size: int | None = None) -> Library:
    """4 and 2 bits: what `freeze` does, before it repacks some weights for PyTorch's int4 kernel and rounds them."""

    def make(w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        library: Any = pytest.importorskip("optimum.quanto")
        layer = unfrozen(w, qtype)
        kind, group = layer.weight_qtype, group_size or layer.weight_group_size
        scale, shift = layer.optimizer(w, qtype=kind, axis=0, group_size=group)
        made = library.quantize_weight(w, kind, 0, scale, shift, group_size=group, optimized=False)
        # Its own dequantize compiles C++ for a minute, so the values are formed from its parts here.
        data, levels = made._data._data.int(), 2**kind.bits
        codes = torch.cat([data // levels**i % levels for i in range(8 // kind.bits)])[: scale.shape[0]]
        restored = (made._scale * codes - made._shift).reshape(w.shape).float()
        return {"qdata": made._data._data, "scale": made._scale, "shift": made._shift}, restored

    return make


def unfrozen(w: Tensor, qtype: str) -> Any:
    library: Any = pytest.importorskip("optimum.quanto")
    linear = nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype)
    linear.load_state_dict({"weight": w})
    return library.QLinear.from_module(linear, weights=library.qtypes[qtype])


def by(group: int) -> dict[tuple[int, ...], str]:
    """What is refused with a group size that the user chose."""
    return {(64, group + 8): f"K={group + 8} is not a multiple of group-size {group}", (33, 2 * group): ""}


# Everywhere else quanto compiles C++ for a minute at the first forward pass of a 4- or 2-bit layer.
NO_COMPILER: dict[str, Any] = {"native_dtypes": (torch.bfloat16,), "native_why": REPACKED}
COMPILES: dict[str, Any] = {"native": 0.01, "native_dtypes": ()}

# The library computes scale * code - shift in bfloat16, our product in float32.
SHIFTED = 0.008

CASES: list[Case] = [
    Case("quanto-qint8", 41, frozen("qint8"), native=ROUNDING, refused=ANY),
    Case("quanto-qfloat8-e4m3fn", 30, frozen("qfloat8_e4m3fn"), native=ROUNDING, refused=ANY),
    Case("quanto-qfloat8-e5m2", 24.5, frozen("qfloat8_e5m2"), native=ROUNDING, refused=ANY),
    Case("quanto-qint4", 18.5, packed("qint4"), native=0.01, product=SHIFTED, refused=GROUPED, **NO_COMPILER),
    Case("quanto-qint4;group-size=32", 20.5, packed("qint4", 32), product=SHIFTED, refused=by(32), **COMPILES),
    Case(
        "quanto-qint4;group-size=96",
        19,
        packed("qint4", 96),
        product=SHIFTED,
        refused=by(96),
        shape=(64, 192),
        **COMPILES,
    ),
    Case("quanto-qint2", 5, packed("qint2"), refused=GROUPED, **COMPILES),
    Case("quanto-qint2;group-size=32", 7, packed("qint2", 32), refused=by(32), **COMPILES),
    Case("quanto-qint2;group-size=64", 5.8, packed("qint2", 64), refused=by(64), **COMPILES),
]
