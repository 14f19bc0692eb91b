"""Who may ask: the Host, Origin and Sec-Fetch-Site of every request, websockets included; and how much they may send.

The server has no password. What keeps other people out is that it listens on loopback; what keeps other web sites out,
which run in a browser on this very machine, is here:

- A page of another site that posts to 127.0.0.1: its Origin is not the Host, or Sec-Fetch-Site says so.
- A page whose name was rebound to 127.0.0.1 (DNS rebinding): Origin and Host agree, but the Host is a foreign name.
- A page that links or frames pictures of this server: Sec-Fetch-Site, and no frame is allowed.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import socket
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from aiohttp import web

from ....quantizers.errors import QuantwireError
from .answers import Refused, error

if TYPE_CHECKING:
    from .app import ServerConfig

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
log = logging.getLogger(__name__)

BODY_TIMEOUT_S = 30
PORTS = {"http": 80, "https": 443}
MIB = 1 << 20
# Of a body, by the start of its path. Parsed JSON takes many times its bytes; files of the user data are kept unread.
MAX_NBYTES = {"/prompt": 8 * MIB, "/userdata/": 1 << 62}
MAX_OTHER_NBYTES = MIB
# Routes that read their body themselves, piece by piece, with limits of their own.
STREAMED = ("/upload/", "/quantwire/")
FINAL = (403, 408, 413)  # who sent this gets no second request over the same connection
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?", re.IGNORECASE)
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "frame-ancestors 'self'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
}


def gate(config: ServerConfig) -> Handler:
    """Middleware: refuse what comes from elsewhere."""

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        reason = refuse_host(request.headers.getall("Host", []), config) or refuse_origin(request)
        if reason is not None:
            # As it was sent: decoded, it could hold a line break and so a line of its own.
            log.warning("refused %s %.80s from %s: %s", request.method, request.raw_path, request.remote, reason)
            raise Refused(403, reason)
        return await handler(request)

    return check  # pyright: ignore[reportReturnType]


def refuse_host(hosts: list[str], config: ServerConfig) -> str | None:
    """Why a Host header is refused: this server answers to loopback names, to --host as given and as bound."""
    if len(hosts) != 1:
        return f"A request needs one Host header, got {len(hosts)}."
    match = HOST.fullmatch(hosts[0])
    name = match[1].lower().strip("[]") if match else ""
    bound = config.bound or config.host
    if is_loopback(name) or name in (config.host.strip("[]").lower(), bound.lower()):
        return None
    if is_any_address(bound) and (_address(name) or name in _own_names()):
        return None  # a rebound name is a name: no page can make an IP address its own
    return (
        f"The Host '{hosts[0][:100]}' is not one that this server answers to. "
        "Open it under the address that it printed, or start it with --host and the name that you use."
    )


def refuse_origin(request: web.Request) -> str | None:
    """Why a request of another site is refused; programs that are no browsers send neither header."""
    site = request.headers.get("Sec-Fetch-Site", "none")
    if site not in ("none", "same-origin") and not _followed_link(request):
        return f"A page of another site ({site}) asked for this; only the editor's own pages may."
    origin = request.headers.get("Origin")
    # Either scheme: behind a proxy that ends TLS the page has https and this server hears http.
    own = {_netloc(f"{scheme}://{request.headers['Host']}") for scheme in PORTS}
    if origin is not None and (_netloc(origin) is None or _netloc(origin) not in own):
        return f"The Origin '{origin[:100]}' is not this server; only the editor's own pages may ask."
    return None


def _followed_link(request: web.Request) -> bool:
    """A link from elsewhere to the editor's page itself, without arguments: it does nothing but open."""
    asked = request.method == "GET" and request.path == "/" and not request.query_string
    return asked and request.headers.get("Sec-Fetch-Mode") == "navigate" and _dest(request) == "document"


def _dest(request: web.Request) -> str:
    return request.headers.get("Sec-Fetch-Dest", "")


def _netloc(url: str) -> tuple[str, int] | None:
    """Name and port; None for `null` and whatever is no URL."""
    try:
        parts = urlsplit(url)
        port = parts.port or PORTS.get(parts.scheme)
    except ValueError:
        return None
    return (parts.hostname, port) if parts.hostname and port else None


def is_loopback(name: str) -> bool:
    """Whether a name is this machine and no other, without asking DNS, whose answers are the attacker's."""
    address = _address(name)
    return address.is_loopback if address is not None else name.rstrip(".").lower() == "localhost"


def is_any_address(host: str) -> bool:
    address = _address(host)
    return address is not None and address.is_unspecified


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return None


def _own_names() -> set[str]:
    name = socket.gethostname().lower()
    return {name, f"{name}.local"}


@web.middleware
async def bodies(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Middleware: read the body within its limits before the route runs."""
    path = request.path.removeprefix("/api")
    if request.can_read_body and not path.startswith(STREAMED) and request.method not in ("GET", "HEAD"):
        known = next((nbytes for start, nbytes in MAX_NBYTES.items() if path.startswith(start)), MAX_OTHER_NBYTES)
        limit, length = min(known, request.client_max_size), request.content_length
        request = request.clone(client_max_size=limit)
        if length is not None and length > limit:
            raise Refused(413, f"The body has {length} bytes; at most {limit} are taken.")
        try:
            await asyncio.wait_for(request.read(), BODY_TIMEOUT_S)
        except asyncio.TimeoutError as err:
            raise Refused(408, f"The body did not arrive within {BODY_TIMEOUT_S} s.") from err
        except web.HTTPRequestEntityTooLarge as err:
            raise Refused(413, f"The body is longer than the {limit} bytes that are taken.") from err
    return await handler(request)


@web.middleware
async def answers(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Middleware, the outermost: every failure is a JSON answer, and every answer has the headers of safety."""
    try:
        response = await handler(request)
    except Refused as err:
        response = error(err.status, str(err))
        if err.status in FINAL:
            response.force_close()
    except web.HTTPException as err:
        if err.status < 400:
            raise
        response = error(err.status, err.reason)
        if "Allow" in err.headers:
            response.headers["Allow"] = err.headers["Allow"]
    except QuantwireError as err:
        response = error(400, str(err))
    except (ConnectionError, asyncio.CancelledError):
        raise  # nobody is left to answer
    except Exception as err:  # the boundary: no traceback leaves the server, its log has it
        log.exception("%s %.200s failed", request.method, request.raw_path)
        response = error(500, f"The server failed: {type(err).__name__}. Its log says more.")
    if not response.prepared:
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
    return response
