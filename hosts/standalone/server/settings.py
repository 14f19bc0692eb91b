"""The editor's settings, one JSON file, and who the user is: one, since the server has no accounts."""

from __future__ import annotations

import json
import logging
import math
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiohttp import web

from .answers import Refused, json_body, json_object
from .confine import write_atomically

if TYPE_CHECKING:
    from .app import Server

FILE = "comfy.settings.json"
MAX_NBYTES = 4 << 20  # of the whole file
# News about ComfyUI's own releases, asked of a server of theirs: they are not about this program.
DEFAULTS: dict[str, Any] = {"Comfy.Notification.ShowVersionUpdates": False}
log = logging.getLogger(__name__)


class Settings:
    """Read at every question: another program, or a person, may edit the file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()

    def read(self) -> dict[str, Any]:
        try:
            text = self._path.read_text(encoding="utf-8")
            data = json.loads(text, parse_constant=_null_for, parse_float=_null_for)
        except FileNotFoundError:
            return {}
        except (ValueError, RecursionError) as err:
            return self._aside(str(err))
        return data if isinstance(data, dict) else self._aside("no JSON object")

    def update(self, changed: dict[str, Any]) -> None:
        """Raises Refused: 413, the file would become too large."""
        with self._lock:
            data = json.dumps({**self.read(), **changed}, indent=4).encode()
            if len(data) > MAX_NBYTES:
                raise Refused(413, f"The settings would have {len(data)} bytes; at most {MAX_NBYTES} are kept.")
            write_atomically(self._path, data)

    def _aside(self, why: str) -> dict[str, Any]:
        """A damaged file is kept under another name, for the next change would overwrite it."""
        kept = self._path.with_suffix(".damaged.json")
        log.error("%s cannot be read (%s): it is now %s, and the settings start anew", self._path, why, kept.name)
        self._path.replace(kept)
        return {}


def _null_for(text: str) -> float | None:
    """None for NaN and infinite numbers, which Python writes and at which the page's parser fails, with the editor."""
    number = float(text)
    return number if math.isfinite(number) else None


def routes(server: Server) -> list[web.RouteDef]:
    settings = Settings(server.config.user_data / FILE)

    async def get_all(_: web.Request) -> web.Response:
        return web.json_response({**DEFAULTS, **await server.in_thread(settings.read)})

    async def get_one(request: web.Request) -> web.Response:
        stored = await server.in_thread(settings.read)
        return web.json_response({**DEFAULTS, **stored}.get(request.match_info["id"]))

    async def set_some(request: web.Request) -> web.Response:
        changed = await json_object(request)
        await server.in_thread(lambda: settings.update(changed))
        return web.Response()

    async def set_one(request: web.Request) -> web.Response:
        changed = {request.match_info["id"]: await json_body(request)}
        await server.in_thread(lambda: settings.update(changed))
        return web.Response()

    async def users(_: web.Request) -> web.Response:
        return web.json_response({"storage": "server", "migrated": True})

    async def add_user(_: web.Request) -> web.Response:
        raise Refused(400, "This server has one user.")

    return [
        web.get("/settings", get_all),
        web.post("/settings", set_some),
        web.get("/settings/{id}", get_one),
        web.post("/settings/{id}", set_one),
        web.get("/users", users),
        web.post("/users", add_user),
    ]
