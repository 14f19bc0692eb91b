"""What is certain to fail beside offload conflicts: nodes, files, links and values that are not there or do not fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from ...quantizers.compat.modes import HostName
from ...quantizers.errors import BackendUnavailable, QuantwireError, near
from ...quantizers.registry import availability, require_reader
from ..standalone.validate import check as validate
from ..standalone.workflow import Link
from .catalog import ANY_TYPES, NUMBERS, Catalog, Input, NodeType, core_nodes, one_slip
from .files import ModelFiles
from .flow import COMPAT
from .graph import PRIMITIVES, Finding, Graph, Level, Node, shortened
from .sources import QUANTIZERS, formats

# Choices that the host makes, which is not here.
OF_THE_HOST = (("LoadGGUFTextEncoder", "type"), ("ConvertModel", "model_name"))
NOT_A_FILE = ("none", "None", "[None]")
MAKE_ONE = "`quantwire convert MODEL.safetensors MODEL.gguf --type Q8_0` makes one."
MAKE_ONE_HERE = "The node ConvertModel makes one of a safetensors file."
TRY_COMFYUI = "If the workflow is meant for ComfyUI, check it with --host comfyui."
NAME_IT = "If a pack brings it: name it with --known, or check against your server with --server URL."
CORE_PACK = "comfy-core"  # what the editor calls ComfyUI itself
MOST_NAMES = 20
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
        strict: an unknown node is an error, whether it may be a pack's or not.
        here: the catalog's server is this process.
    """

    graph: Graph
    catalog: Catalog
    classes: Mapping[str, type]
    own: frozenset[str]
    host: HostName
    allowed: tuple[str, ...]
    files: ModelFiles | None
    live: set[str]
    strict: bool = False
    here: bool = False

    def run(self) -> list[Finding]:
        found = list(self.each())
        return self.without_dead_branches(found) if self.host is HostName.COMFYUI else found

    def each(self) -> Iterator[Finding]:
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
            if node.id in self.live and (self.here or self.catalog.server is None):
                yield from self.runnable(node)
        if self.host is HostName.COMFYUI:
            yield from self.packs()
            yield from self.not_known()
            yield from self.whole()

    # --- nodes ---------------------------------------------------------------------------------------------------

    def is_known(self, node: Node, node_type: NodeType | None) -> bool:
        if any(fnmatchcase(node.class_type, pattern) for pattern in self.allowed):
            return True
        return node_type is not None and (self.catalog.server is None or node.class_type in self.catalog.server)

    def unknown(self, node: Node, node_type: NodeType | None) -> Iterator[Finding]:
        """An id that is certain to be wrong; others that nobody knows here are told once for all, by `not_known`."""
        if self.is_known(node, node_type):
            yield from self.replaced(node, node_type) if node_type is not None else ()
            return
        meant = self.catalog.meant(node.class_type)
        pack = shortened(node.pack, 60)
        data = {"pack": node.pack}
        if self.catalog.server is not None:
            remedies = (f"Install {pack or 'the pack that has it'} on the server.",)
            hint = f" Did you mean {meant}?" if meant else ""
            yield Finding(
                Level.ERROR, "unknown-node", node.place, f"the server has no such node.{hint}", remedies, data
            )
        elif meant and pack in ("", CORE_PACK):
            message = f"neither ComfyUI nor quantwire has such a node. Did you mean {meant}?"
            yield Finding(Level.ERROR, "unknown-node", node.place, message, (NAME_IT,), data)

    def not_known(self) -> Iterator[Finding]:
        """One finding for all nodes of packs that are not known here: whether they are installed cannot be told."""
        if self.catalog.server is not None:
            return
        found: dict[str, list[Node]] = {}
        for node in self.graph.nodes.values():
            slip = self.catalog.meant(node.class_type) and node.pack in ("", CORE_PACK)
            if not self.is_known(node, self.catalog.find(node.class_type)) and not slip:
                found.setdefault(node.class_type, []).append(node)
        if not found:
            return
        packs = {name: nodes[0].pack for name, nodes in found.items()}
        names = [f"{shortened(n, 60)} of {shortened(p, 60)}" if p else shortened(n, 60) for n, p in packs.items()]
        names = [*names[:MOST_NAMES], *([f"{len(names) - MOST_NAMES} more"] if len(names) > MOST_NAMES else [])]
        count = sum(map(len, found.values()))
        message = f"needs nodes that are not known here: {', '.join(names)} ({count} node{'s' if count > 1 else ''})."
        data = {"nodes": {name: [n.id for n in nodes] for name, nodes in found.items()}, "packs": packs}
        level = Level.ERROR if self.strict else Level.WARNING
        yield Finding(level, "unknown-node", None, message, (NAME_IT,), data)

    def replaced(self, node: Node, node_type: NodeType) -> Iterator[Finding]:
        """An older id that ComfyUI replaces, with or without what is linked to it."""
        new = node_type.replaced_by
        if new and node_type.drops_inputs and self.graph.form == "api":
            message = f"ComfyUI replaces it by {new} and drops its inputs, so {new} lacks those that it requires."
            yield Finding(Level.ERROR, "replaced-node", node.place, message, (f"Write {new} as its class_type.",))
        elif new:
            message = f"an older name; ComfyUI replaces the node by {new}."
            yield Finding(Level.NOTE, "replaced-node", node.place, message, (f"Use {new}.",))

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

    def without_dead_branches(self, found: list[Finding]) -> list[Finding]:
        """A server leaves out an output that lacks an input and runs the others; a fault is one where none is left."""
        lacking = {f.place.node_id for f in found if f.code == "missing-input" and f.place is not None}
        faulty = {f.place.node_id for f in found if f.level is Level.ERROR and f.place is not None}
        if not lacking or any(f.level is Level.ERROR and f.place is None for f in found):
            return found
        feeds: dict[str, list[str]] = {}
        for node in self.graph.nodes.values():
            for link in node.links.values():
                feeds.setdefault(link.node_id, []).append(node.id)
        bad = reached(faulty, feeds)
        if not any(self.is_output(node) and node.id not in bad for node in self.graph.nodes.values()):
            return found
        who = "ComfyUI" if self.host is HostName.COMFYUI else "the server"
        skipped = f"; {who} leaves out what needs it and runs the other outputs."
        return [
            replace(f, level=Level.WARNING, message=f.message.rstrip(".") + skipped) if f.code == "missing-input" else f
            for f in found
        ]

    def is_output(self, node: Node) -> bool:
        """Only what is known to be one: any other node may be, and then again may not."""
        node_type = self.catalog.find(node.class_type)
        return node_type is not None and node_type.output_node

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
            # The editor fills widgets, and draws a slot for all else; inputs that grow have other names in a file.
            editor = self.graph.form == "editor"
            by_widget = (i.widget and (editor or node.rest)) or (editor and i.name not in node.input_types)
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
        if given is None and source.class_type in PRIMITIVES:
            given = (PRIMITIVES[source.class_type],)
        if given is None:
            return ""
        if not 0 <= link.output < len(given):
            return f"linked to output {link.output} of {source.place}, which has {len(given)}"
        if wanted is None or _fit(given[link.output], wanted.type):
            return ""
        return f"linked to a {given[link.output]} of {source.place}, and takes {wanted.type}"

    def values(self, node: Node, node_type: NodeType | None, missing: bool) -> Iterator[Finding]:
        """Numbers, choices that are known, and what the pack's own nodes say of their inputs."""
        found = False
        # A pack's node may check its inputs itself, and take what is not listed.
        certain = node.class_type in self.own or node.class_type in core_nodes()
        for name, value in node.values.items():
            i = node_type.inputs.get(name) if node_type else None
            if isinstance(value, dict) and "__value__" in value:  # how the editor tells a list value from a link
                value = value["__value__"]
            fault = number_fault(i, value) if i is not None else ""
            if fault:
                found = True
                level = Level.ERROR if certain else Level.WARNING
                yield Finding(level, "bad-value", node.place, f"{name}: {fault}.", data={"input": name})
            if i is None or i.choices is None or i.type != "COMBO":
                continue
            if self.catalog.server is None and (i.folder or (node.class_type, name) in OF_THE_HOST):
                continue
            for one in value if isinstance(value, list) else [value]:
                if one in i.choices or (node.class_type in self.own and name == "format" and one is not None):
                    continue
                if i.folder and missing:
                    continue
                found = True
                shown = ", ".join(map(str, i.choices[:12])) + (", ..." if len(i.choices) > 12 else "")
                hint = near(str(one), map(str, i.choices)) if isinstance(one, str) else ""
                message = f"{name}: {shortened(repr(one), 80)} is not among its choices.{hint}"
                # Packs add samplers and schedulers to ComfyUI's own, so without a server only a slip is certain.
                recorded = node.class_type not in self.own and self.catalog.server is None
                sure = certain and not (recorded and not any(one_slip(str(one), str(c)) for c in i.choices))
                level = Level.ERROR if sure else Level.WARNING
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
                make_one = MAKE_ONE_HERE if self.here else MAKE_ONE
                remedies = (*remedies, make_one) if node.class_type == "LoadGGUF" else remedies
                data = {"input": i.name, "file": value, "folder": i.folder}
                yield Finding(Level.ERROR, "missing-model", node.place, f"{i.name}: {message}", remedies, data)
            elif isinstance(value, str) and (self.here or self.catalog.server is None):
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
        return self.files.missing(i.folder, value, listed=node.class_type not in self.own, here=self.here)

    def runnable(self, node: Node) -> Iterator[Finding]:
        """Formats whose library is absent or does not run on this machine."""
        if self.files is None:  # who has no models here runs the file elsewhere
            return
        here = self.here or self.host is HostName.STANDALONE
        level = Level.ERROR if here else Level.WARNING
        where = "on this machine" if here else "in the Python that checks; ComfyUI's may have other libraries"
        wanted: Iterable[str] = formats(self.graph, node) if node.class_type in FORMAT_NODES else ()
        for format_id in wanted:
            state = availability(format_id)
            if not state.works:
                message = f"{format_id} cannot run {where}: {state.reason}"
                data = {"format": format_id}
                yield Finding(level, "unavailable-format", node.place, message, (state.remedy,), data)
        if node.class_type not in ("LoadGGUF", "LoadGGUFTextEncoder", "LoadQuantized"):
            return
        of = self.files.layer_formats if node.class_type == "LoadQuantized" else self.files.formats
        for i in self.catalog_inputs(node).values():
            value = node.values.get(i.name)
            path = self.files.find(i.folder, value) if i.folder and isinstance(value, str) else None
            for format_id in of(path) if path is not None else ():
                try:
                    require_reader(format_id)
                except BackendUnavailable as err:
                    reason, _, remedy = str(err).partition("\n")
                    yield Finding(level, "unavailable-format", node.place, f"{value}: {reason}", (remedy,))
                except QuantwireError as err:
                    yield Finding(level, "unavailable-format", node.place, f"{value}: {shortened(str(err), 300)}")


