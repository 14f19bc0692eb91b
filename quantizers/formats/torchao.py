"""torchao: see `backends/torchao`."""

from __future__ import annotations

from .declare import Backend

BACKEND = Backend(
    name="torchao",
    package="torchao",
    licence="BSD-3-Clause",
    about="",
    entries=(),
    arguments={},
    selectors=(),
    chosen={},
)
