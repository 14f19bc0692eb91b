"""Inputs of the node classes that shipped workflows use, in the editor's order: which are widgets, which are slots.

Taken from the classes of the embedded host and of the pack, and from what was recorded of ComfyUI's own nodes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .. import nodes as pack
from ..hosts.editor.formats import COMPAT, FORMAT_WIDGETS, rules_of
from ..hosts.standalone.core_nodes import CORE_NODES
from ..hosts.standalone.foreign_nodes import definitions
from ..quantizers.compat.modes import HostName

WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
BRANCHING = "COMFY_DYNAMICCOMBO_V3"  # a choice that brings inputs of its own
CLASSES: dict[str, Any] = {**CORE_NODES, **pack.NODE_CLASS_MAPPINGS}
GROUPS = ("required", "optional")
EMPTY = {"STRING": "", "BOOLEAN": False}


@dataclass(frozen=True)
class Input:
    name: str
    kind: Any
    options: Mapping[str, Any]

    @property
    def is_widget(self) -> bool:
        return isinstance(self.kind, (list, tuple)) or self.kind in (*WIDGET_TYPES, BRANCHING)

    @property
    def is_text(self) -> bool:
        return bool(self.options.get("multiline"))

    @property
    def shown(self) -> bool:
        return not self.options.get("hidden")

    @property
    def default(self) -> Any:
        """What the editor gives a new node."""
        if "default" in self.options:
            return self.options["default"]
        if self.kind == BRANCHING:
            return self.options["options"][0]["key"]
        if isinstance(self.kind, str) and self.kind in EMPTY:
            return EMPTY[self.kind]
        choices = self.kind if isinstance(self.kind, (list, tuple)) else self.options.get("options", ())
        return next(iter(choices), None)


@functools.cache
def declared(kind: str) -> dict[str, dict[str, Any]]:
    """required and optional inputs of a node class."""
    if kind in CLASSES:
        types = CLASSES[kind].INPUT_TYPES()
        return {group: dict(types.get(group, {})) for group in GROUPS}
    inputs = definitions()[kind]["input"]
    return {group: inputs.get(group, {}) for group in GROUPS}


def inputs_of(kind: str, values: Mapping[str, Any]) -> list[Input]:
    """Inputs of a node in the editor's order; those that a choice brings depend on the values."""
    groups = declared(kind)
    return [found for group in GROUPS for found in _expanded(groups[group], "", values)]


def _expanded(specs: Mapping[str, Any], prefix: str, values: Mapping[str, Any]) -> Iterator[Input]:
    for name, spec in specs.items():
        found = Input(prefix + name, spec[0], spec[1] if len(spec) > 1 else {})
        yield found
        if found.kind == BRANCHING and found.shown:
            chosen = values.get(found.name, found.default)
            branch = next(o["inputs"] for o in found.options["options"] if o["key"] == chosen)
            for group in GROUPS:
                yield from _expanded(branch.get(group, {}), f"{found.name}.", values)


def hidden_in(kind: str, values: Mapping[str, Any]) -> set[str]:
    """Widgets that the pack's extension keeps out of sight in every host, as `web/formats.js` decides it."""
    if kind not in (*FORMAT_WIDGETS, COMPAT):
        return set()
    inputs = {i.name: values.get(i.name, i.default) for i in inputs_of(kind, values)}
    return set[str].intersection(*(_without_effect(kind, host, inputs) for host in HostName))


def _without_effect(kind: str, host: HostName, inputs: Mapping[str, Any]) -> set[str]:
    return {
        name
        for name, dependent in rules_of(kind, host)["depends"].items()
        if (dependent["harmless"] or inputs[name] == dependent["default"])
        and not any(isinstance(inputs[n], tuple) for n in (name, *(w["widget"] for w in dependent["when"])))
        and not all(inputs[w["widget"]] in w["in"] for w in dependent["when"])
    }


def is_of_pack(kind: str) -> bool:
    return kind in pack.NODE_CLASS_MAPPINGS


@functools.cache
def outputs_of(kind: str) -> list[tuple[str, str]]:
    """(name, type) of each output."""
    if kind in CLASSES:
        cls = CLASSES[kind]
        return list(zip(getattr(cls, "RETURN_NAMES", cls.RETURN_TYPES), cls.RETURN_TYPES, strict=True))
    entry = definitions()[kind]
    return list(zip(entry["output_name"], entry["output"], strict=True))
