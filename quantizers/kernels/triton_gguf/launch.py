# The decorated kernels have no type information.
# pyright: reportMissingImports=false, reportUnknownMemberType=false, reportUnknownVariableType=false
"""Launch the kernels of `kernels.py` on tensors. Imports Triton: only `availability.refusal` says when that can be.

Nothing here checks; `ops.py` does.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from . import kernels
from .availability import interpreted
from .blocks import BLOCKS
from .tiles import DEQUANTIZE_NUMEL, FEW, Tile, few_tile_tokens, fused_tile_tokens, fused_tiles

# See kernels.py: `d * q - m` in two roundings, as ggml and gguf have it.
OPTIONS = {"enable_fp_fusion": False}


def dequantize(qdata: Tensor, type_name: str, out: Tensor) -> Tensor:
    """Write all values of (N, bytes a row) `qdata` into contiguous `out` (N, K)."""
    blocks = BLOCKS[type_name]
    groups = out.numel() // (blocks.width * blocks.parts)
    step = max(blocks.groups, DEQUANTIZE_NUMEL // (blocks.width * blocks.parts))
    if groups:
        with _on(qdata):
            launched: Any = kernels.dequantize
            given = constants(type_name, size=False) | {"PER": blocks.groups, "G": step}
            launched[(triton.cdiv(groups, step),)](qdata, out, groups, **given, num_warps=4, **OPTIONS)
    return out


def few_tokens(x: Tensor, qdata: Tensor, type_name: str, bias: Tensor | None, tile: Tile | None = None) -> Tensor:
    """(M, N) of contiguous x (M, K), M at most FEW_TOKENS."""
    return _product(kernels.few_tokens, FEW, x, qdata, type_name, bias, tile, few_tile_tokens(x.shape[0]), {})


def fused(x: Tensor, qdata: Tensor, type_name: str, bias: Tensor | None, tile: Tile | None = None) -> Tensor:
    """(M, N) of contiguous x (M, K)."""
    more = {"UPCAST": interpreted()}
    size = fused_tile_tokens(x.shape[0])
    return _product(kernels.matmul, fused_tiles(size), x, qdata, type_name, bias, tile, size, more)


def constants(type_name: str, size: bool = True) -> dict[str, Any]:
    """What the kernels must know of a type at compile time."""
    b = BLOCKS[type_name]
    found = {"TYPE": type_name, "NBYTES": b.nbytes, "W": b.width, "PARTS": b.parts, "RUN": b.run}
    return found | ({"SIZE": b.size} if size else {})


def _product(
    kernel: Any,
    tiles: tuple[Tile, ...],
    x: Tensor,
    qdata: Tensor,
    type_name: str,
    bias: Tensor | None,
    tile: Tile | None,
    tile_tokens: int,
    more: dict[str, Any],
) -> Tensor:
    m, k = x.shape
    n = qdata.shape[0]
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    if tile is None and interpreted():
        tile = tiles[0]  # nothing to time
    launched = _tuned(kernel, tiles, type_name) if tile is None else kernel
    given = {} if tile is None else _meta(tile, type_name)

    def grid(meta: dict[str, Any]) -> tuple[int]:
        return (triton.cdiv(m, meta["BM"]) * triton.cdiv(n, meta["BN"]),)

    with _on(x):
        launched[grid](
            x, qdata, bias, y, m, n, k, **constants(type_name), HAS_BIAS=bias is not None, BM=tile_tokens,
            **more, **given, **OPTIONS,
        )  # fmt: skip
    return y


def _meta(tile: Tile, type_name: str) -> dict[str, int]:
    found = {"BN": tile.rows, "G": tile.groups(type_name)}
    return found | {"num_warps": tile.warps, "num_stages": tile.stages}


@functools.cache
def _tuned(kernel: Any, tiles: tuple[Tile, ...], type_name: str) -> Any:
    """The kernel with Triton's autotuner around it: the first product of each shape times every tile."""
    configs = [
        triton.Config({"BN": t.rows, "G": t.groups(type_name)}, num_warps=t.warps, num_stages=t.stages) for t in tiles
    ]
    return triton.autotune(configs, key=["n", "k", "BM"])(kernel)


def _on(t: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current CUDA device, which need not be the tensor's."""
    return torch.cuda.device(t.device) if t.device.type == "cuda" else nullcontext()
