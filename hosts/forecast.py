"""What a workflow file asks of memory: which models it runs together, in which formats, at which size.

Nothing is run. The graph is followed from each node that computes with a MODEL back to the files, as `hosts.lint`
does for quantized weights; text encoders, VAE and the size of the image come from what leads to the same outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..quantizers import quoting
from ..quantizers.auto import DeviceFacts, candidates, choose_format, predict_sizes
from ..quantizers.choices import AUTO
from ..quantizers.compat.modes import Carrier, HostName, OffloadMode
from ..quantizers.errors import FileError, SpecError
from ..quantizers.measure.activations import RunShape
from ..quantizers.measure.parts import ModelPart, Role, parts_of_file
from ..quantizers.registry import is_format
from ..quantizers.spec import QuantSpec
from .lint.catalog import Catalog, NodeType
from .lint.check import outputs
from .lint.editor import is_editor_form, read_editor
from .lint.files import ModelFiles
from .lint.graph import UNKNOWN, Graph, Node, from_prompt
from .lint.lint import Linter, Options
from .lint.sources import FROM_CONFIG, QUANTIZERS, carrier_of, configs, parsed_rules
from .standalone.folders import ModelFolders
from .standalone.workflow import Link, parse_workflow, read_json

_ROLE = {"MODEL": Role.DIFFUSION, "CLIP": Role.TEXT, "VAE": Role.VAE}
_MAKERS = {**QUANTIZERS, "LoadAndQuantize": "MODEL"}
_CASTS = ("fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2")  # UNETLoader's weight_dtype
NO_FILE = "none"
# Model folders whose files run beside or after a generation; what they take is not known here.
NOT_COUNTED = ("clip_vision", "upscale_models", "style_models", "model_patches", "audio_encoders", "gligen")


@dataclass(frozen=True)
class Asked:
    """What one MODEL of a workflow runs with.

    Attributes:
        title: of the node that computes with it.
        specs: name of a part -> its format.
        shape: None where the workflow does not tell the size.
        mode: that an OffloadCompat node sets; None for none.
    """

    title: str
    parts: tuple[ModelPart, ...]
    specs: dict[str, QuantSpec]
    shape: RunShape | None
    loras_nbytes: int
    carrier: Carrier
    host: HostName
    mode: OffloadMode | None = None
    notes: tuple[str, ...] = ()


def is_workflow(path: Path) -> bool:
    """Whether a path is a JSON file that is no index of a model."""
    return path.suffix.lower() == ".json" and not path.name.endswith(".index.json")


def read_workflow(
    path: Path, classes: dict[str, type], device: DeviceFacts, models: Sequence[Path] = (), host: HostName | None = None
) -> tuple[Asked, ...]:
    """What each MODEL of a workflow file runs with, in the file's order.

    Args:
        classes: the pack's nodes.
        device: by which format `auto` is chosen.
        models: model folders; empty are the embedded host's.
        host: None: as lint tells it from the file.
    Raises:
        FileError, WorkflowError: no workflow, no model in it, or a model file that is not there.
        SpecError: a format or size that only a run can tell.
    """
    from .standalone.core_nodes import CORE_NODES

    data = read_json(path)
    catalog = Catalog(classes, CORE_NODES)
    graph = read_editor(data, catalog) if is_editor_form(data) else from_prompt(parse_workflow(data, str(path)))
    host = host or Linter(Options(models=tuple(models)), classes).host_of(graph)
    found = _Reader(graph, catalog, ModelFiles(ModelFolders(list(models))), device, host).read()
    if not found:
        raise FileError(
            f"{path.name}: no node in it computes with a MODEL.\nGive a workflow with a sampler, or a file."
        )
    return found


@dataclass
class _Reader:
    graph: Graph
    catalog: Catalog
    files: ModelFiles
    device: DeviceFacts
    host: HostName
    live: set[str] = field(init=False)

    def __post_init__(self) -> None:
        roots = outputs(self.graph, self.catalog)
        self.roots = roots or list(self.graph.nodes)
        self.live = self.graph.needed(self.roots)

    def read(self) -> tuple[Asked, ...]:
        found: dict[tuple[str, ...], Asked] = {}
        for node in self.graph.nodes.values():
            for name in self.taking(node, "MODEL"):
                chain = list(self.chain(node, name, "MODEL"))
                if chain:
                    found.setdefault(tuple(n.id for n in chain), self.asked(node, chain))
        return tuple(found.values())

    def taking(self, node: Node, kind: str) -> list[str]:
        """The inputs of a kind of a node that uses it up: it hands no such value on, and gives more than SIGMAS."""
        node_type = self.catalog.find(node.class_type)
        gives = (node_type.outputs if node_type else None) or node.output_types or ()
        if node.id not in self.live or kind in gives or set(gives) == {"SIGMAS"}:
            return []
        return [name for name in node.links if self.takes(node, node_type, name, kind)]

    def takes(self, node: Node, node_type: NodeType | None, name: str, kind: str) -> bool:
        declared = node_type.inputs.get(name) if node_type else None
        written = declared.type if declared else node.input_types.get(name, name.upper())
        return kind in written.split(",")

    def chain(self, node: Node, name: str, kind: str) -> Iterator[Node]:
        """The nodes that a value comes through, the nearest first, its loader last."""
        seen: set[str] = set()
        link: Link | None = node.links[name]
        while link is not None and link.node_id in self.graph.nodes and link.node_id not in seen:
            seen.add(link.node_id)
            source = self.graph.nodes[link.node_id]
            yield source
            node_type = self.catalog.find(source.class_type)
            links = [source.links[n] for n in source.links if self.takes(source, node_type, n, kind)]
            link = links[0] if links else None

    def asked(self, node: Node, chain: list[Node]) -> Asked:
        ends = [root for root in self.roots if node.id in self.graph.needed([root])]
        related = self.graph.needed(ends)
        chains = [("MODEL", chain)]
        for kind in ("CLIP", "VAE"):
            users = [self.graph.nodes[i] for i in self.graph.nodes if i in related]
            chains += [(kind, list(self.chain(u, n, kind))) for u in users for n in self.taking(u, kind)]
        parts: dict[str, ModelPart] = {}
        specs: dict[str, QuantSpec] = {}
        notes: list[str] = []
        for kind, nodes in chains:
            made = [p for p in self.parts_of(nodes, kind, notes) if p.name not in parts]
            parts |= {p.name: p for p in made}
            specs |= self.specs_of(nodes, made, notes)
        for part in self.beside(related, notes):
            parts.setdefault(part.name, part)
        if not any(p.role is Role.DIFFUSION for p in parts.values()):
            raise FileError(f"{chain[-1].place}: the file of its model is not known.\nChoose it in the node.")
        quantizer = next((n for n in chain if carrier_of(n) and n.class_type in (*_MAKERS, "LoadQuantized")), None)
        carrier = (carrier_of(quantizer) if quantizer else None) or Carrier.QUANTWIRE
        sizes = self.shape(node, related)
        loras = sum(self.lora_nbytes(n) for n in chain)
        title = str(node.place)
        return Asked(
            title, tuple(parts.values()), specs, sizes, loras, carrier, self.host, self.mode(chain), tuple(notes)
        )

    def parts_of(self, nodes: Sequence[Node], kind: str, notes: list[str]) -> Iterator[ModelPart]:
        """The components of the files at the end of a chain."""
        for path in self.paths(nodes[-1]) if nodes else ():
            for part in parts_of_file(path):
                if part.role is not _ROLE[kind]:
                    continue
                cast = nodes[-1].values.get("weight_dtype")
                if kind == "MODEL" and cast in _CASTS and not part.formats:
                    notes.append(f"{part.name}: its weights are cast to {cast} by {nodes[-1].place}")
                    part = replace(part, held_nbytes=part.parameters)
                yield part

    def paths(self, node: Node) -> Iterator[Path]:
        node_type = self.catalog.find(node.class_type)
        for i in node_type.inputs.values() if node_type else ():
            value = node.values.get(i.name)
            if not i.folder or not isinstance(value, str) or value == NO_FILE or i.folder == "loras":
                continue
            path = self.files.find(i.folder, value)
            if path is None:
                message, remedies = self.files.missing(i.folder, value, listed=False) or (f"{value!r} is gone.", ())
                raise FileError("\n".join((f"{node.place}: {message}", *remedies)))
            yield path

    def beside(self, related: set[str], notes: list[str]) -> Iterator[ModelPart]:
        """ControlNets; of other models a note that they are not counted."""
        for node in (self.graph.nodes[i] for i in self.graph.nodes if i in related):
            node_type = self.catalog.find(node.class_type)
            folders = {i.folder for i in node_type.inputs.values() if i.folder} if node_type else set[str]()
            if "controlnet" in folders:
                yield from (p for path in self.paths(node) for p in parts_of_file(path) if p.role is Role.CONTROLNET)
            elif folders & set(NOT_COUNTED):
                notes.append(f"{node.place}: not counted")

    def lora_nbytes(self, node: Node) -> int:
        node_type = self.catalog.find(node.class_type)
        names = [i.name for i in node_type.inputs.values() if i.folder == "loras"] if node_type else []
        paths = [self.files.find("loras", str(node.values.get(name))) for name in names]
        return sum(part.held_nbytes for path in paths if path for part in parts_of_file(path))

    def specs_of(self, nodes: Sequence[Node], parts: Sequence[ModelPart], notes: list[str]) -> dict[str, QuantSpec]:
        maker = next((n for n in nodes if n.class_type in _MAKERS), None)
        if maker is None or not parts:
            return {}
        per_encoder = self.graph.literal(maker, "per_encoder")
        named = {r.pattern: r.target for r in parsed_rules(per_encoder)} if isinstance(per_encoder, str) else {}
        which = self.graph.literal(maker, "encoders", "all")
        found: dict[str, QuantSpec] = {}
        for part in parts:
            keys = [k for k in (*named, which) if _is_encoder(part, k)]
            if which not in ("all", UNKNOWN) and not keys:
                continue
            own = next((named[k] for k in keys if k in named), None)
            if own == "keep":
                continue
            found[part.name] = QuantSpec.from_uri(own) if own else self.spec(maker, part, notes)
        return found

    def spec(self, node: Node, part: ModelPart, notes: list[str]) -> QuantSpec:
        """The format of a Quantize node's widgets and config for one part.

        Raises:
            SpecError: another node chooses it when the graph runs.
        """
        chosen = self.graph.literal(node, "format")
        config = next((c for c in configs(self.graph, node) if isinstance(c, QuantSpec)), None)
        rules = [r for c in configs(self.graph, node) if isinstance(c, str) for r in parsed_rules(c)]
        keep = self.graph.literal(node, "keep_layers", "")
        lines = keep.splitlines() if isinstance(keep, str) else []
        excluded = tuple(p for line in lines for p in quoting.items(line))
        if chosen == AUTO:
            formats = [f for f in candidates(self.device) if is_format(f)]
            facts, sizes = predict_sizes([(part.slots, tuple(rules), excluded)], formats)
            choice = choose_format(self.device, facts, sizes)
            notes.append(f"{part.name}: {choice.why}")
            spec = QuantSpec(choice.format_id)
        elif chosen == FROM_CONFIG and config is not None:
            spec = config
        elif isinstance(chosen, str) and is_format(chosen):
            spec = config if config is not None and config.format_id == chosen else QuantSpec(chosen)
        else:
            raise SpecError(
                f"{node.place}: its format is known when the graph runs.\nChoose it in the node, or give --format."
            )
        return replace(spec, exclude=(*spec.exclude, *excluded), rules=(*spec.rules, *rules))

    def shape(self, sampler: Node, related: set[str]) -> RunShape | None:
        """The size of what is generated, by the first node that makes an empty latent or the like."""
        cfg = self.number(sampler, "cfg", 1.0)
        for node in (n for n in self.graph.nodes.values() if n.id in related):
            width, height = self.number(node, "width", 0), self.number(node, "height", 0)
            if width and height and ("Latent" in node.class_type or "ToVideo" in node.class_type):
                frames, batch = self.number(node, "length", 1), self.number(node, "batch_size", 1)
                return RunShape(int(width), int(height), int(frames), int(batch), 0, float(cfg))
        return None

    def number(self, node: Node, name: str, default: float) -> float:
        value: Any = self.graph.literal(node, name, default)
        return value if isinstance(value, (int, float)) and not isinstance(value, bool) else default

    def mode(self, chain: Sequence[Node]) -> OffloadMode | None:
        for node in chain:
            if node.class_type == "OffloadCompat" and self.graph.literal(node, "set_mode", False) is True:
                value = self.graph.literal(node, "mode")
                return next((m for m in OffloadMode if m.value == value), None)
        return None


def _is_encoder(part: ModelPart, key: object) -> bool:
    """Whether a text encoder is the one that QuantizeTextEncoder calls so: `clip_l`, `t5xxl`, `llm`, ..."""
    family = part.family.lower()
    word = str(key).lower()
    if word in part.name.lower():
        return True
    return any(family.startswith(f) and word.startswith(w) for f, w in (("t5", "t5"), ("t5", "umt5"), ("clip", "clip")))
