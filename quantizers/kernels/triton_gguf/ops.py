"""The checked entrances, and the same as operators that torch.compile takes as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import WeightError
from .availability import TENSOR_CORES, capability, interpreted, refusal
from .blocks import BLOCKS
from .tiles import FEW_TOKENS, FUSED_TOKENS

FEW = "Triton, decoded in registers, sums by threads"
FUSED = "Triton, decoded in registers, tensor cores"
BUFFER = "Triton into a buffer, F.linear"


def way(device: torch.device, dtype: torch.dtype, tokens: int) -> str:
    """Which of FEW, FUSED and BUFFER multiplies so many tokens."""
    if tokens <= FEW_TOKENS:
        return FEW
    # In float32 there are no tensor cores that keep its digits, and cuBLAS beats what Triton makes of it.
    sixteen_bit = dtype in (torch.float16, torch.bfloat16)
    tensor_cores = interpreted() or (device.type == "cuda" and capability(device.index) >= TENSOR_CORES)
    return FUSED if tokens <= FUSED_TOKENS and sixteen_bit and tensor_cores else BUFFER


def run(x: Tensor, qdata: Tensor, type_name: str, n: int, k: int, bias: Tensor | None) -> Tensor:
    """`x @ W.T + bias` in the dtype of x, for x (..., K) and the bytes of a GGUF weight.

    Args:
        x: float16, bfloat16 or float32, on a CUDA device; not modified.
        qdata: uint8, N rows of K / block * bytes a block, contiguous, on the same device.
        bias: (N,) float or None.
    Raises:
        WeightError: the kernels cannot run here, or the tensors do not fit together.
    """
    _check(x.device, x.dtype, qdata, type_name, n, k)
    if x.shape[-1] != k or x.device != qdata.device:
        raise WeightError(
            f"{type_name}: x is {tuple(x.shape)} on {x.device}, the weight ({n}, {k}) on {qdata.device}.\n"
            "Move both to one device; the last axis of x must be K."
        )
    if torch.compiler.is_compiling():
        return torch.ops.quantwire.gguf_linear(x, qdata.view(n, -1), type_name, bias)
    return _linear(x, qdata.view(n, -1), type_name, bias)


def dequantize(qdata: Tensor, type_name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The values of a GGUF tensor of any shape, in `dtype`: those of float32 arithmetic, rounded once.

    Raises:
        WeightError: the kernels cannot run here, or the bytes are not those of the shape.
    """
    k = shape[-1] if shape else 0
    n = 1
    for length in shape[:-1]:
        n *= length
    _check(qdata.device, dtype, qdata, type_name, n, k)
    if torch.compiler.is_compiling():
        return torch.ops.quantwire.gguf_dequantize(qdata.view(n, -1), type_name, dtype).view(shape)
    return _dequantize(qdata.view(n, -1), type_name, dtype).view(shape)


def _check(device: torch.device, dtype: torch.dtype, qdata: Tensor, type_name: str, n: int, k: int) -> None:
    reason = refusal(device, dtype, type_name, (n, k))
    if reason:
        raise WeightError(f"{type_name}: {reason}.\nUse the eager product, which runs everywhere.")
    nbytes = n * k // BLOCKS[type_name].size * BLOCKS[type_name].nbytes
    if qdata.dtype is not torch.uint8 or qdata.numel() != nbytes or not qdata.is_contiguous():
        raise WeightError(
            f"{type_name}: a weight of ({n}, {k}) is {nbytes} contiguous bytes, got {qdata.dtype} "
            f"{tuple(qdata.shape)}, strides {qdata.stride()}.\nPass the bytes of the file as they are."
        )


def _linear(x: Tensor, qdata: Tensor, type_name: str, bias: Tensor | None) -> Tensor:
    from . import launch

    n, k = qdata.shape[0], x.shape[-1]
    rows = x.reshape(-1, k).contiguous()
    bias = None if bias is None else bias.contiguous()
    chosen = way(x.device, x.dtype, rows.shape[0])
    if chosen is BUFFER:
        weight = _dequantize(qdata, type_name, x.dtype)
        out = F.linear(rows, weight, None if bias is None else bias.to(x.dtype))
    else:
        launched = launch.few_tokens if chosen is FEW else launch.fused
        out = launched(rows, _aligned(qdata), type_name, bias)
    return out.view(*x.shape[:-1], n)


def _dequantize(qdata: Tensor, type_name: str, dtype: torch.dtype) -> Tensor:
    from . import launch

    blocks = BLOCKS[type_name]
    k = qdata.shape[1] // blocks.nbytes * blocks.size
    out = torch.empty(qdata.shape[0], k, dtype=dtype, device=qdata.device)
    return launch.dequantize(_aligned(qdata), type_name, out)


def _aligned(qdata: Tensor) -> Tensor:
    """Scales are read two bytes at once. Rows and blocks have even sizes, so only a view can start at an odd byte."""
    return qdata.clone() if qdata.data_ptr() % 2 else qdata


def _linear_shape(x: Tensor, qdata: Tensor, type_name: str, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], qdata.shape[0]))


def _dequantize_shape(qdata: Tensor, type_name: str, dtype: torch.dtype) -> Tensor:
    blocks = BLOCKS[type_name]
    return qdata.new_empty((qdata.shape[0], qdata.shape[1] // blocks.nbytes * blocks.size), dtype=dtype)


def _register(name: str, function: Callable[..., Tensor], shape: Callable[..., Tensor], schema: str) -> None:
    """Once a process: the pack can be loaded twice, under ComfyUI's name for it and under its own."""
    if not hasattr(torch.ops.quantwire, name):
        op: Any = torch.library.custom_op(f"quantwire::{name}", function, mutates_args=(), schema=schema)
        op.register_fake(shape)


_register("gguf_linear", _linear, _linear_shape, "(Tensor x, Tensor qdata, str type_name, Tensor? bias) -> Tensor")
_register(
    "gguf_dequantize", _dequantize, _dequantize_shape, "(Tensor qdata, str type_name, ScalarType dtype) -> Tensor"
)
