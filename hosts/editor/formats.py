"""What the editor needs to know of formats: which widgets of which nodes belong to which of them, as data.

A widget is hidden only where what it holds has no effect on the run; a value that would stop it is left in view.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...nodes import NODE_CLASS_MAPPINGS
from ...nodes.common import FROM_CONFIG
from ...quantizers.choices import AUTO
from ...quantizers.compat.modes import HostName, OffloadMode
from ...quantizers.compat.remedies import has_layer
from ...quantizers.formats import BACKENDS
from ...quantizers.registry import availability, format_ids, get_entry
from .. import current
from ..lint.flow import COMPAT
from ..standalone.workflow import NodeSpec

# Node class -> the widget that names a format or type.
FORMAT_WIDGETS: Mapping[str, str] = {
    "QuantizeModel": "format",
    "QuantizeTextEncoder": "format",
    "QuantizeControlNet": "format",
    "LoadAndQuantize": "format",
    "ConvertModel": "type",
}
MODES = {
    "group_level": (OffloadMode.GROUP,),
    "blocks_per_group": (OffloadMode.GROUP,),
    "use_stream": (OffloadMode.GROUP,),
    "keep_on": (OffloadMode.SEQUENTIAL, OffloadMode.BALANCED, OffloadMode.GROUP),
    "device_gib": (OffloadMode.BALANCED,),
    "low_watermark": (OffloadMode.BALANCED,),
    "high_watermark": (OffloadMode.BALANCED,),
}


def formats(probe: bool = False) -> dict[str, Any]:
    """Formats by id, and the nodes with a widget for one.

    Args:
        probe: find out which run here, which imports all libraries and takes seconds; else `available` is null for
            those that nobody has asked for yet.
    """
    return {
        "formats": {f: _format(f, probe) for f in format_ids()},
        "nodes": {name: rules_of(name) for name in (*FORMAT_WIDGETS, COMPAT)},
    }


_probed: dict[str, tuple[bool, str]] = {}


def _format(format_id: str, probe: bool) -> dict[str, Any]:
    entry = get_entry(format_id)
    backend = next(b for b in BACKENDS if b.name == entry.backend)
    if probe and format_id not in _probed:
        state = availability(format_id)
        _probed[format_id] = (state.works, "" if state.works else state.reason)
    works, reason = _probed.get(format_id, (None, ""))
    used = (n for n, a in backend.arguments.items() if not a.applies or format_id in a.applies)
    return {
        "label": entry.summary,
        "bits": entry.bits,
        "library": backend.package or "torch",
        "available": works,
        "reason": reason,
        "options": [n for n in used if n not in backend.selectors],
    }


def rules_of(name: str, host: HostName | None = None) -> dict[str, Any]:
    """The widget that decides, and conditions of those that depend on it or on each other: all of them must hold.

    What is `harmless` has no effect then, whatever its value; other values than the default would stop the run.

    Args:
        name: of a node class with such widgets.
        host: whose layers count; default: the one that runs.
    """
    spec = NodeSpec.of(NODE_CLASS_MAPPINGS[name])
    shown = _conditions(name, host or HostName(current().name))
    defaults = {w: info.options.get("default", (info.choices or [None])[0]) for w in shown if (info := spec.get(w))}
    return {
        "widget": FORMAT_WIDGETS.get(name),
        "depends": {
            w: {
                "default": defaults[w],
                "harmless": name == COMPAT,
                "when": [{"widget": by, "in": list(values)} for by, values in shown[w].items()],
            }
            for w in defaults
        },
    }


def _conditions(name: str, host: HostName) -> Mapping[str, Mapping[str, list[Any]]]:
    """Widget -> the other widgets that it depends on -> their values with which it has an effect."""
    if name == COMPAT:
        found: dict[str, dict[str, list[Any]]] = {w: {"mode": [m.value for m in modes]} for w, modes in MODES.items()}
        found["blocks_per_group"]["group_level"] = ["block"]
        for w in ("device_gib", "low_watermark", "high_watermark"):
            found[w]["set_mode"] = [True]
        return found
    if name == "ConvertModel":
        from ...quantizers.files.calibration import LARGEST
        from ...quantizers.files.recipes import FLOATS, RECIPES

        types = [*RECIPES, *(f for f in format_ids() if get_entry(f).backend != "gguf")]
        return {
            "imatrix_name": {"type": [t for t in RECIPES if t not in FLOATS]},
            "layout": {"type": [t for t in types if t not in RECIPES]},
            "calibration_name": {"type": [t for t in types if t in LARGEST]},
        }
    chosen = NodeSpec.of(NODE_CLASS_MAPPINGS[name]).get(FORMAT_WIDGETS[name])
    choices = chosen.choices if chosen is not None and chosen.choices is not None else []
    return {"carrier": {"format": [f for f in choices if f in (FROM_CONFIG, AUTO) or has_layer(str(f), host)]}}
