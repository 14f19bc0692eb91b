"""Files of optimum-quanto: found, read bit for bit, and what contradicts its layout is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quantwire.quantizers.registry import availability
from safetensors.torch import save_file
from scheme_files import Two, codes, computes, edited, equals, fault, flux, looked
from torch import nn

if not availability("quanto-qint8").works:
    pytest.skip(availability("quanto-qint8").reason, allow_module_level=True)
from optimum import quanto

TYPES = ("qint8", "qint4", "qint2", "qfloat8_e4m3fn", "qfloat8_e5m2", "qfloat8")


def quantized(kind: str, model: nn.Module) -> nn.Module:
    quanto.quantize(model, weights=quanto.qtypes[kind])
    quanto.freeze(model)
    return model


def saved(path: Path, model: nn.Module) -> Path:
    save_file(model.state_dict(), path)
    return path


def format_of(kind: str) -> str:
    return "quanto-" + ("qfloat8-e4m3fn" if kind == "qfloat8" else kind.replace("_", "-"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", TYPES)
def test_a_file_of_each_type(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    model = quantized(kind, Two(k=200, dtype=dtype))  # a row that no group divides, so that b needs no bias
    found = looked(saved(tmp_path / "q.safetensors", model))
    assert not found.faults
    assert {n: (x.format_id, x.shape) for n, x in found.layers.items()} == {
        "a.weight": (format_of(kind), (48, 200)),
        "b.weight": (format_of(kind), (32, 200)),
    }
    assert set(found.plain) == {"a.bias", "norm.weight", "norm.bias"}
    for name in ("a", "b"):
        layer: Any = getattr(model, name)
        equals(found, f"{name}.weight", layer.weight.dequantize())


@pytest.mark.parametrize("k", [64, 160, 192, 256, 288])
@pytest.mark.parametrize("kind", ["qint4", "qint2"])
def test_groups_of_every_size(tmp_path: Path, kind: str, k: int) -> None:
    model = quantized(kind, Two(k=k))
    found = looked(saved(tmp_path / "q.safetensors", model))
    layer: Any = model.a
    assert found.layers["a.weight"].shape == (48, k)
    equals(found, "a.weight", layer.weight.dequantize())
    # Without a bias groups of a common size may be those of short rows or of long ones.
    other = found.layers["b.weight"]
    assert (other.format_id, "no bias" in other.why) == ("", True)


def test_a_map_in_the_metadata_tells_the_rows(tmp_path: Path) -> None:
    model = quantized("qint4", Two())
    layer: Any = model.b
    told = {"quanto_qmap.json": json.dumps({"b": {"weights": "qint4", "shape": [32, 256]}})}
    save_file(model.state_dict(), tmp_path / "q.safetensors", told)
    found = looked(tmp_path / "q.safetensors")
    assert not found.faults
    equals(found, "b.weight", layer.weight.dequantize())
    told["quanto_qmap.json"] = told["quanto_qmap.json"].replace("256", "250")
    save_file(model.state_dict(), tmp_path / "q.safetensors", told)
    found = looked(tmp_path / "q.safetensors")
    assert codes(found) == {"config-contradicts"}
    assert not found.layers["b.weight"].format_id


def test_products_are_those_of_the_library(tmp_path: Path) -> None:
    for kind in ("qint8", "qfloat8_e4m3fn", "qfloat8_e5m2"):
        model = quantized(kind, Two())
        found = looked(saved(tmp_path / f"{kind}.safetensors", model))
        layer: Any = model.a
        computes(found, "a.weight", layer, layer.bias)


def test_a_single_row(tmp_path: Path) -> None:
    model = quantized("qint8", nn.Sequential(nn.Linear(64, 1, dtype=torch.bfloat16)))
    layer: Any = model[0]
    found = looked(saved(tmp_path / "q.safetensors", model))
    equals(found, "0.weight", layer.weight.dequantize())
    computes(found, "0.weight", layer, layer.bias)
    found = looked(
        saved(tmp_path / "four.safetensors", quantized("qint4", nn.Sequential(nn.Linear(64, 1, dtype=torch.bfloat16))))
    )
    assert "one scale a value" in found.layers["0.weight"].why


def test_convolutions_are_named(tmp_path: Path) -> None:
    for kind in ("qint8", "qint4"):
        model = quantized(kind, nn.Sequential(nn.Conv2d(8, 16, 3)))
        layer = looked(saved(tmp_path / f"{kind}.safetensors", model)).layers["0.weight"]
        assert (layer.format_id, "linear layers" in layer.why) == ("", True)


def test_calibrated_activations_belong_to_their_layer(tmp_path: Path) -> None:
    model: Any = Two()
    quanto.quantize(model, weights=quanto.qint8, activations=quanto.qint8)
    with quanto.Calibration(), torch.no_grad():
        model.a(torch.randn(4, 256, dtype=torch.bfloat16))
    quanto.freeze(model)
    found = looked(saved(tmp_path / "q.safetensors", model))
    tensors = found.layers["a.weight"].tensors
    assert (tensors["input_scale"], tensors["output_scale"]) == ("a.input_scale", "a.output_scale")
    equals(found, "a.weight", model.a.weight.dequantize())


@pytest.mark.parametrize("kind", ["qint8", "qint4", "qfloat8"])
def test_a_folder_of_diffusers(tmp_path: Path, kind: str) -> None:
    from optimum.quanto import QuantizedDiffusersModel

    model = QuantizedDiffusersModel.quantize(flux(), weights=kind)
    model.save_pretrained(tmp_path)
    found = looked(tmp_path)
    assert "quanto_qmap.json" in found.file.configs
    assert not found.faults
    inner: Any = model
    linear = {n: m for n, m in inner._wrapped.named_modules() if isinstance(m, quanto.QLinear)}
    assert {f"{n}.weight" for n in linear} == set(found.layers)
    for name, layer in linear.items():
        equals(found, f"{name}.weight", layer.weight.dequantize())


def test_diffusers_own_quanto_config(tmp_path: Path) -> None:
    from diffusers import FluxTransformer2DModel, QuantoConfig

    flux().save_pretrained(tmp_path / "plain")
    model: Any = FluxTransformer2DModel.from_pretrained(
        tmp_path / "plain", quantization_config=QuantoConfig(weights_dtype="int8"), torch_dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path / "q")
    found = looked(tmp_path / "q")
    assert not found.faults
    assert found.layers
    for name, layer in found.layers.items():
        assert layer.format_id == "quanto-qint8"
        equals(found, name, model.get_parameter(name).dequantize())


def test_two_groups_need_the_folder(tmp_path: Path) -> None:
    small = nn.Sequential(nn.Linear(32, 2, dtype=torch.bfloat16))
    found = looked(saved(tmp_path / "q.safetensors", quantized("qint2", small)))
    assert "as many bytes in qint4" in found.layers["0.weight"].why
    folder = tmp_path / "folder"
    folder.mkdir()
    saved(folder / "model.safetensors", small)
    (folder / "quanto_qmap.json").write_text('{"0": {"weights": "qint2", "activations": "none"}}')
    layer: Any = small[0]
    equals(looked(folder), "0.weight", layer.weight.dequantize())


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("quanto")
    return {kind: saved(folder / f"{kind}.safetensors", quantized(kind, Two())) for kind in ("qint8", "qint4")}


@pytest.mark.parametrize(
    ("kind", "code", "tensor", "change"),
    [
        ("qint8", "tensor-missing", "a.weight._scale", lambda t: t.pop("a.weight._scale")),
        ("qint8", "tensor-missing", "a.weight._data", lambda t: t.pop("a.weight._data")),
        ("qint4", "tensor-missing", "a.weight._shift", lambda t: t.pop("a.weight._shift")),
        ("qint4", "tensor-missing", "a.weight._data._data", lambda t: t.pop("a.weight._data._data")),
        ("qint8", "scale-shape", "a.weight._scale", lambda t: t.update({"a.weight._scale": t["b.weight._scale"]})),
        ("qint4", "scale-shape", "a.weight._scale", lambda t: _cut(t, "_scale", "_shift")),
        ("qint4", "shift-shape", "a.weight._shift", lambda t: _cut(t, "_shift")),
        ("qint8", "tensor-dtype", "a.weight._scale", lambda t: t.update({"a.weight._scale": torch.ones(48, 1).int()})),
    ],
)
def test_damage_is_named(
    tmp_path: Path, sound: dict[str, Path], kind: str, code: str, tensor: str, change: Any
) -> None:
    path = edited(sound[kind], tmp_path / "q.safetensors", lambda tensors, _: change(tensors))
    found = looked(path)
    assert codes(found) == {code}
    assert fault(found, code).tensor == tensor
    assert (found.layers["a.weight"].format_id, bool(found.layers["a.weight"].why)) == ("", True)


def _cut(tensors: dict[str, torch.Tensor], *parts: str) -> None:
    for part in parts:
        tensors[f"a.weight.{part}"] = tensors[f"a.weight.{part}"][:7].contiguous()


@pytest.mark.parametrize("said", ["qint4", "qfloat8"])
def test_a_map_that_contradicts_the_tensors(tmp_path: Path, sound: dict[str, Path], said: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(sound["qint8"].read_bytes())
    (tmp_path / "quanto_qmap.json").write_text(f'{{"a": {{"weights": "{said}"}}, "norm": {{"weights": "qint8"}}}}')
    found = looked(tmp_path)
    assert {(f.code, f.tensor, f.fatal) for f in found.faults} == {
        ("config-contradicts", "a.weight", True),
        ("config-contradicts", "norm.weight", False),
    }
    assert not found.layers["a.weight"].format_id
    assert found.layers["b.weight"].format_id == "quanto-qint8"
