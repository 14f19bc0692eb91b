"""Bits of GGUF blocks with torch operations: fields of bytes, codes to values, and the tables for both.

Every function returns dense tensors in the order of the values of a block. Tables are read by `index_select` on
elements as wide as one entry: eight int8 of a grid are one int64, so a lookup costs the same as for a single value.

Measured on 1.5 M values (1 thread, AVX-512): two nibbles a byte 0.4 ms as shifted int32 and one `stack`, 2 ms as a
shift by a broadcast tensor; eight bits a byte 0.15 ms by table, 1.2 ms by shifts, whose inner loops are eight long.

Only signed integers, uint8, float16 and float32 are used: MPS and CUDA lack arithmetic on the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import BackendUnavailable
from ...kernels.scratch import watched

# Values of the 4-bit codes (ggml-common.h: kvalues_iq4nl, and kvalues_mxfp4, which are twice those of E2M1).
CODEBOOKS = {
    "IQ4_NL": (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
    "E2M1": (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12),
}

_tables: dict[tuple[str, str], Tensor] = {}


def copied(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes (..., m) as elements of `dtype`, (..., m / size): in memory of their own, because files align nothing."""
    return x.clone(memory_format=torch.contiguous_format).view(dtype)


def half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at a byte offset of each block, (n, 1) float32."""
    return copied(blocks[:, at : at + 2], torch.float16).to(torch.float32)


def runs(blocks: Tensor, start: int, stop: int, size: int) -> Tensor:
    """Bytes [start, stop) of each block, (n, runs, size)."""
    return blocks[:, start:stop].view(len(blocks), (stop - start) // size, size)


def fields(x: Tensor, bits: int, at: int = 0) -> Tensor:
    """(..., m) bytes, m a multiple of 4 -> (..., 8 / bits, m) uint8: field i of byte j, lowest bits first, at [i, j].

    Args:
        at: bit to which each field is moved, so that it can be combined with others.
    """
    words = copied(x, torch.int32)
    mask = (((1 << bits) - 1) << at) * 0x01010101
    parts = [_shifted(words, i - at).bitwise_and_(mask) for i in range(0, 8, bits)]
    return torch.stack(parts, dim=-2).view(torch.uint8)


def spread(x: Tensor, bits: int, at: int = 0) -> Tensor:
    """(n, m) bytes -> (n, m * 8 / bits) uint8: the fields of each byte beside each other, lowest bits first."""
    return look_up(x, f"spread {bits} {at}").view(torch.uint8)


def split(x: Tensor, bits: int, count: int) -> Tensor:
    """(n, m) integers -> (n, m, count): fields of `bits` bits, lowest first."""
    return torch.stack([_shifted(x, i * bits).bitwise_and_((1 << bits) - 1) for i in range(count)], dim=-1)


def decoded(x: Tensor, codebook: str) -> Tensor:
    """(..., m) bytes -> (..., 2, m) int8: what the low nibbles stand for, then the high ones."""
    apart = fields(x, 4)
    two = apart.view(torch.int16)  # of neighbouring nibbles, again one byte: half as many look-ups as nibbles
    return look_up((two | two >> 4).bitwise_and_(255), f"codebook {codebook}").view(apart.shape)


def look_up(index: Tensor, table: str) -> Tensor:
    """(..., m) of any integer dtype -> (..., m * entry) int8."""
    own = watched() or type(index) is not Tensor
    return _look_up_op(index, table) if own else _look_up(index, table)


def _look_up(index: Tensor, table: str) -> Tensor:
    flat = index.to(torch.int32).reshape(-1)
    return _table(table, index.device).index_select(0, flat).view(index.shape).view(torch.int8)


# An operator of its own to all that watches operations: the grids come out of another package, which torch.compile
# cannot trace, and tables made under a FakeTensorMode or in torch.func would be kept without values.
_look_up_op: Any = torch.library.custom_op(
    "quantwire::gguf_look_up", _look_up, mutates_args=(), schema="(Tensor index, str table) -> Tensor"
)


@_look_up_op.register_fake
def _look_up_shape(index: Tensor, table: str) -> Tensor:  # pyright: ignore[reportUnusedFunction]
    return index.new_empty((*index.shape[:-1], index.shape[-1] * _entry(table)), dtype=torch.int8)


def _shifted(x: Tensor, by: int) -> Tensor:
    """A copy, shifted right, or left by a negative number."""
    return x >> by if by >= 0 else x << -by


def _table(name: str, device: torch.device) -> Tensor:
    """(entries,) integers of 2 to 8 bytes, each the int8 values of an entry in memory order; made once a device."""
    key = name, str(device)
    if key not in _tables:
        # Outside of inference mode, because what is made inside can never be saved for a backward pass outside.
        with torch.inference_mode(False):
            _tables[key] = _packed(_entries(name), _entry(name)).to(device)
    return _tables[key]


def _entry(name: str) -> int:
    """Values an entry."""
    kind, *rest = name.split(" ")
    if kind == "spread":
        return 8 // int(rest[0])
    if kind == "codebook":
        return 2
    return 4 if rest[0].startswith("IQ3") else 8


def _packed(entries: Tensor, entry: int) -> Tensor:
    wide = {2: torch.int16, 4: torch.int32, 8: torch.int64}[entry]
    return entries.contiguous().view(wide).view(-1)


def _entries(name: str) -> Tensor:
    """(entries, values an entry) int8."""
    kind, *rest = name.split(" ")
    if kind == "spread":
        bits, at = map(int, rest)
        return _bytes([[(byte >> i & ((1 << bits) - 1)) << at for i in range(0, 8, bits)] for byte in range(256)])
    if kind == "codebook":
        values = CODEBOOKS[rest[0]]
        return torch.tensor(
            [[values[byte & 15], values[byte >> 4]] for byte in range(256)], dtype=torch.int8, device="cpu"
        )
    if kind == "signs":
        return _signs(_gguf("IQ2_XXS").ksigns if rest[0] == "even" else range(256))
    grid = torch.tensor(_grid(rest[0]), device="cpu")
    if kind == "grid":
        return grid.to(torch.int8)
    # "eighths": of the grid moved up by 1/8, then of the grid moved down, as the types with 1.6 bits do.
    return torch.cat((8 * grid + 1, 8 * grid - 1)).to(torch.int8)


def _signs(masks: Sequence[int]) -> Tensor:
    """-1 where a bit is set, else 1. The "even" masks are the 128 bytes with an even number of bits."""
    return torch.tensor(
        [[-1 if mask >> i & 1 else 1 for i in range(8)] for mask in masks], dtype=torch.int8, device="cpu"
    )


def _bytes(rows: list[list[int]]) -> Tensor:
    """int8 values, given as bytes."""
    return torch.tensor(rows, dtype=torch.uint8, device="cpu").view(torch.int8)


def _grid(type_name: str) -> Any:
    source = _gguf(type_name)
    source.init_grid()
    return source.grid.reshape(source.grid_shape)


def _gguf(type_name: str) -> Any:
    """The gguf package's class of a type: its grids stand there in 40 kB of text, which need no second copy."""
    try:
        import gguf.quants
    except ImportError as err:
        raise BackendUnavailable(
            f"{type_name}: the gguf package, which holds the tables of this type, is not installed.\n"
            "Run `pip install gguf`, or use a file of another type, such as Q4_K."
        ) from err
    return getattr(gguf.quants, type_name)
