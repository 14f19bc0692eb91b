"""A graph on the demo models, and an executor that keeps its loaded models from test to test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from quantwire.hosts import use
from quantwire.hosts.standalone.core_nodes import CORE_NODES
from quantwire.hosts.standalone.executor import Executor
from quantwire.hosts.standalone.host import StandaloneHost
from quantwire.nodes import NODE_CLASS_MAPPINGS

Graph = dict[str, dict[str, Any]]


class Keep:
    """An output node that hands a value out of the graph."""

    RETURN_TYPES = ("*",)
    FUNCTION = "keep"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"value": ("*", {})}}

    def keep(self, value: object) -> tuple[object]:
        return (value,)


@pytest.fixture
def host(demo_models: Path, tmp_path: Path) -> Iterator[StandaloneHost]:
    """Looks in the demo models, then in `tmp_path/models`."""
    with use(StandaloneHost([demo_models, tmp_path / "models"], tmp_path / "out")) as active:
        yield active


@pytest.fixture(scope="session")
def executor() -> Executor:
    return Executor({**CORE_NODES, **NODE_CLASS_MAPPINGS, "Keep": Keep})


@pytest.fixture
def sampled(host: StandaloneHost) -> Callable[..., Graph]:
    """sampled(source, **nodes): the nodes, and two steps of sampling with the model from output 0 of node `source`.

    Node `model` is the demo model, `clip` its text encoder; `latent` and `image` hand out what was sampled.
    """

    def build(source: str = "model", clip: str = "clip", **nodes: dict[str, Any]) -> Graph:
        sampler = {
            "model": [source, 0], "seed": 7, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple",
            "positive": ["prompt", 0], "negative": ["prompt", 0], "latent_image": ["empty", 0], "denoise": 1.0,
        }  # fmt: skip
        return {
            "model": node("UNETLoader", unet_name="digits_flux.safetensors", weight_dtype="default"),
            "clip": node("CLIPLoader", clip_name="digits_clip.safetensors", type="stable_diffusion"),
            "vae": node("VAELoader", vae_name="digits_tae.safetensors"),
            **nodes,
            "prompt": node("CLIPTextEncode", text="a handwritten seven", clip=[clip, 0]),
            "empty": node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
            "sampler": node("KSampler", **sampler),
            "decoded": node("VAEDecode", samples=["sampler", 0], vae=["vae", 0]),
            "latent": node("Keep", value=["sampler", 0]),
            "image": node("Keep", value=["decoded", 0]),
        }

    return build


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


@pytest.fixture
def make_node() -> Callable[..., dict[str, Any]]:
    return node
