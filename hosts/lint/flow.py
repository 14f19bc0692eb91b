"""Follow quantized weights through a graph, and judge them where a mode meets them.

OffloadCompat judges what arrives at it. What is added behind it is judged where it is used up, as its guard does before
sampling; so is everything under the mode that will be in force there: one that an OffloadCompat sets, or that of the
command line. The action of a check does not soften that: a run that goes on stops in the library. A node that is not
known hands on, in editor form, by the types of its slots; in API form, by what the inputs that it feeds expect.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ...quantizers.compat.matrix import answer
from ...quantizers.compat.modes import HOST_MODES, HostName, OffloadMode, VerdictLevel
from ...quantizers.errors import QuantwireError
from ..offload import OffloadSettings
from ..standalone.workflow import NodePlace
from .catalog import ANY_TYPES, KINDS, Catalog, NodeType
from .graph import UNKNOWN, Finding, Graph, Level, Node
from .sources import QUANTIZERS, Held, Sources
from .verdicts import Use, Verdicts, other

COMPAT = "OffloadCompat"
# Input of OffloadCompat -> index of the output that hands it on.
COMPAT_OUTPUTS = {"model": 0, "clip": 2, "vae": 3, "pipeline": 4}
AUTO = "auto"
# Outputs of nodes that read a model's settings, such as BasicScheduler, and do not run it.
UNUSED = (("SIGMAS",),)
CALLED = {HostName.COMFYUI: "ComfyUI", HostName.STANDALONE: "quantwire run"}
SEVERITY = {level: position for position, level in enumerate(Level)}


@dataclass(frozen=True)
class Guard:
    """An OffloadCompat with a mode of its own that a value went through; it checks again before sampling."""

    use: Use
    action: str
    place: NodePlace


@dataclass(frozen=True)
class Stream:
    """What is known of a value on a link.

    Attributes:
        use: set by an OffloadCompat with set_mode.
    """

    held: frozenset[Held] = frozenset()
    guards: frozenset[Guard] = frozenset()
    use: Use | None = None

    def joined(self, other: Stream) -> Stream:
        return Stream(self.held | other.held, self.guards | other.guards, self.use or other.use)


Streams = Mapping[str, Stream]
Used = dict[int, set[str]]
# (use, action) -> level of the finding, for each time that one was judged.
Judged = dict[tuple[Use, str], Level | None]
EMPTY: Streams = {}


@dataclass
class Flow:
    """One pass over a graph.

    Args:
        offload: the mode given on the command line.
        live: ids of the nodes that run.
        in_force: `offload` is what the host does now, which splits only what does not fit.
    """

    graph: Graph
    catalog: Catalog
    sources: Sources
    host: HostName
    offload: OffloadMode | None
    live: set[str]
    in_force: bool = False
    findings: list[Finding] = field(default_factory=lambda: list[Finding]())
    _out: dict[tuple[str, int], Streams] = field(default_factory=lambda: dict[tuple[str, int], Streams]())
    _ran: set[Stream] = field(default_factory=lambda: set[Stream]())
    _verdicts: Verdicts = field(init=False)
    _judged: dict[tuple[Held, OffloadMode], Judged] = field(
        default_factory=lambda: dict[tuple[Held, OffloadMode], Judged]()
    )

    def __post_init__(self) -> None:
        checked = any(n.class_type == COMPAT for n in self.graph.nodes.values())
        self._verdicts = Verdicts(self.host, checked)

    @property
    def given(self) -> Use | None:
        """The mode of the command line, or that of the running host."""
        if self.offload is None:
            return None
        return Use(self.offload, sized=self.in_force and self.offload in (OffloadMode.PARTIAL, OffloadMode.BALANCED))

    def run(self) -> list[Finding]:
        used = self.used_outputs()
        for node_id in self.graph.order():
            node = self.graph.nodes[node_id]
            if node_id not in self.live:
                continue
            if node.class_type == COMPAT:
                self.compat(node, used.get(node_id, {}))
            else:
                self.ordinary(node, used.get(node_id, {}))
        if self._judged and self.offload is not None and self.offload not in HOST_MODES[self.host]:
            message = (
                f"{CALLED[self.host]} has no offload mode {self.offload.value}; judged for {CALLED[other(self.host)]}."
            )
            remedy = f"The modes of {CALLED[self.host]}: {', '.join(m.value for m in HOST_MODES[self.host])}."
            self.findings.append(Finding(Level.NOTE, "other-host", None, message, (remedy,)))
        return self.findings

    def used_outputs(self) -> dict[str, Used]:
        """Node id -> output -> the kinds that the inputs which it feeds take."""
        used: dict[str, Used] = {}
        for node in self.graph.nodes.values():
            node_type = self.catalog.find(node.class_type)
            for name, link in node.links.items() if node.id in self.live else ():
                expected = _expected(node, name, node_type)
                kinds = used.setdefault(link.node_id, {}).setdefault(link.output, set())
                kinds |= set(KINDS) if expected is None else expected
        return used

    # --- nodes ---------------------------------------------------------------------------------------------------

    def incoming(self, node: Node, name: str, node_type: NodeType | None) -> Streams:
        """What arrives at one input, of the kinds that it takes."""
        link = node.links.get(name)
        streams = self._out.get((link.node_id, link.output), EMPTY) if link is not None else EMPTY
        expected = _expected(node, name, node_type)
        return {k: s for k, s in streams.items() if expected is None or k in expected}

    def ordinary(self, node: Node, used: Used) -> None:
        node_type = self.catalog.find(node.class_type)
        arriving = [(name, self.incoming(node, name, node_type)) for name in node.links]
        merged: dict[str, Stream] = {}
        for _, streams in arriving:
            for kind, stream in streams.items():
                merged[kind] = merged[kind].joined(stream) if kind in merged else stream
        made = self.sources.made(node, node_type)
        types = _output_types(node, node_type)
        for index, taken in used.items():
            kinds = _kinds(types, index) & taken
            out = {k: self.handed_on(k, index, types, arriving, merged[k]) for k in merged if k in kinds}
            for kind, held in made.items():
                if kind in kinds:
                    before = out.get(kind, Stream())
                    # Quantizing replaces what was there; a loader has nothing before it.
                    kept = frozenset() if node.class_type in QUANTIZERS else before.held
                    out[kind] = Stream(kept | frozenset(held), before.guards, before.use)
            self._out[(node.id, index)] = out
        for kind, stream in merged.items():
            if not any(kind in self._out[(node.id, index)] for index in used):
                self.used_up(node, stream)

    def handed_on(
        self, kind: str, index: int, types: tuple[str, ...] | None, arriving: list[tuple[str, Streams]], merged: Stream
    ) -> Stream:
        """With as many inputs of a kind as outputs, each goes to its own; else all go to all."""
        inputs = [streams[kind] for _, streams in arriving if kind in streams]
        outputs = [i for i, t in enumerate(types or ()) if t == kind]
        if len(inputs) == len(outputs) > 1 and index in outputs:
            return inputs[outputs.index(index)]
        return merged

    def compat(self, node: Node, used: Used) -> None:
        self.check_mode(node)
        action = self.graph.literal(node, "action", "block")
        action = action if action in ("warn", "report") else "block"
        mode = self.graph.literal(node, "mode", AUTO)
        use, sets = self.asked(node, mode), self.sets_mode(node)
        reached = False
        for name, index in COMPAT_OUTPUTS.items():
            out: dict[str, Stream] = {}
            for kind, stream in self.incoming(node, name, None).items():
                reached = reached or bool(stream.held)
                out[kind] = stream
                if use is not None:
                    self.judge(node.place, stream.held, use, action)
                    guards = stream.guards | {Guard(use, action, node.place)}
                    # With set_mode, the guard looks at what the host does: the mode that is set last.
                    out[kind] = replace(stream, use=use) if sets else replace(stream, guards=guards)
                elif mode == AUTO and (now := stream.use or self.given) is not None:
                    self.judge(node.place, stream.held, now, action)
                elif mode == AUTO:
                    self.tell_of_auto(node, stream)
            if index in used:
                self._out[(node.id, index)] = out
        if mode is UNKNOWN and reached:
            message = "its mode comes from a link and is known when the graph runs, so this check was not judged."
            remedy = "Choose the mode in the node, or check one with --offload MODE."
            self.findings.append(Finding(Level.NOTE, "not-judged", node.place, message, (remedy,)))

    def asked(self, node: Node, value: Any) -> Use | None:
        """The mode that an OffloadCompat names; None for auto, for a link, and for a word that is no mode."""
        mode = next((m for m in OffloadMode if value == m.value), None)
        if mode is None:
            return None
        return Use(mode, self.variant(node, mode), mode is OffloadMode.BALANCED and self.sets_mode(node))

    def sets_mode(self, node: Node) -> bool:
        value = self.graph.literal(node, "set_mode", False)
        return value is not UNKNOWN and bool(value)

    def variant(self, node: Node, mode: OffloadMode) -> str | None:
        """How an OffloadCompat means its mode to be carried out; None where its widgets do not tell."""
        if mode is OffloadMode.PARTIAL:
            return None
        if mode is OffloadMode.BALANCED:
            return "split-disk" if self.graph.literal(node, "keep_on") == "disk" else "split"
        names = {OffloadMode.SEQUENTIAL: ("keep_on",), OffloadMode.GROUP: ("keep_on", "group_level", "use_stream")}
        given = {name: v for name in names.get(mode, ()) if (v := self.graph.literal(node, name)) is not None}
        if UNKNOWN in given.values():
            return None
        try:
            return OffloadSettings(mode, **given).variant if mode in names else ""
        except (QuantwireError, TypeError):  # the node refuses such a value itself
            return None

    # --- verdicts ------------------------------------------------------------------------------------------------

    def used_up(self, node: Node, stream: Stream) -> None:
        """A sampler, an encoder or an output got it: the guards check again, and the mode that is in force decides."""
        if _output_types(node, self.catalog.find(node.class_type)) in UNUSED or stream in self._ran:
            return
        self._ran.add(stream)  # a second sampler gets nothing new
        for guard in sorted(stream.guards, key=lambda g: g.place.node_id):
            text = f" It was added behind {guard.place}."
            self.judge(node.place, stream.held, guard.use, guard.action, text)
        use = stream.use or self.given
        if use is not None:
            self.judge(node.place, stream.held, use, "block")

    def judge(self, place: NodePlace, held: Iterable[Held], use: Use, action: str, behind: str = "") -> None:
        """Add what is worse than all that was said of the same weights, carried out in the same way."""
        for h in sorted(held, key=lambda h: (h.kind, h.label, h.origin.node_id)):
            judged = self._judged.setdefault((h, use.mode), {})
            if (use, action) in judged:
                continue
            found = self._verdicts.finding(place, h, use, action, behind)
            said = [
                level
                for (u, _), level in judged.items()
                if u.variant == use.variant or None in (u.variant, use.variant)
            ]
            judged[(use, action)] = found.level if found is not None else None
            if found is not None and all(SEVERITY[found.level] < SEVERITY[level] for level in said if level):
                self.findings.append(found)

    def tell_of_auto(self, node: Node, stream: Stream) -> None:
        """Mode `auto` is known when the graph runs; a note where some mode of the host would stop it."""
        told: list[str] = []
        for h in sorted(stream.held, key=lambda h: (h.label, h.origin.node_id)):
            levels = {m.value: answer(h.carrier, h.key, m, host=self.host).level for m in HOST_MODES[self.host]}
            stops = [mode for mode, level in levels.items() if level is VerdictLevel.BLOCK]
            if stops:
                told.append(f"{h.label} from {h.origin} cannot run with {' or '.join(stops)} offload")
        if told:
            message = f"mode auto is what the host does when the graph runs: {'; '.join(told)}."
            remedy = "Check one of these modes with --offload MODE."
            self.findings.append(Finding(Level.NOTE, "offload-auto", node.place, message, (remedy,)))

    def check_mode(self, node: Node) -> None:
        """What OffloadCompat refuses whatever it is given: a mode that the host does not have, or cannot set."""
        value = self.graph.literal(node, "mode", AUTO)
        mode = next((m for m in OffloadMode if value == m.value), None)
        told = mode is not None and self.graph.literal(node, "action", "block") != "report"
        if mode is not None and mode not in HOST_MODES[self.host] and told:
            message = f"{CALLED[self.host]} has no offload mode {mode.value}."
            remedy = f"Its modes: {', '.join(m.value for m in HOST_MODES[self.host])}, or auto."
            self.findings.append(Finding(Level.ERROR, "bad-mode", node.place, message, (remedy,)))
        elif self.host is HostName.COMFYUI and self.sets_mode(node):
            message = "set_mode is on, but ComfyUI chooses its mode when it starts."
            self.findings.append(Finding(Level.ERROR, "bad-mode", node.place, message, ("Turn set_mode off.",)))


def _expected(node: Node, name: str, node_type: NodeType | None) -> set[str] | None:
    """The kinds that an input takes; None for any."""
    declared = node_type.inputs.get(name) if node_type is not None and node_type.detailed else None
    written = declared.type if declared is not None else node.input_types.get(name)
    if written is None and node_type is not None and not node_type.detailed:
        return set()  # a node of ComfyUI that has nothing to do with models
    return _named_kinds(written)


def _named_kinds(written: str | None) -> set[str] | None:
    if written is None or written in ANY_TYPES:
        return None
    parts = {part.strip() for part in written.split(",")}
    return None if "*" in parts else parts & set(KINDS)


def _output_types(node: Node, node_type: NodeType | None) -> tuple[str, ...] | None:
    if node_type is not None and not node_type.detailed:
        return node.output_types or ()
    declared = node_type.outputs if node_type is not None else None
    if declared is None or node.output_types is None:
        return declared if declared is not None else node.output_types
    # The editor knows what an output of any type was linked as.
    return tuple(
        w if d in ANY_TYPES else d
        for d, w in zip(declared, (*node.output_types, *declared[len(node.output_types) :]), strict=False)
    )


def _kinds(types: tuple[str, ...] | None, index: int) -> set[str]:
    if types is None:
        return set(KINDS)
    if not 0 <= index < len(types):
        return set()
    named = _named_kinds(types[index])
    return set(KINDS) if named is None else named
