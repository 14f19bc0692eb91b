"""From an editor node's positional widget values to values by name.

The editor writes the values of a node's widgets in the order of its declared inputs that have a widget, also of those
that were turned into sockets. Behind a seed stands one more value, the choice of what happens to it after a run; and
behind a file that can be uploaded stands the name of the upload button.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .catalog import DYNAMIC, NodeType, is_widget

CONTROL = ("fixed", "increment", "decrement", "randomize", "increment-wrap")


def named_values(box: Mapping[str, Any], node_type: NodeType | None) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """(values by input name, values whose names are not known)."""
    by_name = box.get("widgets_values_named")
    if isinstance(by_name, dict):
        return {str(k): v for k, v in by_name.items()}, ()
    values = box.get("widgets_values")
    if isinstance(values, dict):
        return {str(k): v for k, v in values.items()}, ()
    if not isinstance(values, list):
        return {}, ()
    if node_type is not None and node_type.detailed:
        return _by_class(values, node_type)
    return values_by_names(values, _widget_names(box))


def _widget_names(box: Mapping[str, Any]) -> list[str]:
    """The widgets that have an input slot."""
    slots = box.get("inputs")
    widgets = [slot.get("widget") for slot in slots if isinstance(slot, dict)] if isinstance(slots, list) else []
    return [w["name"] for w in widgets if isinstance(w, dict) and isinstance(w.get("name"), str)]


def _by_class(values: Sequence[Any], node_type: NodeType) -> tuple[dict[str, Any], tuple[Any, ...]]:
    named: dict[str, Any] = {}
    at = 0
    for i in node_type.inputs.values():
        if not i.widget:
            continue
        if at >= len(values) or i.type == DYNAMIC:  # which widgets follow depends on its value
            break
        named[i.name] = values[at]
        at += 1
        if not is_widget(i.type):  # one of the editor's own, which may have more values, or none
            del named[i.name]
            break
        if i.control and at < len(values) and values[at] in CONTROL:
            at += 1
    return named, tuple(values[at:])


def values_by_names(values: Sequence[Any], names: Sequence[str]) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """By the slots that newer editors write for every widget; where there are more or fewer, nothing is known."""
    if len(values) == len(names):
        return dict(zip(names, values, strict=True)), ()
    plain = list(_without_control(values))
    if len(plain) != len(names):
        return {}, tuple(values)
    return dict(zip(names, plain, strict=True)), ()


def _without_control(values: Sequence[Any]) -> Iterator[Any]:
    previous: Any = None
    for value in values:
        # Only a number is a seed; `fixed` behind a text may be a choice of its own.
        is_control = isinstance(value, str) and value in CONTROL and _is_int(previous)
        if not is_control:
            yield value
        previous = value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
