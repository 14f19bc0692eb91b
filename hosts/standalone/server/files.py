"""GET /view: files of the output, input and temp folders.

A browser shows pictures, sounds and videos; everything else is downloaded, so that a file from somewhere cannot run a
script as the editor's own page.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from aiohttp import web

from . import pictures
from .answers import Refused
from .confine import SHOWN, content_type, existing
from .sending import File

if TYPE_CHECKING:
    from .app import Server

ANNOTATED = re.compile(r"(.+?) ?\[(output|input|temp)\]")
DEFAULT_QUALITY = 90
DOWNLOAD = "application/octet-stream"


def find(server: Server, filename: str, kind: str, subfolder: str) -> Path:
    """The file that ComfyUI's three words for one mean; a name such as `x.png [input]` brings its own type.

    Raises:
        Refused: a word that is not known, a name that leads out, no such file.
    """
    if match := ANNOTATED.fullmatch(filename):
        filename, kind = match[1], match[2]
    folder = server.config.folder(kind)
    if folder is None:
        raise Refused(400, f"type '{kind[:50]}' is none of output, input, temp.")
    subfolder = subfolder.strip("/") if subfolder != "/" else ""
    return existing(folder, f"{subfolder}/{filename}" if subfolder else filename)


def routes(server: Server) -> list[web.RouteDef]:
    async def view(request: web.Request) -> web.StreamResponse:
        query = request.query
        if not query.get("filename"):
            raise Refused(400, "The parameter filename is missing.")
        if query.get("subfolder", "").startswith("/"):
            raise Refused(403, "The subfolder leads out of its folder.")
        path = await server.in_thread(
            lambda: find(server, query["filename"], query.get("type", "output"), query.get("subfolder", ""))
        )
        which = query.get("channel", "rgba")
        if "preview" in query:
            form, quality = _preview(query["preview"], which)
            body, kind = await server.with_pictures(lambda: pictures.smaller(path, form, quality, which == "rgb"))
            return web.Response(body=body, content_type=kind, headers={"Content-Disposition": _named(path)})
        if which in ("rgb", "a"):
            body = await server.with_pictures(lambda: pictures.channel(path, which))
            return web.Response(body=body, content_type="image/png", headers={"Content-Disposition": _named(path)})
        kind = content_type(path, SHOWN)
        disposition = _named(path, "attachment" if kind == DOWNLOAD else "inline")
        # A preview's name is used again after a restart, which empties the temp folder.
        headers = {"Content-Type": kind, "Content-Disposition": disposition, "Cache-Control": "no-cache"}
        return File(path, headers=headers)

    return [web.get("/view", view)]


def _preview(asked: str, which: str) -> tuple[str, int]:
    """Form and quality of `webp;90`; what is asked otherwise is WebP, which has transparency."""
    form, _, quality = asked.partition(";")
    form = form if form in ("webp", "jpeg") and "a" not in which.replace("rgba", "") else "webp"
    number = int(quality) if quality.isascii() and quality.isdigit() and len(quality) < 4 else DEFAULT_QUALITY
    return form, min(max(number, 1), 100)


def _named(path: Path, how: str = "inline") -> str:
    """Both forms of the name, since the plain one holds neither quotes nor other alphabets."""
    plain = re.sub(r'[^ -~]|["\\]', "_", path.name)
    return f"{how}; filename=\"{plain}\"; filename*=UTF-8''{quote(path.name, safe='')}"
