"""The templates of published models: what they name, which of ComfyUI's nodes they show, and that they run here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from quantwire.cli import main
from quantwire.hosts.standalone import foreign_nodes, record_foreign
from quantwire.hosts.standalone.core_nodes import CORE_NODES
from quantwire.hosts.standalone.validate import IN_COMFYUI, validate
from quantwire.hosts.standalone.workflow import load_workflow
from quantwire.nodes import NODE_CLASS_MAPPINGS
from quantwire.quantizers.errors import WorkflowError
from quantwire.workflows import build, memory

FOLDER = Path(build.__file__).parent
TEMPLATES = {w.name: w for w in build.TEMPLATES}
OWN: dict[str, Any] = {**CORE_NODES, **NODE_CLASS_MAPPINGS}
ASKED = {
    *("flux_nf4", "flux_gguf_t5_gguf", "sd35_int8", "sdxl_int8_convrot", "wan_q4_k", "qwen_image_nvfp4"),
    *("convert_a_file", "compare_three_formats", "low_vram_offload_compat", "audio_int8"),
}
HERE = ("flux_nf4", "flux_gguf_t5_gguf", "convert_a_file", "compare_three_formats", "low_vram_offload_compat")
QUICK = ("flux_gguf_t5_gguf", "convert_a_file")


def api(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))


def note_of(name: str) -> str:
    graph = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return next(b["widgets_values"][0] for b in graph["nodes"] if b["type"] == "MarkdownNote")


def test_all_are_there() -> None:
    assert set(TEMPLATES) == ASKED


@pytest.mark.parametrize("name", TEMPLATES)
def test_note_lists_every_model_file_of_the_graph(name: str) -> None:
    """Every file name in the graph is in the note with the page that has it, and in the editor's download list."""
    used = {
        Path(v).name
        for node in api(name).values()
        for v in node["inputs"].values()
        if isinstance(v, str) and v.endswith((".safetensors", ".gguf"))
    }
    assert used
    assert {f.name for f in TEMPLATES[name].files} == used
    for file in TEMPLATES[name].files:
        assert file.line in note_of(name)
        assert re.fullmatch(r"https://huggingface\.co/[\w.-]+/[\w.-]+/resolve/main/([\w.-]+/)*[\w.-]+", file.url)


@pytest.mark.parametrize("name", TEMPLATES)
def test_note_says_where_it_runs(name: str) -> None:
    runs_here = all(node["class_type"] in OWN for node in api(name).values())
    foreign = any(node["inputs"].get("type") in ("qwen_image", "ace", "wan") for node in api(name).values())
    assert (name in HERE) == (runs_here and not foreign)
    assert (
        f"quantwire run workflows/api/{name}.json" in note_of(name)
        if name in HERE
        else "Runs in ComfyUI; " in note_of(name)
    )


@pytest.mark.parametrize("name", memory.CASES)
def test_note_has_the_forecast(name: str) -> None:
    assert memory.read()[name] in note_of(name)
    assert "`quantwire forecast`" in note_of(name)


@pytest.mark.slow
def test_forecasts_are_current() -> None:
    """Run `python -m quantwire.workflows.memory`, then `build`, after a change of forecasts."""
    assert memory.written() == memory.FILE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", TEMPLATES)
def test_lint_finds_absent_models_alone(name: str, tmp_path: Path) -> None:
    paths = [FOLDER / f"{name}.json", FOLDER / "api" / f"{name}.json"]
    report = tmp_path / "report.json"
    (tmp_path / "models").mkdir()
    main(["lint", *map(str, paths), "--models", str(tmp_path / "models"), "--json", str(report)])
    found = [f for each in json.loads(report.read_text())["files"] for f in each["findings"]]
    names = {file.name for file in TEMPLATES[name].files}
    assert found
    for f in found:
        assert f["code"] in ("missing-model", "bad-value"), f
        assert any(n in f["message"] for n in names), f


# --- ComfyUI's nodes that this host shows -------------------------------------------------------------------------


def test_foreign_nodes_are_those_that_the_templates_need() -> None:
    """Run `python -m quantwire.hosts.standalone.record_foreign URL` after a change of the templates."""
    assert set(foreign_nodes.definitions()) == record_foreign.wanted_nodes()
    assert not set(foreign_nodes.definitions()) & set(OWN)


def test_foreign_entries_have_what_the_editor_reads() -> None:
    for name, entry in foreign_nodes.definitions().items():
        assert entry["name"] == name
        assert entry["category"].startswith("ComfyUI only/")
        assert "run this workflow in ComfyUI" in entry["description"]
        assert {g: list(specs) for g, specs in entry["input"].items()} == entry["input_order"]
        assert len(entry["output"]) == len(entry["output_name"]) == len(entry["output_is_list"])
    outputs = {n for n, e in foreign_nodes.definitions().items() if e["output_node"]}
    assert outputs == {"SaveVideo", "SaveAudioAdvanced"}


def test_foreign_entries_hold_no_sentence_of_comfyui() -> None:
    text = foreign_nodes.DATA.read_text(encoding="utf-8")
    for word in record_foreign.SENTENCES:
        assert f'"{word}"' not in text
    strings = re.findall(r'"([^"]*)"', text)
    assert max(len(s.split()) for s in strings) <= 6  # display names


