"""GET /docs/...: help pages of the embedded host's own nodes, made of what their classes say; the pack's are files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from aiohttp import web

from .answers import Refused
from .confine import PROGRAMS, shown
from .definitions import definitions

if TYPE_CHECKING:
    from .app import Server


def routes(server: Server) -> list[web.RouteDef]:
    async def page(request: web.Request) -> web.Response:
        name = request.match_info["node"]
        entry = (await server.with_host(lambda: definitions(server, only=name))).get(name)
        if entry is None:
            raise Refused(404, f"There is no node '{shown(name)}'.")
        return web.Response(text=help_page(entry), headers={"Content-Type": PROGRAMS[".md"]})

    return [web.get("/docs/{node}/{locale}.md", page), web.get("/docs/{node}.md", page)]


def help_page(entry: Mapping[str, Any]) -> str:
    """Markdown from an entry of /object_info."""
    lines = [f"# {entry['display_name']}", "", str(entry["description"]), ""]
    inputs = [
        (name, spec) for group in ("required", "optional") for name, spec in entry["input"].get(group, {}).items()
    ]
    if inputs:
        lines += ["## Inputs", "", *_table(("input", "type", "default", ""), map(_row, inputs)), ""]
    if entry["output"]:
        rows = zip(entry["output_name"], map(_type, entry["output"]), strict=False)
        lines += ["## Outputs", "", *_table(("output", "type"), rows), ""]
    return "\n".join(lines)


def _row(named: tuple[str, Any]) -> tuple[str, ...]:
    name, spec = named
    options = spec[1] if len(spec) > 1 and isinstance(spec[1], dict) else {}
    return name, _type(spec[0]), str(options.get("default", "")), str(options.get("tooltip", ""))


def _type(kind: object) -> str:
    return "choice" if isinstance(kind, (list, tuple)) or kind == "COMBO" else str(kind)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in cells) + " |"

    return [line(head), line("---" for _ in head), *map(line, rows)]
