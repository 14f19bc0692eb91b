"""OffloadCompat's guard in the embedded host: what changes after the node is found before the first step."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from quantwire.hosts import use
from quantwire.hosts.standalone.core_nodes import CORE_NODES
from quantwire.hosts.standalone.executor import Executor
from quantwire.hosts.standalone.host import StandaloneHost
from quantwire.nodes import NODE_CLASS_MAPPINGS
from quantwire.quantizers.errors import OffloadConflict

Graph = dict[str, dict[str, Any]]


class Calls:
    """A node that counts the calls of a model's transformer, and one that hands its model out."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "watch"
    count = 0
    models: list[Any] = []

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL", {})}}

    def watch(self, model: Any) -> tuple[Any]:
        def counted(*_: Any) -> None:
            Calls.count += 1

        model.transformer.register_forward_pre_hook(counted)
        Calls.models.append(model)
        return (model,)


@pytest.fixture
def executor(demo_models: Path, tmp_path: Path) -> Any:
    Calls.count, Calls.models = 0, []
    with use(StandaloneHost([demo_models], tmp_path / "out")):
        yield Executor({**CORE_NODES, **NODE_CLASS_MAPPINGS, "Calls": Calls})


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def graph(last: str, *, clip: str = "clip", seed: int = 7, **nodes: dict[str, Any]) -> Graph:
    sampler = {
        "model": [last, 0], "seed": seed, "steps": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple",
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
        "image": node("PreviewImage", images=["decoded", 0]),
    }


def library(source: str) -> dict[str, Any]:
    return node("QuantizeModel", model=[source, 0], format="bnb-nf4", carrier="library")


def compat(source: str, mode: str = "auto", **inputs: Any) -> dict[str, Any]:
    return node("OffloadCompat", model=[source, 0], mode=mode, action="block", **inputs)


def test_layers_quantized_after_the_node_are_found_before_the_first_step(executor: Executor) -> None:
    after = {"check": compat("model", "sequential"), "q": library("check"), "calls": node("Calls", model=["q", 0])}
    with pytest.raises(OffloadConflict, match=r"^transformer: bnb-nf4 .* cannot run with sequential offload"):
        executor.run(graph("calls", **after))
    assert len(Calls.models) == 1  # it came as far as the sampler
    assert Calls.count == 0
    assert executor.run(graph("calls", **{**after, "check": compat("model", "model")})).outputs["image"]
    assert Calls.count > 0


def test_a_mode_that_was_set_goes_on_with_the_model(executor: Executor) -> None:
    set_first = {"check": compat("model", "sequential", set_mode=True), "q": library("check")}
    with pytest.raises(OffloadConflict, match="right before the model ran"):
        executor.run(graph("q", **set_first))


def test_a_mode_changed_between_two_runs_is_found(executor: Executor) -> None:
    from accelerate import cpu_offload

    nodes = {"q": library("model"), "check": compat("q"), "calls": node("Calls", model=["check", 0])}
    assert executor.run(graph("calls", **nodes)).outputs["image"]
    ran = Calls.count
    (model,) = Calls.models
    cpu_offload(model.transformer, torch.device("cpu"))  # as other code in the process may
    with pytest.raises(OffloadConflict, match=r"^transformer: bnb-nf4 .* cannot run with sequential offload"):
        executor.run(graph("calls", seed=8, **nodes))
    assert len(Calls.models) == 1  # what the nodes made was taken from the last run
    assert Calls.count == ran


def test_text_encoders_are_guarded_too(executor: Executor) -> None:
    nodes = {
        "check": node("OffloadCompat", clip=["clip", 0], mode="sequential", action="block"),
        "q": node("QuantizeTextEncoder", clip=["check", 2], format="bnb-nf4", encoders="all", carrier="library"),
    }
    with pytest.raises(OffloadConflict, match=r"^clip_l: bnb-nf4"):
        executor.run(graph("model", clip="q", **nodes))


def test_two_nodes_in_a_chain_leave_one_guard(executor: Executor) -> None:
    nodes = {"one": compat("model", "sequential"), "two": compat("one", "model")}
    nodes["calls"] = node("Calls", model=["two", 0])
    assert executor.run(graph("calls", **nodes)).outputs["image"]
    (model,) = Calls.models
    assert model.guard.mode.value == "model"


def test_copies_of_the_model_keep_the_guard(executor: Executor) -> None:
    nodes = {"check": compat("model", "model"), "calls": node("Calls", model=["check", 0])}
    executor.run(graph("calls", **nodes))
    (model,) = Calls.models
    assert model.with_transformer(torch.nn.Sequential()).guard is model.guard is not None
    assert dataclasses.replace(model, guard=None) == model  # a guard makes no other model
