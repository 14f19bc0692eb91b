"""quanto's own 4-bit layer on our values: which packing it gets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases.subject import values
from quantwire.quantizers.registry import get_quantizer
from quantwire.quantizers.spec import QuantSpec

pytest.importorskip("optimum.quanto")


@pytest.mark.parametrize(
    ("rows", "packing"),
    [(33, "WeightQBitsTensor"), (32, "TinyGemmWeightQBitsTensor")],
    ids=["rows-that-the-int4-kernel-cannot-take", "rows-that-it-takes"],
)
def test_packing_of_native_qint4(rows: int, packing: str) -> None:
    quantizer = get_quantizer("quanto-qint4")
    q = quantizer.quantize(values(rows, 256, dtype=torch.bfloat16), QuantSpec("quanto-qint4"))
    layer: Any = quantizer.to_native(q, None)
    assert type(layer.weight).__name__ == packing
