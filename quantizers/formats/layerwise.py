"""layerwise: see `backends/layerwise`."""

from __future__ import annotations

from .declare import Backend

BACKEND = Backend(name="layerwise", package="", licence="", about="", entries=(), arguments={}, selectors=(), chosen={})
