"""ComfyUI's own files, from comfy-kitchen's tensors: every format in both forms, bit for bit, and planted damage."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantwire.quantizers.errors import FileError
from quantwire.quantizers.registry import availability, get_quantizer
from quantwire.quantizers.spec import QuantSpec
from small_scans import codes, dequantized, fault, json_bytes, raw, same_weight, scan_of, weight_of
from torch import Tensor

pytestmark = pytest.mark.skipif(
    not availability("comfy-int8").works, reason=f"comfy-kitchen: {availability('comfy-int8').reason}"
)
Tensors = dict[str, Tensor]
PREFIX = "model.diffusion_model."
LAYOUTS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    # name: layout of comfy-kitchen, format of ours, arguments of `quantize`, JSON of ComfyUI
    "fp8-e4m3": ("TensorCoreFP8Layout", "comfy-fp8-e4m3fn", {}, {"format": "float8_e4m3fn"}),
    "fp8-e5m2": (
        "TensorCoreFP8Layout",
        "comfy-fp8-e5m2",
        {"dtype": torch.float8_e5m2},
        {"format": "float8_e5m2"},
    ),
    "nvfp4": ("TensorCoreNVFP4Layout", "comfy-nvfp4", {}, {"format": "nvfp4"}),
    "mxfp8": ("TensorCoreMXFP8Layout", "comfy-mxfp8", {}, {"format": "mxfp8"}),
    "int8": ("TensorWiseINT8Layout", "comfy-int8", {}, {"format": "int8_tensorwise"}),
    "int8-row": ("TensorWiseINT8Layout", "comfy-int8", {"per_channel": True}, {"format": "int8_tensorwise"}),
    "int8-convrot": (
        "TensorWiseINT8Layout",
        "comfy-int8-convrot",
        {"per_channel": True, "convrot": True, "convrot_groupsize": 64},
        {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64},
    ),
    "int8-convrot-params": (
        "TensorWiseINT8Layout",
        "comfy-int8-convrot",
        {"per_channel": True, "convrot": True},
        {"format": "int8_tensorwise", "params": {"convrot": True}},
    ),
    "w4a4": ("TensorCoreConvRotW4A4Layout", "comfy-w4a4-convrot", {}, {"format": "convrot_w4a4"}),
    "w4a4-int8": (
        "TensorCoreConvRotW4A4Layout",
        "comfy-w4a4-convrot",
        {"linear_dtype": "int8", "convrot_groupsize": 64},
        {"format": "convrot_w4a4", "linear_dtype": "int8", "convrot_groupsize": 64},
    ),
    "w4a8": ("AsymW4A8Int8Layout", "comfy-w4a8", {}, {"format": "asym_w4a8_int8", "group_size": 16}),
    "w4a8-uniform": ("AsymW4A8Int8Layout", "comfy-w4a8", {"codebook": False}, {"format": "asym_w4a8_int8"}),
}


def made(name: str, n: int = 64, k: int = 512, layer: str = "a") -> tuple[Tensors, dict[str, Any], Tensor]:
    """(tensors of the layer, its JSON, comfy-kitchen's own dequantized values)."""
    import comfy_kitchen.tensor as kitchen

    layout, _, arguments, conf = LAYOUTS[name]
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(n + k)).to(torch.bfloat16)
    quantized: Any = kitchen.QuantizedTensor.from_float(w, layout, **arguments)
    return dict(quantized.state_dict(f"{layer}.weight")), conf, quantized.dequantize()[:n, :k]


def marked(tensors: Tensors, conf: Any, layer: str = "a") -> Tensors:
    return {**tensors, f"{layer}.comfy_quant": json_bytes(conf)}


def metadata(**layers: Any) -> dict[str, str]:
    return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}


