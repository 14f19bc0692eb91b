"""GET /object_info: the definitions of the nodes, of which the editor makes its own.

Nodes that run here come from their classes. Those that only ComfyUI runs are shown from their recorded definitions, so
that a workflow for ComfyUI can be opened and edited here; to run them is refused by name.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from aiohttp import web

if TYPE_CHECKING:
    from .app import Server

PACK_MODULE = "custom_nodes.quantwire"  # the editor takes the folder of help pages from its last part
log = logging.getLogger(__name__)


def routes(server: Server) -> list[web.RouteDef]:
    async def all_nodes(_: web.Request) -> web.Response:
        text = await server.with_host(lambda: _dumps(definitions(server)))
        return web.Response(text=text, content_type="application/json")

    async def one_node(request: web.Request) -> web.Response:
        name = request.match_info["name"]
        text = await server.with_host(lambda: _dumps(definitions(server, only=name)))
        return web.Response(text=text, content_type="application/json")

    return [web.get("/object_info", all_nodes), web.get("/object_info/{name}", one_node)]


def definitions(server: Server, only: str | None = None) -> dict[str, Any]:
    """The entries of /object_info by node id; with `only` that one, or none. Call it with the host in force."""
    from ....nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

    made: dict[str, Any] = {}
    for name, node_class in server.node_classes.items():
        if only is not None and name != only:
            continue
        module = PACK_MODULE if name in NODE_CLASS_MAPPINGS else "nodes"
        try:
            made[name] = definition(name, node_class, NODE_DISPLAY_NAME_MAPPINGS.get(name), module)
        except Exception:  # one node that cannot declare itself must not take the others away
            log.exception("node %s is left out: it does not declare its inputs", name)
    from .. import foreign_nodes

    shown = foreign_nodes.definitions(server.folders.list_files)
    return {**{n: d for n, d in shown.items() if only in (None, n)}, **made}


def definition(name: str, node_class: Any, display_name: str | None, module: str) -> dict[str, Any]:
    """One entry, with the keys that ComfyUI gives a class of this contract."""
    inputs: Mapping[str, Mapping[str, Any]] = node_class.INPUT_TYPES()
    outputs = list(getattr(node_class, "RETURN_TYPES", ()))
    entry: dict[str, Any] = {
        "input": {group: dict(declared) for group, declared in inputs.items()},
        "input_order": {group: list(declared) for group, declared in inputs.items()},
        "is_input_list": getattr(node_class, "INPUT_IS_LIST", False),
        "output": outputs,
        "output_is_list": list(getattr(node_class, "OUTPUT_IS_LIST", [False] * len(outputs))),
        "output_name": list(getattr(node_class, "RETURN_NAMES", outputs)),
        "name": name,
        "display_name": display_name or getattr(node_class, "DISPLAY_NAME", name),
        "description": getattr(node_class, "DESCRIPTION", ""),
        "python_module": module,
        "category": getattr(node_class, "CATEGORY", "sd"),
        "output_node": getattr(node_class, "OUTPUT_NODE", False) is True,
        "has_intermediate_output": getattr(node_class, "HAS_INTERMEDIATE_OUTPUT", False) is True,
        "search_aliases": list(getattr(node_class, "SEARCH_ALIASES", ())),
    }
    if hasattr(node_class, "OUTPUT_TOOLTIPS"):
        entry["output_tooltips"] = list(node_class.OUTPUT_TOOLTIPS)
    if hasattr(node_class, "ESSENTIALS_CATEGORY"):
        entry["essentials_category"] = node_class.ESSENTIALS_CATEGORY
    entry |= {
        key.lower(): True for key in ("DEPRECATED", "EXPERIMENTAL", "DEV_ONLY") if getattr(node_class, key, False)
    }
    _dumps(entry)  # what is no JSON belongs to this node's failure
    return entry


def _dumps(data: Any) -> str:
    return json.dumps(data, allow_nan=False)  # an Infinity would make the whole answer unreadable for the page
