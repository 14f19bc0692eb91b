"""Sizes of the tiles that the products may run with; the autotuner takes the fastest on the user's own GPU.

Chosen from what the compiler says of each on compute capability 8.0 and 9.0 (`tests/backends/triton_gguf_compile.py`):
no registers spilled for any type, at most 99 KB of shared memory, and for few tokens nothing that moves through shared
memory inside the loop at one token. None of them has been timed on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from .blocks import BLOCKS

# Tokens up to which sums are kept by threads; beyond, 16 fill the smallest tile of the tensor cores half at least.
FEW_TOKENS = 8
# Tokens up to which the weight is decoded inside the product: one tile of tokens, so that every weight is decoded once.
# Above, it is decoded once into a buffer for cuBLAS. Not measured on a GPU yet: `benchmarks/gguf_gpu.py` does.
FUSED_TOKENS = 128
# Values a program of the dequantizing kernel writes.
DEQUANTIZE_NUMEL = 4096


@dataclass(frozen=True)
class Tile:
    """Attributes:
    rows: rows of weights a program.
    nbytes: bytes of packed values a row and step; a multiple of the group width.
    warps, stages: Triton's own.
    """

    rows: int
    nbytes: int
    warps: int
    stages: int

    def groups(self, type_name: str) -> int:
        return self.nbytes // BLOCKS[type_name].width


FEW = (Tile(1, 128, 1, 1), Tile(1, 256, 2, 1), Tile(1, 512, 4, 1), Tile(2, 128, 1, 1))
FUSED = (Tile(64, 32, 4, 3), Tile(64, 64, 4, 3), Tile(128, 32, 8, 3), Tile(128, 64, 8, 3))
# For 64 and 128 tokens. Tile(64, 64, 4, 3) would spill 624 bytes a thread there (Q6_K) or want 112 KB of shared memory.
FUSED_WIDE = (Tile(64, 32, 4, 3), Tile(64, 32, 8, 3), Tile(128, 32, 8, 3), Tile(128, 64, 8, 2))


def few_tile_tokens(tokens: int) -> int:
    """Size of the tile along tokens, a power of two."""
    return 1 << max(tokens - 1, 0).bit_length()


def fused_tile_tokens(tokens: int) -> int:
    """The same for `tl.dot`."""
    return min(max(few_tile_tokens(tokens), 16), FUSED_TOKENS)


def fused_tiles(tile_tokens: int) -> tuple[Tile, ...]:
    return FUSED if tile_tokens < 64 else FUSED_WIDE
