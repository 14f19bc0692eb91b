"""The editor's own form of a workflow, as the graph that it queues.

Schema 0.4 writes links as `[id, from, output, to, input, type]`, schema 1 (and every subgraph) as objects. The rules
are those of ComfyUI's front end (1.49): a muted node is gone with its links; a bypassed one hands on the first input
that fits; Reroute, PrimitiveNode and Get/Set are no nodes of the server; a subgraph's nodes get ids such as `12:3`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ...quantizers.errors import WorkflowError
from ..standalone.workflow import Link, NodePlace
from .boxes import (
    INPUT_NODE,
    OUTPUT_NODE,
    Scope,
    definitions,
    downloads,
    edges_of,
    first_value,
    id_of,
    is_id,
    name_of,
    promoted_inputs,
    slots_of,
    title_of,
    type_of,
)
from .catalog import Catalog
from .graph import FileLink, Finding, Graph, Holder, Level, Node, shortened
from .widgets import named_values, values_by_names

NEVER, BYPASS = 2, 4
MOST_NODES = 100_000  # what subgraphs inside subgraphs may become
TOO_LARGE = "too-large"
NOTES = (
    *("Note", "MarkdownNote", "Label (rgthree)", "Bookmark (rgthree)", "Fast Muter (rgthree)"),
    *("Fast Bypasser (rgthree)", "Fast Groups Muter (rgthree)", "Fast Groups Bypasser (rgthree)"),
    *("Fast Actions Button (rgthree)", "Mute / Bypass Relay (rgthree)", "Mute / Bypass Repeater (rgthree)"),
    *("Random Unmuter (rgthree)", "Node Collector (rgthree)"),
)
REROUTES = ("Reroute", "Reroute (rgthree)")
PRIMITIVE = "PrimitiveNode"
GETS, SETS = ("GetNode", "easy getNode"), ("SetNode", "easy setNode")  # of KJNodes, and ComfyUI-Easy-Use's copies
VIRTUAL = (*NOTES, *REROUTES, PRIMITIVE, *GETS, *SETS)
EVERYWHERE = (
    "Anything Everywhere",
    "Anything Everywhere?",
    "Anything Everywhere3",
    "Prompts Everywhere",
    "Seed Everywhere",
)
GROUP_NODES = ("workflow/", "workflow>")


class Value(NamedTuple):
    """A widget's value that comes through a link; not `known` where the file does not tell it."""

    value: Any
    known: bool = True


@dataclass
class Instance:
    """A scope at one place of the workflow.

    Attributes:
        prefix: what stands before the ids of its nodes: empty, or `12:`.
        box: the node of `parent` that stands for it.
        dead: muted or bypassed as a whole.
    """

    scope: Scope
    prefix: str = ""
    parent: Instance | None = None
    box: Mapping[str, Any] = field(default_factory=lambda: dict[str, Any]())
    dead: bool = False
    children: dict[str, Instance] = field(default_factory=lambda: dict[str, "Instance"]())
    promoted: dict[tuple[str, str], Any] = field(default_factory=lambda: dict[tuple[str, str], Any]())
    setters: dict[str, str] = field(default_factory=lambda: dict[str, str]())


def is_editor_form(data: object) -> bool:
    return isinstance(data, dict) and isinstance(data.get("nodes"), list)


def read_editor(data: Mapping[str, Any], catalog: Catalog, most: int = MOST_NODES) -> Graph:
    """The graph that the editor would queue; without a node, and with one finding, where it has more than `most`.

    Raises:
        WorkflowError: it has no node at all.
    """
    return _Reader(data, catalog).run(most)


def too_large(most: int) -> Finding:
    """Nothing else is told then: what stands in a part of a workflow is no answer about it."""
    message = f"it has more than {most} nodes with those of its subgraphs; it was not checked."
    return Finding(Level.ERROR, "too-large", None, message)


