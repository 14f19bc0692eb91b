"""`quantwire serve`: the real ComfyUI editor on the embedded host."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import importlib.util
import os
import signal
import socket
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..quantizers.errors import BackendUnavailable, FileError
from .paths import require_writable

if TYPE_CHECKING:
    from ..hosts.standalone.server.app import Server, ServerConfig

INSTALL = "Run `pip install quantwire[editor]`"
OK = 0
MAX_PORT = 65535
BACKLOG = 128


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "serve",
        parents=[common],
        help="serve the ComfyUI editor on this machine, without ComfyUI",
        description=(
            "Serve the ComfyUI editor (the package comfyui-frontend-package) on the embedded host. It listens on this "
            "machine alone unless --host says otherwise; there is no password. Ctrl-C stops it; runs that wait are "
            "there again after the next start."
        ),
    )
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="where to listen (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8199, help="0 takes any that is free (default: 8199)")
    parser.add_argument(
        "--models", type=Path, action="append", metavar="DIR", help="model folder, laid out as ComfyUI's"
    )
    for name, what in (("out", "where images go"), ("input", "uploads"), ("user", "settings, workflows and the queue")):
        default = Path(name)
        parser.add_argument(f"--{name}", type=Path, default=default, metavar="DIR", help=f"{what} (default: {default})")
    parser.add_argument("--front-end", type=Path, metavar="DIR", help="another front end: the folder of its index.html")
    parser.add_argument("--open", action="store_true", help="open the editor in the browser")
    parser.set_defaults(handler=handle)


def handle(args: argparse.Namespace, report: dict[str, Any]) -> int:
    if importlib.util.find_spec("aiohttp") is None:
        raise BackendUnavailable(f"serve: aiohttp is not installed.\n{INSTALL}.")
    config = _config(args)
    from ..hosts.standalone.server.app import Server, make_app

    listener = _listen(config.host, config.port)
    server = Server(replace(config, bound=str(listener.getsockname()[0])))
    with contextlib.closing(listener):
        return asyncio.run(_serve(make_app(server), server, listener, args.open))


def _config(args: argparse.Namespace) -> ServerConfig:
    """Raises FileError: a folder that is none, or cannot be written in; a port that is none."""
    from ..hosts.standalone.server.app import ServerConfig

    if not 0 <= args.port <= MAX_PORT:
        raise FileError(f"--port: {args.port} is none; ports are 1 to {MAX_PORT}, and 0 takes a free one.")
    for folder in args.models or []:
        if not folder.is_dir():
            raise FileError(f"--models: '{folder}' is not a folder.")
    for name in ("out", "input", "user"):
        require_writable(getattr(args, name), f"--{name}")
    return ServerConfig(
        front_end=_front_end(args.front_end),
        models=tuple(args.models or ()),
        output=args.out.absolute(),
        input=args.input.absolute(),
        user=args.user.absolute(),
        host=args.host,
        port=args.port,
    )


def _front_end(given: Path | None) -> Path:
    """The folder of the front end: the one named, or the installed package's.

    Raises:
        FileError: there is no index.html in the folder named.
        BackendUnavailable: the package is not installed.
    """
    if given is not None:
        if not (given / "index.html").is_file():
            raise FileError(
                f"--front-end: there is no index.html in '{given}'.\nName the folder `static` of a front end."
            )
        return given.absolute()
    spec = importlib.util.find_spec("comfyui_frontend_package")
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        if Path(place, "static", "index.html").is_file():
            return Path(place, "static")
    raise BackendUnavailable(
        f"serve: comfyui-frontend-package, the editor itself, is not installed.\n{INSTALL}, or name a folder with "
        "--front-end."
    )


def _listen(host: str, port: int) -> socket.socket:
    """The socket, before anything else is loaded: a port that is taken is said at once.

    Raises:
        FileError: the address is not this machine's, or the port is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as err:
        raise FileError(f"--host: '{host}' is no address of this machine ({err}).") from err
    listener = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # elsewhere it would share the port with another program
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as err:
        listener.close()
        raise _refused(host, port, err) from err
    return listener


def _refused(host: str, port: int, err: OSError) -> FileError:
    if err.errno == errno.EADDRINUSE:
        return FileError(f"--port: {port} is taken on {host}.\nStop the program that has it, or choose another --port.")
    if err.errno in (errno.EACCES, errno.EPERM):
        return FileError(f"--port: {port} may not be used by this user.\nChoose a --port above 1023.")
    return FileError(f"--host: '{host}' cannot be listened on: {err.strerror or err}.")


async def _serve(app: Any, server: Server, listener: socket.socket, open_browser: bool) -> int:
    from aiohttp import web

    from ..hosts.standalone.server.connections import IDLE_S, Connections, limit
    from ..hosts.standalone.server.security import is_any_address, is_loopback

    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in ("SIGINT", "SIGTERM"):
        with contextlib.suppress(NotImplementedError):  # Windows: Ctrl-C raises KeyboardInterrupt instead
            loop.add_signal_handler(getattr(signal, name), stopped.set)
    # Seconds: for open pages and downloads at the end, and for what a refused client goes on sending.
    runner = web.AppRunner(
        app,
        access_log=None,
        shutdown_timeout=1,
        lingering_time=5,
        keepalive_timeout=IDLE_S,
        handle_signals=False,
    )
    await runner.setup()
    accepting = None
    try:
        assert runner.server is not None
        connections = Connections(runner.server, limit())
        accepting = await loop.create_server(connections, sock=listener, backlog=BACKLOG)
        host, port = listener.getsockname()[:2]
        name = "127.0.0.1" if is_any_address(host) else f"[{host}]" if ":" in host else host
        url = f"http://{name}:{port}/"
        print(f"The editor is at {url}", flush=True)
        print(f"Images go to {server.config.output}. Ctrl-C stops the server.", flush=True)
        if not is_loopback(host):
            print("Warning: whoever reaches this address can use the server; it has no password.", flush=True)
        if open_browser:
            import webbrowser

            await asyncio.to_thread(webbrowser.open, url)
        await stopped.wait()
        print("Stopping.", flush=True)
    finally:
        if accepting is not None:
            accepting.close()
        await runner.cleanup()
    return OK
