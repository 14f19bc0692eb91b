"""FindRecipe in the real ComfyUI: measured by its own sampler, carried out by QuantizeModel, nothing left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graphs import Graph, node, sampled, unet

FEW = "gguf-q8-0\ngguf-q4-0\ngguf-q3-k"


def finding(**inputs: Any) -> Graph:
    find = {
        "model": ["model", 0], "positive": ["prompt", 0], "latent": ["empty", 0], "budget": "13.5MB", "formats": FEW,
        "steps": 2, "levels": 1, "seed": 3, "check": True, **inputs,
    }  # fmt: skip
    quantize = node("QuantizeModel", model=["model", 0], format="gguf-q8-0", config=["find", 0])
    nodes = {"model": unet("digits_flux.safetensors"), "find": node("FindRecipe", **find), "quantize": quantize}
    return sampled(("quantize", 0), {**nodes, "plot": node("PreviewImage", images=["find", 3])}, steps=1)


@pytest.mark.slow
def test_recipe_is_measured_checked_and_carried_out(comfyui: Any) -> None:
    shown = comfyui.run(finding())
    recipe = shown["find"]["report"][0]
    assert recipe["full_nbytes"] > 24e6  # float32, which this host computes in on a CPU
    assert recipe["nbytes"] <= 13.5e6
    measured = {s["format"]: s["measured_error"] for s in recipe["singles"]}
    assert recipe["measured_error"] < 0.5 * measured["gguf-q4-0"] < 0.5 * measured["gguf-q3-k"]
    assert all("transformer_blocks" not in unit for unit in recipe["targets"])
    quantized = shown["quantize"]["report"][0]
    assert quantized["totals"]["nbytes_out"] == recipe["nbytes"]
    assert shown["plot"]["images"]


@pytest.mark.slow
def test_the_model_samples_as_before(comfyui: Any) -> None:
    plain = comfyui.latent(sampled(("model", 0), {"model": unet("digits_flux.safetensors")}, steps=2))
    comfyui.run(finding(check=False, seed=4))
    again = sampled(("model", 0), {"model": unet("digits_flux.safetensors")}, steps=2)
    assert torch.equal(comfyui.latent(again), plain)


@pytest.mark.slow
def test_what_is_refused_says_why(comfyui: Any) -> None:
    assert "smallest mixture" in comfyui.fail(finding(budget="1MB"))["exception_message"]