class _Reader:
    def __init__(self, data: Mapping[str, Any], catalog: Catalog) -> None:
        self.data = data
        self.catalog = catalog
        self.findings: list[Finding] = []
        self.ends: dict[tuple[str, str, str], Link | Value | None] = {}
        self.boxes: dict[str, tuple[Instance, Mapping[str, Any]]] = {}
        self.subgraphs = {i: self.scope(d, str(d.get("name", ""))) for i, d in definitions(data)}

    def add(self, level: Level, code: str, place: NodePlace | None, message: str, *remedies: str) -> None:
        self.findings.append(Finding(level, code, place, message, remedies))

    def run(self, most: int) -> Graph:
        root = Instance(self.scope(self.data, ""))
        instances = [root]
        count = 0
        for instance in instances:  # grows while it is read
            count += len(instance.scope.nodes)
            if count > most:
                return Graph({}, "editor", (too_large(most),), True)
            instances.extend(self.children(instance))
        nodes: dict[str, Node] = {}
        broadcast = False
        for instance in instances:
            for box in instance.scope.nodes.values():
                broadcast |= self.note_broadcast(instance, box)
                if self.runs(instance, box):
                    node = self.node(instance, box)
                    nodes[node.id] = node
                    self.boxes[node.id] = (instance, box)
        if not any(i.scope.nodes for i in instances):
            raise WorkflowError("the workflow has no nodes.")
        # A muted source is gone, and the input with it.
        kept = {i: _without_lost_links(node, nodes) for i, node in nodes.items()}
        return Graph(kept, "editor", tuple(self.findings), broadcast, self)

    # --- the parts of the file ---------------------------------------------------------------------------------

    def scope(self, data: Mapping[str, Any], name: str) -> Scope:
        nodes: dict[str, dict[str, Any]] = {}
        boxes = data.get("nodes")
        for position, box in enumerate(boxes if isinstance(boxes, list) else ()):
            if not isinstance(box, dict) or not isinstance(box.get("type"), str) or not is_id(box.get("id")):
                where = f" of subgraph {name!r}" if name else ""
                self.add(Level.WARNING, "bad-node", None, f"entry {position}{where} of its nodes is no node; left out.")
            elif str(box["id"]) in nodes:
                place = NodePlace(str(box["id"]), title_of(box), box["type"])
                self.add(Level.WARNING, "duplicate-id", place, "another node has the same id; the first one counts.")
            else:
                nodes[str(box["id"])] = box
        ends = [id_of(data.get(key), end) for key, end in (("inputNode", INPUT_NODE), ("outputNode", OUTPUT_NODE))]
        slots = data.get("inputs")
        inputs = tuple(name_of(slot) for slot in slots) if isinstance(slots, list) else ()
        edges = edges_of(data.get("links"))
        results: dict[int, str] = {}
        for key, edge in edges.items():
            if edge.target == ends[1]:
                results.setdefault(edge.input, key)
        return Scope(nodes, edges, name, inputs, ends[0], results, promoted_inputs(nodes, edges, inputs, ends[0]))

    def children(self, instance: Instance) -> Iterator[Instance]:
        for node_id, box in instance.scope.nodes.items():
            scope = self.subgraphs.get(box["type"])
            if scope is None:
                continue
            above: Instance | None = instance
            while above is not None and above.scope is not scope:
                above = above.parent
            if above is not None:
                place = NodePlace(instance.prefix + node_id, title_of(box), scope.name)
                self.add(
                    Level.ERROR, "subgraph-cycle", place, "the subgraph contains itself, so the editor cannot queue it."
                )
                continue
            dead = instance.dead or box.get("mode") in (NEVER, BYPASS)
            child = Instance(scope, f"{instance.prefix}{node_id}:", instance, box, dead)
            child.promoted = self.promoted(scope, box)
            instance.children[node_id] = child
            yield child

    def promoted(self, scope: Scope, box: Mapping[str, Any]) -> dict[tuple[str, str], Any]:
        """(inner node id, or "" for an input of the subgraph; widget name) -> the value set on the subgraph's node."""
        properties = box.get("properties")
        pairs = properties.get("proxyWidgets") if isinstance(properties, dict) else None
        values = box.get("widgets_values")
        found: dict[tuple[str, str], Any] = {}
        if isinstance(pairs, list) and isinstance(values, list):
            for pair, value in zip(pairs, values, strict=False):
                if isinstance(pair, list) and len(pair) >= 2 and value is not None:
                    node_id = "" if str(pair[0]) == "-1" else str(pair[0])
                    found[(node_id, str(pair[1]))] = value
        elif isinstance(values, list):
            named, _ = values_by_names(values, scope.widgets)
            found = {("", name): value for name, value in named.items() if value is not None}
        return found

    def note_broadcast(self, instance: Instance, box: Mapping[str, Any]) -> bool:
        if box["type"] not in EVERYWHERE or instance.dead or box.get("mode") in (NEVER, BYPASS):
            return False
        place = self.place(instance, box)
        message = (
            "broadcasts to inputs without a link; which ones is decided in the editor, so its links are not checked."
        )
        self.add(Level.NOTE, "broadcast", place, message, "Export the workflow in API form to have them checked.")
        return True

    def place(self, instance: Instance, box: Mapping[str, Any]) -> NodePlace:
        return NodePlace(f"{instance.prefix}{box['id']}", title_of(box), box["type"])

    def runs(self, instance: Instance, box: Mapping[str, Any]) -> bool:
        if instance.dead or box.get("mode") in (NEVER, BYPASS) or box["type"] in (*VIRTUAL, *EVERYWHERE):
            return False
        if box["type"].startswith(GROUP_NODES):
            message = "a group node of the old kind, which is not looked into."
            remedy = "Open it in the editor and convert it to a subgraph, or export the workflow in API form."
            self.add(Level.WARNING, "group-node", self.place(instance, box), message, remedy)
            return False
        return box["type"] not in self.subgraphs

    def node(self, instance: Instance, box: Mapping[str, Any]) -> Node:
        values, rest = named_values(box, self.catalog.find(box["type"]))
        for (node_id, name), value in instance.promoted.items():
            if node_id == str(box["id"]) and name in values:
                values[name] = value
        links: dict[str, Link] = {}
        types: dict[str, str] = {}
        filled: set[str] = set()
        for slot in slots_of(box, "inputs"):
            name = name_of(slot)
            types[name] = type_of(slot)
            if slot.get("link") is None:
                continue
            found = self.resolve(instance, str(slot["link"]), type_of(slot))
            if isinstance(found, Link):
                links[name] = found
                values.pop(name, None)
            elif isinstance(found, Value) and found.known:
                values[name] = found.value
            elif isinstance(found, Value):
                filled.add(name)
        outputs = tuple(type_of(slot) for slot in slots_of(box, "outputs"))
        properties = box.get("properties")
        pack = properties.get("cnr_id") or properties.get("aux_id") if isinstance(properties, dict) else None
        node_id, title, class_type = self.place(instance, box)
        pack = pack if isinstance(pack, str) else ""
        return Node(
            *(node_id, class_type, title, values, links, rest, types, outputs, pack),
            frozenset(filled),
            downloads(properties),
        )

    # --- where a link comes from -------------------------------------------------------------------------------

    def resolve(self, instance: Instance, link: str, wanted: str) -> Link | Value | None:
        """The node or the value at the far end of a link; None when nothing is there.

        A loop rather than recursion, with the ends of all links kept: chains of thousands of reroutes exist, hostile
        files have thousands of nodes behind one.
        """
        passed: list[tuple[str, str, str]] = []
        end: Link | Value | None = None
        while (key := (instance.prefix, link, wanted)) not in self.ends:
            self.ends[key] = None  # for as long as it is not known, and for a link that leads to itself
            passed.append(key)
            found = self.step(instance, link, wanted)
            if found is None or isinstance(found, (Link, Value)):
                end = found
                break
            instance, link = found
        else:
            end = self.ends[key]
        self.ends.update(dict.fromkeys(passed, end))
        return end

    def trail(self, node_id: str, name: str) -> list[FileLink]:
        """The links of the file from an input of a node back to the node that gives its value."""
        return [FileLink(tuple(i.prefix.split(":")[:-1]), link) for i, link in self.passed(node_id, name)[0]]

    def holder(self, node_id: str, name: str) -> Holder | None:
        """The widget that decides an input's value: the node's own, one on a subgraph around it, or a PrimitiveNode's;
        None where no widget does."""
        instance, box = self.boxes[node_id]
        steps, end = self.passed(node_id, name)
        if not steps:
            if (str(box["id"]), name) in instance.promoted:
                return _holder_around(instance, name)
            return Holder(node_id, name, id(box))
        if not isinstance(end, Value) or not end.known:
            return None
        last, link = steps[-1]
        edge = last.scope.edges[link]
        if last.parent is None or edge.source != last.scope.into:
            return Holder(f"{last.prefix}{edge.source}", "value", id(last.scope.nodes[edge.source]))
        outer = last.scope.inputs[edge.output]
        return _holder_around(last if ("", outer) in last.promoted else last.parent, outer)

    def passed(self, node_id: str, name: str) -> tuple[list[tuple[Instance, str]], Link | Value | None]:
        """The links that an input's value comes through, and what is at their end."""
        instance, box = self.boxes[node_id]
        slot = next((s for s in slots_of(box, "inputs") if name_of(s) == name and s.get("link") is not None), None)
        found: list[tuple[Instance, str]] = []
        at: tuple[Instance, str] | Link | Value | None = (instance, str(slot["link"])) if slot is not None else None
        seen: set[tuple[str, str]] = set()
        while at is not None and not isinstance(at, (Link, Value)):
            if (key := (at[0].prefix, at[1])) in seen:  # a link that leads to itself
                return found, None
            seen.add(key)
            found.append(at)
            at = self.step(*at, type_of(slot) if slot is not None else "*")
        return found, at

    def step(self, instance: Instance, link: str, wanted: str) -> tuple[Instance, str] | Link | Value | None:
        """The next link to follow, or the end."""
        edge = instance.scope.edges.get(link)
        if edge is None:
            return None
        if instance.parent is not None and edge.source == instance.scope.into:
            return self.above(instance, edge.output)
        box = instance.scope.nodes.get(edge.source)
        if box is None or box.get("mode") == NEVER:
            return None
        return self.through(instance, box, edge.output, wanted)

    def above(self, instance: Instance, slot: int) -> tuple[Instance, str] | Value | None:
        """What the subgraph's own node gets at one of its inputs."""
        assert instance.parent is not None
        names = instance.scope.inputs
        name = names[slot] if 0 <= slot < len(names) else None
        slots = slots_of(instance.box, "inputs")
        # The editor leaves out slots of widgets that have no link, so places in both lists differ.
        matching = [s for s in slots if name_of(s) == name] if name else slots[max(slot, 0) : slot + 1]
        if matching and matching[0].get("link") is not None:
            return instance.parent, str(matching[0]["link"])
        if name is not None and ("", name) in instance.promoted:
            return Value(instance.promoted[("", name)])
        outer = instance.parent.promoted.get((str(instance.box["id"]), name or ""))
        if outer is not None:
            return Value(outer)
        return Value(None, known=False) if name in instance.scope.widgets else None

    def through(
        self, instance: Instance, box: Mapping[str, Any], output: int, wanted: str
    ) -> tuple[Instance, str] | Link | Value | None:
        """What a node hands on: itself, or the link behind it."""
        slots = slots_of(box, "inputs")
        kind = box["type"]
        if box.get("mode") == BYPASS:
            slot = _bypass(box, slots, output, wanted)
            return _following(instance, slot)
        child = instance.children.get(str(box["id"]))
        if child is not None:
            inner = child.scope.results.get(output)
            return (child, inner) if inner is not None else None
        if kind in REROUTES or kind in SETS:
            return _following(instance, slots[0] if slots else None)
        if kind == PRIMITIVE:
            values = box.get("widgets_values")
            return Value(values[0]) if isinstance(values, list) and values else None
        if kind in GETS:
            return self.setter(instance, box)
        if kind.startswith(GROUP_NODES):  # what is inside gives the input something
            return Value(None, known=False)
        if kind in VIRTUAL or kind in self.subgraphs:
            return None
        return Link(f"{instance.prefix}{box['id']}", output)

    def setter(self, instance: Instance, box: Mapping[str, Any]) -> tuple[Instance, str] | None:
        """The link into the SetNode of a GetNode's name, here or in a graph around."""
        name = first_value(box)
        where: Instance | None = instance
        while where is not None and name is not None:
            if not where.setters:
                sets = ((b, k) for k, b in where.scope.nodes.items() if b["type"] in SETS and b.get("mode") != NEVER)
                where.setters = {str(first_value(b)): k for b, k in sets} or {"": ""}
            found = where.scope.nodes.get(where.setters.get(name, ""))
            if found is not None:
                slots = slots_of(found, "inputs")
                return _following(where, slots[0] if slots else None)
            where = where.parent
        place = self.place(instance, box)
        self.add(Level.WARNING, "lost-get", place, f"there is no SetNode named {shortened(str(name), 60)!r}.")
        return None


