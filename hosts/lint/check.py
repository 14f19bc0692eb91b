"""What is certain to fail beside offload conflicts: nodes, files, links and values that are not there or do not fit."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from ...quantizers.compat.modes import HostName
from ...quantizers.errors import BackendUnavailable, QuantwireError, near
from ...quantizers.registry import availability, require_reader
from ..standalone.validate import check as validate
from ..standalone.workflow import Link
from .catalog import ANY_TYPES, Catalog, Input, NodeType, core_nodes
from .files import ModelFiles
from .flow import COMPAT
from .graph import Finding, Graph, Level, Node, shortened
from .sources import QUANTIZERS, formats

# Choices that the host makes, which is not here.
OF_THE_HOST = (("LoadGGUFTextEncoder", "type"), ("ConvertModel", "model_name"))
NOT_A_FILE = ("none", "None", "[None]")
MAKE_ONE = "`quantwire convert MODEL.safetensors MODEL.gguf --type Q8_0` makes one."
TRY_COMFYUI = "If the workflow is meant for ComfyUI, check it with --host comfyui."
FORMAT_NODES = (*QUANTIZERS, "LoadAndQuantize")


@dataclass(frozen=True)
class Checks:
    """One graph and what it is checked against.

    Attributes:
        classes: the Python classes of the embedded host and of this pack.
        own: the ids of this pack.
        allowed: patterns of ids that are there, whoever brings them.
        files: None: model files are not looked for.
        live: ids of the nodes that run.
    """

    graph: Graph
    catalog: Catalog
    classes: Mapping[str, type]
    own: frozenset[str]
    host: HostName
    allowed: tuple[str, ...]
    files: ModelFiles | None
    live: set[str]

    def run(self) -> Iterator[Finding]:
        for node in self.graph.nodes.values():
            node_type = self.catalog.find(node.class_type)
            missing = [] if node.id not in self.live else list(self.models(node, node_type))
            yield from missing
            if self.host is HostName.COMFYUI:
                yield from self.unknown(node, node_type)
                if node.id in self.live:
                    yield from self.wiring(node, node_type)
                    yield from self.values(node, node_type, bool(missing))
            if node.class_type == COMPAT and node.id not in self.live:
                message = "no output needs it, so it never runs and checks nothing."
                yield Finding(Level.WARNING, "unused-check", node.place, message, ("Link its model to the sampler.",))
            if node.id in self.live and self.catalog.server is None:
                yield from self.runnable(node)
        if self.host is HostName.COMFYUI:
            yield from self.packs()
            yield from self.whole()

    # --- nodes ---------------------------------------------------------------------------------------------------

    def unknown(self, node: Node, node_type: NodeType | None) -> Iterator[Finding]:
        known = node_type is not None and (self.catalog.server is None or node.class_type in self.catalog.server)
        if known or any(fnmatchcase(node.class_type, pattern) for pattern in self.allowed):
            return
        hint = _likely(node.class_type, self.catalog.names())
        pack = shortened(node.pack, 60)
        if self.catalog.server is not None:
            remedies = [f"Install {pack or 'the pack that has it'} on the server."]
            message = f"the server has no such node.{hint}"
        else:
            remedies = ["If a pack brings it: name it with --known, or check against your server with --server URL."]
            message = f"neither ComfyUI nor quantwire has such a node{f'; it is from {pack}' if pack else ''}.{hint}"
        yield Finding(Level.ERROR, "unknown-node", node.place, message, tuple(remedies), {"pack": node.pack})

    def packs(self) -> Iterator[Finding]:
        """Once for each pack whose loaders are known here, though not whether it is installed."""
        if self.catalog.server is not None:
            return
        first: dict[str, Node] = {}
        for node in self.graph.nodes.values():
            node_type = self.catalog.find(node.class_type)
            if node_type is not None and node_type.pack and node.class_type not in self.own:
                first.setdefault(node_type.pack, node)
        for pack, node in first.items():
            message = f"needs the pack {pack}; whether it is installed was not checked."
            yield Finding(Level.NOTE, "needs-pack", node.place, message, ("--server URL checks that.",), {"pack": pack})

    def whole(self) -> Iterator[Finding]:
        order = set(self.graph.order())
        stuck = [n for i, n in self.graph.nodes.items() if i not in order]
        cycle = _cycle(self.graph, {n.id for n in stuck})
        if cycle:
            shown = cycle if len(cycle) <= 10 else [*cycle[:5], "...", *cycle[-4:]]
            place = self.graph.nodes[cycle[0]].place
            message = f"its inputs come from its own outputs: {' -> '.join([*shown, cycle[0]])}."
            yield Finding(Level.ERROR, "cycle", place, message, ("Take one of these links away.",))
        if not outputs(self.graph, self.catalog):
            message = "it has no output node, so nothing would run."
            yield Finding(Level.ERROR, "no-output", None, message, ("Add a node such as SaveImage or PreviewImage.",))

    # --- links and values ------------------------------------------------------------------------------------------

    def wiring(self, node: Node, node_type: NodeType | None) -> Iterator[Finding]:
        for name, link in node.links.items():
            message = self.link_fault(node_type.inputs.get(name) if node_type else None, link)
            if message:
                yield Finding(
                    Level.ERROR, "bad-link", node.place, f"input {name!r} is {message}.", data={"input": name}
                )
        if node_type is None or not node_type.detailed or self.graph.open:
            return
        for i in node_type.inputs.values():
            # The editor fills widgets; inputs that grow have other names in a file.
            by_widget = i.widget and (self.graph.form == "editor" or node.rest)
            there = i.name in node.links or i.name in node.values or i.name in node.filled or _grown(i.name, node)
            if i.required and not (there or by_widget or i.type.startswith("COMFY_")):
                message = f"the required input {i.name!r} is missing."
                yield Finding(Level.ERROR, "missing-input", node.place, message, data={"input": i.name})

    def link_fault(self, wanted: Input | None, link: Link) -> str:
        source = self.graph.nodes.get(link.node_id)
        if source is None:
            return f"linked to node {shortened(link.node_id, 60)}, which is not in the workflow"
        source_type = self.catalog.find(source.class_type)
        given = source_type.outputs if source_type is not None and source_type.detailed else None
        if given is None:
            return ""
        if not 0 <= link.output < len(given):
            return f"linked to output {link.output} of {source.place}, which has {len(given)}"
        if wanted is None or _fit(given[link.output], wanted.type):
            return ""
        return f"linked to a {given[link.output]} of {source.place}, and takes {wanted.type}"

    def values(self, node: Node, node_type: NodeType | None, missing: bool) -> Iterator[Finding]:
        """Choices that are known, and what the pack's own nodes say of their inputs."""
        found = False
        for name, value in node.values.items():
            i = node_type.inputs.get(name) if node_type else None
            if i is None or i.choices is None or i.type != "COMBO":
                continue
            if self.catalog.server is None and (i.folder or (node.class_type, name) in OF_THE_HOST):
                continue
            if isinstance(value, dict) and "__value__" in value:
                value = value["__value__"]
            for one in value if isinstance(value, list) else [value]:
                if one in i.choices or (node.class_type in self.own and name == "format"):
                    continue
                if i.folder and missing:
                    continue
                found = True
                shown = ", ".join(map(str, i.choices[:12])) + (", ..." if len(i.choices) > 12 else "")
                hint = near(str(one), map(str, i.choices)) if isinstance(one, str) else ""
                message = f"{name}: {shortened(repr(one), 80)} is not among its choices.{hint}"
                # A pack's node may check its inputs itself, and take what is not listed.
                certain = node.class_type in self.own or node.class_type in core_nodes()
                level = Level.ERROR if certain else Level.WARNING
                yield Finding(level, "bad-value", node.place, message, (f"Choices: {shown}.",), {"input": name})
        if node.class_type in self.own and not missing and not found:
            yield from self.refused(node)

    def refused(self, node: Node) -> Iterator[Finding]:
        """What VALIDATE_INPUTS of a node that opens no file says; the others' answers depend on the host."""
        cls: Any = self.classes[node.class_type]
        if node.class_type not in (*QUANTIZERS, "QuantConfig", "QuantRules"):
            return
        names = {"QuantConfig": ("uri",), "QuantRules": ("rules",)}.get(node.class_type, ("format", "per_encoder"))
        given = {n: node.values.get(n) for n in names if n in self.catalog_inputs(node)}
        try:
            answer = cls.VALIDATE_INPUTS(**given)
        except (TypeError, AttributeError, ValueError) as err:
            answer = f"its inputs are not of the kind that it takes: {err}"
        if answer is not True:
            yield Finding(Level.ERROR, "bad-value", node.place, shortened(str(answer), 600))

    def catalog_inputs(self, node: Node) -> Mapping[str, Input]:
        node_type = self.catalog.find(node.class_type)
        return node_type.inputs if node_type is not None else {}

    # --- files and formats -----------------------------------------------------------------------------------------

    def models(self, node: Node, node_type: NodeType | None) -> Iterator[Finding]:
        for i in node_type.inputs.values() if node_type is not None and self.files is not None else ():
            value = node.values.get(i.name)
            if not i.folder or i.name in node.links or value is None or value in NOT_A_FILE:
                continue
            found = self.missing(node, i, value)
            if found is not None:
                message, remedies = found
                url = node.downloads.get(value) if isinstance(value, str) else None
                remedies = (f"The workflow names {shortened(url, 300)}.", *remedies) if url else remedies
                remedies = (*remedies, MAKE_ONE) if node.class_type == "LoadGGUF" else remedies
                data = {"input": i.name, "file": value, "folder": i.folder}
                yield Finding(Level.ERROR, "missing-model", node.place, f"{i.name}: {message}", remedies, data)
            elif isinstance(value, str) and self.catalog.server is None:
                yield from self.damaged(node, i, value)

    def damaged(self, node: Node, i: Input, value: str) -> Iterator[Finding]:
        """A file that is there and whose header does not hold."""
        path = self.files.find(i.folder, value) if self.files is not None else None
        fault = self.files.fault(path) if self.files is not None and path is not None else ""
        if fault:
            # Another pack's reader may take what ours refuses.
            level = Level.ERROR if node.class_type in self.own or node.class_type in core_nodes() else Level.WARNING
            data = {"input": i.name, "file": value}
            yield Finding(level, "damaged-model", node.place, f"{i.name}: {fault}", ("Download it again.",), data)

    def missing(self, node: Node, i: Input, value: Any) -> tuple[str, tuple[str, ...]] | None:
        assert self.files is not None
        if not isinstance(value, str):
            return f"expected the name of a file, got {shortened(repr(value), 80)}.", ()
        if self.catalog.server is not None:
            choices = i.choices or ()
            hint = near(value, map(str, choices))
            return None if value in choices else (f"{value!r} is not on the server.{hint}", ())
        if "." not in value and node.class_type not in self.own:
            return None  # `pixel_space`, `taesd`: a name that stands for no single file
        return self.files.missing(i.folder, value)

    def runnable(self, node: Node) -> Iterator[Finding]:
        """Formats whose library is absent or does not run on this machine."""
        wanted: Iterable[str] = formats(self.graph, node) if node.class_type in FORMAT_NODES else ()
        for format_id in wanted:
            state = availability(format_id)
            if not state.works:
                message = f"{format_id} cannot run on this machine: {state.reason}"
                yield Finding(
                    Level.ERROR, "unavailable-format", node.place, message, (state.remedy,), {"format": format_id}
                )
        if self.files is None or node.class_type not in ("LoadGGUF", "LoadGGUFTextEncoder"):
            return
        for i in self.catalog_inputs(node).values():
            value = node.values.get(i.name)
            path = self.files.find(i.folder, value) if i.folder and isinstance(value, str) else None
            for format_id in self.files.formats(path) if path is not None else ():
                try:
                    require_reader(format_id)
                except BackendUnavailable as err:
                    reason, _, remedy = str(err).partition("\n")
                    yield Finding(Level.ERROR, "unavailable-format", node.place, f"{value}: {reason}", (remedy,))
                except QuantwireError as err:
                    yield Finding(Level.ERROR, "unavailable-format", node.place, f"{value}: {shortened(str(err), 300)}")


