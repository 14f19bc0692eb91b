"""Write the shipped workflows in both forms: `api/NAME.json` (POST /prompt) and `NAME.json` (the editor's).

    python -m quantwire.workflows.build

A workflow is described once, as nodes with inputs and a place on the canvas; the editor form needs the node classes for
the order of widgets and slots. A test checks that the files in the repository are what this writes.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import nodes as pack
from ..hosts.standalone.core_nodes import CORE_NODES

FOLDER = Path(__file__).parent
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN")
CLASSES = {**CORE_NODES, **pack.NODE_CLASS_MAPPINGS}
COLUMN, ROW = 340, 40
WIDTH = 300


@dataclass(frozen=True)
class Node:
    """A node: class, inputs (a tuple is a link: node id, output), title and canvas cell."""

    kind: str
    inputs: dict[str, Any]
    title: str
    column: int
    row: float


@dataclass(frozen=True)
class Workflow:
    name: str
    note: str
    nodes: dict[str, Node] = field(default_factory=lambda: dict[str, Node]())


def prompt_nodes(prompt: str) -> dict[str, Node]:
    """Text encoder, prompt, guidance, latent and VAE."""
    return {
        "4": Node(
            "CLIPLoader", {"clip_name": "digits_clip.safetensors", "type": "stable_diffusion"}, "Text encoder", 0, 4
        ),
        "5": Node("CLIPTextEncode", {"text": prompt, "clip": ("4", 0)}, "Prompt", 1, 4),
        "6": Node("FluxGuidance", {"conditioning": ("5", 0), "guidance": 3.5}, "Guidance", 2, 4),
        "7": Node("CLIPTextEncode", {"text": "", "clip": ("4", 0)}, "Negative prompt", 1, 9),
        "8": Node("EmptySD3LatentImage", {"width": 64, "height": 64, "batch_size": 1}, "Latent", 2, 8),
        "10": Node("VAELoader", {"vae_name": "digits_tae.safetensors"}, "VAE", 2, 13),
    }


def sampling_nodes(first: int, model: tuple[str, int], prefix: str, title: str, row: float) -> dict[str, Node]:
    """Sampler, decoder and SaveImage with the ids first, first + 1, first + 2."""
    sampler = {
        "model": model,
        "seed": 7,
        "steps": 8,
        "cfg": 1.0,
        "sampler_name": "euler",
        "scheduler": "simple",
        "positive": ("6", 0),
        "negative": ("7", 0),
        "latent_image": ("8", 0),
        "denoise": 1.0,
    }
    a, b, c = (str(first + i) for i in range(3))
    return {
        a: Node("KSampler", sampler, f"Sampler{title}", 3, row),
        b: Node("VAEDecode", {"samples": (a, 0), "vae": ("10", 0)}, f"Decode{title}", 4, row),
        c: Node("SaveImage", {"images": (b, 0), "filename_prefix": prefix}, f"Save{title}", 5, row),
    }


UNET = Node("UNETLoader", {"unet_name": "digits_flux.safetensors", "weight_dtype": "default"}, "Model", 0, 0)


def quantize(carrier: str, format_id: str) -> Node:
    inputs = {"model": ("1", 0), "format": format_id, "carrier": carrier, "keep_layers": "", "on_failure": "error"}
    return Node("QuantizeModel", inputs, "Quantize", 1, -6)


def compat(mode: str) -> Node:
    return Node("OffloadCompat", {"model": ("2", 0), "mode": mode, "action": "block"}, "Offload check", 2, -8)


def report(source: str) -> dict[str, Node]:
    return {"20": Node("PreviewAny", {"source": (source, 1)}, "Report", 3, -6)}


PROMPT = "a handwritten seven"
WORKFLOWS = (
    Workflow(
        "full_precision",
        "The demo model as it is.",
        {"1": UNET, **prompt_nodes(PROMPT), **sampling_nodes(11, ("1", 0), "full_precision", "", 0)},
    ),
    Workflow(
        "quantized",
        "The demo model quantized in the graph; choose the format in the node Quantize.",
        {
            "1": UNET,
            "2": quantize("quantwire", "bnb-nf4"),
            "3": compat("auto"),
            **prompt_nodes(PROMPT),
            **sampling_nodes(11, ("3", 0), "quantized", "", 0),
            **report("2"),
        },
    ),
    Workflow(
        "gguf",
        "A GGUF file; make it with `quantwire convert demo/models/diffusion_models/digits_flux.safetensors "
        "models/diffusion_models/digits_flux-Q8_0.gguf --type Q8_0`.",
        {
            "2": Node("LoadGGUF", {"gguf_name": "digits_flux-Q8_0.gguf", "carrier": "quantwire"}, "GGUF model", 1, -1),
            "3": compat("auto"),
            **prompt_nodes(PROMPT),
            **sampling_nodes(11, ("3", 0), "gguf", "", 0),
            **report("2"),
        },
    ),
    Workflow(
        "conflict",
        "bitsandbytes' own 4-bit layers with sequential offload: the check stops the graph before it samples.",
        {
            "1": UNET,
            "2": quantize("library", "bnb-nf4"),
            "3": compat("sequential"),
            **prompt_nodes(PROMPT),
            **sampling_nodes(11, ("3", 0), "conflict", "", 0),
            **report("2"),
        },
    ),
    Workflow(
        "side_by_side",
        "One model, two branches: full precision and quantized, the same seed.",
        {
            "1": UNET,
            "2": quantize("quantwire", "bnb-nf4"),
            "3": compat("auto"),
            **prompt_nodes(PROMPT),
            **sampling_nodes(11, ("1", 0), "side_by_side_full", " (full precision)", 0),
            **sampling_nodes(14, ("3", 0), "side_by_side_quantized", " (quantized)", 9),
            **report("2"),
        },
    ),
)


def api_form(workflow: Workflow) -> dict[str, Any]:
    return {
        node_id: {
            "class_type": node.kind,
            "inputs": {k: list(v) if isinstance(v, tuple) else v for k, v in node.inputs.items()},
            "_meta": {"title": node.title},
        }
        for node_id, node in workflow.nodes.items()
    }


def editor_form(workflow: Workflow) -> dict[str, Any]:
    """LiteGraph's JSON, version 0.4: nodes with slots and widget values in order, links as a list of six-tuples."""
    links: list[list[Any]] = []
    outgoing: dict[tuple[str, int], list[int]] = {}
    drawn: list[dict[str, Any]] = []
    for node_id, node in workflow.nodes.items():
        slots: list[dict[str, Any]] = []
        widgets: list[Any] = []
        for name, kind, options in _inputs(node.kind):
            value = node.inputs.get(name, options.get("default"))
            if isinstance(kind, list) or kind in WIDGET_TYPES:
                widgets.append(value if value is not None else kind[0])
                widgets += ["fixed"] if options.get("control_after_generate") else []
                continue
            slot: dict[str, Any] = {"name": name, "type": kind, "link": None}
            if isinstance(value, tuple):
                source, output = value
                link = len(links) + 1
                kind = CLASSES[workflow.nodes[source].kind].RETURN_TYPES[output]  # type: ignore[attr-defined]
                links.append([link, int(source), output, int(node_id), len(slots), kind])
                outgoing.setdefault((source, output), []).append(link)
                slot["link"] = link
            slots.append(slot)
        drawn.append(_drawn(node_id, node, len(drawn), slots, widgets))
    for box in drawn:
        for index, output in enumerate(box["outputs"]):
            output["links"] = outgoing.get((str(box["id"]), index), [])
    note = {
        "id": 100, "type": "MarkdownNote", "pos": [0, -280], "size": [WIDTH, 120], "flags": {}, "order": len(drawn),
        "mode": 0, "inputs": [], "outputs": [], "title": "Note", "properties": {}, "widgets_values": [workflow.note],
    }  # fmt: skip
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"quantwire/{workflow.name}")),
        "revision": 0,
        "last_node_id": 100,
        "last_link_id": len(links),
        "nodes": [*drawn, note],
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def _inputs(kind: str) -> list[tuple[str, Any, dict[str, Any]]]:
    types = CLASSES[kind].INPUT_TYPES()  # type: ignore[attr-defined]
    found: list[tuple[str, Any, dict[str, Any]]] = []
    for part in ("required", "optional"):
        for name, spec in types.get(part, {}).items():
            found.append((name, spec[0], spec[1] if len(spec) > 1 else {}))
    return found


