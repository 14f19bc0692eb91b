"""Which nodes make or load quantized weights, held by what, in which format.

Only what is proved by the sources of a pack stands here; of any other node nothing is claimed.

| pack | what its loaders give |
| --- | --- |
| quantwire | the carrier and format of the node's widgets; LoadGGUF, LoadQuantized: those in the file |
| ComfyUI-GGUF (city96, nodes.py, ops.py) | GGMLTensor, one for each type in the file; plain for a safetensors file |
| ComfyUI_bitsandbytes_NF4 (comfyanonymous, __init__.py) | a subclass of Params4bit, in the MODEL alone |
| ComfyUI-MultiGPU (pollockjj, __init__.py) | those of the loader that it wraps |
| ComfyUI-nunchaku (nodes/models) | nunchaku's own modules |
| ComfyUI's loaders | QuantizedTensor, where the file says so; `weight_dtype` fp8 is a cast and no format |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ...quantizers.choices import AUTO
from ...quantizers.compat.modes import Carrier
from ...quantizers.errors import QuantwireError
from ...quantizers.registry import is_format
from ...quantizers.rules import KEEP, parse_rules
from ...quantizers.spec import QuantSpec
from ..standalone.workflow import Link, NodePlace
from .catalog import MULTIGPU, NodeType
from .files import ModelFiles
from .graph import UNKNOWN, Graph, Node

# Words that the pack's nodes write into workflow files.
FROM_CONFIG, NONE, ALL = "from config", "none", "all"
QUANTIZERS = {"QuantizeModel": "MODEL", "QuantizeTextEncoder": "CLIP", "QuantizeControlNet": "CONTROL_NET"}
GGUF_UNKNOWN = "gguf-unknown"  # a GGUF file that is not here: the table's patterns cover every type
LINKED = "linked"  # a format that another node chooses
# Keys of no format, and how a message names them.
UNTOLD = {AUTO: "format auto", LINKED: "a format from a link"}
NF4_LOADERS = ("CheckpointLoaderNF4", "UNETLoaderNF4")
NUNCHAKU = ("NunchakuFluxDiTLoader", "NunchakuQwenImageDiTLoader")
NUNCHAKU_KEY = "nunchaku-svdq"
# Folders whose files may hold ComfyUI's native formats, and the kind of value that they become.
NATIVE_FOLDERS = {
    "diffusion_models": "MODEL",
    "checkpoints": "MODEL",
    "text_encoders": "CLIP",
    "controlnet": "CONTROL_NET",
}


@dataclass(frozen=True)
class Held:
    """Quantized weights inside a value.

    Attributes:
        kind: MODEL, CLIP, VAE or CONTROL_NET.
        key: how the compatibility table names them; one of `UNTOLD` where the format is chosen when the graph runs.
        label: how a message names them.
        origin: the node that made or loaded them.
    """

    kind: str
    carrier: Carrier
    key: str
    label: str
    origin: NodePlace


class Sources:
    """What the nodes of one graph make."""

    def __init__(self, graph: Graph, files: ModelFiles) -> None:
        self.graph = graph
        self.files = files

    def made(self, node: Node, node_type: NodeType | None) -> dict[str, tuple[Held, ...]]:
        """Kind of value -> what is inside, for each kind that the node makes rather than hands on."""
        base = MULTIGPU.sub("", node.class_type)
        if node.class_type in QUANTIZERS:
            kind = QUANTIZERS[node.class_type]
            return {kind: self.quantized(node, kind)}
        if node.class_type == "LoadAndQuantize":
            return {"MODEL": self.quantized(node, "MODEL")}
        if node.class_type == "LoadQuantized":
            return {"MODEL": self.in_file(node)}
        if node.class_type == "LoadGGUF":
            return {"MODEL": self.gguf(node, "MODEL", {"gguf_name": "diffusion_models"}, carrier_of(node), "")}
        if node.class_type == "LoadGGUFTextEncoder":
            folders = {f"clip_name{i}": "text_encoders" for i in (1, 2, 3, 4)}
            return {"CLIP": self.gguf(node, "CLIP", folders, carrier_of(node), "")}
        if base in NF4_LOADERS:
            return {"MODEL": self.nf4(node, node_type)}
        if node.class_type in NUNCHAKU:
            held = Held("MODEL", Carrier.LIBRARY, NUNCHAKU_KEY, NUNCHAKU_KEY, node.place)
            return {"MODEL": (held,)}
        folders = {i.name: i.folder for i in node_type.inputs.values() if i.folder} if node_type else {}
        if any(folder in ("unet_gguf", "clip_gguf") for folder in folders.values()):
            kind = "CLIP" if "clip_gguf" in folders.values() else "MODEL"
            return {kind: self.gguf(node, kind, folders, Carrier.LIBRARY, "comfyui-")}
        return self.native(node, node_type, folders)

    def quantized(self, node: Node, kind: str) -> tuple[Held, ...]:
        carrier = carrier_of(node)
        if carrier is None:
            return ()
        found = {f: f for f in formats(self.graph, node)}
        chosen = self.graph.literal(node, "format")
        if chosen == AUTO or chosen is UNKNOWN:
            key = AUTO if chosen == AUTO else LINKED
            found[key] = UNTOLD[key]
        return tuple(Held(kind, carrier, f, label, node.place) for f, label in found.items())

    def in_file(self, node: Node) -> tuple[Held, ...]:
        """What the file of a LoadQuantized holds; nothing is claimed of one that is not here."""
        carrier, value = carrier_of(node), node.values.get("model_name")
        path = self.files.find("quantized", value) if isinstance(value, str) else None
        if carrier is None or path is None:
            return ()
        return tuple(Held("MODEL", carrier, f, f, node.place) for f in self.files.layer_formats(path))

    def gguf(
        self, node: Node, kind: str, folders: Mapping[str, str], carrier: Carrier | None, prefix: str
    ) -> tuple[Held, ...]:
        """One for each type in the node's GGUF files; a file that is not here counts as one of an unknown type."""
        found: dict[str, str] = {}
        for name, folder in folders.items():
            value = node.values.get(name)
            if not isinstance(value, str) or value == NONE or not value.lower().endswith(".gguf"):
                continue
            path = self.files.find(folder, value)
            if path is None:
                found[GGUF_UNKNOWN] = "GGUF"
            else:
                found |= {f: f for f in self.files.formats(path)}
        if carrier is None:
            return ()
        return tuple(Held(kind, carrier, prefix + f, label, node.place) for f, label in found.items())

    def nf4(self, node: Node, node_type: NodeType | None) -> tuple[Held, ...]:
        """The file says nf4 or fp4; one that is not here counts as nf4, as the pack names it."""
        found: tuple[str, ...] = ()
        for i in node_type.inputs.values() if node_type else ():
            value = node.values.get(i.name)
            path = self.files.find(i.folder, value) if i.folder and isinstance(value, str) else None
            found += tuple(f for f in self.files.formats(path) if f.startswith("bnb-")) if path else ()
        return tuple(Held("MODEL", Carrier.LIBRARY, f, f, node.place) for f in found or ("bnb-nf4",))

    def native(self, node: Node, node_type: NodeType | None, folders: Mapping[str, str]) -> dict[str, tuple[Held, ...]]:
        """ComfyUI's own formats in files that are here, by the loaders of ComfyUI itself."""
        if node_type is None or node_type.pack:
            return {}
        found: dict[str, tuple[Held, ...]] = {}
        for name, folder in folders.items():
            kind, value = NATIVE_FOLDERS.get(folder, ""), node.values.get(name)
            if kind not in (node_type.outputs or ()) or not isinstance(value, str):
                continue
            path = self.files.find(folder, value)
            ids = [f for f in self.files.formats(path) if f.startswith("comfy-")] if path else []
            held = tuple(Held(kind, Carrier.HOST, f, f, node.place) for f in ids)
            found[kind] = (*found.get(kind, ()), *held)
        return found


