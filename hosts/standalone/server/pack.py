"""The pack's own routes, `/quantwire/...`, which the editor's extension asks; the same ones ComfyUI gets."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from aiohttp import web

from ... import use
from .answers import Refused

if TYPE_CHECKING:
    from .app import Server

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
ANSWER_S = 120  # the handlers read their body themselves


def routes(server: Server) -> list[web.RouteDef]:
    from ...editor.routes import ROUTES

    return [web.RouteDef(method, path, _with_host(server, handler), {}) for method, path, handler in ROUTES]


def _with_host(server: Server, handler: Handler) -> Handler:
    """The handler with this server's host as the current one, in the threads that it starts too."""

    @functools.wraps(handler)
    async def handle(request: web.Request) -> web.StreamResponse:
        host = await server.with_host(lambda: server.host)
        # The editor waits for the list of formats before it opens a workflow, and that takes none of the libraries.
        if request.method != "GET" or request.query:
            await server.run.libraries()
        with use(host):
            try:
                return await asyncio.wait_for(handler(request), ANSWER_S)
            except asyncio.TimeoutError as err:
                raise Refused(408, f"The question was not complete, or not answered, within {ANSWER_S} s.") from err

    return handle
