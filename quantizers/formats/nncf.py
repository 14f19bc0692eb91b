"""nncf: see `backends/nncf`."""

from __future__ import annotations

from .declare import Argument, Backend, FormatEntry

_TYPES = ("int8-sym", "int8-asym", "int4-sym", "int4-asym", "nf4")
_FOUR_BIT = ("nncf-int4-sym", "nncf-int4-asym", "nncf-nf4")

BACKEND = Backend(
    name="nncf",
    package="nncf",
    licence="Apache-2.0",
    about="OpenVINO's weight compression: integers or nf4 with float16 scales, weight only. Its telemetry stays off.",
    entries=(
        FormatEntry("nncf-int8-sym", "nncf", "make", 8, "int8, one scale a row, weight only"),
        FormatEntry("nncf-int8-asym", "nncf", "make", 8, "uint8 with zero point, one scale a row, weight only"),
        FormatEntry("nncf-int4-sym", "nncf", "make", 4, "int4, groups of 128, weight only"),
        FormatEntry("nncf-int4-asym", "nncf", "make", 4, "uint4 with zero point, groups of 128, weight only"),
        FormatEntry("nncf-nf4", "nncf", "make", 4, "NormalFloat4, groups of 128, weight only"),
    ),
    arguments={
        "type": Argument("int8-asym", _TYPES, effect="The numbers that weights become; int8-asym is NNCF's default."),
        "group-size": Argument(
            128,
            ("-1", "16", "32", "64", "128", "256"),
            "int",
            applies=_FOUR_BIT,
            effect="Weights along K that share a scale; -1 is the whole row.",
        ),
        "ratio": Argument(
            1.0,
            (),
            "float",
            0,
            1,
            _FOUR_BIT,
            "NNCF's share of weights that become 4-bit. Only 1, all of them, is possible: to choose the others NNCF "
            "compares all layers of a traced model; name them in `exclude` instead.",
        ),
    },
    selectors=("type",),
    chosen={f"nncf-{t}": {"type": t} for t in _TYPES},
    tensors=("scale", "zero_point"),
)
