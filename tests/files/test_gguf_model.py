"""Diffusion models out of GGUF files of several converters; what else a GGUF file may hold is refused by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from quantwire.quantizers.errors import FileError
from quantwire.quantizers.files.checkpoint import read_gguf
from quantwire.quantizers.files.gguf_model import dequantized, in_rows, open_gguf_model
from quantwire.quantizers.weight import QuantizedWeight

SEED = 0
FLUX = {
    "img_in.weight": (64, 64),
    "txt_in.weight": (64, 32),
    "double_blocks.0.img_attn.qkv.weight": (192, 64),
    "double_blocks.0.img_attn.norm.query_norm.scale": (32,),
    "final_layer.linear.weight": (64, 64),
}
WAN = {
    "patch_embedding.weight": (64, 16, 1, 2, 2),
    "patch_embedding.bias": (64,),
    "blocks.0.self_attn.q.weight": (64, 64),
    "text_embedding.0.weight": (64, 32),
    "head.head.weight": (64, 64),
    "head.modulation": (1, 2, 64),
}
UNET = {
    "input_blocks.0.0.weight": (32, 4, 3, 3),
    "input_blocks.0.0.bias": (32,),
    "time_embed.0.weight": (64, 32),
    "input_blocks.4.1.proj_in.weight": (32, 32),
    "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (32, 2048),
    "out.2.weight": (4, 32, 3, 3),
}


def values(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(SEED)
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    arch: str | None = "flux",
    *,
    kind: str = "F32",
    blocks: Mapping[str, str] | None = None,
    stored: Mapping[str, tuple[int, ...]] | None = None,
    orig: Mapping[str, tuple[int, ...]] | None = None,
    strings: Mapping[str, str] | None = None,
) -> Path:
    """`blocks`: name -> type, beside `kind`; `stored`: name -> shape in the file; `orig`: shapes told in keys."""
    writer = gguf.GGUFWriter(str(path), arch or "")
    if arch is None:
        for part in writer.kv_data:
            part.pop("general.architecture", None)
    for key, value in (strings or {}).items():
        writer.add_string(key, value)
    for name, shape in (orig or {}).items():
        writer.add_array(f"comfy.gguf.orig_shape.{name}", list(shape))
    for name, value in tensors.items():
        ggml = gguf.GGMLQuantizationType[(blocks or {}).get(name, kind)]
        value = value.reshape((stored or {}).get(name, value.shape))
        plain = ggml.name[0] in "FI" and ggml.name[1:].isdigit()
        data = value.astype(f"{ggml.name[0].lower()}{int(ggml.name[1:]) // 8}") if plain else gguf.quantize(value, ggml)
        writer.add_tensor(name, data, raw_dtype=ggml)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def shape_of(value: torch.Tensor | QuantizedWeight) -> tuple[int, ...]:
    return value.orig_shape if isinstance(value, QuantizedWeight) else tuple(value.shape)


@pytest.mark.parametrize("arch", ["flux", "pig", None])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_names_and_architecture(tmp_path: Path, arch: str | None, prefix: str) -> None:
    tensors = values(FLUX)
    model = open_gguf_model(write(tmp_path / "m.gguf", {prefix + n: v for n, v in tensors.items()}, arch))
    assert model.found is not None
    assert model.found.architecture == "flux"
    for name, value in tensors.items():
        assert torch.equal(model.values[name], torch.from_numpy(value)), name


@pytest.mark.parametrize("kind", ["Q8_0", "F16"])
@pytest.mark.parametrize("how", ["as it is", "as a matrix", "merged"])
def test_five_dimensions(tmp_path: Path, how: str, kind: str) -> None:
    """A matrix of 64 x 64 has rows of whole blocks, as converters store it that have blocks for it."""
    tensors, name = values(WAN), "patch_embedding.weight"
    stored = {"as it is": {}, "as a matrix": {name: (64, 64)}, "merged": {name: (1024, 1, 2, 2)}}[how]
    told = {name: WAN[name]} if how == "as a matrix" else {}
    used = kind if how == "as a matrix" else "F16"
    stored |= {"head.modulation": (2, 64)} if how == "merged" else {}
    path = write(tmp_path / "m.gguf", tensors, "wan", blocks={name: used}, stored=stored, orig=told)
    model = open_gguf_model(path)
    assert {n: shape_of(v) for n, v in model.values.items()} == WAN
    value = model.values[name]
    got = dequantized(value, torch.float32) if isinstance(value, QuantizedWeight) else value.float()
    expected = gguf.quants.dequantize(
        gguf.quantize(tensors[name].reshape(64, 64), gguf.GGMLQuantizationType[used]), gguf.GGMLQuantizationType[used]
    )
    assert torch.equal(got, torch.from_numpy(expected).reshape(WAN[name]))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1", "TQ2_0"])
def test_matrices_in_rows_of_256(tmp_path: Path, kind: str) -> None:
    """ComfyUI-GGUF's converter for SD 1 and SDXL; the values must be those of the file in the order of the file."""
    shapes = {**FLUX, "double_blocks.0.img_mlp.0.weight": (96, 64), "double_blocks.0.img_mlp.2.weight": (64, 24)}
    tensors = values(shapes)
    stored = {n: (v.size // 256, 256) for n, v in tensors.items() if "mlp" in n}
    orig = {n: shapes[n] for n in stored}
    blocks = dict.fromkeys(stored, kind)
    model = open_gguf_model(write(tmp_path / "m.gguf", tensors, blocks=blocks, stored=stored, orig=orig))
    ggml = gguf.GGMLQuantizationType[kind]
    block = gguf.GGML_QUANT_SIZES[ggml][0]
    for name in stored:
        value: Any = model.values[name]
        assert value.orig_shape == shapes[name]
        assert in_rows(value) == (shapes[name][1] % block == 0)
        expected = gguf.quants.dequantize(gguf.quantize(tensors[name].reshape(-1, 256), ggml), ggml)
        assert torch.equal(dequantized(value, torch.float32), torch.from_numpy(expected.reshape(shapes[name])))


def test_shape_that_cannot_be(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", values(FLUX), orig={"img_in.weight": (64, 65)})
    with pytest.raises(FileError, match=r"'img_in.weight' has shape \(64, 64\), and its other shape"):
        open_gguf_model(path)


@pytest.mark.parametrize(("width", "squeezed"), [(2048, True), (1024, True), (768, False)])
def test_linear_layers_stored_as_convolutions(tmp_path: Path, width: int, squeezed: bool) -> None:
    """By stable-diffusion.cpp in SDXL; SD 1 has convolutions there."""
    shapes = {**UNET, "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (32, width)}
    if width == 2048:
        shapes["label_emb.0.0.weight"] = (64, 2816)
    name = "input_blocks.4.1.proj_in.weight"
    path = write(tmp_path / "m.gguf", values(shapes), None, kind="F16", stored={name: (32, 32, 1, 1)})
    assert shape_of(open_gguf_model(path).values[name]) == ((32, 32) if squeezed else (32, 32, 1, 1))


@pytest.mark.parametrize(
    ("kind", "dtype"), [("F64", torch.float64), ("I32", torch.int32), ("I64", torch.int64), ("I8", torch.int8)]
)
def test_other_plain_types(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    tensors = values({**FLUX, "scale": (3,)})
    found = read_gguf(write(tmp_path / "m.gguf", tensors, blocks={"scale": kind})).tensors["scale"]
    assert torch.equal(found, torch.from_numpy(tensors["scale"]).to(dtype))


def test_what_stands_outside_the_model_is_named(tmp_path: Path) -> None:
    tensors = {f"model.diffusion_model.{n}": v for n, v in values(FLUX).items()} | values({"model_ema.decay": (1,)})
    model = open_gguf_model(write(tmp_path / "m.gguf", tensors))
    assert set(model.values) == set(FLUX)
    assert model.notes == ("1 tensors outside 'model.diffusion_model.' were left out",)


NOT_MODELS: dict[str, tuple[dict[str, tuple[int, ...]], str | None, dict[str, str], str]] = {
    "all-in-one": (
        {f"model.diffusion_model.{n}": s for n, s in FLUX.items()}
        | {"first_stage_model.decoder.conv_in.weight": (4, 4)},
        None,
        {},
        "a whole checkpoint.*\n.*quantwire convert.*LoadGGUFTextEncoder",
    ),
    "llama": ({"token_embd.weight": (8, 32), "blk.0.attn_q.weight": (32, 32)}, "llama", {}, "LoadGGUFTextEncoder"),
    "t5": ({"token_embd.weight": (8, 32), "enc.blk.0.attn_q.weight": (32, 32)}, "t5encoder", {}, "LoadGGUFTextEncoder"),
    "transformers": (
        {
            "shared.weight": (8, 32),
            "encoder.block.0.layer.0.SelfAttention.q.weight": (32, 32),
            "encoder.block.0.layer.1.DenseReluDense.wi_0.weight": (32, 32),
            "encoder.final_layer_norm.weight": (32,),
        },
        "pig",
        {},
        "LoadGGUFTextEncoder",
    ),
    "mmproj": ({"v.blk.0.attn_q.weight": (32, 32), "mm.0.weight": (32, 32)}, "clip", {}, "mmproj.*\n.*beside the file"),
    "vae": ({"decoder.conv_in.weight": (8, 4, 3, 3), "encoder.conv_in.weight": (4, 8, 3, 3)}, "pig", {}, "VAELoader"),
    "lora": ({"blk.0.attn_q.weight.lora_a": (4, 32)}, "llama", {"general.type": "adapter"}, "LoraLoaderModelOnly"),
    "imatrix": (
        {"blk.0.attn_q.weight.in_sum2": (1, 32), "blk.0.attn_q.weight.counts": (1, 1)},
        None,
        {"general.type": "imatrix"},
        "importance matrix.*\n.*quantwire convert",
    ),
}


@pytest.mark.parametrize("case", NOT_MODELS)
def test_files_of_something_else(tmp_path: Path, case: str) -> None:
    shapes, arch, strings, expected = NOT_MODELS[case]
    path = write(tmp_path / "other.gguf", values(shapes), arch, strings=strings)
    with pytest.raises(FileError) as caught:
        open_gguf_model(path)
    assert str(caught.value).startswith("other.gguf: ")
    assert re.search(expected, str(caught.value), re.DOTALL), caught.value


def test_unknown_model_is_left_to_the_host(tmp_path: Path) -> None:
    model = open_gguf_model(write(tmp_path / "m.gguf", values({"layer.weight": (4, 32)}), "newmodel"))
    assert model.found is None
    assert "'layer.weight' (4, 32)" in str(model.problem)
