"""The node classes of the ComfyUI that runs this process, as lint knows node types, and its model folders.

A class is asked when it is looked up: /object_info asks all of them, which takes seconds with many packs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..lint.catalog import NodeType, from_object_info, with_replaced
from ..standalone.folders import ModelFolders
from .host import ComfyHost

FRESH_S = 2.0  # for so long a class is not asked again: its choices are files, which come and go
_made: dict[str, tuple[float, NodeType | None]] = {}


class LiveTypes(Mapping[str, NodeType]):
    """Node types by id; those that ComfyUI replaces by others included."""

    def __init__(self) -> None:
        host_nodes: Any = sys.modules["nodes"]  # the host's: the pack has a package of that name
        self._classes: Mapping[str, type] = host_nodes.NODE_CLASS_MAPPINGS
        self._replaced = _replacements()

    def __getitem__(self, name: str) -> NodeType:
        now = time.monotonic()
        if name not in _made or now - _made[name][0] > FRESH_S:
            _made[name] = (now, self._ask(name))
        found = _made[name][1]
        if found is None:
            raise KeyError(name)
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._classes or (name in self._replaced and self.get(str(name)) is not None)

    def __iter__(self) -> Iterator[str]:
        return iter([*self._classes, *(name for name in self._replaced if name not in self._classes)])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def _ask(self, name: str) -> NodeType | None:
        if name in self._classes:
            return from_object_info(name, _info(self._classes[name]), _given_types(self._classes))
        entries: Any = self._replaced.get(name)
        new = str(entries[0].get("new_node_id")) if entries else ""
        if new not in self._classes:
            return None
        return with_replaced({new: self[new]}, {name: entries}).get(name)


class LiveFolders(ModelFolders):
    """ComfyUI's model folders, wherever its settings put them."""

    name = "comfyui"

    def __init__(self) -> None:
        import folder_paths

        super().__init__([Path(folder_paths.models_dir)])
        self._host = ComfyHost()

    def _roots(self, folder: str) -> list[Path]:
        return self._host.roots(folder)

    def text_encoder_types(self) -> Any:
        return self._host.text_encoder_types()


def _info(cls: Any) -> dict[str, Any]:
    """The parts of a class's /object_info entry that lint reads; empty where the class fails, as packs' may."""
    try:
        if hasattr(cls, "GET_NODE_INFO_V1"):
            info = cls.GET_NODE_INFO_V1()
        else:
            output = getattr(cls, "OUTPUT_NODE", False)
            info = {"input": cls.INPUT_TYPES(), "output": cls.RETURN_TYPES, "output_node": output}
        groups = {group: _as_json(declared) for group, declared in info["input"].items() if group != "hidden"}
        return {"input": groups, "output": list(info["output"]), "output_node": info["output_node"]}
    except Exception:  # the host leaves such a class out of /object_info, whatever it raises
        return {}


def _as_json(declared: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs with lists in place of tuples, as they arrive through the route."""
    found = {name: list(info) if isinstance(info, (list, tuple)) else info for name, info in declared.items()}
    for info in found.values():
        if isinstance(info, list) and info and isinstance(info[0], tuple):
            info[0] = list(info[0])
    return found


def _given_types(classes: Mapping[str, type]) -> frozenset[str]:
    """Types that some node gives out; counted again when classes were added."""
    if _given[0] != len(classes):
        found: set[str] = set()
        for cls in list(classes.values()):
            try:
                outputs = cls.RETURN_TYPES  # pyright: ignore[reportAttributeAccessIssue]
                found |= {part.strip() for kind in outputs if isinstance(kind, str) for part in kind.split(",")}
            except Exception:  # as above
                continue
        _given[:] = [len(classes), frozenset(found)]
    return _given[1]


_given: list[Any] = [0, frozenset()]


def _replacements() -> Mapping[str, Any]:
    """As /node_replacements tells; older hosts have none."""
    from server import PromptServer

    manager = getattr(PromptServer.instance, "node_replace_manager", None)
    return manager.as_dict() if manager is not None else {}
