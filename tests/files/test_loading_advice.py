"""What a file is to be opened with agrees with what is wrong in it, and with what ComfyUI's own nodes read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from header_files import header_of, write_header
from quantwire.quantizers.errors import FileError
from quantwire.quantizers.files.components import Component
from quantwire.quantizers.files.detect import FileFacts, detect_file
from quantwire.quantizers.files.inspect import inspect
from quantwire.quantizers.files.loading import COMFYUI, NEEDED_TO_READ, STANDALONE, Loading, libraries
from quantwire.quantizers.registry import format_ids, get_quantizer

Header = dict[str, tuple[str, tuple[int, ...]]]
FLUX = "diffusion_models/digits_flux.safetensors"
MODEL, TEXT = "model.diffusion_model.", "text_encoders.clip_l.transformer."


def loading(facts: FileFacts, host: str = COMFYUI) -> Loading:
    return next(x for x in facts.loads if x.host == host)


def node(facts: FileFacts, host: str = COMFYUI) -> str:
    return loading(facts, host).node


def is_block(name: str) -> bool:
    return "_blocks." in name and name.endswith(".weight") and "norm" not in name


def fp8(header: Header, scale: str = "scale_weight", shape: Any = lambda _: (), dtype: str = "F8_E4M3") -> Header:
    """The blocks of a model as fp8 with scales beside them."""
    found: Header = {}
    for name, (plain, dims) in header.items():
        found[name] = (dtype if is_block(name) else plain, dims)
        if is_block(name):
            found[name.removesuffix("weight") + scale] = ("F32", shape(dims))
    return found


def named(header: Header, prefix: str = "") -> dict[str, str]:
    layers = {prefix + name.removesuffix(".weight"): {"format": "float8_e4m3fn"} for name in header if is_block(name)}
    return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}


@pytest.fixture
def flux(demo_models: Path) -> Header:
    return header_of(demo_models / FLUX)


@pytest.fixture
def clip(demo_models: Path) -> Header:
    return header_of(demo_models / "text_encoders/digits_clip.safetensors", TEXT)


MARKER: Header = {"scaled_fp8": ("F8_E4M3", (2,))}


@pytest.mark.parametrize("case", ["no marker", "rows", "prefix too many", "e5m2", "no comfy_quant", "sound"])
def test_a_file_that_the_stock_loader_misreads(case: str, flux: Header, tmp_path: Path) -> None:
    tensors, metadata = fp8(flux) | MARKER, dict[str, str]()
    if case == "no marker":
        del tensors["scaled_fp8"]
    elif case == "e5m2":
        tensors = fp8(flux, dtype="F8_E5M2") | MARKER
    elif case == "no comfy_quant":
        tensors = fp8(flux, "weight_scale")
    elif case != "sound":
        tensors = fp8(flux, "weight_scale", (lambda dims: (dims[0], 1)) if case == "rows" else lambda _: ())
        metadata = named(flux, MODEL if case == "prefix too many" else "")
    facts = detect_file(write_header(tmp_path / "flux.safetensors", tensors, metadata))
    assert node(facts, STANDALONE) == "LoadQuantized"
    if case == "sound":
        assert (node(facts), loading(facts).note, facts.warnings) == ("UNETLoader", "", ())
    else:
        assert node(facts) == "LoadQuantized"
        assert loading(facts).note == f"Not UNETLoader: {facts.warnings[0].partition(' (')[0]}"


def test_a_checkpoint_whose_metadata_lacks_the_prefix(flux: Header, clip: Header, tmp_path: Path) -> None:
    model = {MODEL + name: entry for name, entry in fp8(flux, "weight_scale").items()}
    facts = detect_file(write_header(tmp_path / "all.safetensors", model | clip, named(flux)))
    assert node(facts) == "LoadQuantized"
    assert "Not CheckpointLoaderSimple" in loading(facts).note
    right = detect_file(write_header(tmp_path / "right.safetensors", model | clip, named(flux, MODEL)))
    assert node(right) == "CheckpointLoaderSimple"


def test_a_text_encoder_that_the_stock_loader_misreads(tmp_path: Path) -> None:
    layer = "encoder.block.0.layer.0.SelfAttention."
    names = [*(layer + x for x in ("q", "k", "v", "o")), "encoder.block.0.layer.1.DenseReluDense.wo"]
    names += [f"encoder.block.0.layer.1.DenseReluDense.wi_{i}" for i in (0, 1)]
    tensors: Header = {"shared.weight": ("BF16", (64, 64)), f"{layer}relative_attention_bias.weight": ("BF16", (8, 8))}
    for name in names:
        tensors |= {f"{name}.weight": ("F8_E4M3", (64, 64)), f"{name}.scale_weight": ("F32", ())}
    facts = detect_file(write_header(tmp_path / "t5.safetensors", tensors))
    assert facts.main.component is Component.TEXT
    assert node(facts) == ""
    assert "--repair" in loading(facts).note
    assert node(detect_file(write_header(tmp_path / "sound.safetensors", tensors | MARKER))) == "CLIPLoader"


@pytest.mark.parametrize("prefix", ["", "model.", "net.", "model.model.", MODEL])
def test_prefixes_that_unet_loader_knows(prefix: str, flux: Header, tmp_path: Path) -> None:
    facts = detect_file(write_header(tmp_path / "x.safetensors", {prefix + n: e for n, e in flux.items()}))
    assert (facts.main.prefix, node(facts)) == (prefix, "UNETLoader")
    assert (node(facts, STANDALONE) == "UNETLoader") is (prefix in ("", MODEL))


@pytest.mark.parametrize("prefix", ["diffusion_model.", "transformer.", "unet."])
def test_prefixes_that_unet_loader_does_not_know(prefix: str, flux: Header, tmp_path: Path) -> None:
    for header, wanted in ((flux, ""), (fp8(flux) | MARKER, "LoadQuantized")):
        facts = detect_file(write_header(tmp_path / "x.safetensors", {prefix + n: e for n, e in header.items()}))
        assert (facts.main.prefix, node(facts)) == (prefix, wanted)
        assert f"begin with '{prefix}'" in loading(facts).note
        assert ("quantwire convert" in loading(facts).note) is not wanted


def test_a_checkpoint_with_a_quantized_text_encoder(flux: Header, clip: Header, tmp_path: Path) -> None:
    """What the text encoder is stored as decides nothing about the model."""
    attention = next(name for name in clip if name.endswith("q_proj.weight"))
    numel = clip[attention][1][0] * clip[attention][1][1]
    state = ("U8", (2,))
    nf4: Header = clip | {
        attention: ("U8", (numel // 2, 1)),
        f"{attention}.absmax": ("F32", (numel // 64,)),
        f"{attention}.quant_map": ("F32", (16,)),
        f"{attention}.quant_state.bitsandbytes__nf4": state,
    }
    model = {MODEL + name: entry for name, entry in flux.items()}
    facts = detect_file(write_header(tmp_path / "all.safetensors", model | nf4))
    assert (node(facts), node(facts, STANDALONE)) == ("UNETLoader", "")
    assert "left out" in loading(facts).note
    assert loading(facts).libraries == ()
    # The state of that layer is damaged too, which must not stop the model without a prefix.
    bare = detect_file(write_header(tmp_path / "bare.safetensors", fp8(flux) | MARKER | nf4))
    assert any(fault["fatal"] for fault in bare.faults)
    assert (node(bare), node(bare, STANDALONE)) == ("UNETLoader", "LoadQuantized")


def test_only_sdnq_needs_its_package() -> None:
    """By what each backend itself says of reading."""
    formats = {f.partition("-")[0]: f for f in format_ids()}
    for backend in ("bnb", "quanto", "comfy", "sdnq", "torchao", "nncf"):
        own = type(get_quantizer(formats[backend]))
        restores = "probe_reading" in {
            name for cls in own.__mro__[:-1] if cls.__name__ != "Quantizer" for name in vars(cls)
        }
        (library,) = libraries([formats[backend]])
        assert library.needed is (backend in NEEDED_TO_READ) is not restores, backend


def test_the_demo_s_text_encoder_opens_here(demo_models: Path) -> None:
    facts = detect_file(demo_models / "text_encoders/digits_clip.safetensors")
    assert (node(facts), node(facts, STANDALONE)) == ("CLIPLoader", "CLIPLoader")


def test_a_lora_in_fp8(tmp_path: Path) -> None:
    layer = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors: Header = {
        f"{layer}.lora_down.weight": ("F8_E4M3", (4, 64)),
        f"{layer}.lora_up.weight": ("F8_E4M3", (192, 4)),
    }
    assert node(detect_file(write_header(tmp_path / "lora.safetensors", tensors)), STANDALONE) == "LoraLoaderModelOnly"


@pytest.mark.parametrize("stem", ["diffusion_pytorch_model", "model"])
def test_one_variant_is_taken(stem: str, flux: Header, tmp_path: Path) -> None:
    folder = tmp_path / "pipe" / "transformer"
    write_header(folder / f"{stem}.fp16.safetensors", flux)
    facts = detect_file(folder)
    assert (facts.main.family, facts.files) == ("flux", (f"{stem}.fp16.safetensors",))
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    pipeline = detect_file(tmp_path / "pipe")
    assert (list(pipeline.folders), pipeline.warnings) == (["transformer"], ())
    write_header(folder / f"{stem}.bf16.safetensors", flux)
    with pytest.raises(FileError, match="2 variants of one model: bf16, fp16") as said:
        detect_file(folder)
    assert f"{folder / stem}.bf16.safetensors" in str(said.value)
    assert "bf16, fp16" in detect_file(tmp_path / "pipe").warnings[0]
    write_header(folder / f"{stem}.safetensors", flux)
    assert detect_file(folder).files == (f"{stem}.safetensors",)


def test_a_variant_in_parts(flux: Header, tmp_path: Path) -> None:
    every, where = list(flux.items()), dict[str, str]()
    for i, some in enumerate((every[:30], every[30:])):
        name = f"diffusion_pytorch_model.fp16-0000{i + 1}-of-00002.safetensors"
        write_header(tmp_path / name, dict(some))
        where |= {tensor: name for tensor, _ in some}
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.fp16.json"
    index.write_text(json.dumps({"weight_map": where}))
    facts = detect_file(tmp_path)
    assert (facts.tensors, len(facts.files)) == (len(flux), 2)


def svdquant(module: str) -> Header:
    parts = {"qweight": ("I8", (64, 32)), "wscales": ("BF16", (1, 64)), "smooth_factor": ("BF16", (64,))}
    return {f"{module}.{part}": entry for part, entry in parts.items()}


def nunchaku_awq(module: str) -> Header:
    parts = {"qweight": ("I32", (16, 32)), "wscales": ("BF16", (1, 64)), "wzeros": ("BF16", (1, 64))}
    return {f"{module}.{part}": entry for part, entry in parts.items()}


def test_nunchaku(tmp_path: Path) -> None:
    block = "transformer_blocks.0"
    tensors = (
        svdquant(f"{block}.qkv_proj") | svdquant(f"{block}.qkv_proj_context") | nunchaku_awq(f"{block}.norm1.linear")
    )
    facts = detect_file(write_header(tmp_path / "svdq-int4.safetensors", tensors))
    assert (facts.main.component, facts.main.family) == (Component.DIFFUSION, "flux")
    assert facts.title == "FLUX.1 diffusion model, nunchaku SVDQuant, int4, nunchaku AWQ, 4 bits"
    other = write_header(tmp_path / "z.safetensors", svdquant("x"), {"model_class": "NunchakuZImageTransformer2DModel"})
    assert detect_file(other).main.family == "z-image"


def test_awq_of_tinychat(tmp_path: Path) -> None:
    parts = {"qweight": ("I16", (16, 64)), "scales": ("F16", (1, 64)), "scaled_zeros": ("F16", (1, 64))}
    tensors: Header = {f"encoder.block.0.layer.0.SelfAttention.q.{part}": entry for part, entry in parts.items()}
    facts = detect_file(write_header(tmp_path / "awq-int4.safetensors", tensors))
    assert [(t.type, t.numel) for t in facts.types] == [("AWQ, 4 bits", 64 * 64)]
    assert (facts.faults, len(facts.warnings)) == ((), 1)
    assert facts.title.endswith(", AWQ, 4 bits")


@pytest.mark.parametrize("scale", ["weight.scale", "scale"])
def test_fp8_with_a_scale_that_nothing_explains(scale: str, flux: Header, tmp_path: Path) -> None:
    """Neither a plain cast, which would be noise, nor SDNQ, which says so."""
    facts = detect_file(write_header(tmp_path / "flux.safetensors", fp8(flux, scale)))
    assert facts.types[0].scheme == "fp8-scale"
    assert {t.scheme for t in facts.types} == {"fp8-scale", ""}
    assert (node(facts), node(facts, STANDALONE)) == ("", "")
    assert "multiplied or divided by" in loading(facts).note


def test_an_inverse_scale_of_one_value(flux: Header, tmp_path: Path) -> None:
    facts = detect_file(write_header(tmp_path / "flux.safetensors", fp8(flux, "weight_scale_inv")))
    assert "is one value" in loading(facts).note
    assert not any("blocks of rows" in text for text in facts.warnings)


def test_one_warning_for_what_is_wrong_in_all_layers(flux: Header, tmp_path: Path) -> None:
    tensors = fp8(flux, shape=lambda dims: (dims[0] + 1,)) | MARKER
    path = write_header(tmp_path / "flux.safetensors", tensors)
    facts = detect_file(path)
    count = sum(map(is_block, flux))
    (warning,) = facts.warnings
    assert f"({count - 1} more of this kind)" in warning
    note = loading(facts).note
    assert note.count("has shape") == 1
    assert str(inspect(path)).count("more of this kind") == 1


def test_the_parts_of_ltx2(flux: Header, tmp_path: Path) -> None:
    tensors: Header = {MODEL + name: entry for name, entry in flux.items()}
    tensors |= {
        "vae.decoder.conv_in.conv.weight": ("BF16", (8, 128, 3, 3, 3)),
        "audio_vae.decoder.conv_in.conv.weight": ("BF16", (8, 8, 3, 3)),
        "vocoder.conv_pre.weight": ("BF16", (8, 8, 7)),
        "text_embedding_projection.aggregate_embed.weight": ("BF16", (8, 8)),
    }
    facts = detect_file(write_header(tmp_path / "ltx.safetensors", tensors))
    assert [(p.component, p.family, p.prefix) for p in facts.parts[1:]] == [
        (Component.VAE, "video", "vae."),
        (Component.VAE, "audio", "audio_vae."),
        (Component.VOCODER, "", "vocoder."),
        (Component.TEXT, "", "text_embedding_projection."),
    ]
