"""Buffers that are used again from product to product.

On a CPU a fresh buffer costs more than what is written into it: 37.7 M int8 values become bfloat16 in 26 ms in new
memory and in 3 ms in memory that was touched before (2 cores, AVX-512); the rest is the operating system handing out
pages. On other devices torch's own allocator keeps memory, so nothing is kept here.

A thread keeps one buffer a name and dtype: about 100 MB after products with large layers, most of it the one expanded
weight.
"""

from __future__ import annotations

import math
import threading
from typing import Any, cast

import torch
from torch import Tensor

# Weights that need more are computed in parts. FLUX's largest layer, 3072 x 21504, needs 126 MiB in bfloat16.
CAP_NBYTES = 64 * 1024 * 1024


class _Kept(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}


_kept = _Kept()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor, valid until the next call with the same name and dtype in this thread.

    A fresh one where buffers cannot be kept: on other devices, and where tensors are not made of memory (`watched`).
    """
    if device.type != "cpu" or watched():
        return torch.empty(shape, dtype=dtype, device=device)
    numel = math.prod(shape)
    buffer = _kept.buffers.get((name, dtype))
    if buffer is None or buffer.numel() < numel:
        # Made outside of inference mode, because what is made inside can never be written to outside.
        with torch.inference_mode(False):
            buffer = torch.empty(numel, dtype=dtype, device=device)
        if buffer.nbytes <= CAP_NBYTES:
            _kept.buffers[name, dtype] = buffer
    return buffer[:numel].view(shape)


def watched() -> str:
    """Who looks at every operation, and may make tensors without memory of their own, now in this thread, or ""."""
    if torch.compiler.is_compiling():
        return "torch.compile"
    c = cast(Any, torch)._C
    if c._len_torch_dispatch_stack():
        return "a dispatch mode such as FakeTensorMode"
    return "" if c._functorch.peek_interpreter_stack() is None else "torch.func"


def kept_nbytes() -> int:
    """Bytes that this thread keeps."""
    return sum(b.nbytes for b in _kept.buffers.values())


def release() -> None:
    """Give the buffers of this thread back."""
    _kept.buffers.clear()
