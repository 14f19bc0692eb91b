"""`quantwire calibrate`: what is recorded is the largest input of each layer, and a scale follows from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from quantwire.cli import main
from quantwire.hosts.record import Recorder
from quantwire.quantizers.errors import FileError
from quantwire.quantizers.files.calibration import (
    Calibration,
    Inputs,
    merge,
    read_calibration,
    write_calibration,
)
from torch import nn

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows" / "api"
QKV = "double_blocks.0.img_attn.qkv.weight"


@pytest.fixture(scope="module")
def workflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    graph = json.loads((WORKFLOWS / "full_precision.json").read_text())
    graph["11"]["inputs"]["steps"] = 2
    path = tmp_path_factory.mktemp("workflow") / "two_steps.json"
    path.write_text(json.dumps(graph), encoding="utf-8")
    return path


def calibrate(workflow: Path, models: Path, out: Path, *more: str) -> int:
    return main(["calibrate", str(workflow), "--out", str(out), "--models", str(models), *more])


def test_a_run_is_recorded_and_merged(
    tmp_path: Path, workflow: Path, demo_models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.json"
    assert calibrate(workflow, demo_models, out) == 0
    found = read_calibration(out)
    assert len(found.layers) == 33
    assert found.calls == 2
    assert found.layers[QKV].columns == 256
    assert all(x.amax > 0 and x.rows >= 2 for x in found.layers.values())
    assert "33 weights, 2 model calls; largest inputs: " in capsys.readouterr().out
    assert calibrate(workflow, demo_models, out) == 2
    assert "is there already" in capsys.readouterr().err
    assert calibrate(workflow, demo_models, out, "--merge", str(out)) == 0
    again = read_calibration(out)
    assert {n: x.amax for n, x in again.layers.items()} == {n: x.amax for n, x in found.layers.items()}
    assert again.calls == 4
    assert again.layers[QKV].rows == 2 * found.layers[QKV].rows


def test_the_largest_input_is_exact() -> None:
    layer, recorder = nn.Linear(300, 8), Recorder()
    inputs = [torch.randn(1000, 300) * scale for scale in (1.0, 3.0, 2.0)]
    with recorder.watch(layer, {"a.weight": layer}):
        for x in inputs:
            layer(x)
    found = recorder.calibration("test").layers["a.weight"]
    assert found.amax == pytest.approx(max(float(x.abs().max()) for x in inputs), rel=1e-7)
    assert (found.rows, found.columns) == (3000, 300)


@pytest.mark.parametrize("format_id", ["comfy-fp8-e4m3fn", "comfy-fp8-e5m2", "comfy-nvfp4"])
def test_the_scale_is_the_one_that_comfy_kitchen_finds(format_id: str) -> None:
    kitchen = pytest.importorskip("comfy_kitchen.tensor", reason="comfy-kitchen is not installed")
    layout, key = {
        "comfy-fp8-e4m3fn": ("TensorCoreFP8Layout", {"dtype": torch.float8_e4m3fn}),
        "comfy-fp8-e5m2": ("TensorCoreFP8Layout", {"dtype": torch.float8_e5m2}),
        "comfy-nvfp4": ("TensorCoreNVFP4Layout", {}),
    }[format_id]
    x = torch.randn(32, 64)
    _, params = getattr(kitchen, layout).quantize(x, **key)
    found = Calibration({"a": Inputs(float(x.abs().max()), 32, 64)})
    scale = found.input_scale("a", format_id)
    assert scale is not None
    assert torch.tensor(scale, dtype=torch.float32) == params.scale


def test_what_has_no_scale() -> None:
    found = Calibration({"a": Inputs(2.0, 1, 4), "zero": Inputs(0.0, 1, 4)})
    assert found.input_scale("a", "comfy-int8") is None
    assert found.input_scale("b", "comfy-nvfp4") is None
    assert found.input_scale("zero", "comfy-nvfp4") is None


def test_other_models_do_not_merge() -> None:
    with pytest.raises(FileError, match=r"'a': 4 columns in one calibration, 8 in another"):
        merge([Calibration({"a": Inputs(2.0, 1, 4)}), Calibration({"a": Inputs(2.0, 1, 8)})])


def layer(fields: str) -> str:
    return f'{{"quantwire_calibration": 1, "runs": [], "calls": 1, "layers": {{"a": {fields}}}}}'


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[]", "not a calibration of version 1"),
        ('{"quantwire_calibration": 2}', "not a calibration of version 1"),
        ('{"quantwire_calibration": 1}', "corrupt calibration: KeyError"),
        (layer('{"amax": NaN, "rows": 1, "columns": 1}'), "corrupt calibration: ValueError: amax nan"),
        (layer("3"), "corrupt calibration: TypeError"),
    ],
)
def test_what_is_no_calibration(tmp_path: Path, text: str, error: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(FileError, match=error):
        read_calibration(path)


def test_a_file_that_is_none_is_not_replaced(
    tmp_path: Path, workflow: Path, demo_models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "workflow.json"
    out.write_text("{}", encoding="utf-8")
    assert calibrate(workflow, demo_models, out, "--overwrite") == 2
    assert "no calibration that could be replaced" in capsys.readouterr().err
    assert out.read_text(encoding="utf-8") == "{}"
    assert calibrate(workflow, demo_models, tmp_path / "a.gguf") == 2


def test_written_and_read(tmp_path: Path) -> None:
    found = Calibration({"a.weight": Inputs(1.5, 7, 4)}, ("x.json --set A.b=c",), 3)
    write_calibration(tmp_path / "a.json", found)
    assert read_calibration(tmp_path / "a.json") == found
