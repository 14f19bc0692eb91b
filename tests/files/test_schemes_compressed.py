"""Folders of compressed-tensors: found, read with the library's numbers, and what contradicts them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quantwire.quantizers.errors import FileError
from quantwire.quantizers.registry import availability, get_quantizer
from safetensors.torch import save_file
from scheme_files import Two, codes, computes, edited, equals, fault, looked, weight_of
from torch import Tensor
from torch.nn import functional

pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed: `pip install .[dev]`")
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

N, K = 48, 128
INT, FLOAT = {"type": "int"}, {"type": "float"}
ROW, TENSOR, GROUP = {"strategy": "channel"}, {"strategy": "tensor"}, {"strategy": "group", "group_size": 32}
BLOCK = {"strategy": "block", "block_structure": [16, 64]}
ASYM = {"symmetric": False}
MX = {"scale_dtype": torch.uint8, "zp_dtype": torch.uint8}
# Name -> layout of the library, its arguments, our format, what the layer is called.
CASES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "int8 rows": ("int-quantized", INT | ROW, "quanto-qint8", "int8"),
    "int8 tensor": ("int-quantized", INT | TENSOR, "quanto-qint8", "int8, one scale a tensor"),
    "int8 groups": ("naive-quantized", INT | GROUP, "torchao-int8wo", "int8, groups of 32"),
    "float8 rows": ("float-quantized", FLOAT | ROW, "quanto-qfloat8-e4m3fn", "float8"),
    "float8 tensor": ("float-quantized", FLOAT | TENSOR, "quanto-qfloat8-e4m3fn", "float8, one scale a tensor"),
    "float8 blocks": ("float-quantized", FLOAT | BLOCK, "torchao-float8wo", "float8, blocks of 16 x 64"),
    "packed int4 groups": ("pack-quantized", INT | GROUP | {"num_bits": 4}, "torchao-int4wo", "int4, groups of 32"),
    "packed int4 rows": ("pack-quantized", INT | ROW | {"num_bits": 4}, "torchao-int4wo", "int4"),
    "packed uint4": ("pack-quantized", INT | GROUP | ASYM | {"num_bits": 4}, "torchao-int4wo", "int4, groups of 32"),
    "packed int8": ("pack-quantized", INT | ROW, "quanto-qint8", "int8"),
    "packed int8 groups": ("pack-quantized", INT | GROUP, "torchao-int8wo", "int8, groups of 32"),
    "mxfp4": ("mxfp4-pack-quantized", FLOAT | GROUP | MX | {"num_bits": 4}, "gguf-mxfp4", "mxfp4"),
    "mxfp8": ("mxfp8-quantized", FLOAT | GROUP | MX, "comfy-mxfp8", "mxfp8"),
    "nvfp4": (
        "nvfp4-pack-quantized",
        FLOAT | {"num_bits": 4, "strategy": "tensor_group", "group_size": 16},
        "comfy-nvfp4",
        "nvfp4",
    ),
}


def ranges(w: Tensor, args: QuantizationArgs) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of what shares a scale."""
    if args.strategy == "tensor":
        return w.amin().reshape(1), w.amax().reshape(1)
    if args.strategy == "block":
        rows, columns = args.block_structure or [1, 1]
        parts = w.reshape(N // rows, rows, K // columns, columns)
        return parts.amin(dim=(1, 3)), parts.amax(dim=(1, 3))
    parts = w.reshape(N, -1, args.group_size or K)
    return parts.amin(dim=-1), parts.amax(dim=-1)


def compressed(layout: str, settings: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor, dict[str, Any]]:
    """Tensors of one layer, the weight that the library makes of them, and the folder's config."""
    args = QuantizationArgs(**settings)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    w = torch.randn(N, K, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    state: dict[str, Any] = {"weight": w}
    low, high = ranges(w, args)
    if args.strategy == "tensor_group":
        state["weight_global_scale"] = generate_gparam(w.amin(), w.amax()).reshape(1).float()
    scale, zero_point = calculate_qparams(low, high, args, global_scale=state.get("weight_global_scale"))
    state |= {"weight_scale": scale, "weight_zero_point": zero_point}
    compressor: Any = BaseCompressor.get_value_from_registry(layout)
    tensors = compressor.compress(state, scheme)
    back = compressor.decompress(dict(tensors), scheme)["weight"]
    config = QuantizationConfig(config_groups={"group_0": scheme}, format=layout)
    return tensors, back, json.loads(config.model_dump_json())


def folder(path: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    path.mkdir(exist_ok=True)
    plain = {"a.bias": torch.ones(N, dtype=torch.bfloat16), "norm.weight": torch.ones(K)}
    save_file({f"a.{name}": t.contiguous() for name, t in tensors.items()} | plain, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"quantization_config": config}))
    return path


@pytest.mark.parametrize("name", list(CASES))
def test_a_folder_of_each_layout(tmp_path: Path, name: str) -> None:
    layout, settings, format_id, shown = CASES[name]
    if not availability(format_id).works:
        pytest.skip(availability(format_id).reason)
    tensors, back, config = compressed(layout, settings)
    found = looked(folder(tmp_path / "m", tensors, config))
    assert not found.faults
    layer = found.layers["a.weight"]
    assert (layer.format_id, layer.type, layer.shape) == (format_id, shown, (N, K))
    assert set(found.plain) == {"a.bias", "norm.weight"}
    assert set(layer.tensors.values()) == {f"a.{n}" for n in tensors}
    if name == "nvfp4":
        # A divisor becomes a factor: the same numbers up to one rounding of float32; the library rounds to bfloat16.
        ours = get_quantizer(format_id).dequantize(weight_of(found, "a.weight"), torch.float32)
        assert float(((ours - back.float()).abs() / back.float().abs().clamp(min=1e-9)).max()) < 2**-8
    elif format_id.startswith(("gguf", "comfy")):
        equals(found, "a.weight", back.float(), torch.bfloat16)
    else:
        equals(found, "a.weight", back)
    computes(found, "a.weight", lambda x: functional.linear(x, back.to(x.dtype)), None)


def test_nvfp4_to_the_last_bits(tmp_path: Path) -> None:
    """Codes, block scales and the global scale in float64, against ours in float32."""
    tensors, _, config = compressed(*CASES["nvfp4"][:2])
    found = looked(folder(tmp_path / "m", tensors, config))
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    codes_ = torch.stack([tensors["weight_packed"] & 15, tensors["weight_packed"] >> 4], dim=-1).reshape(N, K).int()
    values = table[codes_ & 7] * (1 - 2 * (codes_ >> 3)).double()
    scale = tensors["weight_scale"].double() / tensors["weight_global_scale"].double()
    exact = values * scale.repeat_interleave(16, dim=1)
    ours = get_quantizer("comfy-nvfp4").dequantize(weight_of(found, "a.weight"), torch.float32).double()
    assert float((ours - exact).abs().max()) <= 2**-22 * float(exact.abs().max())


def test_packed_weights_need_no_config(tmp_path: Path) -> None:
    for name in ("packed int4 groups", "nvfp4", "mxfp4"):
        tensors, _, _ = compressed(*CASES[name][:2])
        path = tmp_path / f"{name}.safetensors"
        save_file({f"a.{n}": t.contiguous() for n, t in tensors.items()}, path)
        assert looked(path).layers["a.weight"].format_id == CASES[name][2]


@pytest.mark.parametrize(
    ("layout", "settings", "why"),
    [
        ("int-quantized", INT | ROW | ASYM, "zero points"),
        ("pack-quantized", INT | ROW | {"num_bits": 3}, "3 bits"),
        ("pack-quantized", INT | ROW | ASYM, "zero points of 8 bits"),
    ],
)
def test_what_has_no_format_is_named(tmp_path: Path, layout: str, settings: dict[str, Any], why: str) -> None:
    tensors, _, config = compressed(layout, settings)
    found = looked(folder(tmp_path / "m", tensors, config))
    layer = found.layers["a.weight"]
    assert (layer.format_id, why in layer.why) == ("", True)
    assert not found.faults
    with pytest.raises(FileError, match=why):
        found.read("a.weight")


SEVEN = torch.zeros(7, K // 8, dtype=torch.int32)


@pytest.mark.parametrize(
    ("case", "code", "tensor", "change"),
    [
        ("int8 rows", "tensor-missing", "weight_scale", lambda t: t.pop("a.weight_scale")),
        ("int8 rows", "scale-without-weight", "weight_scale", lambda t: t.pop("a.weight")),
        ("int8 rows", "scale-shape", "weight_scale", lambda t: t.update({"a.weight_scale": torch.ones(7, 1)})),
        ("nvfp4", "scale-shape", "weight_scale", lambda t: t.update({"a.weight_scale": t["a.weight_scale"][:7]})),
        ("packed uint4", "tensor-missing", "weight_shape", lambda t: t.pop("a.weight_shape")),
        (
            "packed uint4",
            "weight-size",
            "weight_packed",
            lambda t: t.update({"a.weight_packed": t["a.weight_packed"][:7]}),
        ),
        ("packed uint4", "zero-point-shape", "weight_zero_point", lambda t: t.update(_seven_zeros(t))),
        (
            "packed int8",
            "tensor-dtype",
            "weight_scale",
            lambda t: t.update({"a.weight_scale": torch.ones(48, 1).int()}),
        ),
    ],
)
def test_damage_is_named(tmp_path: Path, case: str, code: str, tensor: str, change: Any) -> None:
    tensors, _, config = compressed(*CASES[case][:2])
    sound, broken = folder(tmp_path / "sound", tensors, config), folder(tmp_path / "broken", tensors, config)
    edited(sound / "model.safetensors", broken / "model.safetensors", lambda t, _: change(t))
    found = looked(broken)
    assert codes(found) == {code}
    assert fault(found, code).tensor == f"a.{tensor}"
    assert code == "scale-without-weight" or not found.layers["a.weight"].format_id


def _seven_zeros(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"a.weight_zero_point": tensors["a.weight_zero_point"][:, :1]}


def test_a_config_that_contradicts_the_tensors(tmp_path: Path) -> None:
    tensors, _, _ = compressed(*CASES["packed int4 groups"][:2])
    _, _, other = compressed(*CASES["int8 rows"][:2])
    found = looked(folder(tmp_path / "m", tensors, other))
    assert codes(found) == {"config-contradicts"}
    assert not found.layers["a.weight"].format_id


def test_a_model_that_the_library_compresses_and_describes(tmp_path: Path) -> None:
    """Two groups of layers, found by the library's own targets, with `config.json` as it writes it."""
    model: Any = Two(k=K)
    groups = {
        "four": QuantizationScheme(targets=["re:a"], weights=QuantizationArgs(**(INT | GROUP | {"num_bits": 4}))),
        "eight": QuantizationScheme(targets=["b"], weights=QuantizationArgs(**(INT | ROW))),
    }
    apply_quantization_config(model, QuantizationConfig(config_groups=groups))
    for layer in (model.a, model.b):
        args = layer.quantization_scheme.weights
        parts = layer.weight.detach().reshape(layer.weight.shape[0], -1, args.group_size or K)
        layer.weight_scale.data = calculate_qparams(parts.amin(dim=-1), parts.amax(dim=-1), args)[0]
        layer.weight_zero_point.data.zero_()
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, tmp_path / "model.safetensors")
    compressor.update_config(str(tmp_path))
    found = looked(tmp_path)
    assert not found.faults
    assert {n: x.type for n, x in found.layers.items()} == {"a.weight": "int4, groups of 32", "b.weight": "int8"}
    compressor.decompress_model(model)
    for name in found.layers:
        equals(found, name, model.get_parameter(name).detach())
