"""layerwise: see `backends/layerwise`."""

from __future__ import annotations

from .declare import Argument, Backend, FormatEntry

_TYPES = ("fp8-e4m3fn", "fp8-e5m2")

BACKEND = Backend(
    name="layerwise",
    package="",
    licence="",
    about="Weights are stored as 8-bit floats without a scale and cast back layer by layer; needs only torch.",
    entries=(
        FormatEntry("layerwise-fp8-e4m3fn", "layerwise", "make", 8, "float8 e4m3 by plain cast, no scale"),
        FormatEntry("layerwise-fp8-e5m2", "layerwise", "make", 8, "float8 e5m2 by plain cast, no scale"),
    ),
    arguments={
        "type": Argument(
            "fp8-e4m3fn", _TYPES, effect="e4m3fn is finer and ends at 448, e5m2 is coarser and ends at 57344."
        )
    },
    selectors=("type",),
    chosen={f"layerwise-{t}": {"type": t} for t in _TYPES},
)
