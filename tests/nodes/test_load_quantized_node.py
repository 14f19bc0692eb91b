"""LoadQuantized in a graph: names of the list, parts, folders, the report, and files that are not there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from quantwire.hosts.lint.lint import Linter, Options
from quantwire.hosts.standalone.executor import Executor
from quantwire.hosts.standalone.validate import InvalidWorkflow
from quantwire.nodes import NODE_CLASS_MAPPINGS
from quantwire.nodes.load_quantized import LoadQuantized
from quantwire.quantizers.apply import quantize_tensor
from quantwire.quantizers.compat.modes import HostName, OffloadMode
from quantwire.quantizers.errors import FileError
from quantwire.quantizers.files.checkpoint import read_safetensors
from quantwire.quantizers.files.writers import writer_for
from quantwire.quantizers.spec import QuantSpec
from safetensors.torch import save_file
from torch import Tensor

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows" / "api"


@pytest.fixture(scope="module")
def quantized(demo_models: Path) -> dict[str, Tensor]:
    """The demo model with the matrices of its blocks in NF4, as bitsandbytes lays them out."""
    tensors: Any = read_safetensors(demo_models / "diffusion_models" / "digits_flux.safetensors").tensors
    writer, found = writer_for("bnb-nf4"), dict[str, Tensor]()
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and "blocks." in name and "mod" not in name:
            found |= writer.tensors(name, quantize_tensor(name, tensor, QuantSpec("bnb-nf4"))[0])
        else:
            found[name] = tensor.clone()
    return found


@pytest.fixture
def models(host: Any, tmp_path: Path) -> Path:
    for name in ("diffusion_models", "checkpoints"):
        (tmp_path / "models" / name).mkdir(parents=True)
    return tmp_path / "models"


def test_samples_and_reports(
    executor: Executor, sampled: Any, make_node: Any, models: Path, quantized: dict[str, Tensor]
) -> None:
    save_file(quantized, str(models / "diffusion_models" / "demo-nf4.safetensors"))
    graph = sampled("load", load=make_node("LoadQuantized", model_name="demo-nf4.safetensors", carrier="quantwire"))
    result = executor.run(graph)
    assert torch.isfinite(result.results["image"][0]).all()
    shown = result.outputs["load"]
    assert "bnb-nf4" in shown["text"][0]
    report = shown["report"][0]
    assert report["format_id"] == "bnb-nf4"
    assert sum(e["action"] == "quantize" for e in report["entries"]) > 18  # fused ones are several layers here


def test_checkpoints_are_in_the_list_and_give_their_model(
    executor: Executor, make_node: Any, models: Path, quantized: dict[str, Tensor]
) -> None:
    whole = {f"model.diffusion_model.{name}": t for name, t in quantized.items()}
    whole["first_stage_model.decoder.conv_in.weight"] = torch.zeros(4, 4, 3, 3)
    save_file(whole, str(models / "checkpoints" / "whole.safetensors"))
    names = LoadQuantized.INPUT_TYPES()["required"]["model_name"][0]
    assert {"whole.safetensors", "digits_flux.safetensors"} <= set(names)
    graph = {"load": make_node("LoadQuantized", model_name="whole.safetensors")}
    report = executor.run(graph | {"keep": make_node("Keep", value=["load", 0])}).outputs["load"]["report"][0]
    assert any("1 tensors of other parts (first_stage_model" in note for note in report["notes"])


def test_any_part_gives_the_whole_model(
    executor: Executor, make_node: Any, models: Path, quantized: dict[str, Tensor]
) -> None:
    names, stem = sorted(quantized), "model"
    parts = {f"{stem}-0000{i}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
    for part, held in parts.items():
        save_file({name: quantized[name] for name in held}, str(models / "diffusion_models" / part))
    where = {name: part for part, held in parts.items() for name in held}
    index = models / "diffusion_models" / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    for part in parts:
        graph = {"load": make_node("LoadQuantized", model_name=part)}
        result = executor.run(graph | {"keep": make_node("Keep", value=["load", 0])})
        assert result.outputs["load"]["report"][0]["format_id"] == "bnb-nf4"
    before = LoadQuantized.IS_CHANGED(next(iter(parts)))
    other = models / "diffusion_models" / list(parts)[1]
    os.utime(other, ns=(1, 1))
    assert LoadQuantized.IS_CHANGED(next(iter(parts))) != before
    index.unlink()
    with pytest.raises(FileError, match="one of 2 parts of a model"):
        LoadQuantized().load(next(iter(parts)))


def test_a_folder_is_known_by_its_weights(models: Path, quantized: dict[str, Tensor]) -> None:
    """What stands in the JSON files beside the weights decides too, so they count as changes."""
    folder = models / "diffusion_models" / "demo"
    folder.mkdir()
    save_file(quantized, str(folder / "diffusion_pytorch_model.safetensors"))
    (folder / "config.json").write_text("{}")
    name = "demo/diffusion_pytorch_model.safetensors"
    assert LoadQuantized.VALIDATE_INPUTS(name) is True
    before = LoadQuantized.IS_CHANGED(name)
    assert LoadQuantized.load(LoadQuantized(), name)["result"][1].title == "demo"
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "bitsandbytes"}}')
    assert LoadQuantized.IS_CHANGED(name) != before


def test_missing_files_are_named_before_the_run(executor: Executor, make_node: Any, host: Any) -> None:
    graph = {"load": make_node("LoadQuantized", model_name="digits_flux.safetensor")}
    with pytest.raises(
        InvalidWorkflow, match=r"'digits_flux.safetensor' is not in the folders diffusion_models and checkpoints"
    ):
        executor.run(graph | {"keep": make_node("Keep", value=["load", 0])})
    assert LoadQuantized.VALIDATE_INPUTS(None) is True


def test_near_names_of_the_second_folder_are_offered(models: Path, quantized: dict[str, Tensor]) -> None:
    save_file(quantized, str(models / "checkpoints" / "whole-nf4.safetensors"))
    assert "Did you mean whole-nf4.safetensors" in str(LoadQuantized.VALIDATE_INPUTS("whole-nf.safetensors"))


def test_full_precision_files_are_refused(host: Any) -> None:
    with pytest.raises(
        FileError, match=r"no weight .* is quantized\.\n.*UNETLoader .* QuantizeModel .*LoadAndQuantize"
    ):
        LoadQuantized().load("digits_flux.safetensors")


def test_lint_reads_what_the_file_holds(models: Path, demo_models: Path, quantized: dict[str, Tensor]) -> None:
    save_file(quantized, str(models / "checkpoints" / "demo-nf4.safetensors"))
    path = models / "workflow.json"

    def found(name: str, carrier: str) -> list[tuple[str, str]]:
        graph = json.loads((WORKFLOWS / "quantized.json").read_text(encoding="utf-8"))
        quantize = next(n for n in graph.values() if n["class_type"] == "QuantizeModel")
        quantize["class_type"] = "LoadQuantized"
        quantize["inputs"] = {"model_name": name, "carrier": carrier}
        path.write_text(json.dumps(graph), encoding="utf-8")
        options = Options(models=(demo_models, models), host=HostName.COMFYUI, offload=OffloadMode.PARTIAL)
        findings = Linter(options, NODE_CLASS_MAPPINGS).check(path).findings
        return [(f.code, f.message) for f in findings if f.code != "unused-node"]

    assert any(code == "missing-model" and "demo-nf4.safetensors" in m for code, m in found("demo-nf.sft", "quantwire"))
    ((code, message),) = found("demo-nf4.safetensors", "library")
    assert code == "offload-conflict"
    assert message.startswith("bnb-nf4 (the library's own layers in the model, from node 2 'Quantize' (LoadQuantized))")
    assert found("demo-nf4.safetensors", "quantwire") == []
