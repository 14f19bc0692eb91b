"""CompareQuality in the real ComfyUI: its own modules compared before and after sampling, its own images judged."""

from __future__ import annotations

from typing import Any

import pytest
from graphs import Graph, node, sampled, unet


def comparing(format_id: str) -> Graph:
    quantize = node("QuantizeModel", model=["model", 0], format=format_id)
    graph = sampled(("quantize", 0), {"model": unet("digits_flux.safetensors"), "quantize": quantize}, steps=2)
    graph["sampler_a"] = node("KSampler", **{**graph["sampler"]["inputs"], "model": ["model", 0]})
    graph["vae"] = node("VAELoader", vae_name="digits_tae.safetensors")
    for side, source in (("a", "sampler_a"), ("b", "sampler")):
        graph[f"images_{side}"] = node("VAEDecode", samples=[source, 0], vae=["vae", 0])
    links = {"model_a": ["model", 0], "model_b": ["quantize", 0]}
    links |= {"images_a": ["images_a", 0], "images_b": ["images_b", 0]}
    graph["compare"] = node("CompareQuality", gain=4.0, **links)
    for name, slot in (("plot", 1), ("pictures", 2)):
        graph[name] = node("PreviewImage", images=["compare", slot])
    return graph


@pytest.mark.slow
@pytest.mark.parametrize("format_id", ["quanto-qint8", "comfy-fp8-e4m3fn"])
def test_models_and_images(comfyui: Any, format_id: str) -> None:
    """One format in the pack's own layers, one in ComfyUI's quantized tensors."""
    shown = comfyui.run(comparing(format_id))
    report = shown["compare"]["report"][0]
    # This host computes in float32 on a CPU, so that quanto's scales are float32 too.
    expected = {"quanto-qint8": 44.4, "comfy-fp8-e4m3fn": 31.4}[format_id]
    assert report["layers"]["sqnr_db"] == pytest.approx(expected, abs=0.7)
    assert {x["now"] for x in report["layers"]["layers"] if x["noise"]} == {format_id}
    assert not report["layers"]["only_a"]
    assert not report["layers"]["only_b"]
    assert report["broken"] is False
    assert report["images"]["medians"]["ssim"] > 0.9
    assert shown["plot"]["images"]
    assert shown["pictures"]["images"]


@pytest.mark.slow
def test_half_a_pair_is_refused(comfyui: Any) -> None:
    graph = comparing("quanto-qint8")
    del graph["compare"]["inputs"]["model_b"]
    assert "model_a is linked and model_b is not" in comfyui.fail(graph)["exception_message"]
