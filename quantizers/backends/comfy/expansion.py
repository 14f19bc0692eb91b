"""How the weights of each native format come back block by block, and their products.

ConvRot formats hold `W @ H` by groups of columns, H a regular Hadamard matrix, which is its own inverse. So a product
can rotate the activations instead of the weight: `x @ W.T = (x @ H) @ (W @ H).T`, and 1,024 rows of x are fewer than
the 12,288 of a weight. Layouts: comfy_kitchen/tensor and backends/eager at 0.2.40.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...kernels import expand, forms
from ...kernels.expand import Expansion
from ...kernels.tiles import from_tiles
from ...weight import QuantizedWeight

INT4 = torch.tensor([float(i if i < 8 else i - 16) for i in range(16)], device="cpu")
_POSITIVE = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E2M1 = torch.tensor(_POSITIVE + [-v for v in _POSITIVE], device="cpu")
MX_BLOCK, NV_BLOCK = 32, 16


def stored(q: QuantizedWeight, algo: str) -> Expansion:
    """The weight as it is stored, rotated where the format rotates; `algo` is ComfyUI's name of the format."""
    t = q.tensors
    n, k = q.orig_shape
    qdata = t["qdata"]
    if algo.startswith("float8"):
        return forms.float8(qdata, t["scale"])
    if algo == "mxfp8":
        scale = from_tiles(t["scale"].view(torch.uint8), qdata.shape[0], qdata.shape[1] // MX_BLOCK)
        exponents = (scale[:n].to(torch.int32) << 23).view(torch.float32)  # e8m0 is the exponent of a float32
        return _cut(forms.float8(qdata[:n], exponents), k)
    if algo == "nvfp4":
        scale = from_tiles(t["block_scale"], qdata.shape[0], 2 * qdata.shape[1] // NV_BLOCK)[:n]
        table = forms.pairs(E2M1.to(qdata.device), "high first")
        return _cut(forms.nibbles(qdata[:n], table, scale.to(torch.float32) * t["scale"]), k)
    if algo == "int8_tensorwise":
        return forms.integers(qdata, t["scale"])
    if algo == "convrot_w4a4":
        return forms.nibbles(qdata, forms.pairs(INT4.to(qdata.device), "low first"), t["scale"].reshape(n, 1))
    return _w4a8(q)


def _w4a8(q: QuantizedWeight) -> Expansion:
    """The codes become int8 first, as for the int8 product that the format is made for, then get their row's scale."""
    t = q.tensors
    table = forms.pairs(t["codebook"].to(torch.float32), "low first")
    codes = forms.nibbles(t["qdata"], table, t["scale"].to(torch.float32))
    s_channel = t["s_channel"].to(torch.float32).reshape(-1, 1)

    def fill(out: Tensor, start: int, stop: int) -> None:
        codes.fill(out, start, stop)
        out.round_().clamp_(-127, 127).mul_(s_channel[start:stop])

    return Expansion(codes.shape, codes.device, fill)


def _cut(padded: Expansion, k: int) -> Expansion:
    """Without the columns beyond K that fill the last block."""
    if padded.shape[1] == k:
        return padded
    n, wide = padded.shape

    def fill(out: Tensor, start: int, stop: int) -> None:
        whole = torch.empty(stop - start, wide, dtype=torch.float32, device=padded.device)
        padded.fill(whole, start, stop)
        out.copy_(whole[:, :k])

    return Expansion((n, k), padded.device, fill)


def rotated_back(source: Expansion, group: int) -> Expansion:
    """A rotated weight in its own basis."""
    h = _hadamard(group, source.device, torch.float32)

    def fill(out: Tensor, start: int, stop: int) -> None:
        source.fill(out, start, stop)
        out.copy_(torch.matmul(out.view(stop - start, -1, group), h).view_as(out))

    return Expansion(source.shape, source.device, fill)


def rotated_linear(x: Tensor, source: Expansion, group: int, bias: Tensor | None) -> Tensor:
    """The product with a rotated weight, by rotating x (..., K) in its dtype."""
    turned = torch.matmul(x.reshape(-1, x.shape[-1] // group, group), _hadamard(group, x.device, x.dtype))
    return expand.linear(turned.reshape(x.shape), source, bias)


@functools.lru_cache(maxsize=32)
def _hadamard(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Normalized regular Hadamard matrix (size, size), a power of 4: the Kronecker power of one of 4 x 4."""
    with torch.inference_mode(False):
        seed = torch.ones(4, 4, device="cpu") - 2 * torch.eye(4, device="cpu").flip(0)
        h = seed
        while h.shape[0] < size:
            h = torch.kron(h, seed)
        return (h / size**0.5).to(device, dtype)
