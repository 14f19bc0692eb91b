"""MemoryForecast in a graph of the embedded host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from quantwire.hosts.standalone.executor import Executor
from quantwire.hosts.standalone.validate import InvalidWorkflow
from quantwire.nodes.forecast import MemoryForecast
from quantwire.quantizers.errors import SpecError


@pytest.fixture
def graph(host: Any, make_node: Any) -> Callable[..., dict[str, Any]]:
    def build(source: str = "model", **inputs: Any) -> dict[str, Any]:
        given = {"model": [source, 0], "format": "as it is", "width": 64, "height": 64, "vram_gib": 8.0, **inputs}
        return {
            "model": make_node("UNETLoader", unet_name="digits_flux.safetensors", weight_dtype="default"),
            "clip": make_node("CLIPLoader", clip_name="digits_clip.safetensors", type="stable_diffusion"),
            "vae": make_node("VAELoader", vae_name="digits_tae.safetensors"),
            "q": make_node("QuantizeModel", model=["model", 0], format="gguf-q8-0"),
            "f": make_node("MemoryForecast", **given),
            "image": make_node("Keep", value=["f", 1]),
            "text": make_node("Keep", value=["f", 2]),
        }

    return build


def test_forecast_of_the_demo(graph: Any, executor: Executor) -> None:
    pytest.importorskip("matplotlib")
    result = executor.run(graph(clip=["clip", 0], vae=["vae", 0]))
    (report,) = result.outputs["f"]["report"]
    assert report["verdict"] == "fits"
    assert {p["role"] for p in report["parts"]} == {"diffusion model", "text encoder", "VAE"}
    assert not any(p["assumed"] for p in report["parts"])
    (image,) = result.results["image"]
    assert image.ndim == 4
    assert image.shape[-1] == 3
    assert 0 <= float(image.min()) < float(image.max()) <= 1
    assert result.results["text"][0] == result.outputs["f"]["text"][0]
    # TAESD's decoder, by its own formula.
    assert all("not measured" not in s["how"] for m in report["modes"] for s in m["stages"])


def test_quantized_model_is_what_its_format_was_forecast_as(graph: Any, executor: Executor) -> None:
    pytest.importorskip("matplotlib")
    (before,) = executor.run(graph(format="gguf-q8-0")).outputs["f"]["report"]
    (after,) = executor.run(graph(source="q")).outputs["f"]["report"]
    assert before["parts"][0]["nbytes"] == after["parts"][0]["nbytes"]


def test_wrong_inputs_are_named(graph: Any, executor: Executor) -> None:
    with pytest.raises(InvalidWorkflow, match="nf4"):
        executor.run(graph(format="nf4"))
    assert MemoryForecast.VALIDATE_INPUTS(None, None) is True
    with pytest.raises(SpecError, match="nothing to act on"):
        MemoryForecast().forecast(None, "as it is", 64, 64, keep_layers="x")
