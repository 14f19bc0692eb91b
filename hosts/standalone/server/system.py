"""What the editor asks about the server: machine, features, logs, translations, folders."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiohttp import web

from ..folders import PACK_ROOT
from .answers import Refused, json_object
from .confine import stat_of
from .logs import TERMINAL

if TYPE_CHECKING:
    from .app import Server, ServerConfig

log = logging.getLogger(__name__)
# Of the ComfyUI whose interface this server has: front ends show it, and choose by it what to ask.
COMFYUI_VERSION = "0.33.0"
LOCALES = PACK_ROOT / "locales"


def features(config: ServerConfig) -> dict[str, Any]:
    """Feature flags, for GET /features and for the websocket's handshake."""
    return {
        "supports_preview_metadata": True,
        "supports_model_type_tags": True,
        "max_upload_size": config.max_upload_nbytes,
        "node_replacements": True,
        "assets": False,
    }


def routes(server: Server) -> list[web.RouteDef]:
    lines = server.log.lines

    async def system_stats(_: web.Request) -> web.Response:
        return web.json_response(await server.with_host(lambda: stats(server)))

    async def get_features(_: web.Request) -> web.Response:
        return web.json_response(features(server.config))

    async def i18n(_: web.Request) -> web.Response:
        return web.json_response(await server.in_thread(translations))

    async def nothing(_: web.Request) -> web.Response:
        return web.json_response({})  # no replaced nodes, no subgraphs to share

    async def logs(_: web.Request) -> web.Response:
        return web.json_response("".join(f"{line['t']} - {line['m']}" for line in lines))

    async def raw_logs(_: web.Request) -> web.Response:
        return web.json_response({"entries": list(lines), "size": TERMINAL})

    async def subscribe(request: web.Request) -> web.Response:
        asked = await json_object(request)
        if not isinstance(client_id := asked.get("clientId"), str):
            raise Refused(400, "clientId is the id of a websocket's client.")
        server.log.subscribe(client_id[:200], asked.get("enabled") is True)
        return web.Response()

    async def folder_paths(_: web.Request) -> web.Response:
        from .model_files import folders

        return web.json_response(await server.in_thread(lambda: folders(server)))

    async def files(request: web.Request) -> web.Response:
        kind = request.match_info["kind"]
        folder = server.config.folder(kind)
        if folder is None:
            raise Refused(400, f"'{kind[:50]}' is none of output, input, temp.")
        return web.json_response(await server.in_thread(lambda: [f"{n} [{kind}]" for n in _newest_first(folder)]))

    return [
        web.get("/system_stats", system_stats),
        web.get("/features", get_features),
        web.get("/i18n", i18n),
        web.get("/node_replacements", nothing),
        web.get("/global_subgraphs", nothing),
        web.get("/internal/logs", logs),
        web.get("/internal/logs/raw", raw_logs),
        web.patch("/internal/logs/subscribe", subscribe),
        web.get("/internal/folder_paths", folder_paths),
        web.get("/internal/files/{kind}", files),
    ]


def stats(server: Server) -> dict[str, Any]:
    """As ComfyUI's; the command line and paths stay here."""
    import torch

    from ....quantizers.errors import SpecError
    from ....quantizers.memory import device_facts, ram

    try:
        free, total = ram()
    except SpecError:  # an operating system that does not tell
        free = total = 0
    names = ["cuda:0"] if torch.cuda.is_available() else []
    devices = []
    for name in [*names, "cpu"]:
        device = torch.device(name)
        try:
            facts = device_facts(device)
        except SpecError:
            continue
        sizes = {"vram_total": facts.total_nbytes, "vram_free": facts.free_nbytes}
        devices.append({
            "name": name if name == "cpu" else f"{name} {facts.name}", "type": device.type, "index": device.index or 0,
            **sizes, "torch_vram_total": facts.total_nbytes, "torch_vram_free": facts.free_nbytes,
        })  # fmt: skip
    return {
        "system": {
            "os": sys.platform,
            "ram_total": total,
            "ram_free": free,
            "comfyui_version": COMFYUI_VERSION,
            "required_frontend_version": front_end_version(server.config.front_end),
            "installed_templates_version": None,
            "required_templates_version": None,
            "comfy_package_versions": [],
            "python_version": sys.version,
            "pytorch_version": torch.__version__,
            "embedded_python": False,
            "deploy_environment": "quantwire",
            "argv": ["quantwire", "serve"],
        },
        "devices": devices,
    }


def front_end_version(folder: Path) -> str | None:
    """Version of the front end that is served, from the package metadata beside its folder; None where there is none.

    The editor warns of a front end older than the one that this names, so it must not be that of another copy.
    """
    packages = folder.resolve().parents[1]
    for found in importlib.metadata.distributions(name="comfyui-frontend-package", path=[str(packages)]):
        return found.version
    return None


def translations(root: Path = LOCALES) -> dict[str, Any]:
    """`locales/<language>/*.json` merged as ComfyUI does: main.json, and the other files under their names."""
    made: dict[str, Any] = {}
    for folder in sorted(p for p in root.glob("*") if p.is_dir()):
        language: dict[str, Any] = {}
        for name in ("main", "nodeDefs", "commands", "settings"):
            data = _read_json(folder / f"{name}.json")
            language |= data if name == "main" else {name: data} if data else {}
        if language:
            made[folder.name] = language
    return made


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as err:
        log.error("%s is not JSON and is left out: %s", path, err)
        return {}
    return data if isinstance(data, dict) else {}


def _newest_first(folder: Path) -> list[str]:
    found = [p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")] if folder.is_dir() else []
    dated = [(-stat.st_mtime, p.name) for p in found if (stat := stat_of(p))]
    return [name for _, name in sorted(dated)]
