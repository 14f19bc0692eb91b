"""optimum-quanto: see `backends/quanto`."""

from __future__ import annotations

from .declare import Argument, Backend, FormatEntry

_WEIGHTS = ("qint8", "qint4", "qint2", "qfloat8-e4m3fn", "qfloat8-e5m2")
_GROUPED = ("quanto-qint4", "quanto-qint2")
_GROUPS = ("32", "64", "96", "128", "256")

BACKEND = Backend(
    name="quanto",
    package="optimum-quanto",
    licence="Apache-2.0",
    about="Weight-only quantization with one scale a row, or a scale and a shift a group.",
    entries=(
        FormatEntry("quanto-qint8", "quanto", "make", 8, "int8, one scale a row, weight only"),
        FormatEntry("quanto-qint4", "quanto", "make", 4, "uint4 with shift, groups of up to 128, weight only"),
        FormatEntry("quanto-qint2", "quanto", "make", 2, "uint2 with shift, groups of up to 128, weight only"),
        FormatEntry("quanto-qfloat8-e4m3fn", "quanto", "make", 8, "float8 e4m3, one scale a row, weight only"),
        FormatEntry("quanto-qfloat8-e5m2", "quanto", "make", 8, "float8 e5m2, one scale a row, weight only"),
    ),
    arguments={
        "weights": Argument("qint8", _WEIGHTS, effect="Weight type."),
        "group-size": Argument(
            None,
            _GROUPS,
            "int",
            applies=_GROUPED,
            effect="Values along K that share a scale and a shift; default: rows of up to 128 are one group, longer "
            "ones take the first of 128, 96, 64, 32 that divides K.",
        ),
        "activations": Argument(
            "none",
            ("none",),
            effect="Weights only; the one choice.",
            why="quanto's activation scales come from calibration with sample inputs, which nothing here runs.",
        ),
    },
    selectors=("weights",),
    chosen={f"quanto-{w}": {"weights": w} for w in _WEIGHTS},
    tensors=("scale", "shift"),
)