def _holder_around(instance: Instance, name: str) -> Holder | None:
    return Holder(instance.prefix[:-1], name, id(instance.box)) if instance.parent is not None else None


def _following(instance: Instance, slot: Mapping[str, Any] | None) -> tuple[Instance, str] | None:
    return (instance, str(slot["link"])) if slot is not None and slot.get("link") is not None else None


def _bypass(box: Mapping[str, Any], slots: list[dict[str, Any]], output: int, wanted: str) -> Mapping[str, Any] | None:
    """The input that a bypassed node hands on: the one beside the output if it fits, else the first that fits."""
    if wanted in ("*", ""):
        return slots[output] if output < len(slots) else (slots[0] if slots else None)
    outputs = slots_of(box, "outputs")
    given = type_of(outputs[output]) if 0 <= output < len(outputs) else "*"
    beside = slots[output : output + 1] if output >= 0 else []
    exact = [s for s in slots if type_of(s) == wanted]
    fitting = [s for s in slots if _fits(type_of(s), given) and _fits(type_of(s), wanted)]
    first = [s for s in beside if s in fitting]
    return next(iter([*first, *exact, *fitting]), None)


def _fits(one: str, other: str) -> bool:
    if "*" in (one, other) or "" in (one, other):
        return True
    return not {p.strip().lower() for p in one.split(",")}.isdisjoint(p.strip().lower() for p in other.split(","))


def _without_lost_links(node: Node, nodes: Mapping[str, Node]) -> Node:
    lost = [name for name, link in node.links.items() if link.node_id not in nodes]
    if not lost:
        return node
    return replace(node, links={name: link for name, link in node.links.items() if name not in lost})
