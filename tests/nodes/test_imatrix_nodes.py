"""RecordImatrix and SaveImatrix in the embedded host."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from quantwire.hosts.standalone.core_nodes import CORE_NODES
from quantwire.hosts.standalone.executor import Executor
from quantwire.nodes import NODE_CLASS_MAPPINGS
from quantwire.quantizers.errors import FileError, WorkflowError
from quantwire.quantizers.files.calibration import read_calibration
from quantwire.quantizers.files.imatrix import Imatrix, read_imatrix
from safetensors import safe_open

WORKFLOW = Path(__file__).resolve().parents[2] / "workflows" / "api" / "full_precision.json"
pytestmark = pytest.mark.usefixtures("host")


def graph(**save: Any) -> dict[str, Any]:
    nodes = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    nodes["2"] = {"class_type": "RecordImatrix", "inputs": {"model": ["1", 0]}}
    nodes["11"]["inputs"] |= {"model": ["2", 0], "steps": 2}
    inputs = {"imatrix": ["2", 1], "after": ["11", 0], "filename": "matrices/a", "if_exists": "add to it", **save}
    nodes["3"] = {"class_type": "SaveImatrix", "inputs": inputs}
    return nodes


def run(nodes: dict[str, Any], executor: Executor | None = None) -> dict[str, Any]:
    executor = executor or Executor({**CORE_NODES, **NODE_CLASS_MAPPINGS})
    return executor.run(nodes).outputs


def written(folder: Path) -> Imatrix:
    return read_imatrix(folder / "out" / "matrices" / "a.gguf")


def test_one_run(tmp_path: Path) -> None:
    said = run(graph())["3"]["text"][0]
    assert said.startswith("33 weights, 2 model calls, 2 to 64 inputs of a layer\n")
    assert written(tmp_path).chunk_count == 2


def test_runs_add_up_though_the_executor_caches(tmp_path: Path) -> None:
    executor = Executor({**CORE_NODES, **NODE_CLASS_MAPPINGS})
    run(graph(), executor)
    once = written(tmp_path)
    run(graph(), executor)
    twice = written(tmp_path)
    assert all(torch.equal(s.squares, 2 * once.entries[n].squares) for n, s in twice.entries.items())
    run(graph(if_exists="replace it"), executor)
    assert all(torch.equal(s.squares, once.entries[n].squares) for n, s in written(tmp_path).entries.items())


def test_the_recording_follows_the_model_through_other_nodes(tmp_path: Path) -> None:
    nodes = graph()
    nodes["4q"] = {"class_type": "QuantizeModel", "inputs": {"model": ["2", 0], "format": "gguf-q8-0"}}
    nodes["11"]["inputs"]["model"] = ["4q", 0]
    run(nodes)
    assert len(written(tmp_path).entries) == 33


def test_the_input_model_records_nothing(tmp_path: Path) -> None:
    nodes = graph()
    nodes["11"]["inputs"]["model"] = ["1", 0]
    with pytest.raises(WorkflowError, match=r"^Nothing was recorded"):
        run(nodes)
    assert not (tmp_path / "out" / "matrices").exists()


@pytest.mark.parametrize("name", ["../a", "/tmp/a", "x/../../a"])
def test_names_that_lead_outside(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileError, match="leads out of the output folder"):
        run(graph(filename=name))
    assert not list(tmp_path.rglob("*.gguf"))


def test_a_file_of_another_kind_is_not_added_to(tmp_path: Path) -> None:
    path = tmp_path / "out" / "matrices" / "a.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"something else")
    with pytest.raises(FileError, match="not an importance matrix"):
        run(graph())
    assert path.read_bytes() == b"something else"


def test_the_same_recording_makes_a_calibration(tmp_path: Path) -> None:
    nodes = graph()
    inputs = {"imatrix": ["2", 1], "after": ["11", 0], "filename": "scales/a", "if_exists": "add to it"}
    nodes["4c"] = {"class_type": "SaveCalibration", "inputs": inputs}
    said = run(nodes)["4c"]["text"][0]
    found = read_calibration(tmp_path / "out" / "scales" / "a.json")
    assert len(found.layers) == len(written(tmp_path).entries) == 33
    assert said.startswith("33 weights, 2 model calls; largest inputs: ")
    before = {name: x.amax for name, x in found.layers.items()}
    nodes["4c"]["inputs"]["if_exists"] = "replace it"
    run(nodes)
    assert {n: x.amax for n, x in read_calibration(tmp_path / "out/scales/a.json").layers.items()} == before


def test_a_calibration_goes_into_the_converted_file(tmp_path: Path, demo_models: Path) -> None:
    folder = tmp_path / "models" / "diffusion_models"
    folder.mkdir(parents=True)
    shutil.copy(demo_models / "diffusion_models" / "digits_flux.safetensors", folder / "copy.safetensors")
    nodes = graph()
    inputs = {"imatrix": ["2", 1], "after": ["11", 0], "filename": "scales/a", "if_exists": "add to it"}
    nodes["4c"] = {"class_type": "SaveCalibration", "inputs": inputs}
    convert = {"model_name": "diffusion_models/copy.safetensors", "type": "comfy-fp8-e4m3fn"}
    convert |= {"output_name": "calibrated.safetensors", "calibration_name": ["4c", 0]}
    nodes["5c"] = {"class_type": "ConvertModel", "inputs": convert}
    run(nodes)
    found = read_calibration(tmp_path / "out" / "scales" / "a.json")
    with safe_open(folder / "calibrated.safetensors", "pt") as file:
        scales = {n: float(file.get_tensor(n)) for n in file.keys() if n.endswith("input_scale")}  # noqa: SIM118
    assert scales
    for name, scale in scales.items():
        assert scale == pytest.approx(found.layers[name.replace("input_scale", "weight")].amax / 448, rel=1e-6)
