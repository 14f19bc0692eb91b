"""What the editor hears while things happen: ComfyUI's websocket, one bounded outbox per connection.

Anything may send from any thread: a message goes into the outboxes under a lock, and the event loop is woken once to
carry it out. What a newer message makes worthless (a preview, a progress, the length of the queue) replaces the older
one while that waits, so a slow reader gets fewer of them; what must arrive in full is counted, and a reader that lets
too much of it pile up, or takes nothing for STALL_S, is cut off. The editor connects anew and is told of the run that
is in progress.

Binary messages: a big-endian u32 of the kind, then for PREVIEW u32 2 for PNG or 1 for JPEG and the picture; for TEXT
u32 length and node id, then the text; for PREVIEW_WITH_METADATA u32 length and JSON, then the picture.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import struct
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from aiohttp import WSMsgType, web

_log = logging.getLogger(__name__)

MAX_CONNECTIONS = 64
MAX_WAITING = 2_000
"""Messages that must arrive in full, waiting for one connection."""
MAX_WAITING_NBYTES = 8 << 20
STALL_S = 30.0
"""How long one message may wait for a reader whose system buffers are full."""
CLOSE_S = 1.0
HEARTBEAT_S = 30.0
"""A computer that was put to sleep keeps its place no longer than one and a half of these."""
MAX_INCOMING_NBYTES = 64 << 10
"""The editor sends its feature flags and little else."""

PREVIEW, TEXT, PREVIEW_WITH_METADATA = 1, 3, 4


def jsonable(value: Any) -> Any:
    """The value as JSON that every browser parses: nan and infinity become null, tuples lists, strangers text."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(v) for v in value]
    return str(value)


class Outbox:
    """Messages on their way to one connection.

    Args:
        cut: ends the connection; called in the loop when too much waits.
    """

    def __init__(self, sid: str, loop: asyncio.AbstractEventLoop, cut: Callable[[], None] = lambda: None) -> None:
        self.sid = sid
        self.flags: Mapping[str, Any] = {}
        self._loop = loop
        self._cut = cut
        self._lock = threading.Lock()
        self._waiting: OrderedDict[Hashable, str | bytes] = OrderedDict()
        self._owed = 0
        self._owed_nbytes = 0
        self._count = 0
        self._ready = asyncio.Event()
        self._woken = False
        self.overflowed = False

    def put(self, message: str | bytes, replaces: Hashable | None = None) -> None:
        """From any thread.

        Args:
            replaces: what the message is news of; an older one of the same that still waits is dropped.
        """
        with self._lock:
            if self.overflowed:
                return
            if replaces is not None:
                self._waiting.pop(replaces, None)
                self._waiting[replaces] = message
            else:
                self._count += 1
                self._waiting[self._count] = message
                self._owed += 1
                self._owed_nbytes += len(message)
                if self._owed > MAX_WAITING or self._owed_nbytes > MAX_WAITING_NBYTES:
                    self.overflowed = True
                    self._waiting.clear()
            wake, self._woken = not self._woken, True
            overflowed = self.overflowed
        with contextlib.suppress(RuntimeError):  # the loop closed: the server is stopping
            if wake:
                self._loop.call_soon_threadsafe(self._ready.set)
            if overflowed:  # at once: the message on its way waits for the reader up to STALL_S
                self._loop.call_soon_threadsafe(self._cut)

    async def take(self) -> str | bytes | None:
        """The next message; None when the connection is to be cut off."""
        while True:
            with self._lock:
                if self.overflowed:
                    return None
                if self._waiting:
                    key, message = self._waiting.popitem(last=False)
                    if isinstance(key, int):
                        self._owed -= 1
                        self._owed_nbytes -= len(message)
                    return message
                self._woken = False
                self._ready.clear()
            await self._ready.wait()


