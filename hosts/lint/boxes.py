"""The parts of an editor file as it has them: graphs, boxes, slots and links, whatever else their fields may hold.

Every function here takes any JSON: what has another shape than it should is left out, or has a default.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

INPUT_NODE, OUTPUT_NODE = "-10", "-20"


class Edge(NamedTuple):
    """A link as the file has it."""

    source: str
    output: int
    target: str
    input: int


@dataclass(frozen=True)
class Scope:
    """A graph of the file: the workflow, or one subgraph."""

    nodes: dict[str, dict[str, Any]]
    edges: dict[str, Edge]
    name: str = ""
    inputs: tuple[str, ...] = ()
    into: str = INPUT_NODE
    results: Mapping[int, str] = field(default_factory=lambda: dict[int, str]())
    """Output of the subgraph -> the link that leads there."""
    widgets: tuple[str, ...] = ()
    """Inputs of the subgraph that stand for a widget inside."""


def downloads(properties: object) -> dict[str, str]:
    listed = properties.get("models") if isinstance(properties, dict) else None
    found = [(m.get("name"), m.get("url")) for m in listed if isinstance(m, dict)] if isinstance(listed, list) else []
    return {name: url for name, url in found if isinstance(name, str) and isinstance(url, str)}


def definitions(data: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(id, definition) of every subgraph, also of those that stand inside others."""
    waiting: deque[object] = deque([data])
    while waiting:
        holder = waiting.popleft()
        block = holder.get("definitions") if isinstance(holder, dict) else None
        listed = block.get("subgraphs") if isinstance(block, dict) else None
        for definition in listed if isinstance(listed, list) else ():
            if isinstance(definition, dict) and isinstance(definition.get("id"), str):
                yield definition["id"], definition
                waiting.append(definition)


def promoted_inputs(
    nodes: Mapping[str, Mapping[str, Any]], edges: Mapping[str, Edge], inputs: tuple[str, ...], into: str
) -> tuple[str, ...]:
    """The inputs of a subgraph that lead to the slot of a widget."""
    targets = {edge.target for edge in edges.values() if edge.source == into and edge.target in nodes}
    slots = (slot for target in targets for slot in slots_of(nodes[target], "inputs"))
    by_widget = {str(slot.get("link")) for slot in slots if isinstance(slot.get("widget"), dict)}
    found = {edge.output for key, edge in edges.items() if edge.source == into and key in by_widget}
    return tuple(name for place, name in enumerate(inputs) if place in found)


def edges_of(links: object) -> dict[str, Edge]:
    """Links by id, from both notations; anything else is left out, as a link that leads nowhere."""
    found: dict[str, Edge] = {}
    rows = list(links.values()) if isinstance(links, dict) else links
    for row in rows if isinstance(rows, list) else ():
        if isinstance(row, list) and len(row) >= 5:
            key, *ends = row[:5]
        elif isinstance(row, dict):
            key, *ends = (row.get(k) for k in ("id", "origin_id", "origin_slot", "target_id", "target_slot"))
        else:
            continue
        source, output, target, slot = ends
        output, slot = _index(output), _index(slot)
        if is_id(key) and is_id(source) and is_id(target) and output is not None and slot is not None:
            found[str(key)] = Edge(str(source), output, str(target), slot)
    return found


def _index(value: object) -> int | None:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def is_id(value: object) -> bool:
    return (
        isinstance(value, (int, str)) and not isinstance(value, bool) and (isinstance(value, str) or abs(value) < 2**63)
    )


def id_of(holder: object, default: str) -> str:
    found = holder.get("id") if isinstance(holder, dict) else None
    return str(found) if is_id(found) else default


def slots_of(box: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    slots = box.get(key)
    return [slot for slot in slots if isinstance(slot, dict)] if isinstance(slots, list) else []


def name_of(slot: object) -> str:
    name = slot.get("name") if isinstance(slot, dict) else None
    return name if isinstance(name, str) else ""


def type_of(slot: Mapping[str, Any]) -> str:
    kind = slot.get("type")
    if isinstance(kind, list):  # rgthree writes unions so, and old files the choices of a COMBO
        return "COMBO"
    return kind if isinstance(kind, str) else "*"


def title_of(box: Mapping[str, Any]) -> str:
    title = box.get("title")
    return title if isinstance(title, str) else ""


def first_value(box: Mapping[str, Any]) -> str | None:
    values = box.get("widgets_values")
    first = values[0] if isinstance(values, list) and values else None
    return first if isinstance(first, str) else None
