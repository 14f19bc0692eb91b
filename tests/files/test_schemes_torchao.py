"""Files of torchao: its classes taken apart, found and read bit for bit, and what contradicts them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quantwire.quantizers.backends.torchao.library import load
from quantwire.quantizers.errors import FileError
from quantwire.quantizers.registry import availability
from safetensors.torch import save_file
from scheme_files import Two, codes, computes, edited, equals, fault, flux, looked
from torch import Tensor, nn

if not availability("torchao-int8wo").works:
    pytest.skip(availability("torchao-int8wo").reason, allow_module_level=True)
q = load("torchao.quantization")
mx = load("torchao.prototype.mx_formats")


def configs() -> dict[str, tuple[Any, str, str]]:
    """Name -> the library's config, our format, what the layer is called."""
    return {
        "int8wo": (q.Int8WeightOnlyConfig(), "torchao-int8wo", "int8wo"),
        "int8 groups": (q.Int8WeightOnlyConfig(granularity=q.PerGroup(32)), "torchao-int8wo", "int8wo, groups of 32"),
        "int8 tensor": (
            q.Int8WeightOnlyConfig(granularity=q.PerTensor()),
            "torchao-int8wo",
            "int8wo, one scale a tensor",
        ),
        "int8dyn": (q.Int8DynamicActivationInt8WeightConfig(), "torchao-int8dyn", "int8dyn"),
        "float8wo": (q.Float8WeightOnlyConfig(), "torchao-float8wo", "float8wo"),
        "int4 in int8": (
            q.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=q.PerGroup(32)),
            "torchao-int8wo",
            "int4 in int8, groups of 32",
        ),
        "nvfp4": (mx.NVFP4WeightOnlyConfig(), "comfy-nvfp4", "nvfp4"),
    }


def saved(path: Path, model: nn.Module) -> Path:
    """As the library itself takes a state dict apart for safetensors."""
    state = {n: t.data if isinstance(t, nn.Parameter) else t for n, t in model.state_dict().items()}
    tensors, metadata = load("torchao.prototype.safetensors.safetensors_support").flatten_tensor_state_dict(state)
    save_file(tensors, path, metadata)
    return path


def only(**weights: Tensor) -> nn.Module:
    """A model of nothing but these weights."""
    layers = {}
    for name, weight in weights.items():
        layers[name] = nn.Linear(1, 1, bias=False, device="meta")
        layers[name].weight = nn.Parameter(weight, requires_grad=False)
    return nn.ModuleDict(layers)


