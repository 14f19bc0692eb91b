"""GGUF's IQ blocks taken apart with torch operations: indices into grids of 4 or 8 values, signs beside them.

Layouts: ggml-org/ggml, ggml-common.h; the arithmetic is that of gguf's quants.py. Offsets below are bytes of a block of
256 values (IQ4_NL: 32); `d` is float16, numbers are little-endian. Seven sign bits stand for eight: the last makes
their number even.

    IQ2_XXS  d 0; 8 x (4 indices of 8 bits, 4 x 7 sign bits and a 4-bit scale) 2
    IQ2_XS   d 0; 32 x (index of 9 bits, 7 sign bits) 2; 4-bit scales 66
    IQ2_S    d 0; indices' low 8 bits 2; signs 34; indices' upper 2 bits 66; 4-bit scales 74
    IQ3_XXS  d 0; 64 indices 2; 8 x (4 x 7 sign bits and a 4-bit scale) 66
    IQ3_S    d 0; indices' low 8 bits 2; ninth bits 66; signs 74; 4-bit scales 106
    IQ1_S    d 0; indices' low 8 bits 2; 8 x (4 x upper 3 bits, 3-bit scale, direction of the delta) 34
    IQ1_M    indices' low 8 bits 0; 32 x (upper 3 bits, direction of the delta) 32;
             4 x (4 x 3-bit scale, 4 bits of d) 48
    IQ4_NL   d 0; codes 2
    IQ4_XS   d 0; scales' upper 2 bits 2; scales' low 4 bits 4; codes 8
"""

from __future__ import annotations

import torch
from torch import Tensor

from .eager_bits import copied, decoded, half, look_up, runs, split, spread
from .eager_parts import Parts


def iq2_xxs(blocks: Tensor) -> Parts:
    groups = runs(blocks, 2, 66, 8)
    words = copied(groups[:, :, 4:], torch.int32).squeeze(-1)
    codes = look_up(groups[:, :, :4], "grid IQ2_XXS")
    return Parts(codes.mul_(_even_signs(words)), half(blocks, 0) * _quarters(words >> 28 & 15))


def iq2_xs(blocks: Tensor) -> Parts:
    words = copied(blocks[:, 2:66], torch.int16).to(torch.int32)
    codes = look_up(words & 511, "grid IQ2_XS")
    codes.mul_(look_up(words >> 9 & 127, "signs even"))
    return Parts(codes.view(-1, 16, 16), half(blocks, 0) * _quarters(spread(blocks[:, 66:], 4)))


def iq2_s(blocks: Tensor) -> Parts:
    index = _joined(blocks[:, 2:34], spread(blocks[:, 66:74], 2))
    codes = look_up(index, "grid IQ2_S").mul_(look_up(blocks[:, 34:66], "signs all"))
    return Parts(codes.view(-1, 16, 16), half(blocks, 0) * _quarters(spread(blocks[:, 74:], 4)))


def iq3_xxs(blocks: Tensor) -> Parts:
    words = copied(blocks[:, 66:], torch.int32)
    codes = look_up(blocks[:, 2:66], "grid IQ3_XXS").view(-1, 8, 32)
    return Parts(codes.mul_(_even_signs(words)), half(blocks, 0) * _quarters(words >> 28 & 15) * 2)


def iq3_s(blocks: Tensor) -> Parts:
    index = _joined(blocks[:, 2:66], spread(blocks[:, 66:74], 1))
    codes = look_up(index, "grid IQ3_S").mul_(look_up(blocks[:, 74:106], "signs all"))
    return Parts(codes.view(-1, 8, 32), half(blocks, 0) * _odd(spread(blocks[:, 106:], 4)))


def iq1_s(blocks: Tensor) -> Parts:
    words = copied(blocks[:, 34:], torch.int16).to(torch.int32)
    upper = split(words, 3, 4) | (words >> 12 & 8).unsqueeze(-1)
    codes = look_up(_joined(blocks[:, 2:34], upper.flatten(1)), "eighths IQ1_S")
    return Parts(codes.view(-1, 8, 32), half(blocks, 0) / 8 * _odd(words >> 12 & 7))


def iq1_m(blocks: Tensor) -> Parts:
    codes = look_up(_joined(blocks[:, :32], spread(blocks[:, 32:48], 4)), "eighths IQ1_S")
    words = copied(blocks[:, 48:], torch.int16)
    a, b, c, d = (words >> 12 & 15).unbind(1)
    scale = (a | b << 4 | c << 8 | d << 12).view(torch.float16).to(torch.float32).unsqueeze(1)
    return Parts(codes.view(-1, 16, 16), scale / 8 * _odd(split(words, 3, 4).flatten(1)))


def iq4_nl(blocks: Tensor) -> Parts:
    return Parts(decoded(blocks[:, 2:], "IQ4_NL").view(-1, 1, 32), half(blocks, 0))


def iq4_xs(blocks: Tensor) -> Parts:
    codes = decoded(runs(blocks, 8, 136, 16), "IQ4_NL").view(-1, 8, 32)
    scales = spread(blocks[:, 4:8], 4) | spread(blocks[:, 2:4], 2, at=4)
    return Parts(codes, half(blocks, 0) * scales.view(torch.int8).sub_(32))


def _joined(low: Tensor, upper: Tensor) -> Tensor:
    """int32 indices of 8 low bits and what lies above them."""
    return low.to(torch.int32).add_(upper, alpha=256)


def _even_signs(words: Tensor) -> Tensor:
    """(n, 8) int32 -> (n, 8, 32) int8, from the low 28 bits."""
    return look_up(split(words, 7, 4), "signs even")


def _quarters(scale: Tensor) -> Tensor:
    """(scale + 1/2) / 4, float32."""
    return (scale.to(torch.float32) + 0.5) * 0.25


def _odd(scale: Tensor) -> Tensor:
    """2 * scale + 1, of any integer dtype."""
    return scale * 2 + 1
