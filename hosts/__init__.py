"""Which host the pack runs in: the real ComfyUI where its modules are loaded, else the embedded one."""

from __future__ import annotations

import contextlib
import contextvars
import sys
from collections.abc import Iterator

from .base import Host

_active: contextvars.ContextVar[Host | None] = contextvars.ContextVar("quantwire_host", default=None)


def current() -> Host:
    """The host in force: the one set by `use`, else ComfyUI if this process runs it, else the default embedded one."""
    host = _active.get()
    if host is None:
        host = _default()
        _active.set(host)
    return host


def _default() -> Host:
    if "comfy.model_management" in sys.modules:
        from .comfyui.host import ComfyHost

        return ComfyHost()
    from .standalone.host import StandaloneHost

    return StandaloneHost()


@contextlib.contextmanager
def use(host: Host) -> Iterator[Host]:
    """Make `host` the current one inside the block."""
    token = _active.set(host)
    try:
        yield host
    finally:
        _active.reset(token)
