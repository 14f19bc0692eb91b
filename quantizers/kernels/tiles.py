"""Scales in the order of tensor cores: tiles of 128 rows by 4 columns, as cuBLAS takes them for block-scaled products.

Row `32 a + b` of a tile (a < 4, b < 32) stands at `[b, a]` of it; tiles lie row by row. Rows and columns that fill the
last tile hold zeros. Source: "Block Scaling Factors Layout" in the cuBLAS documentation.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS, COLUMNS = 128, 4


def from_tiles(tiled: Tensor, rows: int, columns: int) -> Tensor:
    """Scales (rows, columns) of any dtype of one byte, out of their tiles."""
    down, across = -(-rows // ROWS), -(-columns // COLUMNS)
    tiles = tiled.view(torch.uint8).reshape(down, across, 32, 4, COLUMNS)
    plain = tiles.permute(0, 3, 2, 1, 4).reshape(down * ROWS, across * COLUMNS)
    return plain[:rows, :columns].contiguous().view(tiled.dtype)


def to_tiles(scale: Tensor) -> Tensor:
    """Scales (rows, columns) of a dtype of one byte in tiles, (rows up to 128, columns up to 4)."""
    rows, columns = scale.shape
    down, across = -(-rows // ROWS), -(-columns // COLUMNS)
    padded = torch.zeros(down * ROWS, across * COLUMNS, dtype=torch.uint8, device=scale.device)
    padded[:rows, :columns] = scale.view(torch.uint8)
    tiles = padded.view(down, 4, 32, across, COLUMNS).permute(0, 3, 2, 1, 4)
    return tiles.reshape(down * ROWS, across * COLUMNS).view(scale.dtype)
