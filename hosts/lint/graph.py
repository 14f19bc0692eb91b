"""The graph that both forms of a workflow file become, and the findings about it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple, Protocol

from ..standalone.workflow import Link, NodePlace, Prompt, PromptNode, as_link

MOST_CHARACTERS = 1000
# ComfyUI's nodes that hand on what is in their input `value`, and its type.
PRIMITIVES = {
    "PrimitiveString": "STRING",
    "PrimitiveStringMultiline": "STRING",
    "PrimitiveInt": "INT",
    "PrimitiveFloat": "FLOAT",
    "PrimitiveBoolean": "BOOLEAN",
}
UNKNOWN: Any = object()  # a value that some node makes when the graph runs


class Level(str, Enum):
    """How bad a finding is; only the first two make a check fail."""

    BLOCK = "block"  # a conflict of quantized weights and offload mode
    ERROR = "error"  # something else that is certain to fail
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth knowing.

    Attributes:
        place: None for the file as a whole.
        code: permanent name of the kind of finding, for programs.
        remedies: what to do, best first.
        data: further values, for programs.
        conflict: the `Conflict` of an offload finding, for who offers its ways out as changes of widgets.
    """

    level: Level
    code: str
    place: NodePlace | None
    message: str
    remedies: tuple[str, ...] = ()
    data: Mapping[str, Any] = field(default_factory=lambda: dict[str, Any]())
    conflict: Any = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        # A file may hold anything, and what it holds is quoted here.
        object.__setattr__(self, "message", shortened(self.message, MOST_CHARACTERS))
        object.__setattr__(self, "remedies", tuple(shortened(r, MOST_CHARACTERS) for r in self.remedies))

    @property
    def where(self) -> str:
        """The place as text on one line, whatever the file calls its nodes."""
        if self.place is None:
            return ""
        short = (shortened(part, 80) for part in self.place)
        return str(NodePlace(*short))


@dataclass(frozen=True)
class Node:
    """A node that the host would run.

    Attributes:
        values: widget values and other literals by input name.
        rest: widget values whose names are not known, in the file's order.
        links: input name -> where its value comes from.
        input_types: as the editor writes them; empty in API form.
        output_types: likewise; None in API form.
        pack: the pack that the editor says the node is from.
        filled: inputs that have a value, though the file does not say which.
        downloads: file name -> where the workflow says that it can be had.
    """

    id: str
    class_type: str
    title: str
    values: Mapping[str, Any]
    links: Mapping[str, Link]
    rest: tuple[Any, ...] = ()
    input_types: Mapping[str, str] = field(default_factory=lambda: dict[str, str]())
    output_types: tuple[str, ...] | None = None
    pack: str = ""
    filled: frozenset[str] = frozenset()
    downloads: Mapping[str, str] = field(default_factory=lambda: dict[str, str]())

    @property
    def place(self) -> NodePlace:
        return NodePlace(self.id, self.title, self.class_type)


class FileLink(NamedTuple):
    """A link of an editor file: the ids of the subgraph nodes that it stands in, and its own."""

    path: tuple[str, ...]
    id: str


class Holder(NamedTuple):
    """A widget of an editor file: the id of its node with those of the subgraphs around it, and its name.

    `box` is the same for the same entry of the file, which a subgraph that is used twice has once.
    """

    node_id: str
    widget: str
    box: int


class File(Protocol):
    def trail(self, node_id: str, name: str) -> list[FileLink]: ...

    def holder(self, node_id: str, name: str) -> Holder | None: ...


@dataclass(frozen=True)
class Graph:
    """The nodes of a workflow by id, in the file's order.

    Attributes:
        form: "editor" or "api".
        findings: what the file itself has wrong.
        open: inputs without a link may get one when the graph is queued, from nodes that broadcast values.
        file: what the editor's file has and the graph has no more; None in API form.
    """

    nodes: Mapping[str, Node]
    form: str
    findings: tuple[Finding, ...] = ()
    open: bool = False
    file: File | None = field(default=None, compare=False, repr=False)

    def prompt(self, source: str) -> Prompt:
        """The API form, for the checks of the embedded host."""
        nodes: dict[str, PromptNode] = {}
        for node in self.nodes.values():
            links = {name: list(link) for name, link in node.links.items()}
            nodes[node.id] = PromptNode(node.id, node.class_type, {**node.values, **links}, node.title)
        return Prompt(nodes, source)

    def literal(self, node: Node, name: str, default: Any = None) -> Any:
        """The value of an input, also from a primitive node; UNKNOWN from any other, the default where it has none."""
        passed: set[str] = set()
        while (link := node.links.get(name)) is not None:
            source = self.nodes.get(link.node_id)
            if source is None or source.class_type not in PRIMITIVES or source.id in passed:
                return UNKNOWN
            passed.add(source.id)
            node, name, default = source, "value", UNKNOWN
        return UNKNOWN if name in node.filled else node.values.get(name, default)

    def order(self) -> list[str]:
        """Ids, sources before the nodes that they feed; nodes on a cycle and behind it are left out."""
        waiting = {i: {link.node_id for link in n.links.values()} & self.nodes.keys() for i, n in self.nodes.items()}
        feeds: dict[str, list[str]] = {}
        for i, sources in waiting.items():
            for source in sources:
                feeds.setdefault(source, []).append(i)
        ready = [i for i, sources in waiting.items() if not sources]
        for i in ready:  # grows while it is read
            for fed in feeds.get(i, ()):
                waiting[fed].discard(i)
                if not waiting[fed]:
                    ready.append(fed)
        return ready

    def needed(self, outputs: Iterable[str]) -> set[str]:
        """The nodes that these need, themselves included."""
        found = set(outputs)
        rest = list(found)
        while rest:
            for link in self.nodes[rest.pop()].links.values():
                if link.node_id in self.nodes and link.node_id not in found:
                    found.add(link.node_id)
                    rest.append(link.node_id)
        return found


def from_prompt(prompt: Prompt) -> Graph:
    """The graph of a file in API form."""
    nodes: dict[str, Node] = {}
    for entry in prompt.nodes.values():
        links: dict[str, Link] = {}
        values: dict[str, Any] = {}
        for name, value in entry.inputs.items():
            link = as_link(value)
            if link is None:
                values[name] = value
            else:
                links[name] = link
        nodes[entry.id] = Node(entry.id, entry.class_type, entry.title, values, links)
    return Graph(nodes, "api")


def shortened(text: str, most: int) -> str:
    """On one line, no longer than `most`, and without characters that a terminal acts on."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text[: 4 * most].split()))
    return line if len(line) <= most else line[: most - 3] + "..."
