"""Products with GGUF weights on a GPU: Triton kernels that decode the blocks in registers, inside the product.

    y = x @ decode(qdata).T + bias

for Q8_0, Q4_0, Q4_K, Q5_K, Q6_K and IQ4_XS, on the file's own bytes. Up to 8 tokens threads keep the sums; up to 128
tensor cores multiply tiles; above, the weight is decoded once into a buffer for cuBLAS. The values are those of gguf's
numpy in float32, bit by bit; threads multiply them so, the other two rounded once to the dtype of x. Sums are float32.

CUDA C was not chosen because it needs a compiler on the user's machine; Triton comes with PyTorch. Multiplying int8 by
int8, as llama.cpp does, was not chosen because it rounds the activations. Repacked weights were not chosen because a
weight that moves between host and GPU would have to exist twice.

The kernels are run by Triton's interpreter and compiled for compute capability 8.0 and 9.0 in the tests; the numbers of
tokens above and the tiles were not measured on a GPU yet. Importing this imports no Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...weight import QuantizedWeight
from ..kernel import Kernel
from .availability import refusal
from .blocks import BLOCKS
from .ops import BUFFER, FEW, FUSED, dequantize, run, way
from .tiles import FEW_TOKENS, FUSED_TOKENS

__all__ = ["BLOCKS", "FEW_TOKENS", "FUSED_TOKENS", "dequantize", "kernel_for", "refusal", "run"]

_REASONS = {
    FEW: f"up to {FEW_TOKENS} tokens the product is as long as reading the weight",
    FUSED: f"up to {FUSED_TOKENS} tokens every weight is decoded once, in registers",
    BUFFER: "decoding into a buffer is paid once and cuBLAS multiplies",
}


def kernel_for(type_name: str, device: torch.device, dtype: torch.dtype, tokens: int) -> Kernel | None:
    """The Triton product of this many tokens, or None where `refusal` says why there is none."""
    if type_name not in BLOCKS or refusal(device, dtype, type_name, (1, BLOCKS[type_name].size)):
        return None

    def product(x: Tensor, q: QuantizedWeight, bias: Tensor | None) -> Tensor:
        k = q.orig_shape[-1]
        return run(x, q.tensors["qdata"], type_name, q.numel // k, k, bias)

    chosen = way(device, dtype, tokens)
    return Kernel(chosen, _REASONS[chosen], product)
