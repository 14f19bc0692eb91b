"""MemoryForecast in the real ComfyUI: its modules, LoRAs beside the weights, a picture that PreviewImage takes."""

from __future__ import annotations

from typing import Any

import pytest
from graphs import node, unet

SIZE = {"width": 512, "height": 512, "vram_gib": 8.0}


def test_forecast_of_patchers(comfyui: Any) -> None:
    pytest.importorskip("matplotlib")
    graph = {
        "model": unet(),
        "clip": node("CLIPLoader", clip_name="digits_clip.safetensors", type="stable_diffusion"),
        "vae": node("VAELoader", vae_name="digits_tae.safetensors"),
        "lora": node("LoraLoaderModelOnly", model=["model", 0], lora_name="lora.safetensors", strength_model=1.0),
        "q": node("QuantizeModel", model=["model", 0], format="gguf-q8-0"),
        "before": node(
            "MemoryForecast", model=["model", 0], clip=["clip", 0], vae=["vae", 0], format="gguf-q8-0", **SIZE
        ),
        "after": node("MemoryForecast", model=["q", 0], format="as it is", assume_missing=False, **SIZE),
        "patched": node("MemoryForecast", model=["lora", 0], format="gguf-q8-0", **SIZE),
        "image": node("PreviewImage", images=["before", 1]),
    }
    outputs = comfyui.run(graph)
    before, after, patched = (outputs[name]["report"][0] for name in ("before", "after", "patched"))
    assert before["host"] == "comfyui"
    assert before["verdict"] == "fits"
    assert [m["mode"] for m in before["modes"]] == ["dynamic", "partial", "novram", "none"]
    assert {p["role"] for p in before["parts"]} == {"diffusion model", "text encoder", "VAE"}
    assert before["parts"][0]["nbytes"] == after["parts"][0]["nbytes"]
    sampling = [next(s for s in r["modes"][0]["stages"] if s["name"] == "sampling") for r in (before, patched)]
    assert sampling[0]["loras_nbytes"] == 0 < sampling[1]["loras_nbytes"]
    assert sampling[1]["buffer_nbytes"] > 0
    assert all("not measured" not in s["how"] for m in before["modes"] for s in m["stages"])
    assert outputs["image"]["images"]
    assert outputs["before"]["text"][0].startswith("fits")
