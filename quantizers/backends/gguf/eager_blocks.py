"""GGUF blocks of 32 values and of K types, ternary and 4-bit float types, taken apart with torch operations.

Layouts: ggml-org/ggml, ggml-common.h; the arithmetic is that of gguf's quants.py. Offsets below are bytes of a block;
`d`, `m` and `dmin` are float16. A run of bytes that holds several fields a byte gives all first fields, then all
second ones.

    Q4_0   d 0, nibbles 2                     d * (q - 8)
    Q4_1   d 0, m 2, nibbles 4                d * q + m
    Q5_0   d 0, fifth bits 2, nibbles 6       d * (q - 16)
    Q5_1   d 0, m 2, fifth bits 4, nibbles 8  d * q + m
    Q8_0   d 0, int8 2                        d * q
    Q2_K   scales and minima 0, 2-bit 16, d 80, dmin 82
    Q3_K   third bits 0, 2-bit 32, 6-bit scales 96, d 108
    Q4_K   d 0, dmin 2, 6-bit scales and minima 4, nibbles 16
    Q5_K   d 0, dmin 2, 6-bit scales and minima 4, fifth bits 16, nibbles 48
    Q6_K   nibbles 0, upper 2 bits 128, int8 scales 192, d 208
    TQ1_0  five ternary digits a byte 0, four a byte 48, d 52
    TQ2_0  2-bit 0, d 64
    MXFP4  E8M0 scale 0, E2M1 1
    NVFP4  four E4M3 scales without a sign 0, E2M1 4
"""

from __future__ import annotations

import torch
from torch import Tensor

from .eager_bits import copied, decoded, fields, half, runs, spread
from .eager_parts import Parts


def q4_0(blocks: Tensor) -> Parts:
    return Parts(_signed(_nibbles(blocks, 2), 8), half(blocks, 0))


def q4_1(blocks: Tensor) -> Parts:
    return Parts(_nibbles(blocks, 4), half(blocks, 0), half(blocks, 2))


def q5_0(blocks: Tensor) -> Parts:
    return Parts(_signed(_fives(blocks, 2), 16), half(blocks, 0))


def q5_1(blocks: Tensor) -> Parts:
    return Parts(_fives(blocks, 4), half(blocks, 0), half(blocks, 2))


def q8_0(blocks: Tensor) -> Parts:
    return Parts(blocks[:, 2:].view(torch.int8).unsqueeze(1), half(blocks, 0))


def q2_k(blocks: Tensor) -> Parts:
    codes = fields(runs(blocks, 16, 80, 32), 2).view(-1, 16, 16)
    packed = blocks[:, :16]
    return Parts(codes, half(blocks, 80) * (packed & 15), -(half(blocks, 82) * (packed >> 4)))


def q3_k(blocks: Tensor) -> Parts:
    codes = fields(runs(blocks, 32, 96, 32), 2).view(-1, 16, 16)
    third = fields(blocks[:, :32], 1, at=2).view(-1, 16, 16)
    return Parts(_signed(codes.bitwise_or_(third), 4), half(blocks, 108) * _q3_k_scales(blocks[:, 96:108]))


def q4_k(blocks: Tensor) -> Parts:
    codes = fields(runs(blocks, 16, 144, 32), 4).view(-1, 8, 32)
    return Parts(codes, *_scales_and_minima(blocks))


def q5_k(blocks: Tensor) -> Parts:
    codes = fields(runs(blocks, 48, 176, 32), 4).view(-1, 8, 32)
    return Parts(codes.bitwise_or_(fields(blocks[:, 16:48], 1, at=4)), *_scales_and_minima(blocks))


def q6_k(blocks: Tensor) -> Parts:
    codes = fields(runs(blocks, 0, 128, 64), 4).view(-1, 16, 16)
    upper = fields(runs(blocks, 128, 192, 32), 2, at=4).view(-1, 16, 16)
    scales = half(blocks, 208) * blocks[:, 192:208].view(torch.int8)
    return Parts(_signed(codes.bitwise_or_(upper), 32), scales)