def test_foreign_lists_of_files_are_those_of_the_host() -> None:
    asked: list[str] = []

    def list_files(folder: str) -> list[str]:
        asked.append(folder)
        return [f"a file of {folder}"]

    filled = foreign_nodes.definitions(list_files)
    assert sorted(set(asked)) == ["checkpoints", "text_encoders"]
    assert filled["CheckpointLoaderSimple"]["input"]["required"]["ckpt_name"][0] == ["a file of checkpoints"]
    (kind, options) = filled["TripleCLIPLoader"]["input"]["required"]["clip_name3"]
    assert (kind, options["options"]) == ("COMBO", ["a file of text_encoders"])
    assert "folder" not in options
    assert foreign_nodes.definitions()["CheckpointLoaderSimple"]["input"]["required"]["ckpt_name"][0] == []


def test_recording_leaves_sentences_out_and_finds_folders() -> None:
    node = {
        "name": "Loader",
        "display_name": "Load it",
        "category": "loaders",
        "python_module": "nodes",
        "description": "Loads.",
        "input": {
            "required": {
                "file": [["quantwire-lint-vae.safetensors", "quantwire-lint-vae.yaml"], {"tooltip": "A file."}],
                "how": ["COMBO", {"options": ["a", "b"], "tooltip": "How."}],
            }
        },
        "output": ["VAE"],
        "output_name": ["VAE"],
        "output_is_list": [False],
        "output_node": False,
    }
    recorded = record_foreign.record({"Loader": node}, {"Loader"})["Loader"]
    assert recorded == {
        "category": "loaders",
        "module": "nodes",
        "input": {"required": {"file": [{"folder": "vae"}], "how": ["COMBO", {"options": ["a", "b"]}]}},
        "output": ["VAE"],
        "display_name": "Load it",
    }
    with pytest.raises(WorkflowError, match="no node Other"):
        record_foreign.record({"Loader": node}, {"Other"})
    with pytest.raises(WorkflowError, match="lists"):
        record_foreign.record({"Loader": {**node, "output_is_list": [True]}}, {"Loader"})


@pytest.mark.parametrize("name", sorted(set(TEMPLATES) - set(HERE)))
def test_a_template_of_comfyui_is_refused_by_the_names_of_its_nodes(name: str) -> None:
    problems = validate(load_workflow(FOLDER / "api" / f"{name}.json"), OWN)
    missing = [p for p in problems if p.kind == "missing_node_type"]
    foreign = {n["class_type"] for n in api(name).values()} - set(OWN)
    assert {p.class_type for p in missing} == foreign != set()
    for problem in missing:
        assert repr(problem.class_type) in problem.message
        assert IN_COMFYUI in problem.message


# --- those that run here -------------------------------------------------------------------------------------------

SMALL = {
    "flux1-dev.safetensors": "digits_flux.safetensors",
    "flux1-schnell.safetensors": "digits_flux.safetensors",
    "ae.safetensors": "digits_tae.safetensors",
    "flux1-dev-Q4_K_S.gguf": "digits_flux-Q4_K_S.gguf",
}


def on_the_demo(name: str) -> dict[str, Any]:
    """The template on the demo's files, 64 pixels and two steps; the demo has one text encoder where FLUX has two."""
    graph = api(name)
    for node in graph.values():
        inputs = node["inputs"]
        for key, value in inputs.items():
            if isinstance(value, str) and Path(value).name in SMALL:
                inputs[key] = value.replace(Path(value).name, SMALL[Path(value).name])
        inputs |= {k: 64 for k in ("width", "height") if k in inputs} | {k: 2 for k in ("steps",) if k in inputs}
        if node["class_type"] in ("DualCLIPLoader", "LoadGGUFTextEncoder"):
            node["class_type"] = "CLIPLoader"
            node["inputs"] = {"clip_name": "digits_clip.safetensors", "type": "stable_diffusion"}
        if node["class_type"] == "QuantizeTextEncoder":
            inputs["encoders"] = "all"
    return graph


@pytest.fixture(scope="module")
def gguf_models(demo_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    source = demo_models / "diffusion_models" / "digits_flux.safetensors"
    target = folder / "diffusion_models" / "digits_flux-Q4_K_S.gguf"
    assert main(["convert", str(source), str(target), "--type", "Q4_K_S"]) == 0
    return folder


PICTURES = {"flux_nf4": 1, "flux_gguf_t5_gguf": 1, "convert_a_file": 0, "compare_three_formats": 7}
PICTURES["low_vram_offload_compat"] = 2


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in HERE])
def test_template_runs_on_the_demo_model(
    name: str, gguf_models: Path, demo_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTWIRE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "workflow.json"
    path.write_text(json.dumps(on_the_demo(name)), encoding="utf-8")
    folders = ["--models", str(gguf_models), "--models", str(demo_models)]
    assert main(["run", str(path), *folders, "--out", str(tmp_path / "out")]) == 0
    files = sorted((tmp_path / "out").rglob("*.png"))
    assert len(files) == PICTURES[name]
    for file in files:
        with Image.open(file) as image:
            assert image.convert("L").getextrema()[1] > 0
