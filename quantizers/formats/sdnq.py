"""sdnq: see `backends/sdnq`."""

from __future__ import annotations

from .declare import Backend

BACKEND = Backend(
    name="sdnq", package="sdnq", licence="GPL-3.0-only", about="", entries=(), arguments={}, selectors=(), chosen={}
)
