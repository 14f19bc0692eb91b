"""InspectModel in a graph."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from quantwire.hosts.standalone.executor import Executor
from quantwire.hosts.standalone.validate import InvalidWorkflow
from quantwire.nodes.inspect import InspectModel
from quantwire.quantizers.errors import FileError
from quantwire.quantizers.files.inspect import inspect

FLUX = "diffusion_models/digits_flux.safetensors"


@pytest.fixture
def shown(host: Any, executor: Executor, make_node: Any) -> Any:
    """shown(inputs) -> the report that reaches the editor, and the text that reaches the next node."""

    def run(**inputs: Any) -> tuple[dict[str, Any], str]:
        graph = {"i": make_node("InspectModel", **inputs), "text": make_node("Keep", value=["i", 1])}
        result = executor.run(graph)
        assert result.outputs["i"]["text"] == [result.results["text"][0]]
        return result.outputs["i"]["report"][0], result.results["text"][0]

    return run


def test_report_and_text(shown: Any, demo_models: Path) -> None:
    report, text = shown(model_name=FLUX)
    assert report["title"] == "FLUX.1 diffusion model, plain BF16"
    assert text == str(inspect(demo_models / FLUX))
    report, text = shown(model_name=FLUX, layers="*.qkv.weight")
    assert len(report["layers"]) == 4
    assert text.count("qkv.weight: BF16") == 4


@pytest.mark.parametrize("folder", ["vae/digits_tae", "text_encoders/digits_clip"])
def test_other_folders(shown: Any, folder: str) -> None:
    report, _ = shown(model_name=f"{folder}.safetensors")
    assert report["parts"][0]["component"] == {"vae": "VAE"}.get(folder.partition("/")[0], "text encoder")


def test_a_file_that_changes_is_read_again(host: Any, demo_models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models" / "diffusion_models"
    folder.mkdir(parents=True)
    path = Path(shutil.copy(demo_models / FLUX, folder / "a.safetensors"))
    before = InspectModel.IS_CHANGED("diffusion_models/a.safetensors")
    assert before == InspectModel.IS_CHANGED("diffusion_models/a.safetensors", layers="*")
    path.write_bytes(path.read_bytes()[:-1])
    assert before != InspectModel.IS_CHANGED("diffusion_models/a.safetensors")


def test_names_that_are_none_of_the_list(host: Any, executor: Executor, make_node: Any) -> None:
    with pytest.raises(InvalidWorkflow, match="FOLDER/NAME"):
        executor.run({"i": make_node("InspectModel", model_name="etc/passwd")})
    assert InspectModel.VALIDATE_INPUTS(None) is True
    with pytest.raises(FileError, match="FOLDER/NAME"):
        InspectModel().inspect("digits_flux.safetensors")
