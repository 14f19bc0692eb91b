"""The shipped workflows: both files of each are current, describe one graph, and run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from quantwire.cli import main
from quantwire.hosts import use
from quantwire.hosts.standalone.core_nodes import CORE_NODES
from quantwire.hosts.standalone.host import StandaloneHost
from quantwire.hosts.standalone.validate import validate
from quantwire.hosts.standalone.workflow import load_workflow
from quantwire.nodes import NODE_CLASS_MAPPINGS
from quantwire.quantizers.errors import WorkflowError
from quantwire.workflows import build

FOLDER = Path(build.__file__).parent
NAMES = [w.name for w in build.WORKFLOWS]
CLASSES: dict[str, Any] = {**CORE_NODES, **NODE_CLASS_MAPPINGS}
IMAGES = {"full_precision": 1, "quantized": 1, "gguf": 1, "conflict": 0, "side_by_side": 2}


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_files_are_what_build_writes() -> None:
    """Run `python -m quantwire.workflows.build` after a change of the nodes or of build.py."""
    rendered = build.rendered()
    assert {p.relative_to(FOLDER) for p in FOLDER.rglob("*.json")} == {p.relative_to(FOLDER) for p in rendered}
    for path, text in rendered.items():
        assert path.read_text(encoding="utf-8") == text, path.name


def from_editor(graph: dict[str, Any]) -> dict[str, Any]:
    """API form of an editor file, read as the editor does: widgets by their order, links by their ids."""
    links = {i: [str(source), output] for i, source, output, *_ in graph["links"]}
    out: dict[str, Any] = {}
    for box in graph["nodes"]:
        if box["type"] == "MarkdownNote":
            continue
        types = CLASSES[box["type"]].INPUT_TYPES()
        declared = {**types.get("required", {}), **types.get("optional", {})}
        inputs: dict[str, Any] = {s["name"]: links[s["link"]] for s in box["inputs"] if s["link"] is not None}
        values = iter(box["widgets_values"])
        for name, (kind, *options) in declared.items():
            if isinstance(kind, list) or kind in build.WIDGET_TYPES:
                inputs[name] = next(values)
                if options and options[0].get("control_after_generate"):
                    assert next(values) == "fixed"
        assert next(values, None) is None, "as many values as widgets"
        out[str(box["id"])] = {"class_type": box["type"], "inputs": inputs, "_meta": {"title": box["title"]}}
    return out


@pytest.mark.parametrize("name", NAMES)
def test_both_forms_describe_one_graph(name: str) -> None:
    editor, api = read(FOLDER / f"{name}.json"), read(FOLDER / "api" / f"{name}.json")
    converted = from_editor(editor)
    assert set(converted) == set(api)
    for node_id, node in api.items():
        assert converted[node_id]["class_type"] == node["class_type"]
        assert converted[node_id]["_meta"] == node["_meta"]
        # The editor writes every widget; the API form may leave one at its default.
        types = CLASSES[node["class_type"]].INPUT_TYPES()
        for key, value in converted[node_id]["inputs"].items():
            if key in node["inputs"]:
                assert value == node["inputs"][key], (node_id, key)
            else:
                kind, *options = types["optional"][key]
                default = options[0].get("default", kind[0] if isinstance(kind, list) else None)
                assert value == default, (node_id, key)
        assert set(node["inputs"]) <= set(converted[node_id]["inputs"])


@pytest.mark.parametrize("name", NAMES)
def test_editor_file_is_consistent(name: str) -> None:
    graph = read(FOLDER / f"{name}.json")
    boxes = {b["id"]: b for b in graph["nodes"]}
    assert len(boxes) == len(graph["nodes"])
    assert graph["last_node_id"] == max(boxes)
    assert graph["last_link_id"] == len(graph["links"])
    for link, source, output, target, slot, kind in graph["links"]:
        assert link in boxes[source]["outputs"][output]["links"]
        assert boxes[target]["inputs"][slot]["link"] == link
        assert boxes[source]["outputs"][output]["type"] == kind
        assert boxes[target]["inputs"][slot]["type"] in (kind, "*")
    places = [(x, y, x + w, y + h) for (x, y), (w, h) in ((b["pos"], b["size"]) for b in graph["nodes"])]
    for i, a in enumerate(places):
        for b in places[i + 1 :]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], f"boxes overlap: {a} {b}"


def test_editor_form_is_refused_with_the_way_to_the_other() -> None:
    with pytest.raises(WorkflowError, match="API"):
        load_workflow(FOLDER / "quantized.json")


@pytest.fixture(scope="module")
def models(demo_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that the workflow `gguf` asks for, made as its note says."""
    folder = tmp_path_factory.mktemp("models")
    source = demo_models / "diffusion_models" / "digits_flux.safetensors"
    target = folder / "diffusion_models" / "digits_flux-Q8_0.gguf"
    assert main(["convert", str(source), str(target), "--type", "Q8_0"]) == 0
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_every_workflow_runs_or_is_blocked(name: str, models: Path, demo_models: Path, tmp_path: Path) -> None:
    path = FOLDER / "api" / f"{name}.json"
    steps = [f"--set={node}.steps=2" for node, n in read(path).items() if n["class_type"] == "KSampler"]
    folders = ["--models", str(models), "--models", str(demo_models)]
    assert main(["run", str(path), *folders, "--out", str(tmp_path), *steps]) == (3 if name == "conflict" else 0)
    images = sorted(tmp_path.rglob("*.png"))
    assert len(images) == IMAGES[name]
    for file in images:
        with Image.open(file) as image:
            assert image.size == (64, 64)


@pytest.mark.parametrize("name", NAMES)
def test_every_workflow_is_valid_as_it_stands(name: str, models: Path, demo_models: Path, tmp_path: Path) -> None:
    with use(StandaloneHost([models, demo_models], tmp_path)):
        assert validate(load_workflow(FOLDER / "api" / f"{name}.json"), CLASSES) == []
