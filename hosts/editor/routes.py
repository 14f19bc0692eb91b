"""What the web extension asks of the server: routes under /quantwire, in ComfyUI's server and in the embedded one.

Handlers work in threads of their own, in the context that they are called in (`hosts.use` chooses the host there), so
that the event loop waits for no disk. Each route has one thread: ten open tabs do not read the same headers at once,
and no size waits for a check, whose first one imports the libraries of the formats in the graph. Everything heavy is
imported when a route is first asked.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import json
import logging
import sys
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ...quantizers.errors import QuantwireError

log = logging.getLogger(__name__)
Handler = Callable[[Any], Awaitable[Any]]
MOST_NBYTES = 32 << 20  # of a request; the largest workflow that was seen has 5 MiB
MOST_WAITING = 16
MOST_NAMES = 300


class BadRequest(Exception):
    """A request that no answer can be given to.

    Attributes:
        status: of HTTP.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@functools.cache
def _worker(work: str) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, f"quantwire-{work}")


_waiting = 0


def waiting() -> int:
    """Questions that have no answer yet."""
    return _waiting


async def _answer(request: Any, work: Callable[[dict[str, Any]], Any], thread: str, body: bool = True) -> Any:
    """The JSON answer of `work`, which gets the request's JSON."""
    from aiohttp import web

    global _waiting
    try:
        asked = await _read(request) if body else {}
        if _waiting >= MOST_WAITING:
            raise BadRequest("The server has not answered earlier questions yet; ask again later.", 429)
        _waiting += 1
        try:
            run = functools.partial(contextvars.copy_context().run, work, asked)
            text = await asyncio.get_running_loop().run_in_executor(_worker(thread), lambda: json.dumps(run()))
        finally:
            _waiting -= 1
        return web.Response(text=text, content_type="application/json")
    except BadRequest as err:
        return web.json_response({"error": str(err)}, status=err.status)
    except QuantwireError as err:
        return web.json_response({"error": str(err)}, status=400)
    except Exception as err:  # the editor goes on without an answer; the log says why
        log.exception("quantwire: %s failed", request.path)
        return web.json_response({"error": f"{type(err).__name__}: {err}"}, status=500)


async def _read(request: Any) -> dict[str, Any]:
    """Raises BadRequest: too large, or no JSON object."""
    # A page of another site can send text and forms to this machine without asking first, and JSON not.
    if request.content_type != "application/json":
        raise BadRequest(f"The request is {request.content_type}; application/json is needed.", 415)
    parts: list[bytes] = []
    size = 0
    async for part in request.content.iter_chunked(1 << 16):
        size += len(part)
        if size > MOST_NBYTES:
            raise BadRequest(f"The request is larger than {MOST_NBYTES >> 20} MiB.", 413)
        parts.append(part)
    try:
        data: Any = json.loads(b"".join(parts))
    except (ValueError, RecursionError) as err:
        raise BadRequest(f"The request is no JSON: {err}") from err
    if not isinstance(data, dict):
        raise BadRequest("The request is JSON, but no object.")
    return data


async def check(request: Any) -> Any:
    """POST /quantwire/check {"workflow": editor form, "prompt"?: API form}; also with a prompt alone."""

    def work(asked: dict[str, Any]) -> Any:
        from .check import check

        workflow, prompt = asked.get("workflow"), asked.get("prompt")
        if not isinstance(workflow if workflow is not None else prompt, dict):
            raise BadRequest("A `workflow` (the editor's form) or a `prompt` (API form) is needed, as a JSON object.")
        return check(workflow, prompt)

    return await _answer(request, work, "check")


async def sizes(request: Any) -> Any:
    """POST /quantwire/sizes {"workflow" or "prompt", "node" or "nodes": [...], "formats"?: [...]}.

    With `node` the answer is that node's; with `nodes` it is {"nodes": {id: answer}}.
    """

    def work(asked: dict[str, Any]) -> Any:
        from .sizes import sizes

        data = asked.get("workflow") if asked.get("workflow") is not None else asked.get("prompt")
        if not isinstance(data, dict):
            raise BadRequest("A `workflow` (the editor's form) or a `prompt` (API form) is needed, as a JSON object.")
        nodes = _strings(asked, "nodes") if "node" not in asked else [str(asked["node"])]
        if nodes is None:
            raise BadRequest("A `node`, or a list of `nodes`, is needed.")
        found = sizes(data, nodes, _strings(asked, "formats"))
        return found[nodes[0]] if "node" in asked else {"nodes": found}

    return await _answer(request, work, "sizes")


async def formats(request: Any) -> Any:
    """GET /quantwire/formats[?probe=1]."""
    probe = request.query.get("probe") == "1"

    def work(_: dict[str, Any]) -> Any:
        from .formats import formats

        return formats(probe)

    return await _answer(request, work, "check" if probe else "sizes", body=False)


def _strings(asked: dict[str, Any], name: str) -> list[str] | None:
    found = asked.get(name)
    if found is None:
        return None
    if not isinstance(found, list) or len(found) > MOST_NAMES or not all(isinstance(x, (str, int)) for x in found):
        raise BadRequest(f"`{name}` is no list of at most {MOST_NAMES} names.")
    return [str(x) for x in found]


ROUTES: list[tuple[str, str, Handler]] = [
    ("POST", "/quantwire/check", check),
    ("POST", "/quantwire/sizes", sizes),
    ("GET", "/quantwire/formats", formats),
]


def register() -> bool:
    """Add the routes to ComfyUI's server, where this process runs one that has not started; False where it does not."""
    module = sys.modules.get("server")
    server = getattr(getattr(module, "PromptServer", None), "instance", None)
    routes = getattr(server, "routes", None)
    if routes is None or any(getattr(r, "path", "").startswith("/quantwire/") for r in routes):
        return False
    for method, path, handler in ROUTES:
        routes.route(method, path)(handler)
    return True
