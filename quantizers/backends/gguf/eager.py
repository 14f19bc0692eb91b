"""Every GGUF block type dequantized with torch operations: the reference, and the way wherever ggml's C cannot run.

That is GPUs without Triton, MPS, and torch.compile. Bit-equal to gguf's numpy in float32, then rounded once. The blocks
are taken apart by `eager_blocks` and `eager_iq`; see `eager_parts` for why the order of operations cannot change a bit.
On MPS, whose arithmetic may flush numbers below 2**-126 to zero, blocks of MXFP4 with such scales would differ.

Memory beside the result: on a CPU some MB, because `expand` goes by blocks of rows. On other devices at most 5 bytes
(Q4_K 2.5, Q8_0 0.2) for each of at most `PART_NUMEL` values; no float32 copy on CUDA, whose kernels convert as they
write, nor under torch.compile, which merges the last steps itself.

The float32 copies of whole weights that eager code usually makes were not chosen, nor half precision throughout, as in
diffusers, whose results differ from ggml's in the last bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ...errors import FileError, SpecError, near
from ...ggml_types import TYPES
from ...kernels.expand import Expansion, dequantized
from . import eager_blocks, eager_iq
from .eager_parts import Parts, values, write

# Values expanded at once on a device that is no CPU: large enough that starting kernels does not count.
PART_NUMEL = 32 * 1024 * 1024

PARTS: dict[str, Callable[[Tensor], Parts]] = {
    "Q4_0": eager_blocks.q4_0,
    "Q4_1": eager_blocks.q4_1,
    "Q5_0": eager_blocks.q5_0,
    "Q5_1": eager_blocks.q5_1,
    "Q8_0": eager_blocks.q8_0,
    "Q2_K": eager_blocks.q2_k,
    "Q3_K": eager_blocks.q3_k,
    "Q4_K": eager_blocks.q4_k,
    "Q5_K": eager_blocks.q5_k,
    "Q6_K": eager_blocks.q6_k,
    "IQ2_XXS": eager_iq.iq2_xxs,
    "IQ2_XS": eager_iq.iq2_xs,
    "IQ3_XXS": eager_iq.iq3_xxs,
    "IQ1_S": eager_iq.iq1_s,
    "IQ4_NL": eager_iq.iq4_nl,
    "IQ3_S": eager_iq.iq3_s,
    "IQ2_S": eager_iq.iq2_s,
    "IQ4_XS": eager_iq.iq4_xs,
    "IQ1_M": eager_iq.iq1_m,
    "TQ1_0": eager_blocks.tq1_0,
    "TQ2_0": eager_blocks.tq2_0,
    "MXFP4": eager_blocks.mxfp4,
    "NVFP4": eager_blocks.nvfp4,
}


def _block_function(take_apart: Callable[[Tensor], Parts]) -> Callable[[Tensor], Tensor]:
    def dequantize_blocks(blocks: Tensor) -> Tensor:
        return values(take_apart(blocks))

    return dequantize_blocks


# By ggml's name: (n, bytes a block) uint8 -> (n, values a block) float32 on the same device.
BLOCKS: dict[str, Callable[[Tensor], Tensor]] = {name: _block_function(f) for name, f in PARTS.items()}


def dequantize(type_name: str, qdata: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The whole weight, of `shape`, on the device of its bytes.

    Args:
        type_name: ggml's, such as `Q4_K`.
        qdata: uint8 of any shape, rows of the last axis of `shape` one after another; not modified.
        shape: logical shape; its last axis is a multiple of the type's block.
        dtype: any float dtype; values are those of float32, rounded once.
    Raises:
        SpecError: no block type has this name, or rows are no whole blocks.
        FileError: `qdata` has another number of bytes.
    """
    return dequantized(expansion(type_name, qdata, shape), dtype).reshape(shape)


def expansion(type_name: str, qdata: Tensor, shape: tuple[int, ...]) -> Expansion:
    """How the weight comes back, by rows of the last axis of `shape`; arguments and errors as for `dequantize`."""
    take_apart, block = PARTS.get(type_name), TYPES.get(type_name)
    if take_apart is None or block is None:
        raise SpecError(f"{type_name!r} is not a block type of GGUF.{near(type_name, PARTS)}")
    n, k = math.prod(shape[:-1]), shape[-1]
    if k % block.block:
        raise SpecError(f"{type_name}: K={k} is not a multiple of block size {block.block}.\nUse Q8_0 or a float type.")
    per_row = k // block.block
    if qdata.dtype is not torch.uint8 or qdata.numel() != n * per_row * block.nbytes:
        raise FileError(
            f"{type_name}: a weight of shape {shape} has {n * per_row * block.nbytes} bytes, "
            f"got {qdata.numel()} values of {qdata.dtype}.\nThe file is cut off, or its header names another type."
        )
    blocks = qdata.reshape(n * per_row, block.nbytes)

    def rows(out: Tensor, start: int, stop: int) -> None:
        part = blocks[start * per_row : stop * per_row]
        fill(take_apart, part, out.view(len(part), block.block), qdata.device.type)

    return Expansion((n, k), qdata.device, rows, any_dtype=True)


def fill(take_apart: Callable[[Tensor], Parts], blocks: Tensor, out: Tensor, device_type: str) -> None:
    """Dequantize blocks into `out`, (n, values a block); float32 on a CPU, any float dtype elsewhere."""
    if torch.compiler.is_compiling():
        out.copy_(values(take_apart(blocks)))
        return
    step = len(blocks) if device_type == "cpu" else PART_NUMEL // out.shape[1]
    for first in range(0, len(blocks), max(step, 1)):
        write(take_apart(blocks[first : first + step]), out[first : first + step], device_type)
