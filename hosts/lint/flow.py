"""Follow quantized weights through a graph, and judge them where a mode meets them.

OffloadCompat judges what arrives at it. What is added behind it is judged where it is used up, as its guard does before
sampling; so is everything when a mode is given on the command line. A node that is not known hands on, in editor form,
by the types of its slots; in API form, by what the inputs that it feeds expect.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ...quantizers.compat.matrix import answer
from ...quantizers.compat.modes import HOST_MODES, Carrier, HostName, OffloadMode, VerdictLevel
from ...quantizers.compat.remedies import offered
from ...quantizers.errors import QuantwireError
from ..offload import OffloadSettings
from ..standalone.workflow import NodePlace
from .catalog import ANY_TYPES, KINDS, Catalog, NodeType
from .graph import Finding, Graph, Level, Node
from .sources import QUANTIZERS, Held, Sources

COMPAT = "OffloadCompat"
# Input of OffloadCompat -> index of the output that hands it on.
COMPAT_OUTPUTS = {"model": 0, "clip": 2, "vae": 3, "pipeline": 4}
AUTO = "auto"
NOUNS = {"MODEL": "the model", "CLIP": "the text encoders", "VAE": "the VAE", "CONTROL_NET": "the ControlNet"}
HOLDERS = {
    Carrier.QUANTWIRE: "quantwire's layers",
    Carrier.LIBRARY: "the library's own layers",
    Carrier.HOST: "ComfyUI's own layers",
}
SAID = {
    VerdictLevel.BLOCK: "cannot run",
    VerdictLevel.WARN: "may run badly",
    VerdictLevel.UNKNOWN: "is not known to run",
}
# Outputs of nodes that read a model's settings, such as BasicScheduler, and do not run it.
UNUSED = (("SIGMAS",),)
CALLED = {HostName.COMFYUI: "ComfyUI", HostName.STANDALONE: "quantwire run"}
OWN_LOADERS = ("LoadAndQuantize", "LoadGGUF", "LoadGGUFTextEncoder")


@dataclass(frozen=True)
class Guard:
    """An OffloadCompat that a value went through; it checks again before sampling."""

    mode: OffloadMode
    action: str
    place: NodePlace
    variant: str | None


@dataclass(frozen=True)
class Stream:
    """What is known of a value on a link.

    Attributes:
        mode: set by an OffloadCompat with set_mode.
    """

    held: frozenset[Held] = frozenset()
    guards: frozenset[Guard] = frozenset()
    mode: OffloadMode | None = None

    def joined(self, other: Stream) -> Stream:
        return Stream(self.held | other.held, self.guards | other.guards, self.mode or other.mode)


Streams = Mapping[str, Stream]
Used = dict[int, set[str]]
EMPTY: Streams = {}


@dataclass
class Flow:
    """One pass over a graph.

    Args:
        offload: the mode given on the command line.
        live: ids of the nodes that run.
    """

    graph: Graph
    catalog: Catalog
    sources: Sources
    host: HostName
    offload: OffloadMode | None
    live: set[str]
    findings: list[Finding] = field(default_factory=lambda: list[Finding]())
    _out: dict[tuple[str, int], Streams] = field(default_factory=lambda: dict[tuple[str, int], Streams]())
    _said: set[tuple[Held, OffloadMode]] = field(default_factory=lambda: set[tuple[Held, OffloadMode]]())

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
        if self._said and self.offload is not None and self.offload not in HOST_MODES[self.host]:
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
                    out[kind] = Stream(kept | frozenset(held), before.guards, before.mode)
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
        action = node.values.get("action", "block")
        action = action if isinstance(action, str) and "action" not in node.links else "block"
        for name, index in COMPAT_OUTPUTS.items():
            streams = self.incoming(node, name, None)
            out: dict[str, Stream] = {}
            for kind, stream in streams.items():
                chosen = self.mode_of(node, stream)
                if chosen is None:
                    self.tell_of_auto(node, stream)
                    out[kind] = stream
                    continue
                variant = _variant(node, chosen)
                self.judge(node.place, stream.held, chosen, action, variant)
                guard = Guard(chosen, action, node.place, variant)
                sets = node.values.get("set_mode") is True and node.values.get("mode") != AUTO
                out[kind] = Stream(stream.held, stream.guards | {guard}, chosen if sets else stream.mode)
            if index in used:
                self._out[(node.id, index)] = out

    def mode_of(self, node: Node, stream: Stream) -> OffloadMode | None:
        value = node.values.get("mode", AUTO) if "mode" not in node.links else None
        if value == AUTO:
            return stream.mode or self.offload
        return next((m for m in OffloadMode if m.value == value), None)

    # --- verdicts ------------------------------------------------------------------------------------------------

    def used_up(self, node: Node, stream: Stream) -> None:
        """A sampler, an encoder or an output got it: the guards check again, and so does the given mode."""
        if _output_types(node, self.catalog.find(node.class_type)) in UNUSED:
            return
        for guard in sorted(stream.guards, key=lambda g: g.place.node_id):
            text = f" It was added behind {guard.place}."
            self.judge(node.place, stream.held, guard.mode, guard.action, guard.variant, text)
        mode = stream.mode or self.offload
        if mode is not None:
            self.judge(node.place, stream.held, mode, "block", None)

    def judge(
        self,
        place: NodePlace,
        held: Iterable[Held],
        mode: OffloadMode,
        action: str,
        variant: str | None,
        behind: str = "",
    ) -> None:
        for h in sorted(held, key=lambda h: (h.kind, h.label, h.origin.node_id)):
            if (h, mode) not in self._said:
                self._said.add((h, mode))
                found = self.verdict(place, h, mode, action, variant, behind)
                self.findings += [found] if found else []

    def verdict(
        self, place: NodePlace, h: Held, mode: OffloadMode, action: str, variant: str | None, behind: str
    ) -> Finding | None:
        host = host_of(mode, self.host)
        got = answer(h.carrier, h.key, mode, host=host, variant=variant)
        if got.level is VerdictLevel.OK:
            return None
        how = "without offload" if mode is OffloadMode.NONE else f"with {mode.value} offload"
        origin = "" if h.origin == place else f", from {h.origin}"
        cause = got.cause or "no measurement or document covers it"
        message = (
            f"{h.label} ({HOLDERS[h.carrier]} in {NOUNS[h.kind]}{origin}) {SAID[got.level]} {how}: {cause}.{behind}"
        )
        level = Level.BLOCK if got.level is VerdictLevel.BLOCK else Level.WARNING
        if action != "block":
            level = Level.NOTE if action == "report" else Level.WARNING
            message += f" The check is set to {action}, so the graph goes on."
        texts = (r.text for r in offered(h.carrier, h.key, mode, host=host, variant=variant))
        data = {
            "carrier": h.carrier.value,
            "format": h.key,
            "mode": mode.value,
            "host": host.value,
            "verdict": got.level.value,
            "from": h.origin.node_id,
        }
        code = "offload-conflict" if got.level is VerdictLevel.BLOCK else "offload"
        return Finding(level, code, place, message, tuple(_named(text, h.origin) for text in texts), data)

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
        mode = self.mode_of(node, Stream())
        if mode is None or node.values.get("mode") == AUTO:
            return
        if mode not in HOST_MODES[self.host] and node.values.get("action") != "report":
            message = f"{CALLED[self.host]} has no offload mode {mode.value}."
            remedy = f"Its modes: {', '.join(m.value for m in HOST_MODES[self.host])}, or auto."
            self.findings.append(Finding(Level.ERROR, "bad-mode", node.place, message, (remedy,)))
        elif self.host is HostName.COMFYUI and node.values.get("set_mode") is True:
            message = "set_mode is on, but ComfyUI chooses its mode when it starts."
            self.findings.append(Finding(Level.ERROR, "bad-mode", node.place, message, ("Turn set_mode off.",)))


def _named(remedy: str, origin: NodePlace) -> str:
    """The table's texts name QuantizeModel; here the node is known."""
    own = origin.class_type in (*QUANTIZERS, *OWN_LOADERS)
    return remedy.replace("of QuantizeModel", f"of {origin}") if own else remedy


def other(host: HostName) -> HostName:
    return next(h for h in HostName if h is not host)


def host_of(mode: OffloadMode, host: HostName) -> HostName:
    """The host that has a mode: the one asked for if it has it."""
    return host if mode in HOST_MODES[host] else other(host)


def _variant(node: Node, mode: OffloadMode) -> str | None:
    """How an OffloadCompat means its mode to be carried out; None where its widgets do not tell."""
    if mode in (OffloadMode.PARTIAL, OffloadMode.BALANCED):
        return None
    names = {OffloadMode.SEQUENTIAL: ("keep_on",), OffloadMode.GROUP: ("keep_on", "group_level", "use_stream")}
    given = {name: node.values[name] for name in names.get(mode, ()) if name in node.values}
    try:
        return OffloadSettings(mode, **given).variant if mode in names else ""
    except (QuantwireError, TypeError):  # the node refuses such a value itself
        return None


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
