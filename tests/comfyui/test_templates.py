"""The shipped workflows against the real host: its validation, its node definitions and its editor.

Chromium is taken from PATH; without it the tests of the editor are skipped, or fail where QUANTWIRE_REQUIRE_BROWSER is
set.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Comfy
from quantwire.hosts.standalone import foreign_nodes, record_foreign
from quantwire.workflows import ace_step, build
from quantwire.workflows.thumbnails import FLAGS

FOLDER = Path(build.__file__).parent
NAMES = [w.name for w in build.WORKFLOWS]
# What ComfyUI and the pack's nodes say of a file that is not there.
ABSENT = ("value_not_in_list", "custom_validation_failed")
SIZES = "() => window.app.graph._nodes.map(n => [n.title, [...n.size], [...n.computeSize()]])"
MISSING = """() => window.app.graph._nodes
  .filter(n => n.type !== 'MarkdownNote' && !n.constructor?.nodeData).map(n => n.type)"""


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def answer(comfyui: Comfy, graph: dict[str, Any]) -> dict[str, Any]:
    """What POST /prompt answers, whatever its status."""
    body = json.dumps({"prompt": graph}).encode()
    request = urllib.request.Request(f"{comfyui.url}/prompt", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as err:
        return json.load(err)


@pytest.mark.parametrize("workflow", build.TEMPLATES, ids=lambda w: w.name)
def test_host_refuses_a_template_for_absent_files_alone(comfyui: Comfy, workflow: Any) -> None:
    said = answer(comfyui, read(FOLDER / "api" / f"{workflow.name}.json"))
    wanted = {i: {file.name for file in node.files} for i, node in workflow.nodes.items() if node.files}
    assert said["error"]["type"] == "prompt_outputs_failed_validation"
    assert set(said["node_errors"]) == set(wanted), "the nodes that open files, and no others"
    for node_id, node in said["node_errors"].items():
        for error in node["errors"]:
            assert error["type"] in ABSENT, (node["class_type"], error)
            assert any(f in f"{error['message']} {error['details']}" for f in wanted[node_id]), error


@pytest.mark.parametrize("workflow", build.DEMO, ids=lambda w: w.name)
def test_host_takes_a_demo_workflow(comfyui: Comfy, workflow: Any) -> None:
    graph = read(FOLDER / "api" / f"{workflow.name}.json")
    for node in graph.values():
        if node["class_type"] == "KSampler":
            node["inputs"]["steps"] = 1
    said = answer(comfyui, graph)
    if workflow.name == "conflict":  # sequential is a mode of the embedded host; the check says so when it runs
        assert comfyui.wait(said["prompt_id"])["status"]["status_str"] == "error"
        return
    assert said["node_errors"] == {}
    entry = comfyui.wait(said["prompt_id"])
    assert entry["status"]["status_str"] == "success", comfyui.error(entry)


def without_files(recorded: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """`other` without what `recorded` reads from a model folder: there the machine decides."""
    out = copy.deepcopy(other)
    for group, specs in recorded["input"].items():
        for name, spec in specs.items():
            if isinstance(spec[0], dict):
                out["input"][group][name][0] = spec[0]
            elif len(spec) > 1 and foreign_nodes.FOLDER in spec[1]:
                options = out["input"][group][name][1]
                options.pop("options", None)
                options[foreign_nodes.FOLDER] = spec[1][foreign_nodes.FOLDER]
    return out


def test_recorded_nodes_are_those_of_the_host(comfyui: Comfy) -> None:
    """Run `python -m quantwire.hosts.standalone.record_foreign URL` where ComfyUI has changed them."""
    recorded = read(foreign_nodes.DATA)
    found = record_foreign.record(comfyui.get("/object_info"), record_foreign.wanted_nodes())
    assert recorded == {name: without_files(recorded[name], entry) for name, entry in found.items()}


SHAPES = """
import json, sys
sys.path.insert(0, sys.argv[1])
sys.argv = ["x", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import torch
import comfy.ops
from comfy.ldm.ace.ace_step15 import AceStepConditionGenerationModel
model = AceStepConditionGenerationModel(device="cpu", dtype=torch.bfloat16, operations=comfy.ops.disable_weight_init)
linear = [f"{n}.weight" for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
print(json.dumps([[n, list(p.shape), n in linear] for n, p in model.named_parameters()]))
"""


@pytest.mark.skipif(not os.environ.get("COMFYUI_PATH"), reason="COMFYUI_PATH is unset, see `make test-comfyui`")
def test_ace_step_is_counted_as_the_host_builds_it() -> None:
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    command = [python, "-c", SHAPES, os.environ["COMFYUI_PATH"]]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    built = {name: (tuple(shape), linear) for name, shape, linear in json.loads(done.stdout.splitlines()[-1])}
    assert built == {name: (shape, linear) for name, shape, linear in ace_step.tensors()}


@pytest.fixture(scope="module")
def editor(comfyui: Comfy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        reason = "there is no chromium in PATH"
        (pytest.fail if os.environ.get("QUANTWIRE_REQUIRE_BROWSER") else pytest.skip)(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            str(tmp_path_factory.mktemp("profile")), executable_path=browser, args=FLAGS
        )
        page = context.pages[0]
        page.goto(comfyui.url, wait_until="domcontentloaded")
        page.wait_for_function("() => window.app?.graph && window.app.extensionManager", timeout=90_000)
        page.wait_for_timeout(3000)
        yield page
        context.close()


@pytest.mark.parametrize("name", NAMES)
def test_editor_makes_the_api_form_of_it(editor: Any, name: str) -> None:
    graph = read(FOLDER / f"{name}.json")
    editor.evaluate("graph => window.app.loadGraphData(graph)", graph)
    editor.wait_for_timeout(300)
    assert editor.evaluate(MISSING) == []
    assert editor.evaluate("async () => (await window.app.graphToPrompt()).output") == read(
        FOLDER / "api" / f"{name}.json"
    )
    for title, size, needed in editor.evaluate(SIZES):
        assert needed[0] <= size[0] + 1, f"{title} is narrower than the editor draws it"
        assert needed[1] <= size[1] + 1, f"{title} is lower than the editor draws it"
    saved = {box["title"]: box["size"] for box in graph["nodes"]}
    grown = [t for t, size, _ in editor.evaluate(SIZES) if size[1] > saved[t][1] + 1]
    assert grown == [], "larger than in the file, so what stands below may be covered"


def test_host_lists_the_templates_with_their_pictures(comfyui: Comfy) -> None:
    assert set(comfyui.get("/workflow_templates")["quantwire"]) == set(NAMES)
    for name in NAMES:
        with urllib.request.urlopen(f"{comfyui.url}/api/workflow_templates/quantwire/{name}.jpg") as reply:
            assert reply.headers["Content-Type"] == "image/jpeg"
