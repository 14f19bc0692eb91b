"""nncf: see `backends/nncf`."""

from __future__ import annotations

from .declare import Backend

BACKEND = Backend(
    name="nncf", package="nncf", licence="Apache-2.0", about="", entries=(), arguments={}, selectors=(), chosen={}
)
