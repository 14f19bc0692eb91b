"""bitsandbytes >= 0.46 (MIT): LLM.int8, NF4 and FP4 (on a CPU FP4 needs 0.47, which the probe finds out).

Int8: row i of the weight is `qdata[i] * absmax[i] / 127`. Activations are quantized row by row too, except the columns
in which any value exceeds the threshold (default 6.0), which are multiplied in 16 bits (LLM.int8, arXiv:2208.07339).
4-bit: the flattened weight in blocks of 64 (or 32 to 4096); value = codebook[nibble] * absmax[block], even index in the
high nibble (QLoRA, arXiv:2305.14314); with double quantization the absmax are themselves 8-bit, in blocks of 256. The
packed bytes may be seen as another dtype (`bits4-quant-storage`), for sharding tools that move only one dtype.

Quantizing is the library's own, on plain tensors. So are the products on CUDA (`int8_scaled_mm`, `gemm_4bit`); on a CPU
the pack's own compute the same, at every shape. `Linear4bit` and `Linear8bitLt` are made by `to_native` only.
"""

from __future__ import annotations

from .four_bit import BnbFourBit
from .int8 import BnbInt8


def make(format_id: str) -> BnbInt8 | BnbFourBit:
    return BnbInt8() if format_id == "bnb-int8" else BnbFourBit(format_id.removeprefix("bnb-"))
