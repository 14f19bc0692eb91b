"""SDNQ >= 0.2.8 (GPL-3.0-only): SD.Next's quantization of weights to 2 to 16 bits, whole or float.

Signed types: value = `scale * q`; unsigned types: value = `zero_point + scale * q`; scale and zero point are float32.
A group is `group_size` neighbours along K, or the whole row. With SVD, `svd_up @ svd_down` in the weight's dtype is
added; with Hadamard, K has been rotated in groups of a power of two and is rotated back at the end.

`qdata` is the library's own storage. Types of 8, 16 (and native float) bits: (N, K), or (N, K / group, group) when
grouped, or (K, N) when prepared for the quantized product. Every other width is packed over the flattened values:
uint8 words up to 7 bits (4 bits: even index in the low nibble), int16 words above 8. `meta` holds what the library's
dequantizer needs to know of them, so all of it can be rebuilt from JSON.

The library is only called, never copied: its licence is not ours, and what it computes is what its users expect. It is
imported at first use, with its compiling switched off: its import would otherwise compile a test kernel (18 s) and
raise the recompile limits of torch. Without that its import leaves every setting of torch as it was.
"""

from __future__ import annotations

from .quantizer import Sdnq


def make(format_id: str) -> Sdnq:
    return Sdnq(format_id)
