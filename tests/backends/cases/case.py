"""The shape of a conformance case."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

# The library's own result on a weight: its tensors under our names, and the weight that it dequantizes to in float32.
Library = Callable[[Tensor], tuple[Mapping[str, Tensor], Tensor]]

# For products that round to the dtype of x at another step than the library's: about the width of its last bit.
ROUNDING = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One format with its options, and how good it must be.

    Attributes:
        uri: format id or URI; also the id of the test.
        sqnr_db: at least so good on 2,000 or more normally distributed values; about 1 dB below what was measured.
        library: what the library itself makes of a weight (float32, float16 or bfloat16); every tensor and the
            dequantized values must be bit-equal to ours. Runs the library's public path, not our code.
        product: largest relative error (Frobenius norm) of `linear` against float32 x @ dequantized.T: what bfloat16
            costs by default; more for formats that quantize activations.
        native: largest relative difference between the output of `to_native`'s layer and ours, for all dtypes of the
            weight or for each; None where the format has no such layer and `to_native` must refuse. `native_why` says
            where a difference above 0 comes from.
        native_dtypes: dtypes of the weight in which the native layer's output is compared; say beside it why one is
            missing. The layer itself is made and looked at in every dtype.
        refused: shape -> how the reason begins, for shapes that must be refused; shapes with "" must work. Every case
            is tried with more shapes beside: each must work or be refused with a reason that names N or K.
        zeros_exact: False only where the library itself does not give zeros for a row of zeros; say why beside it.
        overflow: whether a weight of 1e8 is beyond the format and must be refused as such.
        compiles: whether torch.compile(fullgraph=False) of the layer must give the eager result (see `product`).
        shape: (N, K) of the checks that are not about shapes.
    """

    uri: str
    sqnr_db: float
    library: Library
    product: float = 0.006
    native: float | Mapping[torch.dtype, float] | None = None
    native_why: str = ""
    native_dtypes: tuple[torch.dtype, ...] = tuple(DTYPES.values())
    refused: Mapping[tuple[int, ...], str] = field(default_factory=lambda: dict[tuple[int, ...], str]())
    zeros_exact: bool = True
    overflow: bool = False
    compiles: bool = True
    shape: tuple[int, int] = (64, 256)
