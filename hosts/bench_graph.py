"""The same workflow in another format, for `quantwire bench --against`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..quantizers.errors import SpecError, WorkflowError
from ..quantizers.measure.results import FULL
from ..quantizers.spec import QuantSpec
from .standalone.workflow import Prompt, PromptNode, as_link

WORDS = ("full", FULL)  # of --against, for no quantization at all
KINDS = ("MODEL", "CLIP", "VAE", "CONTROL_NET")
FROM_CONFIG = "from config"  # the value of a format widget that leaves the choice to a linked config
QUANTIZERS = ("QuantizeModel", "QuantizeTextEncoder", "QuantizeControlNet")
_QUANTIZED = ("LoadGGUF", "LoadQuantized", "FitModel")
# Class -> types of its outputs; None where they are not known.
Outputs = Callable[[str], "tuple[str, ...] | None"]


def named(against: Sequence[str]) -> dict[str, QuantSpec | None]:
    """Name -> spec of each format to compare with; None is full precision.

    Raises:
        SpecError: no format, or twice the same.
    """
    found: dict[str, QuantSpec | None] = {}
    for text in against:
        name, spec = (FULL, None) if text in WORDS else (text, QuantSpec.from_uri(text))
        if name in found or (spec is not None and spec in found.values()):
            raise SpecError(f"--against: {text} is named twice.")
        found[name] = spec
    return found


def title_of(prompt: Prompt) -> str:
    """The format that the graph's own nodes ask for; empty where no node quantizes a diffusion model."""
    asked = {n.id: n for n in prompt.nodes.values() if n.class_type in ("QuantizeModel", "LoadAndQuantize")}
    sources = {link.node_id for n in asked.values() if (link := as_link(n.inputs.get("model"))) is not None}
    for node in asked.values():
        if node.id in sources:
            continue  # a quantizer behind it has the last word
        text = node.inputs.get("format")
        if text == FROM_CONFIG:
            return _linked_format(prompt, node)
        if isinstance(text, str):
            return text
    return ""


def _linked_format(prompt: Prompt, node: PromptNode) -> str:
    """The URI of a linked QuantConfig; the kind of node where it is no plain URI, such as rules."""
    link = as_link(node.inputs.get("config"))
    config = prompt.nodes.get(link.node_id) if link is not None else None
    uri = config.inputs.get("uri") if config is not None else None
    if isinstance(uri, str) and uri.strip():
        return uri.strip()
    return config.class_type if config is not None else FROM_CONFIG


def with_format(prompt: Prompt, spec: QuantSpec | None, outputs: Outputs) -> Prompt:
    """The graph with its diffusion models in a format, or at full precision for None.

    Nodes that quantize get the format; where there is none, a QuantizeModel is put behind each loader of a model.
    What shows a report that is no longer made goes.

    Raises:
        WorkflowError: the graph loads a model that is quantized already, or loads none.
    """
    nodes = dict(prompt.nodes)
    asking = [n for n in nodes.values() if n.class_type in ("QuantizeModel", "LoadAndQuantize")]
    for node in nodes.values():
        if node.class_type in _QUANTIZED:
            raise WorkflowError(
                f"--against: {node.place} loads {_loads(node)} quantized already, and other formats are made of full "
                "precision.\nCompare in a workflow that loads the full-precision file."
            )
    if asking:
        for node in asking:
            _set(nodes, nodes[node.id], spec)  # one before it in a chain may have changed its inputs
    elif spec is not None:
        _insert(nodes, spec, outputs)
    return Prompt(_without_dead_ends(nodes), prompt.source)


def _loads(node: PromptNode) -> str:
    return "a model as it chooses, maybe" if node.class_type == "FitModel" else "a model that is"


def _set(nodes: dict[str, PromptNode], node: PromptNode, spec: QuantSpec | None) -> None:
    if spec is not None:
        config = _config(nodes, node.id, spec)
        kept = {k: v for k, v in node.inputs.items() if k not in ("format", "config")}
        nodes[node.id] = replace(node, inputs={**kept, **config})
    elif node.class_type == "QuantizeModel":
        source = node.inputs.get("model")
        for other in list(nodes.values()):
            inputs = {k: source if v == [node.id, 0] else v for k, v in other.inputs.items()}
            nodes[other.id] = replace(other, inputs=inputs)
        del nodes[node.id]
    else:
        inputs = {"unet_name": node.inputs.get("model_name"), "weight_dtype": "default"}
        nodes[node.id] = replace(node, class_type="UNETLoader", inputs=inputs)


def _config(nodes: dict[str, PromptNode], owner: str, spec: QuantSpec) -> dict[str, Any]:
    """Widgets of a node that quantizes; options need a node of their own."""
    if spec == QuantSpec(spec.format_id):
        return {"format": spec.format_id}
    config = _new_id(nodes, f"{owner}-config")
    nodes[config] = PromptNode(config, "QuantConfig", {"uri": spec.to_uri()}, "Benchmark config")
    return {"format": FROM_CONFIG, "config": [config, 0]}


def _insert(nodes: dict[str, PromptNode], spec: QuantSpec, outputs: Outputs) -> None:
    """Put a QuantizeModel behind whatever makes a MODEL from no other."""
    sources = [
        (node.id, index)
        for node in nodes.values()
        for index, kind in enumerate(outputs(node.class_type) or ())
        if kind == "MODEL" and not any(_gives_model(nodes, value, outputs) for value in node.inputs.values())
    ]
    if not sources:
        raise WorkflowError(
            "--against: no node that loads a diffusion model was found in the workflow.\n"
            "Put a QuantizeModel where it is to be quantized; its format is then changed."
        )
    for node_id, index in sources:
        made = _new_id(nodes, f"{node_id}-quantize")
        for other in list(nodes.values()):
            inputs = {k: [made, 0] if v == [node_id, index] else v for k, v in other.inputs.items()}
            nodes[other.id] = replace(other, inputs=inputs)
        inputs = {"model": [node_id, index], **_config(nodes, made, spec), "on_failure": "full precision"}
        nodes[made] = PromptNode(made, "QuantizeModel", inputs, "Benchmark")


def _gives_model(nodes: Mapping[str, PromptNode], value: object, outputs: Outputs) -> bool:
    link = as_link(value)
    if link is None or link.node_id not in nodes:
        return False
    kinds = outputs(nodes[link.node_id].class_type) or ()
    return link.output < len(kinds) and kinds[link.output] == "MODEL"


def _without_dead_ends(nodes: dict[str, PromptNode]) -> dict[str, PromptNode]:
    """Without nodes that want an output which is gone, such as the report of a quantization that is left out."""
    while True:
        gone = [n.id for n in nodes.values() if any(_is_dead(nodes, v) for v in n.inputs.values())]
        if not gone:
            return nodes
        for node_id in gone:
            del nodes[node_id]


def _is_dead(nodes: Mapping[str, PromptNode], value: object) -> bool:
    link = as_link(value)
    if link is None:
        return False
    # A loader that took the place of one with a report gives the model alone.
    return link.node_id not in nodes or (nodes[link.node_id].class_type == "UNETLoader" and link.output > 0)


def _new_id(nodes: Mapping[str, PromptNode], base: str) -> str:
    number, name = 2, base
    while name in nodes:
        name, number = f"{base}-{number}", number + 1
    return name
