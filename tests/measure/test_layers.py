"""Weights of two files or models compared: names of layouts matched, numbers those of the values themselves."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from quantwire.hosts.standalone.models import load_diffusion_model
from quantwire.quantizers.apply import quantize_linears
from quantwire.quantizers.errors import FileError, SpecError
from quantwire.quantizers.files.checkpoint import read_safetensors
from quantwire.quantizers.files.gguf_writer import write_gguf
from quantwire.quantizers.measure.layers import compare_files, compare_models
from quantwire.quantizers.spec import QuantSpec
from quantwire.quantizers.weight import QuantizedLinear
from safetensors.torch import load_file, save_file
from torch import nn

NAME = "double_blocks.0.img_mlp.0.weight"


@pytest.fixture(scope="module")
def source(demo_models: Path) -> Path:
    return demo_models / "diffusion_models" / "digits_flux.safetensors"


@pytest.fixture(scope="module")
def gguf(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    path = tmp_path_factory.mktemp("gguf") / "digits_flux-Q8_0.gguf"
    report = write_gguf(path, read_safetensors(source).tensors, QuantSpec("gguf-q8-0"))
    assert report.sqnr_db is not None
    return path, report.sqnr_db


def diffusers_file(source: Path, path: Path) -> Path:
    """The same model under diffusers' names, q, k and v apart."""
    state = {n: t.detach().contiguous().clone() for n, t in load_diffusion_model(source).transformer.named_parameters()}
    save_file(state, path)
    return path


def test_a_file_with_itself(source: Path) -> None:
    found = compare_files(source, source)
    assert found.verdict == f"identical: all {len(load_file(source))} tensors hold the same values"
    assert found.sqnr_db is None
    assert not found.changed
    assert not found.broken


def test_numbers_are_those_of_the_values(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source)
    before = tensors[NAME].float()
    tensors[NAME] = (before + 0.01 * torch.randn(before.shape, generator=torch.Generator().manual_seed(0))).to(
        tensors[NAME].dtype
    )
    error = before - tensors[NAME].float()
    save_file(tensors, tmp_path / "b.safetensors")
    found = compare_files(source, tmp_path / "b.safetensors")
    assert [layer.name for layer in found.changed] == [NAME]
    layer = found.changed[0]
    assert layer.sqnr_db == pytest.approx(
        10 * math.log10(float(before.square().sum() / error.square().sum())), abs=1e-3
    )
    assert layer.max_error == pytest.approx(float(error.abs().max()))
    assert layer.relative_max == pytest.approx(float(error.abs().max() / before.abs().max()))
    assert found.sqnr_db == pytest.approx(layer.sqnr_db)


def test_a_gguf_file(source: Path, gguf: tuple[Path, float]) -> None:
    found = compare_files(source, gguf[0])
    assert {layer.now for layer in found.changed} == {"Q8_0"}
    assert found.sqnr_db == pytest.approx(gguf[1], abs=0.05)
    ranks = [layer.rank for layer in found.layers]
    assert ranks == sorted(ranks)
    assert all(len(line) <= 120 for line in str(found).splitlines())
    json.dumps(found.to_dict(), allow_nan=False)


def test_layouts_and_prefixes_are_matched(source: Path, gguf: tuple[Path, float], tmp_path: Path) -> None:
    diffusers = diffusers_file(source, tmp_path / "diffusers.safetensors")
    found = compare_files(source, diffusers)
    assert not found.changed
    assert len(found.layers) == len(load_file(source))
    assert not found.only_a
    assert not found.only_b
    assert "ComfyUI's names" in found.notes[0]
    assert compare_files(diffusers, gguf[0]).sqnr_db == pytest.approx(gguf[1], abs=0.05)
    prefixed = tmp_path / "prefixed.safetensors"
    save_file({f"model.diffusion_model.{n}": t for n, t in load_file(source).items()}, prefixed)
    assert not compare_files(prefixed, source).changed


