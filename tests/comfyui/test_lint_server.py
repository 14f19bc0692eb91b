"""`quantwire lint --server` against a real ComfyUI server."""

from __future__ import annotations

import copy
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from quantwire.cli import main

SHIPPED = Path(__file__).resolve().parents[2] / "workflows"


@pytest.fixture
def graph(comfyui: Any) -> dict[str, Any]:
    """A shipped workflow with a model that the server has."""
    found = json.loads((SHIPPED / "api" / "conflict.json").read_text(encoding="utf-8"))
    info = comfyui.get("/object_info")
    for node_id, name in (("1", "unet_name"), ("4", "clip_name"), ("10", "vae_name")):
        kind = info[found[node_id]["class_type"]]["input"]["required"][name]
        found[node_id]["inputs"][name] = (kind[0] if isinstance(kind[0], list) else kind[1]["options"])[0]
    found["3"]["inputs"]["mode"] = "novram"
    return found


def lint(graph: dict[str, Any], url: str, folder: Path) -> tuple[int, list[dict[str, Any]]]:
    path, report = folder / "workflow.json", folder / "report"
    path.write_text(json.dumps(graph), encoding="utf-8")
    code = main(["lint", str(path), "--server", url, "--json", str(report)])
    return code, json.loads(report.read_text(encoding="utf-8"))["files"][0]["findings"]


def test_the_servers_nodes_and_models_decide(comfyui: Any, graph: dict[str, Any], tmp_path: Path) -> None:
    code, found = lint(graph, comfyui.url, tmp_path)
    assert code == 3
    assert [(f["code"], f["node"]["id"]) for f in found] == [("offload-conflict", "3")]

    other = copy.deepcopy(graph)
    other["1"]["inputs"]["unet_name"] = "not_there.safetensors"
    other["12"]["class_type"] = "VAEDecodeNotThere"
    other["11"]["inputs"]["sampler_name"] = "no_such_sampler"
    code, found = lint(other, comfyui.url, tmp_path)
    assert code == 3
    assert {(f["code"], f["node"]["id"]) for f in found} == {
        ("offload-conflict", "3"),
        ("missing-model", "1"),
        ("unknown-node", "12"),
        ("bad-value", "11"),
    }


def test_what_lint_passes_the_server_accepts(comfyui: Any, graph: dict[str, Any], tmp_path: Path) -> None:
    graph["2"]["inputs"]["carrier"] = "quantwire"
    code, found = lint(graph, comfyui.url, tmp_path)
    assert (code, found) == (0, [])
    comfyui.queue(graph)  # an invalid prompt is answered with an error, which raises


def test_recorded_nodes_are_the_servers(comfyui: Any) -> None:
    """`core_nodes.txt` is of this ComfyUI: otherwise write it anew with record_nodes.py."""
    from quantwire.hosts.lint.catalog import core_nodes, from_object_info

    info = comfyui.get("/object_info")
    own = {name for name, entry in info.items() if not entry["python_module"].startswith("custom_nodes")}
    recorded = core_nodes()
    assert own <= recorded.keys()
    for name in own:
        if recorded[name].detailed:
            now = from_object_info(name, info[name])
            assert list(recorded[name].inputs) == [i.replace(" ", "_") for i in now.inputs], name
            assert recorded[name].outputs == now.outputs, name


def test_bundled_templates_lack_nothing(comfyui: Any) -> None:
    """ComfyUI's own examples: no input is missing, with and without the server, and without it nothing is wrong."""
    from quantwire.hosts.lint.catalog import ask_server
    from quantwire.hosts.lint.graph import Level
    from quantwire.hosts.lint.lint import Linter, Options
    from quantwire.nodes import NODE_CLASS_MAPPINGS
    from quantwire.quantizers.compat.modes import HostName

    code = "import comfyui_workflow_templates_json as t; print(list(t.__path__)[0])"
    asked = subprocess.run([os.environ["COMFYUI_PYTHON"], "-c", code], capture_output=True, text=True, check=False)
    paths = sorted(Path(asked.stdout.strip()).rglob("*.json")) if asked.returncode == 0 else []
    if not paths:
        pytest.skip("this ComfyUI brings no templates")
    alone = Linter(Options(host=HostName.COMFYUI, find_models=False), NODE_CLASS_MAPPINGS)
    asking = Linter(Options(server=ask_server(comfyui.url)), NODE_CLASS_MAPPINGS)
    faults: list[Any] = []
    for path in paths:
        faults += [(path.name, f) for f in alone.check(path, False).findings if f.level is Level.ERROR]
        faults += [(path.name, f) for f in asking.check(path, False).findings if f.code == "missing-input"]
    assert faults == []