def _drawn(node_id: str, node: Node, order: int, slots: list[dict[str, Any]], widgets: list[Any]) -> dict[str, Any]:
    cls: Any = CLASSES[node.kind]
    names = getattr(cls, "RETURN_NAMES", cls.RETURN_TYPES)
    outputs = [{"name": name, "type": kind, "links": []} for name, kind in zip(names, cls.RETURN_TYPES, strict=True)]
    height = 60 + 24 * max(len(slots), len(outputs)) + 26 * len(widgets)
    return {
        "id": int(node_id),
        "type": node.kind,
        "pos": [node.column * COLUMN, int(node.row * ROW)],
        "size": [WIDTH, height],
        "flags": {},
        "order": order,
        "mode": 0,
        "inputs": slots,
        "outputs": outputs,
        "title": node.title,
        "properties": {"Node name for S&R": node.kind},
        "widgets_values": widgets,
    }


def rendered() -> dict[Path, str]:
    """Path -> text of every file."""
    files: dict[Path, str] = {}
    for workflow in WORKFLOWS:
        files[FOLDER / "api" / f"{workflow.name}.json"] = json.dumps(api_form(workflow), indent=2) + "\n"
        files[FOLDER / f"{workflow.name}.json"] = json.dumps(editor_form(workflow), indent=2) + "\n"
    return files


if __name__ == "__main__":
    for path, text in rendered().items():
        path.write_text(text, encoding="utf-8")
