"""Folders of sdnq: found by their settings, read as the library's own layers, and what contradicts them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quantwire.quantizers.backends.sdnq.library import library, to_meta
from quantwire.quantizers.errors import FileError
from quantwire.quantizers.registry import availability
from safetensors.torch import save_file
from scheme_files import codes, computes, edited, equals, fault, flux, looked, weight_of
from torch import nn

if not availability("sdnq-int8").works:
    pytest.skip(availability("sdnq-int8").reason, allow_module_level=True)

WEIGHTS = "diffusion_pytorch_model.safetensors"
LAYERS = ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_out")
# Settings -> what a usual layer becomes.
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "int8": ({}, "sdnq-int8"),
    "uint4": ({"weights_dtype": "uint4"}, "sdnq-uint4"),
    "uint4 with SVD": ({"weights_dtype": "uint4", "use_svd": True, "svd_rank": 8}, "sdnq-uint4"),
    "uint4 rotated": ({"weights_dtype": "uint4", "use_hadamard": True}, "sdnq-uint4"),
    "int5 by rows": ({"weights_dtype": "int5", "group_size": -1}, "sdnq-int5"),
    "uint3 in groups of 32": ({"weights_dtype": "uint3", "group_size": 32}, "sdnq-uint3"),
    "int8 in groups of 32": ({"group_size": 32}, "sdnq-int8"),
    "int8 for the product": ({"use_quantized_matmul": True}, "sdnq-int8"),
    "int8 for the product with SVD": ({"use_quantized_matmul": True, "use_svd": True, "svd_rank": 8}, "sdnq-int8"),
    "uint4 for the product": ({"weights_dtype": "uint4", "use_quantized_matmul": True}, "sdnq-uint4"),
    "int12": ({"weights_dtype": "int12"}, "sdnq-int12"),
    "float8": ({"weights_dtype": "float8_e4m3fn"}, "sdnq-float8-e4m3fn"),
    "float8, one scale": ({"weights_dtype": "float8_e4m3fn", "group_size": -2}, "sdnq-float8-e4m3fn"),
    "uint4, one scale": ({"weights_dtype": "uint4", "group_size": -2}, "sdnq-uint4"),
    "packed float": ({"weights_dtype": "float6_e3m2fn"}, "sdnq-float6-e3m2fn"),
    "int8, scales in bfloat16": ({"dequantize_fp32": False}, "sdnq-int8"),
    "uint4 and better": ({"weights_dtype": "uint4", "use_dynamic_quantization": True}, "sdnq-uint4"),
}


def saved(folder: Path, **settings: Any) -> Any:
    """A small FLUX quantized and saved by the library; returns the model."""
    config = library().quantizer.SDNQConfig(add_skip_keys=False, **settings)
    model = library().quantizer.sdnq_post_load_quant(flux(), quantization_config=config)
    library().loader.save_sdnq_model(model, str(folder))
    return model


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if hasattr(m, "sdnq_dequantizer")}


def theirs(layer: Any) -> torch.Tensor:
    tensors = {name: getattr(layer, name) for name in library().quantizer.sdnq_keys}
    dequantizer = layer.sdnq_dequantizer
    return dequantizer(**tensors, skip_quantized_matmul=dequantizer.use_quantized_matmul, skip_compile=True)


@pytest.mark.parametrize("name", list(CASES))
def test_a_folder_of_each_kind(tmp_path: Path, name: str) -> None:
    settings, format_id = CASES[name]
    model = saved(tmp_path, **settings)
    found = looked(tmp_path)
    assert not found.faults
    layers = quantized_layers(model)
    assert {f"{n}.weight" for n in layers} == set(found.layers)
    assert found.layers[f"{LAYERS[0]}.weight"].format_id == format_id
    for layer in LAYERS:
        equals(found, f"{layer}.weight", theirs(layers[layer]))
        computes(found, f"{layer}.weight", layers[layer], layers[layer].bias)
    if settings.get("group_size") != -2:  # there one scale is repeated for every row
        for layer in layers:
            meta = dict(weight_of(found, f"{layer}.weight").meta)
            expected = to_meta(layers[layer].sdnq_dequantizer)
            assert {key: meta[key] for key in expected} == expected


def test_settings_of_single_modules(tmp_path: Path) -> None:
    model = saved(
        tmp_path,
        weights_dtype="uint4",
        modules_dtype_dict={
            "int8": ["single_transformer_blocks.*.proj_out"],
            "minimum_6bit": ["norm1"],
            "int5": [".norm_out"],
        },
        modules_quant_config={"add_q_proj": {"use_hadamard": True, "group_size": 32}},
        modules_to_not_use_matmul=["ff"],
        use_quantized_matmul=True,
    )
    found = looked(tmp_path)
    assert not found.faults
    kinds = {name: str(m.sdnq_dequantizer.weights_dtype) for name, m in quantized_layers(model).items()}
    assert set(kinds.values()) == {"uint4", "int8", "int6", "int5"}
    for name, kind in kinds.items():
        assert found.layers[f"{name}.weight"].format_id == f"sdnq-{kind}"
        equals(found, f"{name}.weight", theirs(quantized_layers(model)[name]))
    for name, layer in quantized_layers(model).items():
        meta = weight_of(found, f"{name}.weight").meta
        assert meta["use_quantized_matmul"] == layer.sdnq_dequantizer.use_quantized_matmul, name
        assert meta["use_hadamard"] == layer.sdnq_dequantizer.use_hadamard, name


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"weights_dtype": "uint4", "use_codebook": True, "codebook_steps": 1}, "codebook"),
        ({"weights_dtype": "uint4", "scale_dtype": "int8"}, "scales are quantized too"),
        ({"weights_dtype": "uint9"}, "no format here"),
    ],
)
def test_what_has_no_format_is_named(tmp_path: Path, settings: dict[str, Any], why: str) -> None:
    saved(tmp_path, **settings)
    found = looked(tmp_path)
    layer = found.layers[f"{LAYERS[0]}.weight"]
    assert (layer.format_id, why in layer.why) == ("", True)
    with pytest.raises(FileError, match=why):
        found.read(layer.name)
    assert f"{LAYERS[0]}.scale" in layer.tensors.values()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdnq")
    saved(folder, weights_dtype="uint4", use_svd=True, svd_rank=8)
    return folder


def test_settings_in_the_metadata_of_a_single_file(tmp_path: Path, sound: Path) -> None:
    config = (sound / "quantization_config.json").read_text()
    one = edited(sound / WEIGHTS, tmp_path / "one.safetensors", lambda t, m: m.update(quantization_config=config))
    name = f"{LAYERS[0]}.weight"
    ours, same = weight_of(looked(one), name), weight_of(looked(sound), name)
    assert all(torch.equal(t, same.tensors[n]) for n, t in ours.tensors.items())
    assert ours.meta == same.meta


def test_without_settings_it_is_named(tmp_path: Path, sound: Path) -> None:
    one = edited(sound / WEIGHTS, tmp_path / "one.safetensors", lambda t, m: None)
    layer = looked(one).layers[f"{LAYERS[0]}.weight"]
    assert (layer.format_id, "quantization_config" in layer.why) == ("", True)


def test_a_plain_scale_is_no_sign(tmp_path: Path) -> None:
    save_file(
        {"norm.scale": torch.ones(4), "a.weight": torch.ones(4, 4), "a.scale": torch.ones(4)},
        tmp_path / "p.safetensors",
    )
    found = looked(tmp_path / "p.safetensors")
    assert not found.layers
    assert not found.faults


@pytest.mark.parametrize(
    ("code", "part", "change"),
    [
        ("tensor-missing", "scale", lambda t, x: t.pop(f"{x}.scale")),
        ("tensor-missing", "zero_point", lambda t, x: t.pop(f"{x}.zero_point")),
        ("tensor-missing", "svd_up", lambda t, x: t.pop(f"{x}.svd_up")),
        ("weight-missing", "weight", lambda t, x: t.pop(f"{x}.weight")),
        ("scale-shape", "scale", lambda t, x: t.update({f"{x}.scale": torch.ones(7, 1)})),
        ("tensor-dtype", "scale", lambda t, x: t.update({f"{x}.scale": t[f"{x}.scale"].int()})),
    ],
)
def test_damage_is_named(tmp_path: Path, sound: Path, code: str, part: str, change: Any) -> None:
    layer = LAYERS[0]
    (tmp_path / "config.json").write_text((sound / "config.json").read_text())
    found = looked(edited(sound / WEIGHTS, tmp_path / WEIGHTS, lambda t, _: change(t, layer)).parent)
    assert codes(found) == {code}
    assert fault(found, code).tensor == f"{layer}.{part}"
    assert part == "weight" or not found.layers[f"{layer}.weight"].format_id


@pytest.mark.parametrize(("said", "code"), [("int8", "config-contradicts"), ("int12", "config-contradicts")])
def test_settings_that_contradict_the_tensors(tmp_path: Path, sound: Path, said: str, code: str) -> None:
    (tmp_path / WEIGHTS).write_bytes((sound / WEIGHTS).read_bytes())
    config = json.loads((sound / "quantization_config.json").read_text()) | {"weights_dtype": said}
    (tmp_path / "quantization_config.json").write_text(json.dumps(config))
    found = looked(tmp_path)
    assert codes(found) == {code}
    assert not any(layer.format_id for layer in found.layers.values())


def test_shapes_that_the_settings_do_not_make(tmp_path: Path, sound: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes((sound / WEIGHTS).read_bytes())
    config = json.loads((sound / "quantization_config.json").read_text()) | {"group_size": 32}
    (tmp_path / "quantization_config.json").write_text(json.dumps(config))
    found = looked(tmp_path)
    with pytest.raises(FileError, match="do not belong together"):
        found.read(f"{LAYERS[0]}.weight")