@pytest.mark.parametrize("prefix", ["", PREFIX], ids=["bare", "all-in-one"])
@pytest.mark.parametrize("form", ["tensor", "metadata"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_format(tmp_path: Path, name: str, form: str, prefix: str) -> None:
    tensors, conf, theirs = made(name, layer=f"{prefix}a")
    tensors |= {f"{prefix}a.bias": torch.zeros(64), "norm.scale": torch.ones(3)}
    if form == "tensor":
        found = scan_of(tmp_path, marked(tensors, conf, f"{prefix}a"))
    else:
        found = scan_of(tmp_path, tensors, metadata(**{f"{prefix}a": conf}))
    assert found.faults == ()
    one = found.layers[f"{prefix}a.weight"]
    assert (one.scheme, one.type, one.format_id, one.shape) == ("comfy", conf["format"], LAYOUTS[name][1], (64, 512))
    assert set(found.plain) == {f"{prefix}a.bias", "norm.scale"}
    assert torch.equal(dequantized(found, one.name, torch.bfloat16), theirs)


@pytest.mark.parametrize("format_id", sorted({layout[1] for layout in LAYOUTS.values()}))
def test_weight_is_the_backends_own(tmp_path: Path, format_id: str) -> None:
    """Name by name what `quantize` makes, so that everything that computes with it works on a file's layer too."""
    name = next(n for n, layout in LAYOUTS.items() if layout[1] == format_id and n not in ("int8", "int8-convrot"))
    tensors, conf, _ = made(name)
    w = torch.randn(64, 512, generator=torch.Generator().manual_seed(576)).to(torch.bfloat16)
    own = get_quantizer(format_id).quantize(w, QuantSpec(format_id))
    assert same_weight(weight_of(scan_of(tmp_path, marked(tensors, conf)), "a.weight"), own)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp8"])
def test_padded_shapes(tmp_path: Path, name: str) -> None:
    tensors, conf, theirs = made(name, 40, 72)
    stored = {"nvfp4": (48, 80), "mxfp8": (64, 96)}[name]
    found = scan_of(tmp_path, marked(tensors, conf))
    assert found.layers["a.weight"].shape == stored
    found = scan_of(tmp_path, marked({**tensors, "a.bias": torch.zeros(40)}, conf))
    layer = found.layers["a.weight"]
    assert layer.shape == (40, stored[1])
    known = dataclasses.replace(layer, shape=(40, 72))
    weight = found.scheme(layer).weight(known, found.file.read)
    quantizer = get_quantizer(weight.format_id)
    assert torch.equal(quantizer.dequantize(weight, torch.bfloat16), theirs)
    # What is beyond (N, K) multiplies with nothing.
    assert torch.equal(dequantized(found, "a.weight", torch.bfloat16)[:, :72], theirs)
    assert not dequantized(found, "a.weight", torch.float32)[:, 72:].any()


def test_scales_as_bytes(tmp_path: Path) -> None:
    for name in ("nvfp4", "mxfp8", "w4a8"):
        tensors, conf, theirs = made(name)
        scale = "a.weight_s_rel" if name == "w4a8" else "a.weight_scale"
        tensors[scale] = tensors[scale].view(torch.uint8)
        found = scan_of(tmp_path, marked(tensors, conf))
        assert found.faults == ()
        assert torch.equal(dequantized(found, "a.weight", torch.bfloat16), theirs)


def test_packed_bytes_with_a_sign(tmp_path: Path) -> None:
    for name, dtype in (("nvfp4", torch.int8), ("w4a4", torch.uint8), ("w4a8", torch.uint8)):
        tensors, conf, theirs = made(name)
        tensors["a.weight"] = tensors["a.weight"].view(dtype)
        found = scan_of(tmp_path, marked(tensors, conf))
        assert found.faults == ()
        assert torch.equal(dequantized(found, "a.weight", torch.bfloat16), theirs)


def test_int8_with_flat_scales(tmp_path: Path) -> None:
    tensors, conf, theirs = made("int8-row")
    tensors["a.weight_scale"] = tensors["a.weight_scale"].reshape(-1)
    found = scan_of(tmp_path, marked(tensors, conf))
    assert codes(found) == ["scale-shape"]
    assert not found.faults[0].fatal
    assert torch.equal(dequantized(found, "a.weight", torch.bfloat16), theirs)


def test_fp8_with_row_scales_keeps_its_numbers(tmp_path: Path) -> None:
    qdata = torch.randn(8, 16).to(torch.float8_e4m3fn)
    scale = torch.rand(8, 1)
    tensors = marked({"a.weight": qdata, "a.weight_scale": scale}, {"format": "float8_e4m3fn"})
    found = scan_of(tmp_path, tensors)
    assert found.layers["a.weight"].format_id == "quanto-qfloat8-e4m3fn"
    assert codes(found) == ["scale-rows"]
    assert not found.faults[0].fatal
    assert torch.equal(dequantized(found, "a.weight", torch.float32), qdata.float() * scale)


def test_what_belongs_to_the_layer(tmp_path: Path) -> None:
    tensors, conf, _ = made("nvfp4")
    tensors |= {"a.input_scale": torch.tensor(0.5), "a.pre_quant_scale": torch.ones(512)}
    found = scan_of(tmp_path, marked(tensors, {**conf, "full_precision_matrix_mult": True}))
    layer = found.layers["a.weight"]
    assert found.plain == ()
    assert {role: layer.tensors[role] for role in ("input_scale", "pre_quant_scale")} == {
        "input_scale": "a.input_scale",
        "pre_quant_scale": "a.pre_quant_scale",
    }
    assert layer.options == {
        "block_size": 16, "input_scale": True, "pre_quant_scale": True, "full_precision_matrix_mult": True,
    }  # fmt: skip
    assert set(weight_of(found, "a.weight").tensors) == {"qdata", "scale", "block_scale"}


def test_banks_and_six_bits_are_named(tmp_path: Path) -> None:
    bank = {"a.weight": torch.zeros(2, 8, 16).to(torch.float8_e4m3fn), "a.weight_scale": torch.ones(2)}
    found = scan_of(tmp_path, marked(bank, {"format": "float8_e4m3fn", "num_experts": 2}))
    assert found.layers["a.weight"].format_id == ""
    assert found.plain == ()
    with pytest.raises(FileError, match="bank of experts"):
        found.read("a.weight")
    import comfy_kitchen.tensor as kitchen

    w = torch.randn(64, 512).to(torch.bfloat16)
    six: Any = kitchen.QuantizedTensor.from_float(w, "AsymW4A8Int8Layout", bits=6, codebook=False)
    found = scan_of(tmp_path, marked(dict(six.state_dict("a.weight")), {"format": "asym_w4a8_int8"}))
    assert found.layers["a.weight"].shape == (64, 512)
    with pytest.raises(FileError, match="6 bits"):
        found.read("a.weight")


def test_convolutions_are_none_of_comfyuis(tmp_path: Path) -> None:
    conv = {"a.weight": torch.zeros(4, 4, 3, 3).to(torch.float8_e4m3fn), "a.weight_scale": torch.ones(())}
    found = scan_of(tmp_path, marked(conv, {"format": "float8_e4m3fn"}))
    assert codes(found, fatal=True) == ["tensor-shape"]
    assert found.layers["a.weight"].format_id == ""


def _drop(name: str) -> Callable[[Tensors], Any]:
    return lambda t: t.pop(name)


def _change(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Any]:
    return lambda t: t.__setitem__(name, change(t[name]))


CONF = "a.comfy_quant"
BAD_ROTATION = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 48}
DAMAGE: dict[str, tuple[str, Callable[[Tensors], Any], str]] = {
    "fp8 no scale": ("fp8-e4m3", _drop("a.weight_scale"), "tensor-missing"),
    "fp8 column scales": ("fp8-e4m3", _change("a.weight_scale", lambda s: s.expand(64)), "scale-shape"),
    "fp8 scale dtype": ("fp8-e4m3", _change("a.weight_scale", lambda s: s.to(torch.int32)), "tensor-dtype"),
    "fp8 weight dtype": ("fp8-e4m3", _change("a.weight", lambda w: w.to(torch.bfloat16)), "tensor-dtype"),
    "nvfp4 no scale": ("nvfp4", _drop("a.weight_scale"), "tensor-missing"),
    "nvfp4 no second scale": ("nvfp4", _drop("a.weight_scale_2"), "tensor-missing"),
    "nvfp4 untiled": ("nvfp4", _change("a.weight_scale", lambda s: s[:64, :32]), "scale-shape"),
    "nvfp4 second scale": ("nvfp4", _change("a.weight_scale_2", lambda s: s.expand(64)), "tensor-shape"),
    "nvfp4 rows": ("nvfp4", _change("a.weight", lambda w: w[:63]), "tensor-shape"),
    "mxfp8 no scale": ("mxfp8", _drop("a.weight_scale"), "tensor-missing"),
    "mxfp8 scale dtype": ("mxfp8", _change("a.weight_scale", lambda s: s.float()), "tensor-dtype"),
    "int8 no scale": ("int8-row", _drop("a.weight_scale"), "tensor-missing"),
    "int8 short scale": ("int8-row", _change("a.weight_scale", lambda s: s[:-1]), "scale-shape"),
    "rotation": ("int8-row", _change(CONF, lambda _: json_bytes(BAD_ROTATION)), "comfy-quant"),
    "w4a4 no scale": ("w4a4", _drop("a.weight_scale"), "tensor-missing"),
    "w4a4 rows": ("w4a4", _change("a.weight_scale", lambda s: s[:-1]), "tensor-shape"),
    "w4a8 no groups": ("w4a8", _drop("a.weight_s_rel"), "tensor-missing"),
    "w4a8 no channels": ("w4a8", _drop("a.weight_s_channel"), "tensor-missing"),
    "w4a8 codebook": ("w4a8", _change("a.weight_codebook", lambda c: c[:8]), "tensor-shape"),
    "w4a8 packing": ("w4a8", _change("a.weight", lambda w: w[:, :100]), "tensor-shape"),
    "unknown": ("int8", _change(CONF, lambda _: json_bytes({"format": "fp2"})), "format-unknown"),
    "format a list": ("int8", _change(CONF, lambda _: json_bytes({"format": ["int8_tensorwise"]})), "format-unknown"),
    "no format": ("int8", _change(CONF, lambda _: json_bytes({})), "format-unknown"),
    "no weight": ("int8", _drop("a.weight"), "weight-missing"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_a_fault(tmp_path: Path, what: str) -> None:
    name, damage, code = DAMAGE[what]
    tensors, conf, _ = made(name)
    tensors = marked(tensors, conf)
    damage(tensors)
    found = scan_of(tmp_path, tensors)
    assert code in codes(found, fatal=True)
    assert fault(found, code).effect
    assert not found.layers or found.plain == ()  # the scales belong to the layer even so
    for layer in found.layers.values():
        assert layer.format_id == ""
        with pytest.raises(FileError, match=r"a\.weight"):
            found.read(layer.name)


@pytest.mark.parametrize("bad", ["{", "[1]", "[" * 5000])
def test_comfy_quant_that_is_no_json(tmp_path: Path, bad: str) -> None:
    tensors, _, _ = made("int8")
    tensors["a.comfy_quant"] = torch.tensor(list(bad.encode()), dtype=torch.uint8)
    found = scan_of(tmp_path, tensors)
    assert "comfy-quant-json" in codes(found)
    assert found.layers["a.weight"].format_id == ""


@pytest.mark.parametrize("bad", ["{", "[1]", '{"layers": 3}', "{}"])
def test_metadata_that_is_no_json(tmp_path: Path, bad: str) -> None:
    tensors, _, _ = made("nvfp4")
    found = scan_of(tmp_path, tensors, {"_quantization_metadata": bad})
    assert codes(found) == ["metadata-json", "comfy-quant-missing"]


@pytest.mark.parametrize(("inside", "outside"), [("", PREFIX), (PREFIX, "")], ids=["missing", "surplus"])
def test_prefixes_that_disagree(tmp_path: Path, inside: str, outside: str) -> None:
    """The layers are found, and the fault says what ComfyUI makes of it."""
    tensors, conf, theirs = made("nvfp4", layer=f"{outside}a")
    found = scan_of(tmp_path, tensors, metadata(**{f"{inside}a": conf}))
    assert codes(found) == ["metadata-prefix"]
    assert not found.faults[0].fatal
    assert torch.equal(dequantized(found, f"{outside}a.weight", torch.bfloat16), theirs)


def test_metadata_wins_and_names_nothing_else(tmp_path: Path) -> None:
    tensors, conf, theirs = made("int8-convrot")
    found = scan_of(
        tmp_path, marked(tensors, {"format": "int8_tensorwise"}), metadata(a=conf, gone={"format": "nvfp4"})
    )
    assert sorted(codes(found)) == ["layer-missing", "metadata-disagrees"]
    assert codes(found, fatal=True) == []
    assert torch.equal(dequantized(found, "a.weight", torch.bfloat16), theirs)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp8", "int8", "int8-row", "w4a4", "w4a8"])
def test_layers_without_their_json(tmp_path: Path, name: str) -> None:
    tensors, conf, _ = made(name)
    found = scan_of(tmp_path, {**tensors, "a.bias": torch.zeros(64)})
    assert codes(found) == ["comfy-quant-missing"]
    layer = found.layers["a.weight"]
    assert (layer.format_id, layer.options["guess"]["format"]) == ("", conf["format"])
    assert found.plain == ("a.bias",)


def test_tensors_stay_the_files_own(tmp_path: Path) -> None:
    tensors, conf, _ = made("nvfp4")
    found = scan_of(tmp_path, marked(tensors, conf))
    weight = weight_of(found, "a.weight")
    assert torch.equal(raw(weight.tensors["qdata"]), raw(tensors["a.weight"]))
    assert torch.equal(raw(weight.tensors["block_scale"]), raw(tensors["a.weight_scale"]))
    assert weight.nbytes == sum(t.nbytes for t in tensors.values())
