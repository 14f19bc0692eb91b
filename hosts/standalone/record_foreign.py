"""Write `foreign_nodes.json` from a running ComfyUI: the core nodes that the shipped workflows use and this host lacks.

    python -m quantwire.hosts.lint.record_nodes mark DIR
    python main.py --cpu --base-directory DIR --port 8390           (in ComfyUI's folder)
    python -m quantwire.hosts.standalone.record_foreign http://127.0.0.1:8390

`mark` puts one file into each model folder, so that a list of files tells which folder it is read from. ComfyUI's own
sentences (descriptions, tooltips) are left out, and so are node aliases and the like that no workflow needs.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from collections.abc import Mapping
from typing import Any

from ...nodes import NODE_CLASS_MAPPINGS
from ...quantizers.errors import WorkflowError
from ..lint.record_nodes import MARK
from .core_nodes import CORE_NODES
from .foreign_nodes import DATA, FOLDER, GROUPS

SENTENCES = ("tooltip", "placeholder", "description")


def record(info: Mapping[str, Any], wanted: set[str]) -> dict[str, Any]:
    """Entries of `foreign_nodes.json` for the wanted nodes.

    Args:
        info: what ComfyUI answers to `/object_info`.
    Raises:
        WorkflowError: ComfyUI lacks one of them, or it takes or gives lists, which `foreign_nodes` does not record.
    """
    lacking = sorted(wanted - set(info))
    if lacking:
        raise WorkflowError(f"This ComfyUI has no node {', '.join(lacking)}.\nRecord from a newer one.")
    return {name: _recorded(info[name]) for name in sorted(wanted)}


def wanted_nodes() -> set[str]:
    """Node types of the shipped workflows that neither the embedded host nor the pack has."""
    from ...workflows.build import WORKFLOWS

    used = {node.kind for workflow in WORKFLOWS for node in workflow.nodes.values()}
    return used - set(CORE_NODES) - set(NODE_CLASS_MAPPINGS)


def _recorded(node: Mapping[str, Any]) -> dict[str, Any]:
    if node.get("is_input_list") or any(node["output_is_list"]):
        raise WorkflowError(f"{node['name']} takes or gives lists, which is not recorded.\nUse another node.")
    groups = {group: node["input"][group] for group in GROUPS if node["input"].get(group)}
    out: dict[str, Any] = {
        "category": node["category"],
        "module": node["python_module"],
        "input": {group: {name: _input(spec) for name, spec in specs.items()} for group, specs in groups.items()},
        "output": node["output"],
    }
    if node["output_name"] != node["output"]:
        out["output_name"] = node["output_name"]
    if node.get("display_name") and node["display_name"] != node["name"]:
        out["display_name"] = node["display_name"]
    if node["output_node"]:
        out["output_node"] = True
    return out


def _input(spec: list[Any]) -> list[Any]:
    kind, options = spec[0], _without_sentences(spec[1]) if len(spec) > 1 else {}
    if isinstance(kind, list):
        folder = _folder(kind)
        return [{FOLDER: folder} if folder else kind, *([options] if options else [])]
    folder = _folder(options.get("options", ()))
    if folder:
        options = {**{k: v for k, v in options.items() if k != "options"}, FOLDER: folder}
    return [kind, *([options] if options else [])]


def _folder(choices: Any) -> str:
    """The model folder that a list of files is read from; empty for any other list."""
    marks = [c for c in choices if isinstance(c, str) and c.startswith(MARK)]
    return marks[0].removeprefix(MARK).rpartition(".")[0] if marks else ""


def _without_sentences(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_sentences(v) for k, v in value.items() if k not in SENTENCES}
    return [_without_sentences(v) for v in value] if isinstance(value, list) else value


def main(url: str) -> None:
    with urllib.request.urlopen(f"{url}/object_info") as answer:
        info = json.load(answer)
    nodes = record(info, wanted_nodes())
    lines = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in nodes.items()]
    DATA.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
