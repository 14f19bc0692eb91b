"""A product and the reason for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from ..weight import QuantizedWeight


@dataclass(frozen=True)
class Kernel:
    """How a product is computed.

    Attributes:
        name: a few words, such as `int8 x int8, torch._int_mm` or `dequantize, F.linear`.
        reason: why this one here, one clause.
        run: (x, weight, bias) -> product in the dtype of x; x is (..., K), bias (N,) in any float dtype or None.
    """

    name: str
    reason: str
    run: Callable[[Tensor, QuantizedWeight, Tensor | None], Tensor] = field(compare=False)
