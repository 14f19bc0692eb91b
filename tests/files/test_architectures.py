"""Detection: names and shapes of real models of diffusers and transformers, and what is no model to convert."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantwire.quantizers.errors import FileError
from quantwire.quantizers.families import find_family
from quantwire.quantizers.files.architectures import Found, comfyui_targets, detect, gguf_targets
from quantwire.quantizers.files.layouts.llama_cpp import ARCHITECTURES as LLAMA_CPP
from quantwire.quantizers.files.signatures import SIGNATURES
from quantwire.quantizers.weight import TensorMeta
from real_models import IMAGE_MODELS, SAME_NAMES, TEXT_MODELS, image_shapes, metas_of, on_meta, text_shapes

DEMO = Path(__file__).parents[2] / "demo" / "models"
# What ComfyUI-GGUF's loader.py accepts: IMG_ARCH_LIST and TXT_ARCH_LIST.
COMFYUI_GGUF = {
    *("flux", "sd1", "sdxl", "sd3", "aura", "hidream", "cosmos", "ltxv", "hyvid", "wan", "lumina2", "qwen_image"),
    *("t5", "t5encoder", "llama", "qwen2vl", "qwen3", "qwen3vl", "gemma3"),
}
# `families.py` has names of its own, which plans and reports show.
FAMILY_NAMES = {
    **{"flux2": "flux", "chroma": "flux", "sd1": "sd1.5", "qwen_image": "qwen-image"},
    **{"cosmos1": "cosmos", "cosmos2": "cosmos"},
}


def comfyui_metas(name: str, prefix: str = "") -> dict[str, TensorMeta]:
    metas = metas_of(image_shapes(name))
    made = [t.meta for t in comfyui_targets(detect(metas), metas)]
    return metas_of({prefix + m.name: m.shape for m in made})


def told(found: Found) -> tuple[str, str, str, str, str]:
    return found.family, found.architecture, found.component, found.layout, found.prefix


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_diffusion_models(name: str) -> None:
    family, architecture, _ = IMAGE_MODELS[name]
    layout = "comfyui" if name in SAME_NAMES else "diffusers"
    found = detect(metas_of(image_shapes(name)))
    assert told(found) == (family, architecture, "diffusion model", layout, "")
    assert all(n in image_shapes(name) for n in found.evidence)
    assert told(detect(comfyui_metas(name))) == (family, architecture, "diffusion model", "comfyui", "")


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_families_agree(name: str) -> None:
    """The lists of layers to keep know every model that can be converted, in both layouts."""
    expected = FAMILY_NAMES.get(IMAGE_MODELS[name][0], IMAGE_MODELS[name][0])
    assert find_family(metas_of(image_shapes(name)).values()).name == expected
    assert find_family(comfyui_metas(name).values()).name == expected


@pytest.mark.parametrize("name", ["flux-dev", "sdxl", "sd3", "wan-t2v", "z-image", "ltxv"])
@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "net."])
def test_all_in_one_files(name: str, prefix: str) -> None:
    metas = comfyui_metas(name, prefix)
    model = set(metas)
    metas |= metas_of({f"text_encoders.t5xxl.transformer.{n}": s for n, s in text_shapes("t5encoder").items()})
    metas |= metas_of({"first_stage_model.decoder.conv_in.weight": (64, 4, 3, 3), "vae.decoder.conv_in.bias": (64,)})
    family, architecture, _ = IMAGE_MODELS[name]
    found = detect(metas)
    assert told(found) == (family, architecture, "diffusion model", "comfyui", prefix)
    made = gguf_targets(found, metas)
    assert {p.source for t in made for p in t.pieces} == model
    assert {t.name for t in made} == {t.name for t in gguf_targets(detect(comfyui_metas(name)), comfyui_metas(name))}


def test_other_parts_beside_a_model_without_a_prefix_are_left_out() -> None:
    metas = comfyui_metas("flux-dev") | metas_of({"vae.decoder.conv_in.weight": (64, 4, 3, 3)})
    assert all(t.name != "vae.decoder.conv_in.weight" for t in gguf_targets(detect(metas), metas))


def test_what_training_left_is_dropped() -> None:
    left = {"accum_image_sample_counter": (), "blocks.0.self_attn.q_norm._extra_state": (0,)}
    metas = comfyui_metas("cosmos2", "net.") | metas_of({f"net.{n}": s for n, s in left.items()})
    made = gguf_targets(detect(metas), metas)
    assert {t.name for t in made} == set(comfyui_metas("cosmos2"))


def test_norms_of_flux_are_called_as_in_the_original_files() -> None:
    shapes = {n.replace("_norm.scale", "_norm.weight"): m.shape for n, m in comfyui_metas("flux-dev").items()}
    metas = metas_of(shapes)
    assert "double_blocks.0.img_attn.norm.query_norm.weight" in metas
    assert {t.name for t in gguf_targets(detect(metas), metas)} == set(comfyui_metas("flux-dev"))


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_text_encoders(name: str) -> None:
    architecture = TEXT_MODELS[name][0]
    metas = metas_of(text_shapes(name))
    found = detect(metas)
    assert told(found) == (architecture, architecture, "text encoder", "transformers", "")
    assert architecture in {*COMFYUI_GGUF, "gemma", "gemma2"}
    made = comfyui_targets(found, metas)
    assert [t.name for t in made] == list(metas)


@pytest.mark.parametrize("before", ["text_encoders.t5xxl.transformer.", "t5xxl.transformer."])
def test_a_prefix_before_a_text_encoder(before: str) -> None:
    metas = metas_of({before + n: s for n, s in text_shapes("t5encoder").items()})
    assert told(detect(metas)) == ("t5encoder", "t5encoder", "text encoder", "transformers", before)
    assert [t.name for t in comfyui_targets(detect(metas), metas)] == list(text_shapes("t5encoder"))


@pytest.mark.parametrize(
    "name", ["t5encoder", "umt5", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3"]
)
def test_text_encoders_under_llama_cpps_names(name: str) -> None:
    """Made from the real model by the tables that a conversion uses."""
    architecture = TEXT_MODELS[name][0]
    assert architecture in LLAMA_CPP
    metas = metas_of(text_shapes(name))
    if architecture == "llama":  # heads are 128 wide there
        metas = metas_of(
            {n: tuple(256 if s == 64 else 128 if s == 32 else s for s in m.shape) for n, m in metas.items()}
        )
    made = metas_of({t.name: t.shape for t in gguf_targets(detect(metas), metas)})
    assert told(detect(made)) == (architecture, architecture, "text encoder", "llama.cpp", "")
    assert [t.name for t in gguf_targets(detect(made), made)] == list(made)


def test_strings_are_those_that_loaders_know() -> None:
    strings = {s.architecture for s in SIGNATURES}
    assert strings == COMFYUI_GGUF | {"pixart", "gemma", "gemma2"}


# What cannot be converted.


def _diffusers(name: str, **config: Any) -> Callable[[], torch.nn.Module]:
    import diffusers

    return lambda: getattr(diffusers, name)(**config)


@pytest.mark.parametrize(
    "names",
    [
        ("lora_unet_input_blocks_1_1_proj_in.lora_down.weight", "lora_unet_input_blocks_1_1_proj_in.alpha"),
        ("diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight",),
        ("transformer.transformer_blocks.0.attn.to_q.lora_B.weight",),
        ("lycoris_blocks_0_attn.lokr_w1",),
        ("lora_unet_x.hada_w1_a",),
    ],
)
def test_loras_under_the_names_of_trainers(names: tuple[str, ...]) -> None:
    with pytest.raises(FileError, match=rf"^A LoRA, no model: it has '{names[0]}'\.\nLoad it with a LoRA"):
        detect(metas_of(dict.fromkeys(names, (4, 4))))


ZIMAGE_CONTROL: dict[str, Any] = {
    **{"control_layers_places": [0], "control_refiner_layers_places": [0], "control_in_dim": 16},
    "add_control_noise_refiner": "control_layers",
}
CONTROLNETS: dict[str, Callable[[], torch.nn.Module]] = {
    "sd": _diffusers("ControlNetModel"),
    "flux": _diffusers("FluxControlNetModel", num_layers=1, num_single_layers=1),
    "sd3": _diffusers("SD3ControlNetModel", num_layers=1),
    "qwen": _diffusers("QwenImageControlNetModel", num_layers=1),
    "z-image": _diffusers("ZImageControlNetModel", **ZIMAGE_CONTROL),
}


@pytest.mark.parametrize("name", CONTROLNETS)
def test_controlnets(name: str) -> None:
    with pytest.raises(FileError, match=r"^A ControlNet, no diffusion model: it has '") as caught:
        detect(metas_of(on_meta(CONTROLNETS[name])))
    assert "Load it with a ControlNet loader" in str(caught.value)


VAES: dict[str, Callable[[], torch.nn.Module]] = {
    "sd": _diffusers("AutoencoderKL"),
    "wan": _diffusers("AutoencoderKLWan"),
    "ltx": _diffusers("AutoencoderKLLTXVideo"),
    "qwen": _diffusers("AutoencoderKLQwenImage"),
    "tiny": _diffusers("AutoencoderTiny"),
}


@pytest.mark.parametrize("name", VAES)
def test_vaes(name: str) -> None:
    metas = metas_of(on_meta(VAES[name]))
    with pytest.raises(FileError, match=rf"^A VAE, no diffusion model: it has '.*'\. {len(metas)} tensors"):
        detect(metas)


def test_clip_and_image_encoders() -> None:
    import transformers as t

    for make, what in (
        (lambda: t.CLIPTextModel(t.CLIPTextConfig(num_hidden_layers=1)), "A CLIP text encoder"),
        (lambda: t.CLIPVisionModel(t.CLIPVisionConfig(num_hidden_layers=1)), "An image encoder"),
        (lambda: t.SiglipVisionModel(t.SiglipVisionConfig(num_hidden_layers=1)), "An image encoder"),
    ):
        with pytest.raises(FileError, match=f"^{what}"):
            detect(metas_of(on_meta(make)))


def test_nothing() -> None:
    with pytest.raises(FileError, match=r"^The file holds no tensors"):
        detect({})


def test_an_unknown_model_says_what_was_seen() -> None:
    metas = metas_of({f"net.layers.{i}.weight": (8, 4) for i in range(4)})
    with pytest.raises(FileError) as caught:
        detect(metas)
    first, *rest = str(caught.value).splitlines()
    assert first == (
        "No known diffusion model or text encoder: 4 tensors, all below 'net.layers.', such as 'net.layers.0.weight' "
        "(8, 4), 'net.layers.1.weight' (8, 4), 'net.layers.2.weight' (8, 4)."
    )
    assert rest[0] == "None of the names is one by which a model is recognised."


def test_a_part_of_a_model_names_the_nearest_and_what_is_missing() -> None:
    """The second of several files, as published models in diffusers' layout come."""
    shard = {n: s for n, s in image_shapes("flux-dev").items() if not n.startswith(("x_embedder", "time_text_embed"))}
    with pytest.raises(FileError) as caught:
        detect(metas_of(shard))
    lines = str(caught.value).splitlines()
    assert lines[1] == (
        "Nearest is flux in the layout of diffusers: 'x_embedder.weight' is missing; "
        "'time_text_embed.text_embedder.linear_1.weight' is missing."
    )
    assert lines[2] == "Give the whole model: of a file in several parts, all of them joined."