def carrier_of(node: Node) -> Carrier | None:
    """The widget's value or its default; None for a link or a word that is no carrier."""
    if "carrier" in node.links:
        return None
    value = node.values.get("carrier", Carrier.QUANTWIRE.value)
    return next((c for c in (Carrier.QUANTWIRE, Carrier.LIBRARY) if c.value == value), None)


def formats(graph: Graph, node: Node) -> list[str]:
    """Every format that a Quantize node may make, as far as the file tells; `auto` tells none."""
    found: dict[str, None] = {}
    chosen = graph.literal(node, "format")
    specs = list(configs(graph, node))
    if chosen == FROM_CONFIG:
        found |= {s.format_id: None for s in specs if isinstance(s, QuantSpec)}
    elif isinstance(chosen, str) and chosen != AUTO and is_format(chosen) and not _overruled(graph, node):
        found[chosen] = None
    targets = [rule.target for s in specs for rule in (s.rules if isinstance(s, QuantSpec) else parsed_rules(s))]
    per_encoder = graph.literal(node, "per_encoder")
    targets += [rule.target for rule in parsed_rules(per_encoder)] if isinstance(per_encoder, str) else []
    for target in targets:
        spec = parsed_uri(target) if target.lower() != KEEP else None
        found |= {spec.format_id: None} if spec else {}
    return list(found)


def _overruled(graph: Graph, node: Node) -> bool:
    """Whether the one encoder that is quantized has a format of its own."""
    which, text = graph.literal(node, "encoders", ALL), graph.literal(node, "per_encoder")
    return which != ALL and isinstance(text, str) and any(rule.pattern == which for rule in parsed_rules(text))


def configs(graph: Graph, node: Node) -> Iterator[QuantSpec | str]:
    """What is linked to `config`, nearest first: specs of QuantConfig, and the texts of QuantRules."""
    seen: set[str] = set()
    link: Link | None = node.links.get("config")
    while link is not None and link.node_id not in seen and link.node_id in graph.nodes:
        seen.add(link.node_id)
        source = graph.nodes[link.node_id]
        uri, rules = graph.literal(source, "uri"), graph.literal(source, "rules")
        if source.class_type == "QuantConfig" and isinstance(uri, str):
            spec = parsed_uri(uri)
            if spec is not None:
                yield spec
        if source.class_type != "QuantRules":
            return
        if isinstance(rules, str):
            yield rules
        link = source.links.get("config")


def parsed_uri(uri: str) -> QuantSpec | None:
    """None for a text that the node itself refuses; that is reported where its inputs are checked."""
    try:
        return QuantSpec.from_uri(uri)
    except QuantwireError:
        return None


def parsed_rules(text: Any) -> tuple[Any, ...]:
    try:
        return parse_rules(text)
    except QuantwireError:
        return ()
