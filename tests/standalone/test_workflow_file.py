"""Reading API-form workflow files and overriding their inputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from quantwire.hosts.standalone.workflow import (
    FileError,
    NodePlace,
    Prompt,
    WorkflowError,
    apply_overrides,
    load_workflow,
    parse_workflow,
)


class Sampler:
    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "steps": ("INT", {"default": 4}),
                "cfg": ("FLOAT", {"default": 1.0}),
                "preview": ("BOOLEAN", {"default": False}),
                "sampler": (["euler", "heun", "4"],),
                "size": ("COMBO", {"options": [512, 1024]}),
                "text": ("STRING", {"multiline": True}),
                "model": ("MODEL",),
            },
            "optional": {"model.strength": ("FLOAT", {})},
            "hidden": {"unique_id": "UNIQUE_ID"},
        }


CLASSES: dict[str, type] = {"Sampler": Sampler}

GRAPH: dict[str, Any] = {
    "3": {
        "class_type": "Sampler",
        "inputs": {"steps": 4, "text": "a cat", "model": ["4", 0]},
        "_meta": {"title": "FLUX.1"},
    },
    "4": {"class_type": "Loader", "inputs": {"name": "a.safetensors", "rate": 8, "on": True}},
    "5": {"class_type": "Encode", "inputs": {"text": "x"}, "_meta": {"title": "Positive"}},
    "6": {"class_type": "Encode", "inputs": {"text": "y"}, "_meta": {"title": "Negative"}},
    "7": {"class_type": "Save", "inputs": {}, "_meta": {"title": "Same"}},
    "8": {"class_type": "Show", "inputs": {}, "_meta": {"title": "Same"}},
}


@pytest.fixture
def prompt() -> Prompt:
    return parse_workflow(GRAPH)


def write(folder: Path, name: str, content: object) -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


# --- reading ---


@pytest.mark.parametrize("wrap", [False, True], ids=["bare", "inside-prompt"])
def test_load_gives_typed_nodes_and_the_same_json_back(tmp_path: Path, wrap: bool) -> None:
    loaded = load_workflow(write(tmp_path, "a.json", {"prompt": GRAPH, "client_id": "x"} if wrap else GRAPH))
    assert list(loaded.nodes) == list(GRAPH)
    assert loaded.nodes["3"].title == "FLUX.1"
    assert loaded.nodes["3"].inputs["model"] == ["4", 0]
    assert loaded.to_json() == GRAPH
    assert loaded.source.endswith("a.json")


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "bom.json"
    path.write_text(json.dumps(GRAPH), encoding="utf-8-sig")
    assert "3" in load_workflow(path).nodes


def test_prompt_is_independent_of_the_given_dict() -> None:
    data: dict[str, Any] = {"1": {"class_type": "A", "inputs": {"x": {"__value__": [1]}}}}
    parsed = parse_workflow(data)
    data["1"]["inputs"]["x"]["__value__"].append(2)
    parsed.to_json()["1"]["inputs"]["x"]["__value__"].append(3)
    assert parsed.nodes["1"].inputs["x"] == {"__value__": [1]}


def test_missing_file_lists_its_neighbours_and_the_nearest_name(tmp_path: Path) -> None:
    write(tmp_path, "flux.json", GRAPH)
    write(tmp_path, "wan.json", GRAPH)
    with pytest.raises(FileError) as caught:
        load_workflow(tmp_path / "fluxx.json")
    first, second = str(caught.value).splitlines()
    assert "fluxx.json: does not exist. Did you mean flux.json" in first
    assert second.endswith("flux.json, wan.json")


def test_missing_file_in_an_empty_or_missing_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "a.json", tmp_path / "none" / "a.json"):
        with pytest.raises(FileError, match=r"does not exist.\nThere is no .json file in"):
            load_workflow(path)


def test_this_folder_is_not_called_by_its_dot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileError, match=r"There is no \.json file in this folder\.$"):
        load_workflow("a.json")


def test_a_folder_is_no_workflow(tmp_path: Path) -> None:
    write(tmp_path, "flux.json", GRAPH)
    with pytest.raises(FileError, match=r"is a folder, not a workflow file.*\n.*flux.json"):
        load_workflow(tmp_path)


def test_invalid_json_names_line_and_column(tmp_path: Path) -> None:
    with pytest.raises(WorkflowError, match=r"bad.json: invalid JSON at line 2, column 8: "):
        load_workflow(write(tmp_path, "bad.json", '{\n  "1": }'))


def test_a_binary_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(FileError, match="not a text file"):
        load_workflow(path)


def test_editor_form_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(WorkflowError) as caught:
        load_workflow(write(tmp_path, "ui.json", {"nodes": [], "links": [], "version": 0.4}))
    assert "export it in API form" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        pytest.param([], "expected a JSON object of nodes by id, got list", id="list"),
        pytest.param({}, "the workflow has no nodes", id="empty"),
        pytest.param({"1": 3}, "'1': expected a node object, got int", id="number"),
        pytest.param({"1": {"inputs": {}}}, "'1': the node has no \"class_type\"", id="no-class"),
        pytest.param({"1": {"class_type": "A", "inputs": []}}, "'1': \"inputs\" is not an object", id="inputs"),
    ],
)
def test_wrong_shapes_are_refused(data: object, text: str) -> None:
    with pytest.raises(WorkflowError) as caught:
        parse_workflow(data)
    assert text in str(caught.value)


def test_all_wrong_entries_are_listed() -> None:
    with pytest.raises(WorkflowError) as caught:
        parse_workflow({"1": 3, "2": {}, "3": {"class_type": "A"}})
    assert "(2 such entries)" in str(caught.value).splitlines()[0]
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("title", "text"),
    [("My 'x'\n", "node 12 \"My 'x'\\n\" (KSampler)"), ("", "node 12 (KSampler)"), ("KSampler", "node 12 (KSampler)")],
    ids=["titled", "untitled", "default-title"],
)
def test_place_as_text(title: str, text: str) -> None:
    assert str(NodePlace("12", title, "KSampler")) == text


# --- overrides ---


@pytest.mark.parametrize(
    ("override", "node_id", "name", "value"),
    [
        pytest.param("3.steps=20", "3", "steps", 20, id="by-id"),
        pytest.param("FLUX.1.steps=20", "3", "steps", 20, id="by-title-with-a-dot"),
        pytest.param("Sampler.steps=20", "3", "steps", 20, id="by-class"),
        pytest.param("FLUX.1.model.strength=0.5", "3", "model.strength", 0.5, id="input-with-a-dot"),
        pytest.param("3.steps=20.0", "3", "steps", 20, id="int-from-integral-float"),
        pytest.param("3.cfg=7", "3", "cfg", 7.0, id="float-from-int"),
        pytest.param("3.preview=True", "3", "preview", True, id="bool-python-spelling"),
        pytest.param("3.preview=0", "3", "preview", False, id="bool-from-0"),
        pytest.param("3.text=4", "3", "text", "4", id="string-stays-string"),
        pytest.param("3.text=4.50", "3", "text", "4.50", id="string-keeps-its-spelling"),
        pytest.param("3.text=true", "3", "text", "true", id="string-true"),
        pytest.param('3.text=["4", 0]', "3", "text", '["4", 0]', id="string-that-looks-like-a-link"),
        pytest.param('3.text="a = b"', "3", "text", "a = b", id="json-string"),
        pytest.param("3.text=a=b.c=d", "3", "text", "a=b.c=d", id="equals-and-dots-in-value"),
        pytest.param("3.text=", "3", "text", "", id="empty"),
        pytest.param("3.sampler=4", "3", "sampler", "4", id="combo-stays-string"),
        pytest.param("3.sampler=nope", "3", "sampler", "nope", id="combo-left-to-validation"),
        pytest.param("3.size=1024", "3", "size", 1024, id="combo-of-ints"),
        pytest.param('3.model=["4", 1]', "3", "model", ["4", 1], id="link"),
        pytest.param("4.name=7", "4", "name", "7", id="no-class-literal-string"),
        pytest.param("4.rate=7.5", "4", "rate", 7.5, id="no-class-literal-number"),
        pytest.param("4.on=false", "4", "on", False, id="no-class-literal-bool"),
        pytest.param("Positive.text=z", "5", "text", "z", id="title-of-a-shared-class"),
    ],
)
def test_override(prompt: Prompt, override: str, node_id: str, name: str, value: object) -> None:
    changed = apply_overrides(prompt, [override], CLASSES)
    got = changed.nodes[node_id].inputs[name]
    assert got == value
    assert type(got) is type(value)
    assert prompt.to_json() == GRAPH  # the original is untouched


def test_overrides_apply_in_order(prompt: Prompt) -> None:
    assert apply_overrides(prompt, ["3.steps=1", "3.steps=2"], CLASSES).nodes["3"].inputs["steps"] == 2


@pytest.mark.parametrize(
    ("override", "texts"),
    [
        pytest.param("3.steps", ["expected NODE.INPUT=VALUE"], id="no-equals"),
        pytest.param("steps=3", ["expected NODE.INPUT=VALUE"], id="no-dot"),
        pytest.param("Positve.text=z", ["no node 'Positve'", "Did you mean Positive", "node 4 (Loader)"], id="unknown"),
        pytest.param("Encode.text=z", ["names 2 nodes", "node 5 'Positive'", "node 6 'Negative'"], id="class-twice"),
        pytest.param("Same.x=1", ["names 2 nodes", "node 7 'Same' (Save)", "node 8 'Same' (Show)"], id="title-twice"),
        pytest.param("3.step=1", ["no input 'step'", "Did you mean steps", "Its inputs: steps, cfg"], id="input"),
        pytest.param("3.unique_id=1", ["no input 'unique_id'"], id="hidden-input"),
        pytest.param("4.nam=1", ["no input 'nam'", "Did you mean name"], id="input-no-class"),
        pytest.param("3.steps=4.5", ["node 3 'FLUX.1' (Sampler).steps: expected INT, got '4.5'"], id="int-float"),
        pytest.param("3.steps=true", ["expected INT, got 'true'"], id="int-bool"),
        pytest.param("3.cfg=high", ["expected FLOAT, got 'high'"], id="float-text"),
        pytest.param("3.preview=maybe", ["expected BOOLEAN, got 'maybe'"], id="bool-text"),
        pytest.param("4.rate=x", ["expected NUMBER, got 'x'"], id="no-class-number"),
    ],
)
def test_override_errors(prompt: Prompt, override: str, texts: list[str]) -> None:
    with pytest.raises(WorkflowError) as caught:
        apply_overrides(prompt, [override], CLASSES)
    for text in texts:
        assert text in str(caught.value)
    assert repr(override) in str(caught.value).splitlines()[0]


@pytest.mark.parametrize("depth", [600, 100_000])
def test_deep_nesting_is_refused(tmp_path: Path, depth: int) -> None:
    path = tmp_path / "deep.json"
    value = "[" * depth + "]" * depth
    path.write_text(f'{{"1": {{"class_type": "A", "inputs": {{"x": {value}}}}}}}')
    with pytest.raises(WorkflowError, match=r"deep\.json.* too deeply nested"):
        load_workflow(path)


def test_a_number_of_too_many_digits_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "long.json"
    path.write_text(f'{{"1": {"9" * 5000}}}')
    with pytest.raises(WorkflowError, match=r"long\.json: the JSON cannot be read"):
        load_workflow(path)
