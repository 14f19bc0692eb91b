"""LoadAndQuantize in the real ComfyUI: the model that UNETLoader and QuantizeModel give, the first and the second time.

The server's cache is a folder of this run (`QUANTWIRE_CACHE`, set in conftest.py).
"""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from graphs import chain, node, sampled

FORMATS = ["bnb-nf4", "comfy-int8", "comfy-nvfp4", "gguf-q8-0", "quanto-qint4"]


def loading(format_id: str, **inputs: Any) -> dict[str, Any]:
    return node("LoadAndQuantize", model_name="digits_flux.safetensors", format=format_id, **inputs)


def lora(source: str) -> tuple[tuple[str, int], dict[str, Any]]:
    inputs = {"model": [source, 0], "lora_name": "lora.safetensors", "strength_model": 1.0}
    return ("lora", 0), {"lora": node("LoraLoaderModelOnly", **inputs)}


@pytest.mark.parametrize("format_id", FORMATS)
def test_equals_quantize_model(comfyui: Any, format_id: str) -> None:
    model, nodes = chain("QuantizeModel", format_id, False, "default")
    wanted = comfyui.latent(sampled(model, nodes))
    load = {"q": loading(format_id)}
    first = comfyui.run(sampled(("q", 0), load))["q"]["text"][0]
    assert "linear layers" in first
    assert "Made now" in first
    assert torch.equal(comfyui.latent(sampled(("q", 0), load)), wanted)
    # A blank changes nothing but the host's own cache key.
    again = {"q2": loading(format_id, keep_layers=" ")}
    result = comfyui.run(sampled(("q2", 0), again))
    assert "From the cache" in result["q2"]["text"][0]
    assert torch.equal(comfyui.latent(sampled(("q2", 0), again)), wanted)


@pytest.mark.parametrize("mode", ["partial", "novram"])
@pytest.mark.parametrize("format_id", ["bnb-nf4", "comfy-int8"])
def test_offloaded_and_with_a_lora(comfyui: Any, format_id: str, mode: str) -> None:
    model, nodes = chain("QuantizeModel", format_id, True, "default")
    wanted = comfyui.latent(sampled(model, nodes))
    (name, index), with_lora = lora("q")
    forced = {"force": node("ProbeLoad", model=[name, index], mode=mode)}
    got = comfyui.latent(sampled(("force", 0), {"q": loading(format_id), **with_lora, **forced}))
    assert float((got - wanted).norm() / wanted.norm()) <= 1e-5  # as in test_matrix.py


def test_without_cache(comfyui: Any) -> None:
    model, nodes = chain("QuantizeModel", "gguf-q8-0", False, "default")
    load = {"q": loading("gguf-q8-0", cache=False)}
    assert torch.equal(comfyui.latent(sampled(("q", 0), load)), comfyui.latent(sampled(model, nodes)))


def test_library_carrier(comfyui: Any) -> None:
    model, nodes = chain("QuantizeModel", "quanto-qint8", False, "default", {"carrier": "library"})
    load = {"q": loading("quanto-qint8", carrier="library")}
    assert torch.equal(comfyui.latent(sampled(("q", 0), load)), comfyui.latent(sampled(model, nodes)))


@pytest.mark.parametrize("family", ["tiny_sd3", "tiny_wan21"])
def test_other_families(comfyui: Any, family: str) -> None:
    wan = node("EmptyHunyuanLatentVideo", width=128, height=128, length=5, batch_size=1)
    empty = wan if family == "tiny_wan21" else None
    base = node("UNETLoader", unet_name=f"{family}.safetensors", weight_dtype="default")
    nodes = {"model": base, "q": node("QuantizeModel", model=["model", 0], format="bnb-nf4")}
    wanted = comfyui.latent(sampled(("q", 0), nodes, latent=empty))
    load = {"q": node("LoadAndQuantize", model_name=f"{family}.safetensors", format="bnb-nf4")}
    assert torch.equal(comfyui.latent(sampled(("q", 0), load, latent=empty)), wanted)


def test_a_file_of_something_else_is_refused(comfyui: Any) -> None:
    folder = comfyui.base / "models"
    shutil.copy(folder / "text_encoders" / "digits_clip.safetensors", folder / "diffusion_models" / "clip.safetensors")
    load = {"q": node("LoadAndQuantize", model_name="clip.safetensors", format="bnb-nf4")}
    assert "does not detect a diffusion model" in comfyui.fail(sampled(("q", 0), load))["exception_message"]
