"""Lists of model files, for the editor's model library; headers and pictures beside the files, never the files."""

from __future__ import annotations

import json
import os
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiohttp import web

from ..folders import ALIASES
from .answers import Refused
from .confine import inside, is_image, shown, stat_of

if TYPE_CHECKING:
    from .app import Server

# ComfyUI's folders that the editor's library knows, whether there are files in them or not.
KNOWN = (
    "checkpoints", "clip_vision", "controlnet", "diffusion_models", "embeddings", "loras", "style_models",
    "text_encoders", "upscale_models", "vae", "vae_approx",
)  # fmt: skip
SUFFIXES = (".ckpt", ".gguf", ".pkl", ".pt", ".pt2", ".pth", ".bin", ".safetensors", ".sft")
MAX_HEADER_NBYTES = 1 << 20
PREVIEW_PIXELS = 512


def folders(server: Server) -> dict[str, list[str]]:
    """Folder name -> where it is searched."""
    old = {name for names in ALIASES.values() for name in names} - set(ALIASES)
    roots = [root for root in server.folders.models if root.is_dir()]
    there = {p.name for root in roots for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")}
    return {name: [str(p.absolute()) for p in _searched(server, name)] for name in sorted({*KNOWN, *there} - old)}


def _searched(server: Server, folder: str) -> list[Path]:
    return [path.parent for path in server.folders.candidates(folder, "x")]


def routes(server: Server) -> list[web.RouteDef]:
    async def names(_: web.Request) -> web.Response:
        return web.json_response(list(await server.in_thread(lambda: folders(server))))

    async def files(request: web.Request) -> web.Response:
        folder = await _known(server, request)
        return web.json_response(await server.in_thread(lambda: server.folders.list_files(folder, SUFFIXES)))

    async def embeddings(_: web.Request) -> web.Response:
        found = await server.in_thread(lambda: server.folders.list_files("embeddings", SUFFIXES))
        return web.json_response([str(Path(name).with_suffix("")) for name in found])

    async def described(_: web.Request) -> web.Response:
        found = await server.in_thread(lambda: folders(server))
        return web.json_response([{"name": n, "folders": p, "extensions": list(SUFFIXES)} for n, p in found.items()])

    async def listed(request: web.Request) -> web.Response:
        folder = await _known(server, request)
        return web.json_response(await server.in_thread(lambda: _listed(server, folder)))

    async def preview(request: web.Request) -> web.Response:
        folder = await _known(server, request)
        body = await server.with_pictures(lambda: _preview(server, folder, request.match_info))
        return web.Response(body=body, content_type="image/webp")

    async def metadata(request: web.Request) -> web.Response:
        folder = await _known(server, request)
        return web.json_response(await server.in_thread(lambda: _metadata(server, folder, request.query)))

    return [
        web.get("/models", names),
        web.get("/models/{folder}", files),
        web.get("/embeddings", embeddings),
        web.get("/experiment/models", described),
        web.get("/experiment/models/{folder}", listed),
        web.get("/experiment/models/preview/{folder}/{index}/{name:.+}", preview),
        web.get("/view_metadata/{folder}", metadata),
    ]


async def _known(server: Server, request: web.Request) -> str:
    name = request.match_info["folder"]
    if name not in await server.in_thread(lambda: folders(server)):
        raise Refused(404, f"There is no model folder '{shown(name)}'.")
    return name


def _listed(server: Server, folder: str) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for name in server.folders.list_files(folder, SUFFIXES):
        for index, path in enumerate(server.folders.candidates(folder, name)):
            if path.is_file() and (s := stat_of(path)):
                made.append(
                    {"name": name, "pathIndex": index, "size": s.st_size, "modified": s.st_mtime, "created": s.st_ctime}
                )
                break
    return made


def _preview(server: Server, folder: str, match: Any) -> bytes:
    """The picture beside a model file, `x.png` or `x.preview.png`, as a small WebP."""
    from .pictures import opened

    roots, name = _searched(server, folder), match["name"]
    index = int(match["index"]) if match["index"].isdigit() and len(match["index"]) < 4 else -1
    if not 0 <= index < len(roots):
        raise Refused(404, "There is no such folder.")
    model = inside(roots[index], name)
    wanted = {model.stem, f"{model.stem}.preview"}
    beside = sorted(model.parent.glob("*")) if model.parent.is_dir() else []
    found = next((p for p in beside if p.stem in wanted and is_image(p) and p.is_file()), None)
    if found is None:
        raise Refused(404, f"There is no picture of '{shown(name)}'.")
    inside(roots[index], found.relative_to(roots[index]).as_posix())  # it may be a link
    with opened(found) as image:
        image.thumbnail((PREVIEW_PIXELS, PREVIEW_PIXELS))
        buffer = BytesIO()
        image.convert("RGBA").save(buffer, "WEBP")
    return buffer.getvalue()


def _metadata(server: Server, folder: str, query: Any) -> dict[str, Any]:
    """The `__metadata__` of a safetensors file."""
    name = query.get("filename", "")
    if not name.endswith(".safetensors"):
        raise Refused(404, "Only .safetensors files have metadata here.")
    # isfile, since it says False, too, for a name that no file system takes.
    path = next((p for p in server.folders.candidates(folder, name) if os.path.isfile(p)), None)
    if path is None:
        raise Refused(404, f"There is no '{shown(name)}'.")
    with path.open("rb") as file:
        nbytes = int.from_bytes(file.read(8), "little")
        if nbytes > MAX_HEADER_NBYTES:
            raise Refused(404, f"The header of '{shown(name)}' is longer than {MAX_HEADER_NBYTES} bytes.")
        header = file.read(nbytes)
    try:
        found = json.loads(header).get("__metadata__")
    except (ValueError, AttributeError, RecursionError) as err:
        raise Refused(404, f"'{shown(name)}' is not a safetensors file.") from err
    if found is None:
        raise Refused(404, f"'{shown(name)}' has no metadata.")
    return found
