"""Runs that ended, the newest MAX_ENTRIES of them, packed in memory and each in a file of its own.

An entry holds the whole editor workflow twice, so in memory it is gzip (about a tenth), and a short summary beside it
answers the lists that the editor asks for after every run. The summaries lie in one more file, a line for each entry
with the checksum of its packed bytes: a start then reads 1,000 entries without unpacking one.
"""

from __future__ import annotations

import gzip
import json
import logging
import threading
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiohttp import web

from .answers import Refused, json_object
from .events import text_json
from .jobs import summary_of
from .queue import id_list, save

if TYPE_CHECKING:
    from .app import Server

_log = logging.getLogger(__name__)

MAX_ENTRIES = 1_000
SUMMARY_FORM = 1
"""Counted up when `summary_of` changes: older lines are then made anew."""
MAX_NBYTES = 64 << 20
"""Of packed entries."""


@dataclass(frozen=True)
class _Kept:
    summary: dict[str, Any]
    packed: bytes
    path: Path


class History:
    """Any thread.

    Args:
        folder: one `NUMBER-ID.json.gz` per entry, numbered in the order in which they ended.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._kept: dict[str, _Kept] = {}
        self._nbytes = 0
        self._count = 0
        self._index = folder / "summaries.jsonl"
        self._lines = 0

    def restore(self) -> None:
        """Read what earlier servers left."""
        known = self._read_index()
        for path in sorted(self._folder.glob("*.json.gz")):
            number, _, prompt_id = path.name.removesuffix(".json.gz").partition("-")
            try:
                packed = path.read_bytes()
                checksum, summary = known.get(path.name, (-1, {}))
                if zlib.crc32(packed) != checksum:
                    summary = summary_of(prompt_id, json.loads(gzip.decompress(packed)))
                kept = _Kept(summary, packed, path)
                self._count = max(self._count, int(number))
            except (OSError, EOFError, ValueError, KeyError, TypeError, RecursionError) as err:
                _log.warning("%s holds no run and is removed: %s", path, err)
                path.unlink(missing_ok=True)
                continue
            self._keep(prompt_id, kept)
        if self._kept or known:
            with self._lock:
                self._save_index()

    def _save_index(self) -> None:
        """Under the lock."""
        save(self._index, b"".join(map(_line, self._kept.values())))
        self._lines = len(self._kept)

    def _read_index(self) -> dict[str, tuple[int, dict[str, Any]]]:
        """File name -> checksum and summary. What cannot be read is made anew from the entries."""
        found: dict[str, tuple[int, dict[str, Any]]] = {}
        try:
            lines = self._index.read_bytes().splitlines()
        except OSError:
            return found
        for line in lines:
            try:
                form, name, checksum, summary = json.loads(line)
                if form == SUMMARY_FORM:
                    found[name] = int(checksum), dict(summary)
            except (ValueError, TypeError, RecursionError):  # the server was killed while it wrote the line
                continue
        return found

    def add(self, prompt_id: str, entry: dict[str, Any]) -> None:
        data = text_json(entry)
        packed = gzip.compress(data, compresslevel=5, mtime=0)
        self._count += 1
        path = self._folder / f"{self._count:010}-{prompt_id}.json.gz"
        save(path, packed)
        kept = _Kept(summary_of(prompt_id, json.loads(data)), packed, path)
        self._keep(prompt_id, kept)
        with self._lock:
            self._lines += 1
            if self._lines > 2 * MAX_ENTRIES:  # half of them are of entries that are gone
                self._save_index()
                return
            try:
                with self._index.open("ab") as file:
                    file.write(_line(kept))
            except OSError as err:
                _log.warning("%s cannot be written, so the next start takes longer: %s", self._index, err)

    def _keep(self, prompt_id: str, kept: _Kept) -> None:
        with self._lock:
            self._drop(prompt_id)
            self._kept[prompt_id] = kept
            self._nbytes += len(kept.packed)
            while len(self._kept) > MAX_ENTRIES or (self._nbytes > MAX_NBYTES and len(self._kept) > 1):
                self._drop(next(iter(self._kept)))

    def _drop(self, prompt_id: str) -> None:
        kept = self._kept.pop(prompt_id, None)
        if kept is not None:
            self._nbytes -= len(kept.packed)
            try:
                kept.path.unlink(missing_ok=True)
            except OSError as err:
                _log.warning("%s cannot be removed: %s", kept.path, err.strerror or err)

    def delete(self, prompt_ids: Iterable[str] | None = None) -> None:
        """Forget these runs, all with None."""
        with self._lock:
            for prompt_id in list(self._kept) if prompt_ids is None else prompt_ids:
                self._drop(prompt_id)
            self._save_index()

    def __contains__(self, prompt_id: str) -> bool:
        return prompt_id in self._kept

    def get(self, prompt_id: str) -> dict[str, Any] | None:
        text = self.text(prompt_id)
        return None if text is None else json.loads(text)

    def text(self, prompt_id: str) -> bytes | None:
        """JSON of one entry."""
        with self._lock:
            kept = self._kept.get(prompt_id)
        return None if kept is None else gzip.decompress(kept.packed)

    def summaries(self) -> list[dict[str, Any]]:
        """Of all runs, the oldest first; not to be changed."""
        with self._lock:
            return [kept.summary for kept in self._kept.values()]

    def texts(self, max_items: int | None = None, offset: int = -1) -> Iterator[bytes]:
        """The JSON object of entries by id in pieces, so that a long history is never in memory whole.

        Args:
            offset: of the first, counted from the oldest; negative: the last `max_items`.
        """
        with self._lock:
            kept = [(prompt_id, k.packed) for prompt_id, k in self._kept.items()]
        if max_items is not None:
            start = max(len(kept) - max_items, 0) if offset < 0 else offset
            kept = kept[start : start + max_items]
        elif offset > 0:
            kept = kept[offset:]
        yield b"{"
        for place, (prompt_id, packed) in enumerate(kept):
            yield b"," * (place > 0) + json.dumps(prompt_id).encode() + b":" + gzip.decompress(packed)
        yield b"}"


def _line(kept: _Kept) -> bytes:
    return text_json([SUMMARY_FORM, kept.path.name, zlib.crc32(kept.packed), kept.summary]) + b"\n"


# --- routes ------------------------------------------------------------------------------------------------------


def routes(server: Server) -> list[web.RouteDef]:
    async def get_history(request: web.Request) -> web.StreamResponse:
        max_items, offset = _whole(request, "max_items", None), _whole(request, "offset", -1)
        answer = web.StreamResponse(headers={"Content-Type": "application/json"})
        texts = server.run.history.texts(max_items, -1 if offset is None else offset)
        await answer.prepare(request)
        while text := await server.in_thread(lambda: next(texts, b"")):
            await answer.write(text)
        await answer.write_eof()
        return answer

    async def get_entry(request: web.Request) -> web.Response:
        prompt_id = request.match_info["prompt_id"]

        def read() -> bytes:
            text = server.run.history.text(prompt_id)
            return b"{}" if text is None else b"{%s: %s}" % (text_json(prompt_id), text)

        return web.Response(body=await server.in_thread(read), content_type="application/json")

    async def post_history(request: web.Request) -> web.Response:
        data = await json_object(request)
        if data.get("clear"):
            await server.in_thread(lambda: server.run.history.delete())
        if "delete" in data:
            ids = id_list(data["delete"], "delete")
            await server.in_thread(lambda: server.run.history.delete(ids))
        return web.Response()

    return [
        web.get("/history", get_history),
        web.get("/history/{prompt_id}", get_entry),
        web.post("/history", post_history),
    ]


def _whole(request: web.Request, name: str, default: int | None) -> int | None:
    text = request.query.get(name)
    if text is None:
        return default
    try:
        return int(text)
    except ValueError as err:
        raise Refused(400, f"{name} must be a whole number, got {text[:40]!r}.") from err