def tq1_0(blocks: Tensor) -> Parts:
    """A byte is a fraction of 256 with digits to base 3: times 3, the carry is the first digit, and so on."""
    runs = (_powers(blocks[:, :32], 5), _powers(blocks[:, 32:48], 5), _powers(blocks[:, 48:52], 4))
    digits = torch.cat(runs, dim=1).to(torch.int16).mul_(3).bitwise_right_shift_(8).sub_(1)
    return Parts(digits.unsqueeze(1), half(blocks, 52))


def tq2_0(blocks: Tensor) -> Parts:
    codes = fields(runs(blocks, 0, 64, 32), 2).view(-1, 1, 256)
    return Parts(_signed(codes, 1), half(blocks, 64))


def mxfp4(blocks: Tensor) -> Parts:
    return Parts(decoded(blocks[:, 1:], "E2M1").view(-1, 1, 32), _half_e8m0(blocks[:, :1]))


def nvfp4(blocks: Tensor) -> Parts:
    codes = decoded(runs(blocks, 4, 36, 8), "E2M1").view(-1, 4, 16)
    return Parts(codes, _half_e4m3(blocks[:, :4]))


def _signed(codes: Tensor, zero: int) -> Tensor:
    """uint8 codes below 128 as int8, less `zero`; in place."""
    return codes.view(torch.int8).sub_(zero)


def _nibbles(blocks: Tensor, at: int) -> Tensor:
    return fields(blocks[:, at:], 4).view(-1, 1, 32)


def _fives(blocks: Tensor, at: int) -> Tensor:
    """(n, 1, 32) uint8: 4 bytes of fifth bits, bit i for value i, then the nibbles."""
    fifth = spread(blocks[:, at : at + 4], 1, at=4)
    return _nibbles(blocks, at + 4).bitwise_or_(fifth.unsqueeze(1))


def _scales_and_minima(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and shifts of the 8 groups of Q4_K and Q5_K, (n, 8) float32 each.

    Twelve bytes a, b, c of four: the low 6 bits of a and b are scales and minima 0 to 3. Those of 4 to 7 have their
    low 4 bits in the nibbles of c and the upper 2 at the top of a and b. Four bytes are handled as one int32.
    """
    a, b, c = copied(blocks[:, 4:16], torch.int32).unbind(1)
    scales = (a & 0x3F3F3F3F, (c & 0x0F0F0F0F) | (a >> 2 & 0x30303030))
    minima = (b & 0x3F3F3F3F, (c >> 4 & 0x0F0F0F0F) | (b >> 2 & 0x30303030))
    six_bits = torch.stack((*scales, *minima), dim=1).view(torch.uint8)
    return half(blocks, 0) * six_bits[:, :8], -(half(blocks, 2) * six_bits[:, 8:])


def _q3_k_scales(packed: Tensor) -> Tensor:
    """(n, 12) bytes a, b, c of four -> (n, 16) int8.

    Low 4 bits: the low nibbles of a and b, then their high ones. Upper 2 bits: the four fields of c, one after another.
    """
    a, b, c = copied(packed, torch.int32).unbind(1)
    low = (a, b, a >> 4, b >> 4)
    upper = (c << 4, c << 2, c, c >> 2)
    six_bits = [(x & 0x0F0F0F0F) | (y & 0x30303030) for x, y in zip(low, upper, strict=True)]
    return _signed(torch.stack(six_bits, dim=1).view(torch.uint8), 32)


def _powers(x: Tensor, count: int) -> Tensor:
    """(n, m) bytes -> (n, count * m): times 1, 3, 9 and so on, modulo 256."""
    return torch.cat([x * 3**i for i in range(count)], dim=1)


def _half_e8m0(exponent: Tensor) -> Tensor:
    """2 ** (e - 128), float32: the codes are doubled. 0 and 1 are below the normal numbers; 255 is not nan here."""
    e = exponent.to(torch.int32)
    return torch.where(e < 2, (e + 1) * 0x00200000, (e - 1) << 23).view(torch.float32)


def _half_e4m3(x: Tensor) -> Tensor:
    """Half of an E4M3 number, float32; the sign bit counts for nothing, except that 0x7F is 0 and 0xFF is 240.

    Its bits moved up by 7 are a float16 whose exponent is 8 too low (bias 15 instead of 7), subnormals included.
    """
    bits = (x.to(torch.int16) & 0x7F) << 7
    return bits.view(torch.float16).to(torch.float32).mul_(128).masked_fill_(x == 0x7F, 0.0)
