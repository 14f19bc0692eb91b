"""RepairModel in a graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quantwire.hosts.standalone.executor import Executor
from quantwire.hosts.standalone.validate import InvalidWorkflow
from quantwire.nodes.repair import RepairModel
from quantwire.quantizers.errors import FileError
from quantwire.quantizers.files.doctor import diagnose
from safetensors.torch import save_file

NAME = "diffusion_models/sub/a.safetensors"


@pytest.fixture
def broken(host: Any, tmp_path: Path) -> Path:
    path = tmp_path / "models" / NAME
    path.parent.mkdir(parents=True)
    fp8 = torch.ones(32, 64).to(torch.float8_e4m3fn)
    save_file({"a.weight": fp8, "a.weight_scale": torch.tensor(2.0)}, path, {"format": "pt"})
    return path


@pytest.fixture
def run(executor: Executor, make_node: Any) -> Any:
    def run(**inputs: Any) -> tuple[dict[str, Any], str]:
        graph = {"r": make_node("RepairModel", **inputs), "name": make_node("Keep", value=["r", 0])}
        result = executor.run(graph)
        return result.outputs["r"]["report"][0], result.results["name"][0]

    return run


def test_a_repaired_copy(run: Any, broken: Path) -> None:
    before = RepairModel.IS_CHANGED(NAME)
    report, name = run(model_name=NAME)
    assert name == "sub/a-repaired.safetensors"
    assert [f["code"] for f in report["before"]["findings"]] == ["comfy-quant-missing"]
    assert report["after"]["findings"] == []
    assert diagnose(broken.with_name("a-repaired.safetensors")).findings == ()
    copy = broken.with_name("a-repaired.safetensors")
    assert before == RepairModel.IS_CHANGED(NAME), "that it came to be is no reason to make it again"
    state = copy.stat()
    assert run(model_name=NAME, output_name=" ")[1] == name  # runs again, and takes what is there
    assert copy.stat() == state
    copy.write_bytes(b"else")
    assert before != RepairModel.IS_CHANGED(NAME)
    with pytest.raises(FileError, match=r"is there already.\nSet overwrite"):
        RepairModel().repair(NAME)
    _, name = run(model_name=NAME, overwrite=True, output_name="other.safetensors")
    assert name == "other.safetensors"


def test_only_check_writes_nothing(run: Any, broken: Path) -> None:
    report, name = run(model_name=NAME, only_check=True)
    assert name == "sub/a.safetensors"
    assert report["findings"][0]["severity"] == "error"
    assert [p.name for p in broken.parent.iterdir()] == ["a.safetensors"]


def test_a_sound_file_stays_alone(run: Any, host: Any) -> None:
    report, name = run(model_name="diffusion_models/digits_flux.safetensors")
    assert name == "digits_flux.safetensors"
    assert not [f for f in report["findings"] if f["severity"] == "error"]


@pytest.mark.parametrize("output", ["../x.safetensors", "/tmp/x.safetensors", ".."])
def test_names_that_lead_out_of_the_folder(broken: Path, output: str) -> None:
    with pytest.raises(FileError, match="not a name in the model folder"):
        RepairModel().repair(NAME, output_name=output)


def test_never_in_place(broken: Path) -> None:
    content = broken.read_bytes()
    with pytest.raises(FileError, match="is read by this"):
        RepairModel().repair(NAME, output_name="sub/a.safetensors", overwrite=True)
    assert broken.read_bytes() == content


def test_names_that_are_none_of_the_list(host: Any, executor: Executor, make_node: Any) -> None:
    with pytest.raises(InvalidWorkflow, match="FOLDER/NAME"):
        executor.run({"r": make_node("RepairModel", model_name="etc/passwd")})
    assert RepairModel.VALIDATE_INPUTS(None) is True