def embedded(
    graph: Graph, source: str, classes: Mapping[str, type], missing: set[tuple[str, str]]
) -> Iterator[Finding]:
    """What the embedded host itself would refuse.

    Args:
        missing: (node id, input) of files that are reported already.
    """
    answered = {node_id for node_id, _ in missing}
    for p in validate(graph.prompt(source), classes).problems:
        node = graph.nodes.get(p.node_id) if p.node_id is not None else None
        if node is None:
            remedy = ("Add a node such as SaveImage or PreviewImage.",)
            yield Finding(Level.ERROR, "no-output", None, "it has no output node, so nothing would run.", remedy)
        elif (p.node_id, p.input) in missing or (p.kind == "custom_validation_failed" and p.node_id in answered):
            continue
        elif not (p.kind == "required_input_missing" and (graph.open or p.input in node.filled)):
            code = CODES.get(p.kind, "bad-value")
            message = f"{p.input}: {p.message}" if p.input else p.message
            yield Finding(Level.ERROR, code, node.place, message, (TRY_COMFYUI,), {"input": p.input or ""})


CODES = {
    "missing_node_type": "unknown-node",
    "required_input_missing": "missing-input",
    "bad_linked_input": "bad-link",
    "return_type_mismatch": "bad-link",
    "dependency_cycle": "cycle",
}


