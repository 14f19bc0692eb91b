"""Files: the front end itself, the pack's extension and help pages, its workflow templates.

The catch-all of the front end comes last, since `/{name}` matches everything.
"""

from __future__ import annotations

import urllib.parse
from pathlib import Path
from typing import TYPE_CHECKING

from aiohttp import web

from ..folders import PACK_ROOT
from .answers import Refused
from .confine import PROGRAMS, content_type, existing, is_image, shown
from .sending import File

if TYPE_CHECKING:
    from .app import Server

PACK = "quantwire"
WEB = PACK_ROOT / "web"
TEMPLATES = PACK_ROOT / "workflows"
# Names in assets/ hold a hash of the content; everything else is asked for again, and answered with 304.
FOR_GOOD = "public, max-age=31536000, immutable"
ASK_AGAIN = "no-cache"
# The page may talk to this server and to nobody else. The front end compiles expressions and has inline scripts.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "connect-src 'self' data: blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)


def routes(server: Server) -> list[web.RouteDef]:
    root = server.config.front_end

    async def index(_: web.Request) -> web.StreamResponse:
        return _page(root / "index.html")

    async def front_end(request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        path = await server.in_thread(lambda: existing(root, name))
        if path.suffix.lower() in (".html", ".htm"):
            return _page(path)
        return _file(path, FOR_GOOD if name.startswith("assets/") else ASK_AGAIN)

    async def extension(request: web.Request) -> web.StreamResponse:
        return _file(await server.in_thread(lambda: existing(WEB, request.match_info["name"])), ASK_AGAIN)

    async def extensions(_: web.Request) -> web.Response:
        return web.json_response(await server.in_thread(lambda: [*_own(root), *_packs()]))

    async def template(request: web.Request) -> web.StreamResponse:
        return _file(await server.in_thread(lambda: _template(request.match_info["name"])), ASK_AGAIN)

    async def templates(_: web.Request) -> web.Response:
        return web.json_response({PACK: await server.in_thread(_template_names)})

    async def no_templates(_: web.Request) -> web.Response:
        return web.json_response([])  # ComfyUI's own, which come in another package and need other nodes

    async def no_logos(_: web.Request) -> web.Response:
        return web.json_response({})

    async def style(_: web.Request) -> web.Response:
        return web.Response(content_type="text/css")  # the page links it; the user's own is in the user data

    found = []
    for prefix in ("", "/api"):
        found += [
            web.get(f"{prefix}/extensions", extensions),
            web.get(f"{prefix}/extensions/{PACK}/{{name:.+}}", extension),
            web.get(f"{prefix}/workflow_templates", templates),
            web.get(f"{prefix}/workflow_templates/{PACK}/{{name:.+}}", template),
        ]
    return [
        *found,
        web.get(r"/templates/{name:index(\.[\w-]+)?\.json}", no_templates),
        web.get("/templates/index_logo.json", no_logos),
        web.get("/user.css", style),
        web.get("/", index),
        web.get("/{name:.+}", front_end),
    ]


def _template(name: str) -> Path:
    """A workflow or its picture; the folder holds the programs that make them, too."""
    path = existing(TEMPLATES, name)
    if path.suffix != ".json" and not is_image(path):
        raise Refused(404, f"There is no template '{shown(name)}'.")
    return path


def _page(path: Path) -> File:
    response = _file(path, "no-store")
    response.headers["Content-Security-Policy"] = POLICY
    return response


def _file(path: Path, cached: str) -> File:
    return File(path, headers={"Content-Type": content_type(path, PROGRAMS), "Cache-Control": cached})


def _own(root: Path) -> list[str]:
    below = root / "extensions"
    return sorted("/extensions/" + p.relative_to(below).as_posix() for p in below.rglob("*.js"))


def _packs() -> list[str]:
    names = sorted(p.relative_to(WEB).as_posix() for p in WEB.rglob("*.js") if p.is_file())
    return [f"/extensions/{PACK}/{urllib.parse.quote(name)}" for name in names]


def _template_names() -> list[str]:
    return sorted(p.stem for p in TEMPLATES.glob("*.json") if p.is_file())
