"""torchao: see `backends/torchao`."""

from __future__ import annotations

from .declare import Argument, Backend, FormatEntry

_TYPES = ("int8wo", "int8dyn", "int4wo", "float8wo")

BACKEND = Backend(
    name="torchao",
    package="torchao",
    licence="BSD-3-Clause",
    about="PyTorch's own quantization: 8-bit rows, weight only or with 8-bit activations, and 4-bit groups.",
    entries=(
        FormatEntry("torchao-int8wo", "torchao", "make", 8, "int8, one scale a row or group, weight only"),
        FormatEntry("torchao-int8dyn", "torchao", "make", 8, "int8, one scale a row, activations in int8 by token"),
        FormatEntry("torchao-int4wo", "torchao", "make", 4, "uint4 with scale and offset, groups of 128, weight only"),
        FormatEntry("torchao-float8wo", "torchao", "make", 8, "float8 e4m3, one scale a row or group, weight only"),
    ),
    arguments={
        "type": Argument("int8wo", _TYPES, effect="What the weights, and with int8dyn the activations, become."),
        "group-size": Argument(
            None,
            ("32", "64", "128"),
            "int",
            applies=("torchao-int8wo", "torchao-int4wo", "torchao-float8wo"),
            effect="Weights along K that share a scale; without it 128 for int4wo, the whole row for the others.",
        ),
    },
    selectors=("type",),
    chosen={f"torchao-{t}": {"type": t} for t in _TYPES},
    tensors=("scale", "zero_point"),
)
