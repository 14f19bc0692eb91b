"""What every question about the graph starts from: a linter for the host that runs now, with what it does now."""

from __future__ import annotations

import sys
from typing import Any

from ...nodes import NODE_CLASS_MAPPINGS
from ...quantizers.compat.modes import HostName, OffloadMode
from .. import current
from ..lint.files import Headers
from ..lint.lint import Linter, Options

# From one question to the next; what a file's header told is kept with its time and size.
_headers = Headers()
MOST_HEADERS = 2000
MOST_NODES = 5000  # of a workflow, with those of its subgraphs; ten times the largest that was seen


def linter() -> Linter:
    """One that looks at this host's node classes and model folders, for the memory mode in force.

    Made anew for each question: classes are asked and folders listed once in its life.
    """
    if len(_headers.read) + len(_headers.layers) > MOST_HEADERS:
        _headers.read.clear()
        _headers.layers.clear()
    return Linter(_options(), NODE_CLASS_MAPPINGS)


def _options() -> Options:
    host: Any = current()
    if host.name == HostName.COMFYUI.value and "comfy.model_management" in sys.modules:
        from ..comfyui.memory import memory_state
        from ..comfyui.node_types import LiveFolders, LiveTypes

        mode, server, folders = memory_state().mode, LiveTypes(), LiveFolders()
        return Options(
            *(mode, HostName.COMFYUI),
            server=server,
            folders=folders,
            here=True,
            in_force=True,
            headers=_headers,
            most_nodes=MOST_NODES,
        )
    # Nothing is offloaded there unless an OffloadCompat of the graph sets a mode.
    return Options(
        *(OffloadMode.NONE, HostName.STANDALONE),
        folders=host,
        here=True,
        in_force=True,
        headers=_headers,
        most_nodes=MOST_NODES,
    )