def embedded(
    graph: Graph, source: str, classes: Mapping[str, type], missing: set[tuple[str, str]], *, here: bool = False
) -> Iterator[Finding]:
    """What the embedded host itself would refuse.

    Args:
        missing: (node id, input) of files that are reported already.
        here: the host that runs, and nobody chose it with an option of the command line.
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
            ways = () if here else (TRY_COMFYUI,)
            yield Finding(Level.ERROR, code, node.place, message, ways, {"input": p.input or ""})


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


def number_fault(i: Input, value: Any) -> str:
    """What ComfyUI's server says of a literal for an INT or FLOAT: whether it converts, and its range."""
    if i.type not in NUMBERS:
        return ""
    try:
        number = int(value) if i.type == "INT" else float(value)
    except (TypeError, ValueError, OverflowError):
        return f"{shortened(repr(value), 80)} is no {i.type}"
    if i.low is not None and number < i.low:
        return f"{number} is below its minimum {i.low}"
    return f"{number} is above its maximum {i.high}" if i.high is not None and number > i.high else ""


def reached(starts: Iterable[str], feeds: Mapping[str, list[str]]) -> set[str]:
    """These nodes and all that they feed."""
    found = set(starts)
    rest = list(found)
    while rest:
        for fed in feeds.get(rest.pop(), ()):
            if fed not in found:
                found.add(fed)
                rest.append(fed)
    return found


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
