"""The shipped workflows: both files of each are current and one graph, well laid out, and those of the demo run."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from quantwire.cli import main
from quantwire.hosts import use
from quantwire.hosts.standalone.core_nodes import CORE_NODES
from quantwire.hosts.standalone.foreign_nodes import definitions
from quantwire.hosts.standalone.host import StandaloneHost
from quantwire.hosts.standalone.validate import validate
from quantwire.hosts.standalone.workflow import load_workflow
from quantwire.nodes import NODE_CLASS_MAPPINGS
from quantwire.quantizers.errors import WorkflowError
from quantwire.workflows import build
from quantwire.workflows.describe import Node, Workflow
from quantwire.workflows.editor_form import heights_of

FOLDER = Path(build.__file__).parent
NAMES = [w.name for w in build.WORKFLOWS]
DEMO = [w.name for w in build.DEMO]
CLASSES: dict[str, Any] = {**CORE_NODES, **NODE_CLASS_MAPPINGS}
IMAGES = {"full_precision": 1, "quantized": 1, "gguf": 1, "conflict": 0, "side_by_side": 2}
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
BRANCHING = "COMFY_DYNAMICCOMBO_V3"
TITLE = 30  # height of a node's title bar, above its `pos`


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_files_are_what_build_writes() -> None:
    """Run `python -m quantwire.workflows.build` after a change of the nodes or of what describes the workflows."""
    rendered = build.rendered()
    assert {p.relative_to(FOLDER) for p in FOLDER.rglob("*.json")} == {p.relative_to(FOLDER) for p in rendered}
    for path, text in rendered.items():
        assert path.read_text(encoding="utf-8") == text, path.name


def declared_inputs(kind: str) -> dict[str, Any]:
    types = CLASSES[kind].INPUT_TYPES() if kind in CLASSES else definitions()[kind]["input"]
    return {**types.get("required", {}), **types.get("optional", {})}


def read_widgets(specs: dict[str, Any], values: Iterator[Any], prefix: str = "") -> dict[str, Any]:
    """Widgets by their order, as the editor reads them; a branching choice brings its inputs behind it."""
    found: dict[str, Any] = {}
    for name, (kind, *rest) in specs.items():
        options = rest[0] if rest else {}
        if not (isinstance(kind, list) or kind in WIDGETS or kind == BRANCHING):
            continue
        found[prefix + name] = value = next(values)
        if options.get("control_after_generate"):
            assert next(values) == "fixed"
        if kind == BRANCHING and not options.get("hidden"):
            (branch,) = (o["inputs"] for o in options["options"] if o["key"] == value)
            inner = {**branch.get("required", {}), **branch.get("optional", {})}
            found |= read_widgets(inner, values, f"{prefix}{name}.")
    return found


def from_editor(graph: dict[str, Any]) -> dict[str, Any]:
    """API form of an editor file, read as the editor does: widgets by their order, links by their ids."""
    links = {i: [str(source), output] for i, source, output, *_ in graph["links"]}
    out: dict[str, Any] = {}
    for box in graph["nodes"]:
        if box["type"] == "MarkdownNote":
            continue
        inputs: dict[str, Any] = {s["name"]: links[s["link"]] for s in box["inputs"] if s["link"] is not None}
        values = iter(box["widgets_values"])
        inputs |= read_widgets(declared_inputs(box["type"]), values)
        assert next(values, None) is None, "as many values as widgets"
        out[str(box["id"])] = {"class_type": box["type"], "inputs": inputs, "_meta": {"title": box["title"]}}
    return out


@pytest.mark.parametrize("name", NAMES)
def test_both_forms_describe_one_graph(name: str) -> None:
    """To the last value: the editor writes every widget, and so does the API form."""
    assert from_editor(read(FOLDER / f"{name}.json")) == read(FOLDER / "api" / f"{name}.json")


@pytest.mark.parametrize("name", NAMES)
def test_slots_are_those_of_the_node(name: str) -> None:
    """All inputs that are no widgets, in the node's order: the editor tells slots by their place."""
    for box in read(FOLDER / f"{name}.json")["nodes"]:
        if box["type"] != "MarkdownNote":
            kinds = {n: spec[0] for n, spec in declared_inputs(box["type"]).items()}
            slots = [n for n, k in kinds.items() if isinstance(k, str) and k not in (*WIDGETS, BRANCHING)]
            assert [s["name"] for s in box["inputs"]] == slots, box["type"]
            assert [s["type"] for s in box["inputs"]] == [kinds[n] for n in slots], box["type"]


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


Area = tuple[float, float, float, float]


def apart(a: Area, b: Area) -> bool:
    return a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def area_of(box: dict[str, Any]) -> Area:
    """Left, top, right and bottom of a node with its title bar."""
    (x, y), (width, height) = box["pos"], box["size"]
    return (x, y - TITLE, x + width, y + height)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_overlaps(name: str) -> None:
    graph = read(FOLDER / f"{name}.json")
    places = {b["title"]: area_of(b) for b in graph["nodes"]}
    for (a, at), (b, other) in itertools.combinations(places.items(), 2):
        assert apart(at, other), f"{a} and {b}: {at} {other}"
    groups = {g["title"]: (x, y, x + w, y + h) for g in graph["groups"] for x, y, w, h in [g["bounding"]]}
    for (a, at), (b, other) in itertools.combinations(groups.items(), 2):
        assert apart(at, other), f"group {a} and group {b}"