def test_nan_missing_and_other_shapes(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source)
    tensors[NAME][3, 5] = float("nan")
    other = "single_blocks.0.linear1.weight"
    tensors[other] = -tensors[other]  # farther from the reference than zeros
    short = "single_blocks.0.linear1.bias"
    tensors[short] = tensors[short][:-1].clone()
    del tensors["double_blocks.0.img_mlp.2.bias"]
    save_file(tensors, tmp_path / "b.safetensors")
    found = compare_files(source, tmp_path / "b.safetensors")
    assert found.verdict.startswith("broken: 2 of ")
    assert "1 with nan or inf, 1 farther off than zeros" in found.verdict
    assert found.layers[0].name == NAME
    assert found.layers[0].not_finite == 1
    assert found.layers[0].sqnr_db is None
    assert found.sqnr_db is None
    assert found.only_a == ("double_blocks.0.img_mlp.2.bias",)
    assert len(found.other_shapes) == 1
    assert short in found.other_shapes[0]
    json.dumps(found.to_dict(), allow_nan=False)


def test_masks_and_infinities_are_no_fault(tmp_path: Path) -> None:
    lowest = torch.finfo(torch.float32).min
    mask = torch.full((4, 4), lowest).triu(1)
    tensors = {"mask": mask, "inf": torch.zeros(4, 4).masked_fill(mask < 0, -math.inf), "w": torch.ones(4, 4)}
    save_file(tensors, tmp_path / "a.safetensors")
    found = compare_files(tmp_path / "a.safetensors", tmp_path / "a.safetensors")
    assert found.verdict == "identical: all 3 tensors hold the same values"
    tensors["inf"] = tensors["inf"] + torch.eye(4)  # differs beside the infinities
    tensors["w"] = tensors["w"].clone()
    tensors["w"][0, 0] = math.inf
    save_file(tensors, tmp_path / "b.safetensors")
    found = compare_files(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert [layer.name for layer in found.broken] == ["w"]
    assert next(layer for layer in found.layers if layer.name == "inf").noise == 4.0
    # What the reference has too is not the other's fault.
    assert not compare_files(tmp_path / "b.safetensors", tmp_path / "a.safetensors").broken
    json.dumps(found.to_dict(), allow_nan=False)


def test_models_trained_apart_are_not_broken_versions(source: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(source)
    apart = {n: (torch.randn(t.shape, generator=generator) * t.float().std()).to(t.dtype) for n, t in tensors.items()}
    save_file(apart, tmp_path / "apart.safetensors")
    found = compare_files(source, tmp_path / "apart.safetensors")
    assert found.verdict.startswith("not versions of one model: 33 of 33 matrices")
    assert not found.broken
    narrow = {n: t[..., : t.shape[-1] // 2].contiguous() if n == "txt_in.weight" else t for n, t in apart.items()}
    save_file(narrow, tmp_path / "narrow.safetensors")
    assert "other shapes, first 'txt_in.weight" in compare_files(source, tmp_path / "narrow.safetensors").verdict
    # Other input channels alone make a version, as of models for inpainting.
    save_file({**tensors, "txt_in.weight": narrow["txt_in.weight"]}, tmp_path / "fill.safetensors")
    assert compare_files(source, tmp_path / "fill.safetensors").verdict.startswith("identical")


def test_other_models_are_refused(source: Path, demo_models: Path, tmp_path: Path) -> None:
    with pytest.raises((FileError, SpecError), match="two versions of one model"):
        compare_files(source, demo_models / "text_encoders" / "digits_clip.safetensors")
    save_file({"x.weight": torch.ones(4, 4)}, tmp_path / "x.safetensors")
    with pytest.raises((FileError, SpecError), match="two versions of one model"):
        compare_files(source, tmp_path / "x.safetensors")
    with pytest.raises(FileError):
        compare_files(source, tmp_path / "none.safetensors")


def test_two_models(source: Path) -> None:
    model = load_diffusion_model(source).transformer
    layers, report = quantize_linears(model, QuantSpec("quanto-qint8"))
    quantized = nn.ModuleDict({name.replace(".", "|"): layer for name, layer in layers.items()})
    plain = nn.ModuleDict({name.replace(".", "|"): model.get_submodule(name) for name in layers})
    found = compare_models({"transformer": plain}, {"transformer": quantized}, ("full", "int8"))
    assert len(found.changed) == len(layers)
    assert {layer.now for layer in found.changed} == {"quanto-qint8"}
    assert report.sqnr_db is not None
    assert found.sqnr_db == pytest.approx(report.sqnr_db, abs=0.01)
    assert not compare_models({"t": quantized}, {"t": quantized}).changed
    first = next(iter(layers.values()))
    assert isinstance(first, QuantizedLinear)
    with pytest.raises(SpecError, match="no tensor of the same name and shape"):
        compare_models({"t": first}, {"t": nn.LayerNorm(4)})
