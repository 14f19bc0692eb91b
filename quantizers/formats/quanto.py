"""optimum-quanto: see `backends/quanto`."""

from __future__ import annotations

from .declare import Argument, Backend, FormatEntry

_WEIGHTS = ("qint8", "qint4", "qfloat8-e4m3fn")

BACKEND = Backend(
    name="quanto",
    package="optimum-quanto",
    licence="Apache-2.0",
    about="Weight-only quantization with one scale a row, or a scale and a shift a group.",
    entries=(
        FormatEntry("quanto-qint8", "quanto", "make", 8, "int8, one scale a row, weight only"),
        FormatEntry("quanto-qint4", "quanto", "make", 4, "uint4 with shift, groups of up to 128, weight only"),
        FormatEntry("quanto-qfloat8-e4m3fn", "quanto", "make", 8, "float8 e4m3, one scale a row, weight only"),
    ),
    arguments={"weights": Argument("qint8", _WEIGHTS, effect="Weight type.")},
    selectors=("weights",),
    chosen={f"quanto-{w}": {"weights": w} for w in _WEIGHTS},
    tensors=("scale", "shift"),
)
