"""`quantwire forecast` on files and workflows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from quantwire.cli import main
from quantwire.hosts.standalone.workflow import read_json
from quantwire.quantizers.measure.parts import parts_of_file
from quantwire.quantizers.rules import parse_rules
from quantwire.quantizers.spec import QuantSpec

ROOT = Path(__file__).resolve().parents[2]
API = ROOT / "workflows" / "api"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], demo_models: Path) -> Any:
    """run(arguments) -> (exit code, standard output, standard error)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main(["forecast", *map(str, arguments)])
        told = capsys.readouterr()
        return code, told.out, told.err

    return call


def forecasts(told: str) -> list[Any]:
    return json.loads(told)["forecasts"]


def test_file(run: Any, demo_models: Path) -> None:
    path = demo_models / "diffusion_models" / "digits_flux.safetensors"
    code, out, _ = run(path, "--format", "gguf-q8-0", "--vram", "8GB", "--resolution", "512x256", "--json")
    assert code == 0
    found = forecasts(out)
    assert [f["host"] for f in found] == ["standalone", "comfyui"]
    assert found[0]["shape"]["width"] == 512
    assert found[0]["shape"]["height"] == 256
    assert found[0]["device"]["total_nbytes"] == 8 * 2**30
    assert found[0]["parts"][0]["format"] == "gguf-q8-0"
    assert found[0]["parts"][0]["nbytes"] < found[0]["parts"][0]["full_nbytes"]


@pytest.mark.parametrize("path", [API / "quantized.json", ROOT / "workflows" / "quantized.json"])
def test_workflow_in_both_forms(run: Any, demo_models: Path, path: Path) -> None:
    code, out, _ = run(path, "--vram", "8", "--models", demo_models, "--json")
    assert code == 0
    (found,) = forecasts(out)
    assert "KSampler" in found["node"]
    assert {p["role"]: p["format"] for p in found["parts"]} == {
        "diffusion model": "bnb-nf4",
        "text encoder": None,
        "VAE": None,
    }
    assert found["shape"]["width"] == 64
    assert not any(p["assumed"] for p in found["parts"])


def test_each_model_of_a_workflow(run: Any, demo_models: Path) -> None:
    _, out, _ = run(API / "side_by_side.json", "--vram", "8", "--models", demo_models, "--json")
    found = forecasts(out)
    assert sorted(str(f["parts"][0]["format"]) for f in found) == ["None", "bnb-nf4"]


def test_rules_config_and_layers_of_a_workflow(run: Any, demo_models: Path, tmp_path: Path) -> None:
    graph = read_json(API / "quantized.json")
    graph["20"] = {"class_type": "QuantRules", "inputs": {"rules": "double_blocks.* = gguf-q4-0"}}
    quantize = next(n for n in graph.values() if n["class_type"] == "QuantizeModel")
    quantize["inputs"] |= {"format": "gguf-q8-0", "config": ["20", 0], "keep_layers": "single_blocks.0.*"}
    told = run(_written(tmp_path, graph), "--vram", "8", "--models", demo_models, "--json")[1]
    found = forecasts(told)[0]["parts"][0]
    (part,) = parts_of_file(demo_models / "diffusion_models" / "digits_flux.safetensors")
    rules = parse_rules("double_blocks.* = gguf-q4-0")
    spec = QuantSpec("gguf-q8-0", exclude=("single_blocks.0.*",), rules=rules)
    assert found["format"] == "gguf-q8-0"
    assert found["nbytes"] == part.nbytes(spec) != part.nbytes(QuantSpec("gguf-q8-0"))


def _written(folder: Path, graph: Any) -> Path:
    path = folder / "w.json"
    path.write_text(json.dumps(graph), encoding="utf-8")
    return path


def test_size_from_a_link_is_asked_for(run: Any, demo_models: Path, tmp_path: Path) -> None:
    graph = read_json(API / "full_precision.json")
    latent = next(n for n in graph.values() if n["class_type"] == "EmptySD3LatentImage")
    latent["class_type"] = "SomebodysLatent"
    latent["inputs"] = {}
    path = _written(tmp_path, graph)
    code, _, err = run(path, "--vram", "8", "--models", demo_models)
    assert code == 2
    assert "--resolution" in err
    assert run(path, "--vram", "8", "--models", demo_models, "--resolution", "64")[0] == 0


def test_picture(run: Any, demo_models: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = demo_models / "diffusion_models" / "digits_flux.safetensors"
    plot, report = tmp_path / "bars.png", tmp_path / "report.json"
    code, out, _ = run(path, "--vram", "8", "--host", "comfyui", "--plot", plot, "--json", report)
    assert code == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert str(plot) in out
    assert json.loads(report.read_text())["plots"] == [str(plot)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gone.safetensors"], "is not there"),
        (["FILE", "--vram", "much"], "is no size"),
        (["FILE", "--vram", "8", "--resolution", "4x4"], "no size of an image"),
        (["FILE", "--vram", "8", "--device", "tpu"], "is no device"),
        (["FILE", "--device", "cuda:8.6"], "--vram"),
        (["FILE", "--vram", "8", "--format", "nf4"], "nf4"),
        (["FILE", "--vram", "8", "--rules", "x"], "--format"),
        (["FILE", "--vram", "8", "--vae", "FILE"], "not a VAE"),
    ],
)
def test_wrong_arguments(run: Any, demo_models: Path, arguments: list[str], said: str) -> None:
    file = str(demo_models / "diffusion_models" / "digits_flux.safetensors")
    code, _, err = run(*(file if a == "FILE" else a for a in arguments))
    assert code == 2
    assert said in err
