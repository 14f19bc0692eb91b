"""JSON in, JSON out: what every route shares.

A body is read whole before its route runs (`security.bodies`), so that `await request.json()` of a route finds it in
memory, within the limits of size and time. The functions here turn what is no JSON into an answer that says so.
"""

from __future__ import annotations

import json
import math
from typing import Any

from aiohttp import web


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
        Refused: 400, with what is wrong.
    """
    try:
        return json.loads(await request.read(), parse_constant=_number, parse_float=_number)
    except RecursionError as err:
        raise Refused(400, "The body is JSON nested too deeply.") from err
    except ValueError as err:  # no JSON, no UTF-8, or a number of thousands of digits
        raise Refused(400, f"The body is not JSON: {err}.") from err


async def json_object(request: web.Request) -> dict[str, Any]:
    """The body as a JSON object.

    Raises:
        Refused: 400, with what is wrong.
    """
    data = await json_body(request)
    if not isinstance(data, dict):
        raise Refused(400, f"The body must be a JSON object, not {type(data).__name__}.")
    return data


def _number(text: str) -> float:
    """Python reads NaN, Infinity and 1e999; a page's parser would fail at what is then answered."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is no JSON number")
    return number
