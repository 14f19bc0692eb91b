"""Which host the pack runs in."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

from .base import Host

_active: contextvars.ContextVar[Host | None] = contextvars.ContextVar("quantwire_host", default=None)


def current() -> Host:
    """The host in force: the one set by `use`, else the default embedded one."""
    host = _active.get()
    if host is None:
        from .standalone.host import StandaloneHost

        host = StandaloneHost()
        _active.set(host)
    return host


@contextlib.contextmanager
def use(host: Host) -> Iterator[Host]:
    """Make `host` the current one inside the block."""
    token = _active.set(host)
    try:
        yield host
    finally:
        _active.reset(token)
