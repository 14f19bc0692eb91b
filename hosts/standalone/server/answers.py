"""JSON in, JSON out: what every route shares.

A body is read whole before its route runs (`security.bodies`), so that `await request.json()` of a route finds it in
memory, within the limits of size and time. The functions here turn what is no JSON into an answer that says so.
"""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

from aiohttp import web

MAX_VALUES = 500_000
"""In one body. Python holds its lock while it parses, so everything else waits: 0.1 s for as many."""
MAX_NESTED = 100
"""Levels. What is taken must be written again, a few levels deeper; Python's own limit of calls is no fixed depth."""
AT_ONCE_NBYTES = 64 << 10
_PARTS = (b",", b"[", b"{")


class Refused(Exception):
    """Ends a request with a status and a JSON error; raised anywhere below a route, in threads too."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def error(status: int, message: str) -> web.Response:
    return web.json_response({"error": message}, status=status)


async def json_body(request: web.Request) -> Any:
    """The body as JSON.

    Raises:
        Refused: 400, with what is wrong; 413 for more values than are taken.
    """
    body = await request.read()
    return parsed(body) if len(body) < AT_ONCE_NBYTES else await asyncio.to_thread(parsed, body)


def parsed(body: bytes) -> Any:
    """Bytes as JSON that every page can read, too.

    Raises:
        Refused: as `json_body`.
    """
    # Before it is parsed, since that cannot be stopped; what stands in texts counts too, which no real body notices.
    if sum(map(body.count, _PARTS)) > MAX_VALUES:
        raise Refused(413, f"The body holds more than {MAX_VALUES} values.")
    too_deep = Refused(400, f"The body is JSON nested more than {MAX_NESTED} levels deep.")
    try:
        data = json.loads(body, parse_constant=_refuse_constant)
        if not _is_plain(data):
            raise too_deep
    except RecursionError as err:
        raise too_deep from err
    except ValueError as err:  # no JSON, no UTF-8, or a number of thousands of digits
        raise Refused(400, f"The body is not JSON: {err}.") from err
    return data


def _is_plain(data: Any) -> bool:
    """Whether no value lies deeper than MAX_NESTED.

    Raises:
        ValueError: a number is infinite: Python reads 1e999, a page's parser would fail at what is then answered.
    """
    level = [data]
    for _ in range(MAX_NESTED + 1):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below.extend(value.values())
            elif isinstance(value, list):
                below.extend(value)
            elif isinstance(value, float) and not math.isfinite(value):
                raise ValueError("a number is too large")
        if not below:
            return True
        level = below
    return False


async def json_object(request: web.Request) -> dict[str, Any]:
    """The body as a JSON object.

    Raises:
        Refused: 400, with what is wrong.
    """
    data = await json_body(request)
    if not isinstance(data, dict):
        raise Refused(400, f"The body must be a JSON object, not {type(data).__name__}.")
    return data


def _refuse_constant(text: str) -> None:
    """Python reads NaN and Infinity; a page's parser would fail at what is then answered."""
    raise ValueError(f"{text} is no JSON number")
