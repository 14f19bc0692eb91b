"""Reference page of the HTTP routes: those of `quantwire serve`, and those that the pack adds to ComfyUI's server too.

Asked from the route modules themselves, with a server that is never started.
"""

from __future__ import annotations

import importlib
import inspect
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from quantwire.hosts.editor.routes import ROUTES
from quantwire.hosts.standalone.server import app as server_app

INTRO = """\
# Server routes

Made from the route modules of `hosts/standalone/server` and from `hosts/editor/routes.py`.

`quantwire serve` answers every route at `/x` and at `/api/x`, as ComfyUI does. It listens on this machine alone unless
`--host` says otherwise, and has no password: a request whose `Host` is not the server's, or whose `Origin` or
`Sec-Fetch-Site` is another site's, is refused with 403. A body above {body} MiB, and an upload above {upload} MiB, is
refused with 413. Errors are JSON.

The routes below `/quantwire` are the pack's own. ComfyUI's server has them too, where the pack is installed.
"""


def pages() -> dict[str, str | bytes]:
    """Path under docs/ -> Markdown."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        config = server_app.ServerConfig(front_end=root, output=root / "out", input=root / "in", user=root / "user")
        server = server_app.Server(config)
        parts = [INTRO.format(body=config.max_body_nbytes >> 20, upload=config.max_upload_nbytes >> 20)]
        parts += ["## The pack's own routes", "", *_table((m, p, h) for m, p, h in ROUTES), ""]
        for name in server_app.ROUTE_MODULES:
            module = importlib.import_module(f"{server_app.__package__}.{name}")
            routes = [(r.method, r.path, r.handler) for r in module.routes(server)]
            if not any(path.startswith("/quantwire/") for _, path, _ in routes):
                parts += [f"## {name.replace('_', ' ').capitalize()}", "", _about(module), "", *_table(routes), ""]
    return {"reference/routes.md": "\n".join(parts)}


def _table(routes: Iterable[tuple[str, str, Callable[..., Any]]]) -> list[str]:
    rows = [(method, path, _what(handler)) for method, path, handler in routes]
    if not any(what for *_, what in rows):
        return ["| method | path |", "| --- | --- |", *(f"| {method} | `{path}` |" for method, path, _ in rows)]
    head = ["| method | path | what it does |", "| --- | --- | --- |"]
    return [*head, *(f"| {method} | `{path}` | {what} |" for method, path, what in rows)]


def _about(module: Any) -> str:
    """The first paragraph of a module's docstring."""
    return " ".join((inspect.getdoc(module) or "").split("\n\n", 1)[0].split())


def _what(handler: Any) -> str:
    """The first sentence that a handler says of itself, if it does."""
    while hasattr(handler, "func"):
        handler = handler.func
    text = " ".join((inspect.getdoc(handler) or "").split())
    return re.split(r"(?<=[.])\s", text, maxsplit=1)[0].replace("|", "\\|")
