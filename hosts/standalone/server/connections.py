"""Connections from their first byte: how many there are, and how long one may take to say what it wants.

aiohttp waits for a request as long as the client likes and counts nobody; each connection is an open file, and a
process that has no more of them cannot save a picture either.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

MAX_CONNECTIONS = 256
"""A browser opens six for each address, and one websocket for each tab."""
HEADER_S = 20.0
IDLE_S = 75.0
"""How long a connection without a request stays open, after the first one."""
_END = b"\r\n\r\n"


def limit() -> int:
    """MAX_CONNECTIONS, or half of the files that this process may open."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return MAX_CONNECTIONS
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MAX_CONNECTIONS if files == resource.RLIM_INFINITY else max(8, min(MAX_CONNECTIONS, files // 2))


class Connections:
    """Makes the protocol of each connection, for `loop.create_server`.

    When the places are taken, the oldest connection that did not say anything yet gives its own to the new one.

    Args:
        make: of the protocol that a connection then speaks.
    """

    def __init__(
        self, make: Callable[[], asyncio.Protocol], most: int = MAX_CONNECTIONS, header_s: float = HEADER_S
    ) -> None:
        self._make = make
        self._most = most
        self._header_s = header_s
        self._silent: dict[_Connection, None] = {}
        self._open: set[_Connection] = set()

    def __call__(self) -> asyncio.Protocol:
        return _Connection(self, self._make())

    def opened(self, connection: _Connection) -> None:
        if len(self._open) >= self._most:
            oldest = next(iter(self._silent), connection)
            oldest.abort()
            self.closed(oldest)
            if oldest is connection:
                return
        self._open.add(connection)
        self._silent[connection] = None
        connection.wait(self._header_s)

    def asked(self, connection: _Connection) -> None:
        self._silent.pop(connection, None)

    def closed(self, connection: _Connection) -> None:
        self._silent.pop(connection, None)
        self._open.discard(connection)


class _Connection(asyncio.Protocol):
    """Hands everything on to the protocol within; looks at the bytes until the first header is complete."""

    def __init__(self, owner: Connections, within: asyncio.Protocol) -> None:
        self._owner = owner
        self._within = within
        self._transport: asyncio.BaseTransport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._tail: bytes | None = b""

    def abort(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        with contextlib.suppress(AttributeError):
            self._transport.abort()  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]

    def wait(self, header_s: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(header_s, self.abort)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._within.connection_made(transport)
        self._owner.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._owner.closed(self)
        self._within.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._tail is not None:
            seen = self._tail + data
            self._tail = seen[1 - len(_END) :]
            if _END in seen:
                self._tail = None
                self._owner.asked(self)
                if self._timer is not None:
                    self._timer.cancel()
        self._within.data_received(data)

    def eof_received(self) -> bool | None:
        return self._within.eof_received()

    def pause_writing(self) -> None:
        self._within.pause_writing()

    def resume_writing(self) -> None:
        self._within.resume_writing()
