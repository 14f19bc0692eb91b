"""Ways out of a conflict as changes of widgets, and the graph with such changes made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

from ...quantizers.compat.modes import HOST_MODES, HostName, OffloadMode
from ...quantizers.compat.remedies import Remedy, RemedyKind, settings_of
from ..lint.flow import AUTO, COMPAT
from ..lint.graph import Finding, Graph, Holder
from ..lint.verdicts import WITH_CARRIER, WITH_FORMAT, Conflict

SERVER = {HostName.COMFYUI: "ComfyUI", HostName.STANDALONE: "this server"}
MOST_CHECKS = 4  # OffloadCompat nodes of one graph that are tried


class Change(NamedTuple):
    """A widget and its new value; `node` is the id that the host runs the node under, as `12:3`."""

    node: str
    widget: str
    value: str | bool


def candidates(f: Finding, graph: Graph, host: HostName, now: OffloadMode) -> Iterator[tuple[str, tuple[Change, ...]]]:
    """(text, changes) that may cure an offload finding, best first; whether one does is for the caller to check.

    Args:
        now: what the host does where no OffloadCompat says otherwise.
    """
    conflict: Conflict | None = f.conflict
    if conflict is None:
        return
    checks = [n.id for n in graph.nodes.values() if n.class_type == COMPAT]
    if f.place is not None and f.place.node_id in checks:
        checks = [f.place.node_id]
    checks = checks[:MOST_CHECKS]
    for text, way in zip(f.remedies, conflict.ways, strict=False):
        yield from ((text, changes) for changes in _of_way(way, conflict, checks))
    for node in (graph.nodes[check] for check in checks):
        if node.values.get("mode") == conflict.mode.value and now is not conflict.mode and now in HOST_MODES[host]:
            text = (
                f"Set `mode` to {AUTO} in {node.place}: it then checks for what {SERVER[host]} does now, which is "
                f"{'no offload' if now is OffloadMode.NONE else f'{now.value} offload'}."
            )
            off = (Change(node.id, "set_mode", False),) if node.values.get("set_mode") else ()
            yield text, (Change(node.id, "mode", AUTO), *off)


def _of_way(way: Remedy, conflict: Conflict, checks: Iterable[str]) -> Iterator[tuple[Change, ...]]:
    """One for each node that may be meant."""
    (carrier, key, mode, variant), held = way.cell, conflict.held
    origin, own = held.origin.node_id, held.origin.class_type
    holder = (Change(origin, "carrier", carrier.value),) if carrier is not held.carrier else ()
    if way.kind in (RemedyKind.CARRIER, RemedyKind.FORMAT):
        if key == held.key and own in WITH_CARRIER:
            yield holder
        elif own in WITH_FORMAT and key:
            yield (*holder, Change(origin, "format", key))
    elif way.kind is RemedyKind.SETTING:
        pairs = [part.partition("=") for part in way.value.split(";")]
        for check in checks:
            yield tuple(Change(check, name, _typed(value)) for name, _, value in pairs)
    elif way.kind is RemedyKind.MODE:
        level = settings_of(mode, variant)["group_level"] if mode is OffloadMode.GROUP else ""
        for check in checks:
            set_level = (Change(check, "group_level", level),) if level else ()
            yield (Change(check, "mode", mode.value), Change(check, "set_mode", True), *set_level)


def _typed(value: str) -> str | bool:
    return {"true": True, "false": False}.get(value, value)


def applied(graph: Graph, changes: Iterable[Change]) -> tuple[Graph, tuple[Change, ...]] | None:
    """The graph with widgets changed, and the changes with the nodes of the editor that hold these widgets.

    A widget inside a subgraph may be shown on the node of the subgraph, and a subgraph may be used twice: then the
    other nodes that the same widget decides change with it. None where a value comes from no widget.
    """
    nodes = dict(graph.nodes)
    made: list[Change] = []
    for change in changes:
        holder = _holder(graph, change.node, change.widget)
        if holder is None:
            return None
        made.append(Change(holder.node_id, holder.widget, change.value))
        for node in graph.nodes.values():
            for name in _names(graph, change.node, change.widget, node.id, holder):
                values = {**nodes[node.id].values, name: change.value}
                nodes[node.id] = replace(nodes[node.id], values=values)
    return replace(graph, nodes=nodes), tuple(made)


def _names(graph: Graph, changed: str, widget: str, node_id: str, holder: Holder) -> Iterator[str]:
    """The inputs of a node that a widget decides."""
    if node_id == changed:
        yield widget
    elif graph.file is not None and graph.nodes[node_id].class_type == graph.nodes[changed].class_type:
        other = _holder(graph, node_id, widget)
        if other is not None and (other.widget, other.box) == (holder.widget, holder.box):
            yield widget


def _holder(graph: Graph, node_id: str, name: str) -> Holder | None:
    node = graph.nodes.get(node_id)
    if node is None or name in node.links or name in node.filled:
        return None
    return graph.file.holder(node_id, name) if graph.file is not None else Holder(node_id, name, 0)
