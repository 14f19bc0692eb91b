"""Which model files flow into a node, as far as the graph tells before it runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from ..lint.graph import Graph, Node, shortened
from ..lint.lint import Linter
from ..lint.sources import QUANTIZERS
from ..standalone.workflow import Link

# Kind of value -> the folders whose files become one.
FOLDERS: Mapping[str, tuple[str, ...]] = {
    "MODEL": ("diffusion_models", "checkpoints", "unet_gguf", "quantized"),
    "CLIP": ("text_encoders", "checkpoints", "clip_gguf"),
    "CONTROL_NET": ("controlnet",),
}
INPUTS = {"MODEL": "model", "CLIP": "clip", "CONTROL_NET": "control_net"}
NO_FILE = ("none", "None", "[None]", "")


class NotKnown(Exception):
    """Why it cannot be told before the graph runs, as a sentence for the user."""


def files_behind(linter: Linter, graph: Graph, node: Node, kind: str) -> tuple[Path, ...]:
    """The files of the loader that a Quantize node's input comes from.

    Raises:
        NotKnown: nothing is linked, the file is not there, or a node between makes or mixes models.
    """
    start, name = node, INPUTS[kind]
    seen: set[str] = set()
    while (link := node.links.get(name)) is not None and link.node_id not in seen:
        seen.add(link.node_id)
        source = source_of(graph, link)
        if source is start:
            raise NotKnown("its inputs come from its own outputs.")
        found = tuple(_files(linter, source, kind))
        if found:
            return found
        if source.class_type in QUANTIZERS:
            raise NotKnown(f"{source.place} quantizes it already.")
        names = list(_inputs(linter, graph, source, kind))
        if not names:
            raise NotKnown(f"{source.place} makes the model when the graph runs.")
        if len(names) > 1:
            raise NotKnown(f"{source.place} makes one model of several when the graph runs.")
        node, name = source, names[0]
    if node.links.get(name) is None:
        raise NotKnown(f"nothing is linked to `{name}`.")
    raise NotKnown("its inputs come from its own outputs.")


def source_of(graph: Graph, link: Link) -> Node:
    """Raises NotKnown: the node is not in the workflow."""
    source = graph.nodes.get(link.node_id)
    if source is None:
        raise NotKnown(f"node {shortened(link.node_id, 60)}, which it is linked to, is not in the workflow.")
    return source


def file_of(linter: Linter, node: Node, name: str) -> Path:
    """The file that one widget of a node names.

    Raises:
        NotKnown: it comes through a link, or is not there.
    """
    value, folder = node.values.get(name), _folders(linter, node).get(name, "diffusion_models")
    if not isinstance(value, str) or value in NO_FILE:
        raise NotKnown(f"no file is chosen in `{name}`.")
    path = linter.files.find(folder, value)
    if path is None:
        raise NotKnown(f"{value!r} is not in {folder}.")
    return path


def _files(linter: Linter, node: Node, kind: str) -> Iterator[Path]:
    if node.values.get("weight_dtype", "default") != "default":
        raise NotKnown(f"{node.place} holds it as {node.values['weight_dtype']}.")
    for name, folder in _folders(linter, node).items():
        if folder in FOLDERS[kind] and node.values.get(name) not in (None, *NO_FILE):
            yield file_of(linter, node, name)


def _folders(linter: Linter, node: Node) -> dict[str, str]:
    node_type = linter.catalog.find(node.class_type)
    return {i.name: i.folder for i in node_type.inputs.values() if i.folder} if node_type is not None else {}


def _inputs(linter: Linter, graph: Graph, node: Node, kind: str) -> Iterator[str]:
    """The linked inputs of a node that take a kind of value."""
    node_type = linter.catalog.find(node.class_type)
    for name, link in node.links.items():
        declared = node_type.inputs.get(name) if node_type is not None else None
        written = declared.type if declared is not None else node.input_types.get(name, "")
        if link.node_id in graph.nodes and kind in (part.strip() for part in written.split(",")):
            yield name
