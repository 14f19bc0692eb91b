"""The embedded server: the real editor over the embedded host, as ComfyUI's own server does it.

A module of routes has `routes(server) -> list[web.RouteDef]`; each is served at `/x` and at `/api/x`, as in ComfyUI.
torch is loaded in a thread once the server listens: the page itself needs none of it.
"""

from __future__ import annotations

import asyncio
import contextvars
import importlib
import logging
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from aiohttp import web

from ... import use
from ..folders import ModelFolders, default_model_folders
from . import security
from .logs import TERMINAL, LogLines, kept

if TYPE_CHECKING:
    from ..host import StandaloneHost
    from .runs import RunState

T = TypeVar("T")
log = logging.getLogger(__name__)

HOST, PORT = "127.0.0.1", 8199
MIB = 1 << 20
# Modules of routes beside this one; the catch-all of the front end is added after them.
ROUTE_MODULES = (
    "runs", "queue", "history", "jobs",
    "definitions", "system", "files", "uploads", "userdata", "settings", "model_files", "help", "pack",
)  # fmt: skip

PREVIEW = re.compile(r"preview_\d+_\.png(\.tmp)?")  # as PreviewImage names them
EMPTY_FILES = {"comfy.templates.json": "[]", "user.css": "", "workflows/.index.json": '{"favorites": []}'}


@dataclass(frozen=True)
class ServerConfig:
    """Where the server listens and what it may touch.

    Attributes:
        models: as `StandaloneHost`'s.
        user: its folder `default` holds what the editor keeps, as in ComfyUI; beside it is what the server keeps.
        front_end: folder of the front end's index.html.
        host: address or name to listen on, as it was given.
        bound: the address that this turned out to be; empty: the same.
        max_body_nbytes: of a request, but for uploads.
    """

    front_end: Path
    models: tuple[Path, ...] = ()
    output: Path = Path("out")
    input: Path = Path("input")
    user: Path = Path("user")
    host: str = HOST
    bound: str = ""
    port: int = PORT
    max_body_nbytes: int = 32 * MIB
    max_upload_nbytes: int = 100 * MIB

    @property
    def temp(self) -> Path:
        """Where PreviewImage writes."""
        return self.output / "temp"

    @property
    def user_data(self) -> Path:
        """The one user's own folder: what the editor may read and write by name."""
        return self.user / "default"

    def folder(self, kind: str) -> Path | None:
        """The folder of ComfyUI's `type`: output, input or temp."""
        return {"output": self.output, "input": self.input, "temp": self.temp}.get(kind)


class Server:
    """What the routes share."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.folders = ModelFolders(config.models or default_model_folders())
        self.log = LogLines(self._tell_line)
        self._lock = threading.Lock()
        self._host: StandaloneHost | None = None
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="quantwire-host")
        self._picture_threads = ThreadPoolExecutor(2, thread_name_prefix="quantwire-picture")

    @property
    def host(self) -> StandaloneHost:
        """Loads torch at first use, which takes seconds: ask from a thread."""
        with self._lock:
            if self._host is None:
                from ..host import StandaloneHost

                self._host = StandaloneHost(self.folders.models, self.config.output)
            return self._host

    @cached_property
    def node_classes(self) -> dict[str, type]:
        """The classes that run here: those of the embedded host and of the pack."""
        from ....nodes import NODE_CLASS_MAPPINGS
        from ..core_nodes import CORE_NODES

        return {**CORE_NODES, **NODE_CLASS_MAPPINGS}

    @cached_property
    def run(self) -> RunState:
        """The queue and its worker."""
        from .runs import RunState

        return RunState(self)

    def _tell_line(self, line: dict[str, str], client_id: str) -> None:
        self.run.events.send("logs", {"entries": [line], "size": TERMINAL}, client_id)

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Run something that waits for a disk beside the event loop."""
        return await asyncio.to_thread(work)

    async def with_pictures(self, work: Callable[[], T]) -> T:
        """Run something that unpacks pictures, few at a time: each may take hundreds of megabytes."""
        return await asyncio.get_running_loop().run_in_executor(self._picture_threads, work)

    async def with_host(self, work: Callable[[], T]) -> T:
        """Run something beside the event loop with this server's host as the current one.

        On threads of its own: while the first call waits for torch, files must still be sent.
        """

        def run() -> T:
            with use(self.host):
                return work()

        return await asyncio.get_running_loop().run_in_executor(self._threads, contextvars.copy_context().run, run)


def make_app(server: Server) -> web.Application:
    """The application; starting it starts the worker, closing it stops it."""
    app = web.Application(
        client_max_size=server.config.max_body_nbytes,
        middlewares=[security.answers, security.gate(server.config), security.bodies],
    )
    for name in ROUTE_MODULES:
        module = importlib.import_module(f".{name}", __package__)
        app.add_routes(_twice(module.routes(server)))
    from .front_end import routes as front_end_routes

    app.add_routes(front_end_routes(server))
    app.on_shutdown.append(lambda _: server.run.events.close())
    app.cleanup_ctx.append(lambda _: _life(server))
    return app


def _twice(routes: Iterable[web.RouteDef]) -> Iterable[web.RouteDef]:
    """Each route at its path and below /api; one that is written with /api is there alone, as in ComfyUI."""
    for route in routes:
        yield route
        if not route.path.startswith("/api/"):
            yield web.RouteDef(route.method, f"/api{route.path}", route.handler, route.kwargs)


async def _life(server: Server) -> AsyncIterator[None]:
    await server.in_thread(lambda: _make_folders(server.config))
    await server.in_thread(lambda: _empty_temp(server.config.temp))
    server.run.start()
    threading.Thread(target=_load, args=(server,), name="quantwire-load", daemon=True).start()
    with kept(server.log):
        yield
    await server.in_thread(server.run.stop)
    await server.in_thread(lambda: _empty_temp(server.config.temp))


def _make_folders(config: ServerConfig) -> None:
    """What the editor looks into at its start: a browser reports every 404 as an error."""
    data = config.user_data
    for folder in (config.output, config.input, config.temp, data / "workflows", data / "subgraphs"):
        folder.mkdir(parents=True, exist_ok=True)
    for name, empty in EMPTY_FILES.items():
        if not (data / name).exists():
            (data / name).write_text(empty, encoding="utf-8")


def _empty_temp(folder: Path) -> None:
    """Previews are for the runs of one server, as in ComfyUI; what else lies in the folder is not ours."""
    for path in folder.iterdir():
        if PREVIEW.fullmatch(path.name) and not path.is_dir():
            try:
                path.unlink(missing_ok=True)
            except OSError as err:
                log.warning("%s cannot be removed: %s", path, err.strerror or err)


def _load(server: Server) -> None:
    """What the first question would wait for, and then the first run."""
    from .runs_libraries import load

    try:
        with use(server.host):
            _ = server.node_classes
        load()
    except Exception:  # the route or run that needs it fails with the same reason, in words
        log.exception("the host could not be loaded")
