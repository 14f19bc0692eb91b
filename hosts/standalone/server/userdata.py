"""Files that the editor keeps for its user: workflows, bookmarks, style. ComfyUI's routes, within one folder.

Names arrive with `%2F` for `/` in one part of the path; they are decoded once, so a name that holds `%2e%2e` after
that is a file of this odd name and leads nowhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiohttp import web

from .answers import Refused
from .confine import existing, inside, shown, stat_of, write_atomically
from .sending import File

if TYPE_CHECKING:
    from .app import Server

MAX_LISTED = 20_000
STYLE = "user.css"  # the one file that the page itself loads


def routes(server: Server) -> list[web.RouteDef]:
    root = server.config.user_data

    async def listing(request: web.Request) -> web.Response:
        query = request.query
        if not query.get("dir"):
            raise Refused(400, "The parameter dir is missing.")
        recurse, full, split = (query.get(name, "").lower() == "true" for name in ("recurse", "full_info", "split"))
        return web.json_response(await server.in_thread(lambda: _list(root, query["dir"], recurse, full, split)))

    async def listing_v2(request: web.Request) -> web.Response:
        name = request.query.get("path", "").strip("/")
        return web.json_response(await server.in_thread(lambda: _tree(root, name)))

    async def read(request: web.Request) -> web.StreamResponse:
        name = request.match_info["file"]
        path = await server.in_thread(lambda: existing(root, name))
        style = name == STYLE
        kind = "text/css" if style else "application/json" if path.suffix == ".json" else "application/octet-stream"
        disposition = "inline" if style else "attachment"
        headers = {"Content-Type": kind, "Content-Disposition": disposition, "Cache-Control": "no-cache"}
        return File(path, headers=headers)

    async def write(request: web.Request) -> web.Response:
        name, body = request.match_info["file"], await request.read()

        def save() -> Any:
            path = inside(root, name)
            _require_free(path, name, request)
            write_atomically(path, body)
            return _answer(path, root, request)

        return web.json_response(await server.in_thread(save))

    async def delete(request: web.Request) -> web.Response:
        name = request.match_info["file"]
        await server.in_thread(lambda: _delete(root, name))
        return web.Response(status=204)

    async def move(request: web.Request) -> web.Response:
        def rename() -> Any:
            source = existing(root, request.match_info["file"])
            target = inside(root, request.match_info["dest"])
            _require_free(target, request.match_info["dest"], request)
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(source, target)
            except OSError as err:
                raise Refused(400, f"'{shown(target.name)}' cannot be written: {err.strerror or err}.") from err
            return _answer(target, root, request)

        return web.json_response(await server.in_thread(rename))

    return [
        web.get("/userdata", listing),
        web.get("/v2/userdata", listing_v2),
        web.get("/userdata/{file}", read),
        web.post("/userdata/{file}", write),
        web.delete("/userdata/{file}", delete),
        web.post("/userdata/{file}/move/{dest}", move),
    ]


def _require_free(path: Path, name: str, request: web.Request) -> None:
    if path.is_dir():
        raise Refused(400, f"'{shown(name)}' is a folder.")
    if request.query.get("overwrite", "true") == "false" and path.exists():
        raise Refused(409, f"There is a '{shown(name)}' already.")


def _answer(path: Path, root: Path, request: web.Request) -> Any:
    full = request.query.get("full_info", "false").lower() == "true"
    return (_info(path, root) if full else None) or path.relative_to(root).as_posix()


def _delete(root: Path, name: str) -> None:
    try:
        existing(root, name).unlink()
    except FileNotFoundError as err:  # somebody else was quicker
        raise Refused(404, f"There is no '{shown(name)}'.") from err
    except OSError as err:
        raise Refused(403, f"'{shown(name)}' cannot be deleted: {err.strerror or err}.") from err


def _info(path: Path, root: Path) -> dict[str, Any] | None:
    """None for a file that was deleted since it was listed."""
    if (stat := stat_of(path)) is None:
        return None
    times = {"modified": int(stat.st_mtime * 1000), "created": int(stat.st_ctime * 1000)}
    return {"path": path.relative_to(root).as_posix(), "size": stat.st_size, **times}


def _folder(root: Path, name: str) -> Path:
    path = inside(root, name.rstrip("/"), empty=True)
    if not path.is_dir():
        raise Refused(404, f"There is no folder '{shown(name)}'.")
    return path


def _list(root: Path, name: str, recurse: bool, full: bool, split: bool) -> list[Any]:
    folder = _folder(root, name if name not in (".", "/") else "")
    files = [p for p in _below(folder, recurse) if p.is_file()]
    if full:
        return [info for p in files if (info := _info(p, folder))]
    names = [p.relative_to(folder).as_posix() for p in files]
    return [[n, *n.split("/")] for n in names] if split else names


def _tree(root: Path, name: str) -> list[dict[str, Any]]:
    """Everything below a folder, folders first; `path` counts from the user's folder."""
    if not name and not root.is_dir():
        return []
    made: list[dict[str, Any]] = []
    for path in _below(_folder(root, name), True):
        entry: dict[str, Any] = {"name": path.name, "path": path.relative_to(root).as_posix()}
        if path.is_dir():
            made.append({**entry, "type": "directory"})
        elif stat := stat_of(path):
            made.append({**entry, "type": "file", "size": stat.st_size, "modified": stat.st_mtime})
    return sorted(made, key=lambda e: (e["type"] != "directory", e["name"].lower()))


def _below(folder: Path, recurse: bool) -> Iterator[Path]:
    """Files and folders, sorted; no hidden names, no links, of which some lead out."""
    count = 0
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith(".")) if recurse else []
        for name in (*folders, *sorted(n for n in names if not n.startswith("."))):
            path = Path(here, name)
            if not path.is_symlink():
                yield path
                count += 1
            if count >= MAX_LISTED:
                return
