"""What each backend offers, as data: formats, URI arguments and their effect, package and licence.

One module a backend, each with a `BACKEND`. The registry, URIs, `quantwire help`, the nodes and the host layouts
read these; importing them imports no library.
"""

from __future__ import annotations

from . import bnb, comfy, gguf, layerwise, nncf, quanto, sdnq, torchao
from .declare import Argument, Backend, FormatEntry

BACKENDS: tuple[Backend, ...] = (
    bnb.BACKEND,
    quanto.BACKEND,
    comfy.BACKEND,
    sdnq.BACKEND,
    torchao.BACKEND,
    nncf.BACKEND,
    layerwise.BACKEND,
    gguf.BACKEND,
)

__all__ = ["BACKENDS", "Argument", "Backend", "FormatEntry"]