class Events:
    """All connections, by the client id that the editor keeps over a reload.

    Args:
        features: what the server tells of itself in answer to a client's feature flags.
        joined: called with the outbox of a client that connects, to send what it must know.
        flagged: the same once its feature flags are known.
    """

    def __init__(
        self, features: Mapping[str, Any], joined: Callable[[Outbox], None], flagged: Callable[[Outbox], None]
    ) -> None:
        self.features = features
        self._joined = joined
        self._flagged = flagged
        self._lock = threading.Lock()
        self._outboxes: dict[str, list[Outbox]] = {}
        self._sockets: set[web.WebSocketResponse] = set()

    # --- sending, from any thread ---

    def send(self, event: str, data: Any, sid: str | None = None, replaces: Hashable | None = None) -> None:
        """To the connections of one client, or of all."""
        outboxes = self._of(sid)
        if outboxes:
            message = text_message(event, data)
            for outbox in outboxes:
                outbox.put(message, replaces)

    def send_text(self, text: str, node_id: str, sid: str) -> None:
        for outbox in self._of(sid):
            outbox.put(text_progress(text, node_id), ("text", node_id))

    def send_preview(self, jpeg: bytes, metadata: Mapping[str, Any], sid: str) -> None:
        """In the form that each connection said it understands."""
        for outbox in self._of(sid):
            outbox.put(preview_message(jpeg, metadata, outbox.flags), ("preview", metadata["node_id"]))

    def connected(self, sid: str) -> bool:
        return bool(self._of(sid))

    def _of(self, sid: str | None) -> list[Outbox]:
        with self._lock:
            if sid is None:
                return [outbox for found in self._outboxes.values() for outbox in found]
            return list(self._outboxes.get(sid, ()))

    # --- connections, in the event loop ---

    async def handle(self, request: web.Request) -> web.StreamResponse:
        with self._lock:
            count = sum(map(len, self._outboxes.values()))
        if count >= MAX_CONNECTIONS:
            text = f"{count} connections are open, which is as many as this server takes. Close an editor tab."
            return web.json_response({"error": text}, status=503)
        socket = web.WebSocketResponse(compress=False, max_msg_size=MAX_INCOMING_NBYTES, heartbeat=HEARTBEAT_S)
        await socket.prepare(request)
        sid = request.query.get("clientId", "")[:200] or uuid.uuid4().hex
        outbox = Outbox(sid, asyncio.get_running_loop(), lambda: _cut_off(request))
        # A copied browser tab has the same id as the first one, so one id may have several connections.
        with self._lock:
            self._outboxes.setdefault(sid, []).append(outbox)
        self._sockets.add(socket)
        self._joined(outbox)
        carrier = asyncio.create_task(self._carry(request, socket, outbox))
        try:
            await self._listen(socket, outbox)
        finally:
            self._sockets.discard(socket)
            self._leave(outbox)
            carrier.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await carrier
        return socket

    async def close(self) -> None:
        """End all connections, when the server stops."""
        ends = [asyncio.wait_for(socket.close(code=1001), CLOSE_S) for socket in list(self._sockets)]
        await asyncio.gather(*ends, return_exceptions=True)

    def _leave(self, outbox: Outbox) -> None:
        with self._lock:
            left = [other for other in self._outboxes.get(outbox.sid, ()) if other is not outbox]
            if left:
                self._outboxes[outbox.sid] = left
            else:
                self._outboxes.pop(outbox.sid, None)

    async def _listen(self, socket: web.WebSocketResponse, outbox: Outbox) -> None:
        async for message in socket:
            if message.type is not WSMsgType.TEXT:
                continue
            try:
                said = json.loads(message.data)
            except (ValueError, RecursionError):
                continue
            if isinstance(said, dict) and said.get("type") == "feature_flags":
                flags = said.get("data")
                outbox.flags = flags if isinstance(flags, dict) else {}
                outbox.put(text_message("feature_flags", self.features))
                self._flagged(outbox)

    async def _carry(self, request: web.Request, socket: web.WebSocketResponse, outbox: Outbox) -> None:
        try:
            while (message := await outbox.take()) is not None:
                send = socket.send_str(message) if isinstance(message, str) else socket.send_bytes(message)
                await asyncio.wait_for(send, STALL_S)
        except asyncio.TimeoutError:
            _cut_off(request)
        except (ConnectionError, RuntimeError):  # it went away; who listens to it sees that too
            pass


def _cut_off(request: web.Request) -> None:
    _log.warning("An editor that does not read what it is told was cut off.")
    # Not close(): its goodbye would wait behind everything that nobody reads.
    if request.transport is not None:
        request.transport.abort()


# --- the wire format ---------------------------------------------------------------------------------------------


def text_message(event: str, data: Any) -> str:
    return json.dumps({"type": event, "data": jsonable(data)}, allow_nan=False)


def text_progress(text: str, node_id: str) -> bytes:
    node = node_id.encode("utf-8", "replace")
    return struct.pack(">II", TEXT, len(node)) + node + text.encode("utf-8", "replace")


def preview_message(jpeg: bytes, metadata: Mapping[str, Any], flags: Mapping[str, Any]) -> bytes:
    if flags.get("supports_preview_metadata") is not True:
        return struct.pack(">II", PREVIEW, 1) + jpeg
    head = text_json({**metadata, "image_type": "image/jpeg"})
    return struct.pack(">II", PREVIEW_WITH_METADATA, len(head)) + head + jpeg


def text_json(data: Any) -> bytes:
    return json.dumps(jsonable(data), allow_nan=False).encode()