def outputs(graph: Graph, catalog: Catalog) -> list[str]:
    """The nodes that make the graph run; one that is not known may be such a node."""
    types = {i: catalog.find(n.class_type) for i, n in graph.nodes.items()}
    return [i for i, t in types.items() if t is None or t.output_node]


def _likely(name: str, names: Iterable[str]) -> str:
    """Only a slip of the pen: among a thousand ids some other is always alike."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.85)
    return f" Did you mean {close[0]}?" if close else ""


def _fit(given: str, wanted: str) -> bool:
    sides = [{part.strip() for part in side.split(",")} for side in (given, wanted)]
    if any(part in ANY_TYPES or part.startswith("COMFY_") for side in sides for part in side):
        return True
    return bool(sides[0] & sides[1])


def _grown(name: str, node: Node) -> bool:
    """Whether the file has the input under a name of several: `images.0`, `model.size`."""
    return any(n.startswith(f"{name}.") for n in (*node.links, *node.values))


def _cycle(graph: Graph, stuck: set[str]) -> list[str]:
    """One cycle among nodes that cannot be ordered; empty where there is none."""
    at = next(iter(stuck), None)
    path: dict[str, None] = {}
    while at is not None and at not in path:
        path[at] = None
        at = next((link.node_id for link in graph.nodes[at].links.values() if link.node_id in stuck), None)
    if at is None:
        return []
    nodes = list(path)
    return list(reversed(nodes[nodes.index(at) :]))