def test_shapes_count_too() -> None:
    """Names of FLUX with packed matrices, as quantized files of other tools have them; a UNet of an unknown width."""
    packed = comfyui_metas("flux-dev")
    packed["img_in.weight"] = TensorMeta("img_in.weight", (98304,), torch.uint8)
    with pytest.raises(FileError, match=r"'img_in.weight' has shape \(98304,\), expected 2 dimensions"):
        detect(packed)
    unet = {n: tuple(640 if i == 768 else i for i in s) for n, s in image_shapes("sd1").items()}
    with pytest.raises(FileError, match=r"Nearest is sd1 .* is 640 wide, expected 768 or 1024"):
        detect(metas_of(unet))


UNCONVERTED: dict[str, tuple[str, Callable[[], torch.nn.Module]]] = {
    "ltx-2": ("^LTX-2 in diffusers' layout", _diffusers("LTX2VideoTransformer3DModel", num_layers=1)),
    "hyvid-1.5": ("^HunyuanVideo 1.5 in", _diffusers("HunyuanVideo15Transformer3DModel", num_layers=1)),
    "wan-animate-2": ("^Wan-Animate 2 in", _diffusers("WanAnimate2Transformer3DModel", num_layers=1)),
}
# These have most names of a known model.
LOOKALIKES: dict[str, tuple[str, Callable[[], torch.nn.Module]]] = {
    "allegro": ("Nearest is pixart", _diffusers("AllegroTransformer3DModel", num_layers=1)),
    "sana-wm": ("Nearest is pixart", _diffusers("SanaWMTransformer3DModel", num_layers=2)),
    "nucleus": ("Nearest is qwen_image", _diffusers("NucleusMoEImageTransformer2DModel", num_layers=1)),
    "audioldm2": ("Nearest is sd1", _diffusers("AudioLDM2UNet2DConditionModel")),
    "mochi": ("Nearest is ", _diffusers("MochiTransformer3DModel", num_layers=1)),
    "bria": ("Nearest is flux", _diffusers("BriaTransformer2DModel", num_layers=1, num_single_layers=1)),
}
# What is recognised, and has tensors of its own beside those of the known model.
VARIANTS: dict[str, Callable[[], torch.nn.Module]] = {
    "hunyuan-image": _diffusers("HunyuanImageTransformer2DModel", num_layers=1, num_single_layers=1),
    "wan-animate": _diffusers("WanAnimateTransformer3DModel", num_layers=1),
    "helios": _diffusers("HeliosTransformer3DModel", num_layers=1),
    "animatediff": _diffusers("UNetMotionModel", cross_attention_dim=768),
}


