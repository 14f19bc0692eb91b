"""Other libraries' 4-bit and 8-bit blocks in the order of ComfyUI's formats: bits move, no value changes.

Scales of blocks stand in cuBLAS's tiles of 128 x 4: of a tile, row r column c is at [r % 32, r // 32, c]. NVFP4 bytes
hold the even value in the high half here, and in the low half in torchao and compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # finding layers does not need torch
    import torch
    from torch import Tensor

    from ...weight import QuantizedWeight

NV_BLOCK, MX_BLOCK = 16, 32
TILE_ROWS, TILE_COLUMNS = 128, 4


def up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def tiled_numel(rows: int, columns: int) -> int:
    """Scales of `rows` x `columns` blocks in whole tiles."""
    return up(rows, TILE_ROWS) * up(columns, TILE_COLUMNS)


def tiled(scale: Tensor) -> Tensor:
    """Scales (rows, columns) of one byte each in cuBLAS's order, (rows up to 128, columns up to 4)."""
    import torch

    rows, columns = scale.shape
    whole = _padded(scale.view(torch.uint8), up(rows, TILE_ROWS), up(columns, TILE_COLUMNS))
    tiles = whole.view(-1, 4, TILE_ROWS // 4, whole.shape[1] // TILE_COLUMNS, TILE_COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(whole.shape).view(scale.dtype)


def _padded(values: Tensor, rows: int, columns: int) -> Tensor:
    if tuple(values.shape) == (rows, columns):
        return values
    whole = values.new_zeros(rows, columns)
    whole[: values.shape[0], : values.shape[1]] = values
    return whole


def nvfp4(
    qdata: Tensor, block_scale: Tensor, scale: Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> QuantizedWeight:
    """A weight in comfy-nvfp4.

    Args:
        qdata: (N, K/2) uint8, even index in the low half.
        block_scale: e4m3, in tiles: (N up to 128, K/16 up to 4), in any shape.
        scale: one value, multiplies.
        shape: (N, K), K a multiple of 16.
    """
    import torch

    n, k = shape
    high_first = _padded((qdata << 4 | qdata >> 4).reshape(n, k // 2), up(n, NV_BLOCK), k // 2)
    return _weight(
        "comfy-nvfp4",
        {
            "qdata": high_first,
            "scale": scale.to(torch.float32).reshape(()),
            "block_scale": block_scale.reshape(up(n, TILE_ROWS), up(k // NV_BLOCK, TILE_COLUMNS)),
        },
        shape,
        dtype,
        {"transposed": False},
    )


def mxfp8(qdata: Tensor, scale: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> QuantizedWeight:
    """A weight in comfy-mxfp8.

    Args:
        qdata: (N, K) e4m3.
        scale: e8m0, in tiles: (N up to 128, K/32 up to 4), in any shape.
        shape: (N, K), K a multiple of 32.
    """
    import torch

    n, k = shape
    padded = _padded(qdata.view(torch.uint8), up(n, MX_BLOCK), k).view(qdata.dtype)
    blocks = scale.reshape(up(n, TILE_ROWS), up(k // MX_BLOCK, TILE_COLUMNS))
    return _weight("comfy-mxfp8", {"qdata": padded, "scale": blocks}, shape, dtype, {"transposed": False})


def _weight(
    format_id: str, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype, meta: Mapping[str, bool]
) -> QuantizedWeight:
    from ...weight import QuantizedWeight

    return QuantizedWeight(format_id, tensors, shape, dtype, meta)
