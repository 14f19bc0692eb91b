"""A file as an answer, and no other file than that."""

from __future__ import annotations

from typing import Any

from aiohttp import hdrs, web


class File(web.FileResponse):
    """aiohttp's, without its search for `x.png.gz` beside `x.png`, which may be anything and was never asked for."""

    async def prepare(self, request: web.BaseRequest) -> Any:
        headers = request.headers.copy()
        headers.popall(hdrs.ACCEPT_ENCODING, None)
        return await super().prepare(request.clone(headers=headers))
