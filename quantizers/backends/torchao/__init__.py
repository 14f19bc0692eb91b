"""torchao >= 0.18 (BSD-3-Clause): int8, float8 and 4-bit weights, and int8 activations.

int8wo, int8dyn: `qdata * scale`, one float32 scale a row (or a group along K), `scale = absmax / 127.5`. int8dyn also
quantizes activations so, token by token, and multiplies in int8.
float8wo: `qdata * scale` with `scale = absmax / 448`.
int4wo: `(nibble - 8) * scale + zero_point` by groups along K, scale and zero point in the weight's dtype ("tinygemm").

Quantizing is the library's: its tensor classes (`Int8Tensor.from_hp`, `Float8Tensor.from_hp`) or, for int4wo, the
functions that `Int4OpaqueTensor.from_hp` calls; their plain tensors are kept. `quantize_` with a config was not chosen:
the configs change inductor's settings for the whole process. `Int4Tensor`, the library's default for int4wo, was not
chosen because it needs the package mslk and CUDA; `Int4OpaqueTensor` is its format for the CPU, and `int4.py` says why
its packed bytes are not what is kept.
"""

from __future__ import annotations

from .float8 import TorchaoFloat8
from .int4 import TorchaoInt4
from .int8 import TorchaoInt8


def make(format_id: str) -> TorchaoInt8 | TorchaoInt4 | TorchaoFloat8:
    if format_id == "torchao-int4wo":
        return TorchaoInt4()
    return TorchaoFloat8() if format_id == "torchao-float8wo" else TorchaoInt8(format_id)
