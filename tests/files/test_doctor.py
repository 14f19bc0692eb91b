"""What the doctor finds, with its severity and its effect, beside what `test_repair.py` proves of the fixes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from damaged_files import joined, layout, seeds, text, write
from quantwire.quantizers.errors import FileError
from quantwire.quantizers.files.doctor import Severity, diagnose
from quantwire.quantizers.files.model_file import open_model
from quantwire.quantizers.files.safetensors_header import parse
from safetensors.torch import load_file, save_file

FLOAT = {"a.weight": ("F32", [4, 8]), "a.bias": ("F32", [4])}


def codes(path: Path, deep: bool = False) -> list[tuple[str, str]]:
    return [(f.severity.value, f.code) for f in diagnose(path, deep).findings]


@pytest.mark.parametrize("name", seeds())
def test_sound_files_have_no_errors(tmp_path: Path, name: str) -> None:
    found = diagnose(write(tmp_path / "a.safetensors", *seeds()[name]))
    assert found.worst in (None, Severity.NOTE)
    assert found.tensors == len(seeds()[name][0])
    assert found.layers == (name != "plain")


@pytest.mark.parametrize("models", ["diffusion_models", "text_encoders", "vae"])
def test_the_demo_models_are_sound(demo_models: Path, models: str) -> None:
    for path in (demo_models / models).glob("*.safetensors"):
        assert diagnose(path, deep=True).worst in (None, Severity.NOTE), path


@pytest.mark.parametrize(
    ("value", "index"), [(float("nan"), 0), (float("inf"), 31), (float("-inf"), 17)], ids=["nan", "inf", "minus-inf"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_nan_and_inf(tmp_path: Path, dtype: torch.dtype, value: float, index: int) -> None:
    weight = torch.ones(4, 8, dtype=dtype)
    weight.view(-1)[index] = value
    save_file({"a.weight": weight}, tmp_path / "a.safetensors", {"format": "pt"})
    (found,) = diagnose(tmp_path / "a.safetensors").findings
    assert (found.code, found.tensors, found.fix) == ("not-finite", ("a.weight",), "")
    assert found.text.endswith(f"has 1 that are nan or inf, the first at {index}.")


def test_nan_in_fp8(tmp_path: Path) -> None:
    weight = torch.ones(4, 8).to(torch.float8_e4m3fn)
    weight.view(torch.uint8)[1, 1] = 0x7F
    scale = torch.tensor(1.0)
    tensors = {"a.weight": weight, "a.weight_scale": scale}
    tensors["a.comfy_quant"] = torch.frombuffer(bytearray(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt"})
    assert codes(tmp_path / "a.safetensors") == [("error", "not-finite")]


def test_a_scale_that_is_inf_is_called_one(tmp_path: Path) -> None:
    tensors, metadata = seeds()["comfy"]
    path = write(tmp_path / "a.safetensors", tensors, metadata)
    header = parse(path)
    start, _ = header.entries["double_blocks.0.img_mlp.0.weight_scale"]["data_offsets"]
    content = bytearray(path.read_bytes())
    content[header.data_start + start : header.data_start + start + 4] = b"\x00\x00\x80\x7f"
    path.write_bytes(content)
    (found,) = [f for f in diagnose(path).findings if f.code == "not-finite"]
    assert "a scale of 1 values" in found.text


def test_large_tensors_are_read_when_asked_for(tmp_path: Path) -> None:
    weight = torch.ones(600, 500)
    weight[599, 499] = float("nan")
    save_file({"a": weight}, tmp_path / "a.safetensors", {"format": "pt"})
    assert codes(tmp_path / "a.safetensors") == []
    assert codes(tmp_path / "a.safetensors", deep=True) == [("error", "not-finite")]
    assert "the first at 299999" in diagnose(tmp_path / "a.safetensors", deep=True).findings[0].text


def test_the_same_tensor_twice(tmp_path: Path) -> None:
    weight = torch.randn(16, 16)
    tensors = {"a": weight, "b": weight.clone(), "c": torch.zeros(16, 16), "d": torch.zeros(16, 16), "e": weight.T}
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "a.safetensors", {"format": "pt"})
    (found,) = diagnose(tmp_path / "a.safetensors").findings
    assert (found.code, found.severity, found.tensors) == ("duplicate-tensor", Severity.NOTE, ("b",))


@pytest.mark.parametrize("place", ["weight_scale", "input_scale", "comfy_quant", "scale_weight", "SCB"])
def test_what_has_lost_its_weight(tmp_path: Path, place: str) -> None:
    value: Any = text({"format": "float8_e4m3fn"}) if place == "comfy_quant" else ("F32", [])
    path = write(tmp_path / "a.safetensors", {**FLOAT, f"gone.{place}": value}, {"format": "pt"})
    found = [f for f in diagnose(path).findings if f.code == "scale-without-weight"]
    assert len(found) == 1
    assert (found[0].tensors, found[0].fix) == (("gone",), "")
    assert len({c for _, c in codes(path)} - {"scaled-fp8-missing", "comfy-quant-missing"}) == 1


def test_a_marker_without_scales(tmp_path: Path) -> None:
    tensors = {"scaled_fp8": ("F8_E4M3", [2]), "a.weight": ("F8_E4M3", [4, 8])}
    path = write(tmp_path / "a.safetensors", tensors, {"format": "pt"})
    assert codes(path) == [("warning", "scaled-fp8-without-scales")]


def test_a_layer_without_scales(tmp_path: Path) -> None:
    tensors = {"a.weight": ("U8", [16, 8]), "a.comfy_quant": text({"format": "nvfp4"})}
    found = diagnose(write(tmp_path / "a.safetensors", tensors, {"format": "pt"})).findings
    assert [f.severity for f in found] == [Severity.ERROR]
    assert "weight_scale' is missing" in found[0].text
    assert "ComfyUI stops" in found[0].effect


def test_several_schemes(tmp_path: Path) -> None:
    tensors = {**seeds()["quanto"][0], **{f"x.{n}": v for n, v in seeds()["int8"][0].items()}}
    assert ("note", "mixed-schemes") in codes(write(tmp_path / "a.safetensors", tensors, {"format": "pt"}))


def test_metadata_that_are_no_json(tmp_path: Path) -> None:
    tensors, _ = seeds()["comfy-metadata"]
    path = write(tmp_path / "a.safetensors", tensors, {"format": "pt", "_quantization_metadata": "{"})
    assert ("error", "metadata-json") in codes(path)


# Headers


def damaged(tmp_path: Path, change: Any, behind: bytes = b"") -> Path:
    header, data = layout(FLOAT, {"format": "pt"})
    change(header)
    path = tmp_path / "a.safetensors"
    path.write_bytes(joined(header, data + behind))
    return path


def test_an_overlap_has_no_fix(tmp_path: Path) -> None:
    path = damaged(tmp_path, lambda h: h["a.bias"].update(data_offsets=[0, 16]))
    found = diagnose(path).findings
    assert {"header-overlap", "header-trailing"} <= {f.code for f in found}
    assert not any(f.fix for f in found)
    assert "safetensors refuses the whole file" in found[0].effect


def test_truncation_is_all_that_is_said_of_it(tmp_path: Path) -> None:
    path = damaged(tmp_path, lambda h: None)
    path.write_bytes(path.read_bytes()[:-3])
    (found,) = diagnose(path).findings
    assert (found.code, found.tensors, found.fix) == ("header-truncated", ("a.bias",), "")


def test_a_name_like_a_path_is_a_note(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"../a": ("F32", [2])}, {"format": "pt"})
    assert codes(path) == [("note", "header-path")]


def test_what_nothing_can_be_read_of(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"\x10" + bytes(7) + b"not json at all!")
    with pytest.raises(FileError, match="not JSON"):
        diagnose(tmp_path / "a.safetensors")


def test_parts_of_a_model(tmp_path: Path) -> None:
    write(tmp_path / "p1", {"a.weight": ("F8_E4M3", [4, 8])}, {"format": "pt"})
    write(tmp_path / "p2", {"a.weight_scale": ("F32", [])}, {"format": "pt"})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a.weight": "p1", "a.weight_scale": "p2"}}))
    assert codes(index) == [("error", "comfy-quant-missing")]
    assert open_model(index).nbytes == diagnose(index).tensors * 18


def test_the_text_and_the_report(tmp_path: Path) -> None:
    tensors = {f"{i}.weight": ("F8_E4M3", [4, 8]) for i in range(5)} | {
        f"{i}.weight_scale": ("F32", []) for i in range(5)
    }
    found = diagnose(write(tmp_path / "a.safetensors", tensors, {"x": "y"}))
    lines = str(found).splitlines()
    assert lines[0].startswith("a.safetensors: 10 tensors, 5 quantized layers; ")
    assert lines[0].endswith(": 1 error, 1 note.")
    assert lines[1].startswith("error: comfy-quant-missing: ")
    assert lines[3] == "    repair: 5 layers are named as fp8 by comfy_quant."
    data = json.loads(json.dumps(found.to_dict()))
    assert [f["severity"] for f in data["findings"]] == ["error", "note"]


def test_a_prefix_on_some_tensors_of_a_model(tmp_path: Path, demo_models: Path) -> None:
    source = demo_models / "diffusion_models" / "digits_flux.safetensors"
    assert "prefix-mixed" not in {f.code for f in diagnose(source).findings}
    tensors = load_file(source)
    some = {f"model.diffusion_model.{n}" if n.startswith("double_blocks") else n: t for n, t in tensors.items()}
    save_file(some, tmp_path / "half.safetensors", {"format": "pt"})
    found = next(f for f in diagnose(tmp_path / "half.safetensors").findings if f.code == "prefix-mixed")
    assert found.severity is Severity.ERROR
    assert "stand behind 'model.diffusion_model.'" in found.text
    whole = {f"model.diffusion_model.{n}": t for n, t in tensors.items()}
    save_file(whole, tmp_path / "whole.safetensors", {"format": "pt"})
    assert "prefix-mixed" not in {f.code for f in diagnose(tmp_path / "whole.safetensors").findings}
