"""Whether the kernels can run on a device, and why not."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from .blocks import BLOCKS

# Compute capabilities. Below 8.0 Triton multiplies without tensor cores and spills registers (compiled for 7.5: 256 to
# 4,400 bytes a thread), so there the weight is decoded into a buffer for cuBLAS.
LOWEST = (7, 5)
TENSOR_CORES = (8, 0)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors: how they are tested without a GPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


def refusal(device: torch.device, dtype: torch.dtype, type_name: str, shape: tuple[int, ...]) -> str:
    """Why the kernels cannot multiply by a weight here, or "".

    Args:
        dtype: of the activations, or of the dequantized weight.
        type_name: ggml's, such as `Q4_K`.
        shape: of the weight; its last axis is K.
    """
    if type_name not in BLOCKS:
        return f"there is no Triton kernel for {type_name}, only for {', '.join(BLOCKS)}"
    if dtype not in DTYPES:
        return f"the Triton kernels compute in float16, bfloat16 and float32, not in {dtype}"
    size = BLOCKS[type_name].size
    if not shape or not shape[-1] or shape[-1] % size:
        return f"shape {shape} has no rows of blocks of {size} values"
    return device_refusal(device.type, device.index, dtype)


def device_refusal(kind: str, index: int | None, dtype: torch.dtype) -> str:
    """The part of `refusal` that asks the machine."""
    if kind == "cpu" and interpreted():
        return _failing(kind, index)
    if kind != "cuda":
        return f"the Triton kernels run on CUDA devices, not on {kind}"
    if torch.version.hip:
        return "the Triton kernels have been compiled for NVIDIA GPUs only, and this is an AMD GPU"
    found = capability(index)
    if found < LOWEST:
        return f"the Triton kernels need compute capability 7.5, and this GPU has {found[0]}.{found[1]}"
    if dtype is torch.bfloat16 and found < TENSOR_CORES:
        return f"bfloat16 needs compute capability 8.0, and this GPU has {found[0]}.{found[1]}"
    return _failing(kind, index)


# torch.compile takes the answer as a constant. `torch.compiler.assume_constant_result` sets the same, and imports
# torch._dynamo for it, which costs every start of the host a second.
device_refusal._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


@functools.cache
def capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@functools.cache
def _failing(kind: str, index: int | None) -> str:
    """Why one block cannot be dequantized there. Triton compiles as it runs, and needs a C compiler for it on Linux."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; PyTorch for CUDA brings it on Linux, `pip install triton-windows` on Windows"
    try:
        from . import launch

        device = torch.device(kind if index is None else f"{kind}:{index}")
        block = torch.zeros(1, BLOCKS["Q8_0"].nbytes, dtype=torch.uint8, device=device)
        launch.dequantize(block, "Q8_0", torch.empty(1, BLOCKS["Q8_0"].size, device=device))
    except torch.OutOfMemoryError:
        raise
    except Exception as err:  # an availability probe: whatever a foreign Triton raises is the reason
        return f"Triton cannot run a kernel here: {type(err).__name__}: {err}"
    return ""
