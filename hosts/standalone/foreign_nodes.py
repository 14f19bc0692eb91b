"""ComfyUI's core nodes that the shipped workflows use and this host lacks, as entries of `/object_info`.

With them a template opens in the editor of `quantwire serve` as it does in ComfyUI: every node with its inputs, every
link, no box in red. None of them runs here: validation refuses a workflow that holds one, by the node's name. The
entries are recorded from a running ComfyUI by `record_foreign.py`, as data alone: names, types, defaults, ranges,
choices.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

DATA = Path(__file__).with_name("foreign_nodes.json")
CATEGORY = "ComfyUI only"
DESCRIPTION = "A node of ComfyUI. This host shows it and does not run it: run this workflow in ComfyUI."
FOLDER = "folder"  # in the place of a list of files: the model folder that it is read from
GROUPS = ("required", "optional")
ListFiles = Callable[[str], list[str]]


def definitions(list_files: ListFiles | None = None) -> dict[str, dict[str, Any]]:
    """Id -> entry of `/object_info`; a copy, which the caller may change.

    Args:
        list_files: names of the files in a model folder; without it such choices are empty.
    """
    return {name: _entry(name, recorded, list_files) for name, recorded in copy.deepcopy(_data()).items()}


def _entry(name: str, recorded: dict[str, Any], list_files: ListFiles | None) -> dict[str, Any]:
    inputs: dict[str, dict[str, Any]] = recorded["input"]
    for spec in (spec for group in inputs.values() for spec in group.values()):
        if isinstance(spec[0], dict):
            spec[0] = list_files(spec[0][FOLDER]) if list_files else []
        elif len(spec) > 1 and FOLDER in spec[1]:
            folder = spec[1].pop(FOLDER)
            spec[1]["options"] = list_files(folder) if list_files else []
    outputs: list[str] = recorded["output"]
    return {
        "input": inputs,
        "input_order": {group: list(specs) for group, specs in inputs.items()},
        "is_input_list": False,
        "output": outputs,
        "output_is_list": [False] * len(outputs),
        "output_name": recorded.get("output_name", list(outputs)),
        "name": name,
        "display_name": recorded.get("display_name", name),
        "description": DESCRIPTION,
        "python_module": recorded["module"],
        "category": f"{CATEGORY}/{recorded['category']}",
        "output_node": recorded.get("output_node", False),
    }


@functools.cache
def _data() -> dict[str, Any]:
    return json.loads(DATA.read_text(encoding="utf-8"))
