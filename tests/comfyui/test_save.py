"""SaveQuantized in the real ComfyUI: its own loaders and LoadQuantized open the file as the model that was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import chain, node, sampled, unet
from quantwire.quantizers.files.model_file import open_model
from quantwire.quantizers.files.schemes.scan import scan

SAME = 1e-5  # as in test_matrix.py
# format -> who opens what is saved
LOADERS = {
    **dict.fromkeys(("comfy-fp8-e4m3fn", "comfy-nvfp4", "comfy-int8-convrot", "comfy-w4a8"), "UNETLoader"),
    **dict.fromkeys(("bnb-nf4", "quanto-qint8", "torchao-int8wo"), "LoadQuantized"),
    "gguf-q8-0": "LoadGGUF",
}
INPUTS = {"UNETLoader": "unet_name", "LoadQuantized": "model_name", "LoadGGUF": "gguf_name"}


def save(comfyui: Any, nodes: dict[str, Any], last: str, name: str, **inputs: Any) -> Path:
    """Save the model of a node, and put the file among the models."""
    graph = {**nodes, "saved": node("SaveQuantized", model=[last, 0], filename=f"models/{name}", **inputs)}
    text = comfyui.run(graph)["saved"]["text"][0]
    path = Path(text.splitlines()[-1])
    return path.rename(comfyui.base / "models" / "diffusion_models" / path.name)


def load(loader: str, path: Path) -> dict[str, Any]:
    more = {"weight_dtype": "default"} if loader == "UNETLoader" else {}
    return {"load": node(loader, **{INPUTS[loader]: path.name}, **more)}


@pytest.mark.parametrize("format_id", LOADERS)
def test_what_is_saved_is_the_same_model(comfyui: Any, format_id: str) -> None:
    (last, index), nodes = chain("QuantizeModel", format_id, False, "default")
    wanted = comfyui.latent(sampled((last, index), nodes))
    path = save(comfyui, nodes, last, f"saved-{format_id}")
    got = comfyui.latent(sampled(("load", 0), load(LOADERS[format_id], path)))
    if LOADERS[format_id] == "UNETLoader":
        got2 = comfyui.latent(sampled(("load", 0), load("LoadQuantized", path)))
        assert torch.equal(got2, got)
    assert float((got - wanted).norm() / wanted.norm()) <= SAME


def test_a_native_model_is_saved_as_it_was_loaded(comfyui: Any) -> None:
    """ComfyUI's own quantized layers, which UNETLoader made."""
    (last, _), nodes = chain("QuantizeModel", "comfy-int8", False, "default")
    first = save(comfyui, nodes, last, "native-1")
    second = save(comfyui, {"model": unet(first.name)}, "model", "native-2")
    a, b = scan(open_model(first)), scan(open_model(second))
    assert {n: x.format_id for n, x in a.layers.items()} == {n: x.format_id for n, x in b.layers.items()}
    for name in a.layers:
        one, other = a.read(name), b.read(name)
        assert all(torch.equal(one.tensors[k], t) for k, t in other.tensors.items()), name  # type: ignore[union-attr]


@pytest.mark.parametrize("options", [{}, {"lora": "requantize"}])
def test_loras_are_merged(comfyui: Any, options: dict[str, str]) -> None:
    """Never dropped: what is loaded is nearer to the model with the LoRA than to the one without it."""
    plain, nodes = chain("QuantizeModel", "comfy-int8", False, "default", options)
    without = comfyui.latent(sampled(plain, nodes))
    (last, index), nodes = chain("QuantizeModel", "comfy-int8", True, "default", options)
    wanted = comfyui.latent(sampled((last, index), nodes))
    path = save(comfyui, nodes, last, f"lora-{len(options)}")
    got = comfyui.latent(sampled(("load", 0), load("UNETLoader", path)))
    assert float((got - wanted).norm()) < 0.2 * float((wanted - without).norm())


def test_what_cannot_be_saved_is_refused(comfyui: Any) -> None:
    graph = {"model": unet(), "saved": node("SaveQuantized", model=["model", 0], filename="models/x")}
    assert "no layer is quantized" in comfyui.fail(graph)["exception_message"]
    (last, _), nodes = chain("QuantizeModel", "quanto-qint8", False, "default", {"carrier": "library"})
    graph = {**nodes, "saved": node("SaveQuantized", model=[last, 0], filename="models/x")}
    assert "Quantize with carrier quantwire" in comfyui.fail(graph)["exception_message"]
    (last, _), nodes = chain("QuantizeModel", "comfy-int8", False, "default")
    graph = {**nodes, "saved": node("SaveQuantized", model=[last, 0], filename="../x")}
    assert "leads out of the output folder" in comfyui.fail(graph)["exception_message"]