@pytest.mark.parametrize("workflow", build.WORKFLOWS, ids=lambda w: w.name)
def test_nothing_overlaps_where_the_editor_shows_every_widget(workflow: Workflow) -> None:
    """Without the pack's extension the editor makes nodes higher when it opens the file."""
    graph = read(FOLDER / f"{workflow.name}.json")
    grown: dict[str, Area] = {}
    for box in graph["nodes"]:
        left, top, right, bottom = area_of(box)
        if box["type"] != "MarkdownNote":
            shown, every = heights_of(workflow.nodes[str(box["id"])])
            assert box["size"][1] == shown
            bottom += every - shown
        grown[box["title"]] = (left, top, right, bottom)
    for (a, at), (b, other) in itertools.combinations(grown.items(), 2):
        assert apart(at, other), f"{a} and {b}: {at} {other}"


OFFLOAD = {"model": ("1", 0)}


@pytest.mark.parametrize(
    ("kind", "inputs", "widgets"),
    [
        ("OffloadCompat", {**OFFLOAD, "mode": "auto"}, 7),
        ("OffloadCompat", {**OFFLOAD, "mode": "sequential"}, 6),
        ("OffloadCompat", {**OFFLOAD, "mode": "group"}, 3),
        ("OffloadCompat", {**OFFLOAD, "mode": ("2", 0)}, 0),
        ("ConvertModel", {"type": "Q4_K_M"}, 2),
        ("ConvertModel", {"type": "Q4_K_M", "layout": "diffusers"}, 1),
        ("QuantizeModel", {**OFFLOAD, "format": "bnb-nf4"}, 0),
    ],
)
def test_a_node_has_the_height_of_what_is_shown(kind: str, inputs: dict[str, Any], widgets: int) -> None:
    """Linked widgets decide when the graph runs, and a value that would stop the run stays in sight."""
    shown, every = heights_of(Node(kind, kind, inputs))
    assert every - shown == 24 * widgets


@pytest.mark.parametrize("name", NAMES)
def test_every_node_stands_in_a_titled_group(name: str) -> None:
    """And the note in none, to the left of all."""
    graph = read(FOLDER / f"{name}.json")
    titles = [g["title"] for g in graph["groups"]]
    assert len(set(titles)) == len(titles) > 1
    assert all(titles)
    for box in graph["nodes"]:
        left, top, right, bottom = area_of(box)
        around = [
            g["title"]
            for g in graph["groups"]
            for x, y, w, h in [g["bounding"]]
            if x < left and right < x + w and y + TITLE < top and bottom < y + h
        ]
        assert len(around) == (0 if box["type"] == "MarkdownNote" else 1), box["title"]
        if box["type"] == "MarkdownNote":
            assert right <= min(g["bounding"][0] for g in graph["groups"])


@pytest.mark.parametrize("name", NAMES)
def test_note_says_what_it_shows_and_what_to_change(name: str) -> None:
    graph = read(FOLDER / f"{name}.json")
    (text,) = (b["widgets_values"][0] for b in graph["nodes"] if b["type"] == "MarkdownNote")
    title, _, rest = text.partition("\n")
    assert title.startswith("# ")
    assert len(rest.partition("##")[0]) > 60
    assert "\n## What to change\n\n- " in text or "\n## What to change\n- " in text


@pytest.mark.parametrize("name", NAMES)
def test_thumbnail(name: str) -> None:
    """Run `python -m quantwire.workflows.thumbnails` for a new workflow."""
    path = FOLDER / f"{name}.jpg"
    assert path.stat().st_size < 60_000
    with Image.open(path) as image:
        assert image.format == "JPEG"
        assert image.size == (640, 360)
        darkest, brightest = image.convert("L").getextrema()
        assert brightest - darkest > 150, "a picture of something"


def test_every_thumbnail_has_a_workflow() -> None:
    assert {p.stem for p in FOLDER.glob("*.jpg")} == set(NAMES)


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


@pytest.mark.parametrize("name", DEMO)
def test_every_demo_workflow_runs_or_is_blocked(name: str, models: Path, demo_models: Path, tmp_path: Path) -> None:
    path = FOLDER / "api" / f"{name}.json"
    steps = [f"--set={node}.steps=2" for node, n in read(path).items() if n["class_type"] == "KSampler"]
    folders = ["--models", str(models), "--models", str(demo_models)]
    assert main(["run", str(path), *folders, "--out", str(tmp_path), *steps]) == (3 if name == "conflict" else 0)
    images = sorted(tmp_path.rglob("*.png"))
    assert len(images) == IMAGES[name]
    for file in images:
        with Image.open(file) as image:
            assert image.size == (64, 64)


@pytest.mark.parametrize("name", DEMO)
def test_every_demo_workflow_is_valid_as_it_stands(name: str, models: Path, demo_models: Path, tmp_path: Path) -> None:
    with use(StandaloneHost([models, demo_models], tmp_path)):
        assert validate(load_workflow(FOLDER / "api" / f"{name}.json"), CLASSES) == []