@pytest.mark.parametrize("name", list(configs()))
def test_a_file_of_each_class(tmp_path: Path, name: str) -> None:
    config, format_id, shown = configs()[name]
    if not availability(format_id).works:
        pytest.skip(availability(format_id).reason)
    model: Any = Two(k=128)
    q.quantize_(model, config)
    found = looked(saved(tmp_path / "t.safetensors", model))
    assert not found.faults
    assert {n: (x.format_id, x.type, x.shape, x.dtype) for n, x in found.layers.items()} == {
        "a.weight": (format_id, shown, (48, 128), "BF16"),
        "b.weight": (format_id, shown, (32, 128), "BF16"),
    }
    assert set(found.plain) == {"a.bias", "norm.weight", "norm.bias"}
    for layer in ("a", "b"):
        weight = getattr(model, layer).weight
        # In bfloat16 comfy-kitchen rounds the scales of nvfp4 too.
        expected = weight.dequantize(torch.float32) if name == "nvfp4" else weight.dequantize()
        equals(found, f"{layer}.weight", expected, torch.bfloat16)
    computes(found, "a.weight", model.a, model.a.bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_the_dtype_of_the_weight_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    model: Any = Two(k=64, dtype=dtype)
    q.quantize_(model, q.Int8WeightOnlyConfig())
    found = looked(saved(tmp_path / "t.safetensors", model))
    equals(found, "a.weight", model.a.weight.dequantize())


@pytest.mark.parametrize("granularity", ["PerTensor", "PerBlock"])
def test_float8_by_tensor_and_by_block(tmp_path: Path, granularity: str) -> None:
    w = torch.randn(256, 128, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    unit = (
        q.PerTensor() if granularity == "PerTensor" else load("torchao.quantization.granularity").PerBlock([128, 128])
    )
    kwargs: dict[str, Any] = {"granularity": unit}
    weight = q.Float8Tensor.from_hp(w, **kwargs)
    path = saved(tmp_path / "t.safetensors", only(a=weight))
    found = looked(path)
    assert found.layers["a.weight"].format_id == "torchao-float8wo"
    equals(found, "a.weight", weight.dequantize())


def test_dynamic_float8_keeps_its_weight(tmp_path: Path) -> None:
    workflows = load("torchao.quantization.quantize_.workflows")
    w = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    kwargs = workflows.QuantizeTensorToFloat8Kwargs(granularity=q.PerRow())
    weight = q.Float8Tensor.from_hp(w, granularity=q.PerRow(), act_quant_kwargs=kwargs)
    found = looked(saved(tmp_path / "t.safetensors", only(a=weight)))
    assert "full precision" in found.layers["a.weight"].options["activations"]
    equals(found, "a.weight", weight.dequantize())


@pytest.mark.parametrize("shape", [(48, 128), (130, 320)], ids=str)
@pytest.mark.parametrize("tiles", [True, False])
def test_blocks_of_16_and_32(tmp_path: Path, tiles: bool, shape: tuple[int, int]) -> None:
    if not availability("comfy-nvfp4").works:
        pytest.skip(availability("comfy-nvfp4").reason)
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    nvfp4 = load("torchao.prototype.mx_formats.nvfp4_tensor")
    scale = nvfp4.per_tensor_amax_to_scale(w.abs().amax())
    four = nvfp4.NVFP4Tensor.to_nvfp4(w, per_tensor_scale=scale, is_swizzled_scales=tiles)
    eight = load("torchao.prototype.mx_formats.mx_tensor").MXTensor.to_mx(
        w, torch.float8_e4m3fn, 32, is_swizzled_scales=tiles
    )
    alone = nvfp4.NVFP4Tensor.to_nvfp4(w, is_swizzled_scales=tiles)
    found = looked(saved(tmp_path / "t.safetensors", only(four=four, eight=eight, alone=alone)))
    assert not found.faults
    for name, weight in {"four": four, "eight": eight, "alone": alone}.items():
        # In bfloat16 comfy-kitchen rounds the scales too.
        equals(found, f"{name}.weight", weight.dequantize(torch.float32), torch.bfloat16)


def test_int4_by_the_published_layout(tmp_path: Path) -> None:
    """torchao's own quantizing to `Int4Tensor` needs the package mslk on CUDA, so its values are made here; the class
    and the file are the library's."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-8, 8, (32, 128), generator=generator, dtype=torch.int8)
    scale, zero = (torch.randn(4, 32, generator=generator).to(torch.bfloat16) for _ in range(2))
    packed = (values[:, ::2] & 15) | (values[:, 1::2] << 4)
    weight = q.Int4Tensor(packed, scale, zero, [1, 32], torch.Size((32, 128)))
    found = looked(saved(tmp_path / "t.safetensors", only(a=weight)))
    assert found.layers["a.weight"].format_id == "torchao-int4wo"
    grouped = values.float().reshape(32, 4, 32) * scale.t().float().unsqueeze(-1) + zero.t().float().unsqueeze(-1)
    equals(found, "a.weight", grouped.reshape(32, 128).to(torch.bfloat16))


def test_classes_without_a_format_are_named(tmp_path: Path) -> None:
    tiles = q.Int4TilePackedTo4dTensor(
        torch.zeros(4, 1, 32, 4, dtype=torch.int32),
        torch.zeros(2, 32, 2, dtype=torch.bfloat16),
        [1, 64],
        torch.Size((32, 128)),
    )
    found = looked(saved(tmp_path / "t.safetensors", only(a=tiles)))
    layer = found.layers["a.weight"]
    assert (layer.format_id, layer.type, "Int4TilePackedTo4dTensor" in layer.why) == (
        "",
        "Int4TilePackedTo4dTensor",
        True,
    )
    with pytest.raises(FileError, match="Int4TilePackedTo4dTensor"):
        found.read("a.weight")


def test_asymmetric_int8_is_refused_when_read(tmp_path: Path) -> None:
    w = torch.rand(16, 64) + 1
    kind = load("torchao.quantization.quant_primitives").MappingType.ASYMMETRIC
    weight = q.Int8Tensor.from_hp(w, granularity=q.PerRow(), mapping_type=kind)
    assert weight.zero_point.any()
    found = looked(saved(tmp_path / "t.safetensors", only(a=weight)))
    with pytest.raises(FileError, match="zero points other than 0"):
        found.read("a.weight")


@pytest.mark.parametrize("name", ["int8wo", "int8dyn"])
def test_a_folder_of_diffusers(tmp_path: Path, name: str) -> None:
    from diffusers import FluxTransformer2DModel, TorchAoConfig

    flux().save_pretrained(tmp_path / "plain")
    model: Any = FluxTransformer2DModel.from_pretrained(
        tmp_path / "plain", quantization_config=TorchAoConfig(configs()[name][0]), torch_dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path / "q", safe_serialization=True)
    found = looked(tmp_path / "q")
    assert not found.faults
    assert found.layers
    for weight, layer in found.layers.items():
        assert layer.format_id == configs()[name][1]
        equals(found, weight, model.get_parameter(weight).dequantize())


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = Two(k=64)
    q.quantize_(model, q.Int8WeightOnlyConfig())
    return saved(tmp_path_factory.mktemp("torchao") / "t.safetensors", model)


ZEROS = torch.zeros(7, 1, dtype=torch.int8)


def _other_block(metadata: dict[str, str]) -> None:
    told = json.loads(metadata["a.weight"])
    told["_data"]["block_size"] = [1, 32]
    metadata["a.weight"] = json.dumps(told)


@pytest.mark.parametrize(
    ("code", "tensor", "change"),
    [
        ("tensor-missing", "a._weight_scale", lambda t, m: t.pop("a._weight_scale")),
        ("tensor-missing", "a._weight_qdata", lambda t, m: t.pop("a._weight_qdata")),
        ("scale-shape", "a._weight_scale", lambda t, m: t.update({"a._weight_scale": torch.ones(7, 1)})),
        (
            "zero-point-shape",
            "a._weight_zero_point",
            lambda t, m: t.update({"a._weight_zero_point": t["a.bias"].char()}),
        ),
        ("tensor-dtype", "a._weight_qdata", lambda t, m: t.update({"a._weight_qdata": torch.ones(48, 64)})),
        ("config-contradicts", "a._weight_scale", lambda t, m: _other_block(m)),
    ],
)
def test_damage_is_named(tmp_path: Path, sound: Path, code: str, tensor: str, change: Any) -> None:
    found = looked(edited(sound, tmp_path / "t.safetensors", change))
    assert codes(found) == {code}
    assert fault(found, code).tensor == tensor
    assert not found.layers["a.weight"].format_id
    assert found.layers["b.weight"].format_id


def test_without_metadata_dtypes_tell_the_numbers(tmp_path: Path, sound: Path) -> None:
    found = looked(edited(sound, tmp_path / "t.safetensors", lambda t, m: m.clear()))
    assert {(f.code, f.fatal) for f in found.faults} == {("metadata-missing", False)}
    expected = looked(sound).read("a.weight")
    got = found.read("a.weight")
    assert torch.equal(got.tensors["qdata"], expected.tensors["qdata"])  # type: ignore[union-attr]


@pytest.mark.slow
def test_a_folder_of_transformers(tmp_path: Path) -> None:
    from transformers import T5Config, T5EncoderModel, TorchAoConfig

    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4)
    T5EncoderModel(config).to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    model: Any = T5EncoderModel.from_pretrained(
        tmp_path / "plain", quantization_config=TorchAoConfig(q.Int8WeightOnlyConfig()), dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path / "q")
    found = looked(tmp_path / "q")
    assert not found.faults
    assert len(found.layers) == 6
    for weight in found.layers:
        equals(found, weight, model.get_parameter(weight).dequantize())