@pytest.mark.parametrize("name", UNCONVERTED)
def test_what_cannot_be_converted_is_refused_by_name(name: str) -> None:
    message, make = UNCONVERTED[name]
    with pytest.raises(FileError, match=message) as caught:
        detect(metas_of(on_meta(make)))
    assert "Use the single-file checkpoint" in str(caught.value)


@pytest.mark.parametrize("name", LOOKALIKES)
def test_other_models_are_not_taken_for_known_ones(name: str) -> None:
    message, make = LOOKALIKES[name]
    with pytest.raises(FileError, match=message):
        detect(metas_of(on_meta(make)))


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_with_tensors_of_their_own_are_refused(name: str) -> None:
    metas = metas_of(on_meta(VARIANTS[name]))
    with pytest.raises(FileError, match="have no place in ComfyUI's layout of"):
        comfyui_targets(detect(metas), metas)


def of_file(path: Path) -> dict[str, TensorMeta]:
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return metas_of({n: tuple(e["shape"]) for n, e in header.items() if n != "__metadata__"})


def test_leading_dimensions_of_one_may_be_left_out() -> None:
    """As in GGUF files that went through llama-quantize."""
    for name in ("wan-t2v", "aura"):
        metas = metas_of({n: m.shape[1:] if m.shape[0] == 1 else m.shape for n, m in comfyui_metas(name).items()})
        assert detect(metas) == detect(comfyui_metas(name))


def test_the_demo_models() -> None:
    found = detect(of_file(DEMO / "diffusion_models" / "digits_flux.safetensors"))
    assert told(found) == ("flux", "flux", "diffusion model", "comfyui", "")
    with pytest.raises(FileError, match=r"^A CLIP text encoder"):
        detect(of_file(DEMO / "text_encoders" / "digits_clip.safetensors"))
    with pytest.raises(FileError, match=r"^A VAE"):
        detect(of_file(DEMO / "vae" / "digits_tae.safetensors"))
