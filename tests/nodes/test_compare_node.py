"""CompareQuality in a graph of the embedded host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from quantwire.hosts.standalone.executor import Executor
from quantwire.quantizers.errors import SpecError
from torch import Tensor


def run(executor: Executor, graph: dict[str, Any]) -> tuple[dict[str, Any], str, Tensor, Tensor]:
    result = executor.run(graph)
    shown = result.outputs["c"]
    return shown["report"][0], shown["text"][0], result.results["plot"][0], result.results["pictures"][0]


@pytest.fixture
def compared(sampled: Callable[..., Any], make_node: Callable[..., Any]) -> Callable[..., Any]:
    """compared(**inputs): the demo model as it is and in int8, sampled from one seed, and the node linked as asked."""

    def build(**inputs: Any) -> dict[str, Any]:
        graph = sampled("model", q=make_node("QuantizeModel", model=["model", 0], format="quanto-qint8"))
        sampler = {**graph["sampler"]["inputs"], "model": ["q", 0]}
        graph["sampler_q"] = make_node("KSampler", **sampler)
        graph["decoded_q"] = make_node("VAEDecode", samples=["sampler_q", 0], vae=["vae", 0])
        graph["c"] = make_node("CompareQuality", gain=4.0, **inputs)
        graph["plot"], graph["pictures"] = make_node("Keep", value=["c", 1]), make_node("Keep", value=["c", 2])
        return graph

    return build


MODELS = {"model_a": ["model", 0], "model_b": ["q", 0]}
IMAGES = {"images_a": ["decoded", 0], "images_b": ["decoded_q", 0]}


def test_models_and_images(host: Any, executor: Executor, compared: Any) -> None:
    report, text, plot, pictures = run(executor, compared(**MODELS, **IMAGES))
    assert report["broken"] is False
    assert report["layers"]["sqnr_db"] == pytest.approx(43.5, abs=1)
    assert {layer["now"] for layer in report["layers"]["layers"]} == {"quanto-qint8", "bfloat16"}
    assert report["images"]["medians"]["psnr_db"] > 30
    assert report["noise"]["images"][0]["kind"] == "picture"
    assert text.startswith("images: PSNR")
    for image in (plot, pictures):
        assert image.dtype is torch.float32
        assert image.dim() == 4
        assert image.shape[0] == 1
        assert image.min() >= 0
        assert image.max() <= 1
    assert pictures.shape[1:3] == (64, 3 * 64 + 4)
    assert not torch.equal(plot, torch.ones_like(plot))


def test_models_alone(host: Any, executor: Executor, compared: Any) -> None:
    report, text, plot, pictures = run(executor, compared(**MODELS))
    assert report["images"] is None
    assert text.startswith("weights: 29 of ")
    assert torch.equal(plot, pictures)


def test_broken_images(host: Any, executor: Executor, compared: Any) -> None:
    noise = {"images_a": ["decoded", 0], "images_b": ["noise", 0]}
    graph = compared(**noise)
    graph["noise"] = {"class_type": "VAEDecode", "inputs": {"samples": ["latent_noise", 0], "vae": ["vae", 0]}}
    graph["latent_noise"] = {"class_type": "NoiseLatent", "inputs": {"latent": ["empty", 0]}}
    executor_with = Executor({**executor._classes, "NoiseLatent": NoiseLatent})
    report, text, _, _ = run(executor_with, graph)
    assert report["broken"] is True
    assert text.startswith("images broken: 1 of 1 images (1 noise)")


class NoiseLatent:
    """Latents that no denoiser has touched."""

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"latent": ("LATENT", {})}}

    def make(self, latent: dict[str, Any]) -> tuple[dict[str, Any]]:
        return ({"samples": torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(0))},)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({}, "Nothing is linked"),
        ({"model_a": ["model", 0]}, "model_a is linked and model_b is not"),
        ({"images_b": ["decoded", 0]}, "images_b is linked and images_a is not"),
    ],
    ids=["none", "half of the models", "half of the images"],
)
def test_what_is_not_linked(host: Any, executor: Executor, compared: Any, inputs: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        executor.run(compared(**inputs))
