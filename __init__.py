"""quantwire: a ComfyUI node pack that wires quantization into generation graphs.

`NODE_CLASS_MAPPINGS` and `NODE_DISPLAY_NAME_MAPPINGS` are made at first access, so that importing the package costs
nothing and works without ComfyUI, in any test layout.
"""

from __future__ import annotations

import sys
from typing import Any

WEB_DIRECTORY = "./web"  # the editor's extension, and the nodes' help pages

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import nodes

        if "server" in sys.modules:  # ComfyUI's, which takes routes until it starts
            from .hosts.editor.routes import register

            register()
        return getattr(nodes, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
