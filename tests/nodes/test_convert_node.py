"""ConvertModel in a graph: the file that it makes, what its loader makes of it, and where it may write."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from quantwire.hosts.standalone.executor import Executor
from quantwire.hosts.standalone.validate import InvalidWorkflow
from quantwire.quantizers.errors import FileError, SpecError
from quantwire.quantizers.files.checkpoint import read_gguf, read_safetensors
from quantwire.quantizers.files.imatrix import Imatrix, Sums, write_imatrix
from quantwire.quantizers.weight import QuantizedWeight

SOURCE = "diffusion_models/digits_flux.safetensors"


@pytest.fixture
def folder(host: Any, demo_models: Path, tmp_path: Path) -> Path:
    """A model folder of our own, before that of the demo."""
    folder = tmp_path / "models" / "diffusion_models"
    (folder / "sub").mkdir(parents=True)
    shutil.copy(demo_models / SOURCE, folder / "sub" / "flux.safetensors")
    return folder


@pytest.fixture
def convert(executor: Executor, make_node: Any) -> Any:
    """convert(inputs) -> the outputs of one ConvertModel, and its report."""

    def run(**inputs: Any) -> tuple[str, dict[str, Any]]:
        inputs = {"model_name": "diffusion_models/sub/flux.safetensors", "type": "Q4_K_M", **inputs}
        rules = inputs.pop("rules", None)
        graph = {"c": make_node("ConvertModel", **inputs), "name": make_node("Keep", value=["c", 0])}
        if rules is not None:
            graph["r"] = make_node("QuantRules", rules=rules)
            graph["c"]["inputs"]["rules"] = ["r", 0]
        result = executor.run(graph)
        return result.results["name"][0], result.outputs["c"]["report"][0]

    return run


def test_the_new_file_samples(executor: Executor, sampled: Any, make_node: Any, folder: Path, convert: Any) -> None:
    name, report = convert()
    assert name == "sub/flux-Q4_K_M.gguf"
    assert sorted(p.name for p in (folder / "sub").iterdir()) == ["flux-Q4_K_M.gguf", "flux.safetensors"]
    assert {e["format_id"] for e in report["entries"]} == {"", "gguf-q4-k", "gguf-q5-k", "gguf-q6-k"}
    result = executor.run(sampled("g", g=make_node("LoadGGUF", gguf_name=name)))
    assert torch.isfinite(result.results["image"][0]).all()


def test_options(folder: Path, convert: Any) -> None:
    rules = "*.img_attn.qkv = gguf-q6-k"
    name, plan = convert(dry_run=True, output_name="new/a.gguf", rules=rules, keep_layers="txt_mlp")
    assert (name, plan["type"], (folder / "new").exists()) == ("new/a.gguf", "Q4_K_M", False)
    assert convert(output_name="new/a.gguf", rules=rules, keep_layers="txt_mlp")[0] == "new/a.gguf"
    tensors = read_gguf(folder / "new" / "a.gguf").tensors
    value = tensors["double_blocks.0.img_attn.qkv.weight"]
    assert isinstance(value, QuantizedWeight)
    assert value.format_id == "gguf-q6-k"
    assert isinstance(tensors["double_blocks.0.txt_mlp.0.weight"], torch.Tensor)
    assert (folder / "new" / "a.gguf").stat().st_size == plan["nbytes"]
    with pytest.raises(FileError, match=r"a\.gguf: is there already\.\nSet overwrite to replace it"):
        convert(output_name="new/a.gguf")
    plan = convert(dry_run=True, output_name="new/a.gguf")[1]
    assert "--" not in " ".join(plan["warnings"])
    assert any("a.gguf is there already; overwrite replaces it" in w for w in plan["warnings"])
    convert(output_name="new/a.gguf", overwrite=True, type="Q8_0")
    again = convert(model_name="diffusion_models/new/a.gguf", type="BF16")
    assert again[0] == "new/a-BF16.safetensors"
    assert convert(type="comfy-fp8-e4m3fn")[0] == "sub/flux-comfy-fp8-e4m3fn.safetensors"


@pytest.fixture
def ran(executor: Executor, make_node: Any, folder: Path) -> Any:
    """ran(inputs) -> whether a queue of the graph ran its ConvertModel; nodes run anew with `new=True`."""
    runs: list[Executor] = [executor]

    def run(new: bool = False, **inputs: Any) -> bool:
        if new:
            runs.append(Executor(executor._classes))
        inputs = {"model_name": "diffusion_models/sub/flux.safetensors", "type": "Q8_0", **inputs}
        graph = {"c": make_node("ConvertModel", **inputs), "name": make_node("Keep", value=["c", 0])}
        result = runs[-1].run(graph)
        assert result.outputs["c"]["report"][0]["entries"]
        assert (folder / result.results["name"][0]).is_file()
        return "c" not in result.cached

    return run


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_graph_queued_again_converts_once(folder: Path, ran: Any, overwrite: bool) -> None:
    target = folder / "sub" / "flux-Q8_0.gguf"
    assert ran(overwrite=overwrite)
    made = target.stat()
    for _ in range(2):
        assert not ran(overwrite=overwrite)
    assert ran(new=True, overwrite=overwrite), "the host's cache is empty"
    assert (target.stat().st_ino, target.stat().st_mtime_ns) == (made.st_ino, made.st_mtime_ns)


def test_a_result_that_is_gone_or_another_is_made_again(folder: Path, ran: Any) -> None:
    target = folder / "sub" / "flux-Q8_0.gguf"
    assert ran(overwrite=True)
    content = target.read_bytes()
    target.unlink()
    assert ran(overwrite=True)
    target.write_bytes(b"other")
    assert ran(overwrite=True)
    assert target.read_bytes() == content
    assert not ran(overwrite=True)
    target.write_bytes(b"other")
    with pytest.raises(FileError, match="is there already"):
        ran()
    assert target.read_bytes() == b"other"


def test_other_rules_for_the_same_name_convert(folder: Path, convert: Any) -> None:
    target = folder / "sub" / "a.gguf"
    contents: list[bytes] = []
    for rules in ("*.img_attn.qkv = gguf-q6-k", "*.img_attn.qkv = gguf-q5-k", "*.img_attn.qkv = gguf-q6-k"):
        convert(output_name="sub/a.gguf", overwrite=True, rules=rules)
        contents.append(target.read_bytes())
    assert contents[0] == contents[2] != contents[1]


def test_another_matrix_or_source_converts(folder: Path, ran: Any) -> None:
    inputs = {"overwrite": True, "imatrix_name": "m.gguf", "type": "IQ3_S"}
    name, target = "double_blocks.0.img_mlp.2.weight", folder / "sub" / "flux-IQ3_S.gguf"
    columns = read_safetensors(folder / "sub" / "flux.safetensors").tensors[name].shape[1]
    contents: list[bytes] = []
    for seed in (0, 1):
        squares = torch.rand(1, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        write_imatrix(folder / "m.gguf", Imatrix({name: Sums(squares, torch.tensor([1]))}))
        assert ran(**inputs)
        assert not ran(**inputs)
        contents.append(target.read_bytes())
    assert contents[0] != contents[1]
    os.utime(folder / "sub" / "flux.safetensors", ns=(1, 1))
    assert ran(**inputs)


@pytest.mark.parametrize("name", ["../a.gguf", "sub/../../a.gguf", "/tmp/a.gguf", "link/a.gguf", "."])
def test_it_writes_into_the_model_folder_only(tmp_path: Path, folder: Path, convert: Any, name: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileError, match=r"is not a name in the model folder|leads out of the model folder"):
        convert(output_name=name)
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("name", ["vae/digits_tae.safetensors", "diffusion_models/none.gguf", "flux"])
def test_sources_are_files_of_the_model_folders(convert: Any, folder: Path, name: str) -> None:
    with pytest.raises(InvalidWorkflow):
        convert(model_name=name)


def test_refusals_of_the_converter_reach_the_graph(convert: Any, folder: Path) -> None:
    with pytest.raises(SpecError, match=r"^IQ1_S: .* needs an importance matrix") as caught:
        convert(type="IQ1_S")
    assert "imatrix_name" in str(caught.value)
    assert "--" not in str(caught.value)
