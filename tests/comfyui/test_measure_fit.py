"""FitModel in the real ComfyUI: what it gives is what the host's loader and the pack's quantizing loader give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import Graph, node, sampled, unet
from quantwire.commands.fit_graph import KINDS, workflow
from quantwire.quantizers.measure.activations import RunShape

FILE = "digits_flux.safetensors"
GIB, MIB, RESERVE = 1 << 30, 1 << 20, 1 << 28


def fitting(nbytes: int, name: str = FILE, **inputs: Any) -> Graph:
    """Node `fit` in so much memory, with text encoders that the graph has as `clip`."""
    given = {"vram_gib": (RESERVE + nbytes) / GIB, "clip": ["clip", 0], "width": 64, "height": 64, **inputs}
    return {"fit": node("FitModel", model_name=name, **given)}


def fitted(comfyui: Any, nodes: Graph) -> tuple[torch.Tensor, dict[str, Any]]:
    """The latent sampled with its model and text encoders, and its report."""
    graph = sampled(("fit", 0), nodes)
    graph["prompt"]["inputs"]["clip"] = ["fit", 1]
    outputs = comfyui.run(graph)
    return comfyui.read_latent(outputs["save"]), outputs["fit"]["report"][0]


def formats(report: dict[str, Any]) -> list[str | None]:
    return [pick["format"] for pick in report["picks"]]


@pytest.fixture(scope="module")
def whole(comfyui: Any) -> dict[str, Any]:
    latent, report = fitted(comfyui, fitting(GIB))
    assert torch.equal(latent, comfyui.latent(sampled(("model", 0), {"model": unet()})))
    return report


def alone(comfyui: Any, nbytes: int, **inputs: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """The same without text encoders, which are then not counted."""
    nodes = fitting(nbytes, **inputs)
    del nodes["fit"]["inputs"]["clip"]
    outputs = comfyui.run(sampled(("fit", 0), nodes))
    return comfyui.read_latent(outputs["save"]), outputs["fit"]["report"][0]


@pytest.fixture(scope="module")
def too_little(comfyui: Any) -> int:
    """Bytes in which the model alone does not stay at full precision."""
    return alone(comfyui, GIB)[1]["expected_peak_nbytes"] - 3 * MIB


def test_full_precision_where_it_fits(whole: dict[str, Any]) -> None:
    assert formats(whole) == [None] * len(whole["picks"])
    assert {p["role"] for p in whole["picks"]} == {"diffusion model", "text encoder"}
    for pick in whole["picks"]:
        assert whole["measured_nbytes"][pick["part"]] == pytest.approx(pick["nbytes"], rel=0.01)


def test_quantizes_what_does_not_fit(comfyui: Any, too_little: int) -> None:
    latent, report = alone(comfyui, too_little)
    model = report["picks"][0]
    assert model["format"] is not None
    assert report["expected_peak_nbytes"] <= too_little
    load = {"q": node("LoadAndQuantize", model_name=FILE, format=model["format"])}
    assert torch.equal(latent, comfyui.latent(sampled(("q", 0), load)))
    assert report["measured_nbytes"]["transformer"] == pytest.approx(model["nbytes"], rel=0.01)


def test_a_mixed_recipe(comfyui: Any, too_little: int) -> None:
    _, report = alone(comfyui, too_little, mixed=True)
    model = report["picks"][0]
    assert model["name"] == "mixed recipe"
    assert report["expected_peak_nbytes"] <= too_little
    assert report["measured_nbytes"]["transformer"] == pytest.approx(model["nbytes"], rel=0.01)


def test_text_encoders_are_quantized_before_nothing_fits(comfyui: Any, whole: dict[str, Any]) -> None:
    """The model comes first, so what little is missing is taken from what reads the prompt."""
    latent, report = fitted(comfyui, fitting(whole["expected_peak_nbytes"] - 3 * MIB))
    text = next(p for p in report["picks"] if p["role"] == "text encoder")
    graph = sampled(("model", 0), {"model": unet()})
    graph["text"] = node("QuantizeTextEncoder", clip=["clip", 0], encoders="all", format=text["format"])
    graph["prompt"]["inputs"]["clip"] = ["text", 0]
    assert torch.equal(latent, comfyui.latent(graph))
    assert report["measured_nbytes"][text["part"]] == pytest.approx(text["nbytes"], rel=0.01)


def test_a_quantized_file_stays_as_it_is(comfyui: Any) -> None:
    latent, report = fitted(comfyui, fitting(GIB, "digits_flux-Q8_0.gguf"))
    load = {"q": node("LoadGGUF", gguf_name="digits_flux-Q8_0.gguf")}
    assert torch.equal(latent, comfyui.latent(sampled(("q", 0), load)))
    assert report["from_full_precision"][0]["format"] is None


@pytest.mark.parametrize("family", ["tiny_sd3", "tiny_wan21"])
def test_other_families(comfyui: Any, family: str) -> None:
    fit = {"fit": node("FitModel", model_name=f"{family}.safetensors", vram_gib=8.0)}
    wan = node("EmptyHunyuanLatentVideo", width=128, height=128, length=5, batch_size=1)
    empty = wan if family == "tiny_wan21" else None
    wanted = sampled(("model", 0), {"model": unet(f"{family}.safetensors")}, latent=empty)
    assert torch.equal(comfyui.latent(sampled(("fit", 0), fit, latent=empty)), comfyui.latent(wanted))


def test_nothing_fits(comfyui: Any) -> None:
    graph = sampled(("fit", 0), fitting(MIB))
    assert "Nothing fits" in comfyui.fail(graph)["exception_message"]


def test_written_graphs_are_of_nodes_that_are_here(comfyui: Any) -> None:
    known = comfyui.get("/object_info")
    for family, kind in KINDS.items():
        for count, told in kind.clip.items():
            files = [Path(f"{i}.safetensors") for i in range(count)]
            graph = workflow(family, Path("m.safetensors"), files, Path("v.safetensors"), GIB, RunShape(), "balanced")
            for box in graph.values():
                inputs = known[box["class_type"]]["input"]
                declared = {**inputs["required"], **inputs.get("optional", {})}
                assert set(box["inputs"]) <= set(declared), (family, box["class_type"])
                assert set(inputs["required"]) <= set(box["inputs"]), (family, box["class_type"])
                if "type" in box["inputs"]:
                    options = declared["type"]
                    assert told in (options[1]["options"] if options[0] == "COMBO" else options[0])
