"""ConvertModel in the real ComfyUI: its files load there, GGUF through LoadGGUF and native ones through UNETLoader."""

from __future__ import annotations

from typing import Any

import pytest
from graphs import node, sampled, unet

SOURCE = "diffusion_models/digits_flux.safetensors"


def convert(comfyui: Any, kind: str, **inputs: Any) -> str:
    graph = {"c": node("ConvertModel", model_name=SOURCE, type=kind, overwrite=True, **inputs)}
    return comfyui.run(graph)["c"]["text"][0]


def error(comfyui: Any, loader: dict[str, Any]) -> float:
    full = comfyui.latent(sampled(("m", 0), {"m": unet()}))
    got = comfyui.latent(sampled(("q", 0), {"q": loader}))
    return float((got - full).norm() / full.norm())


# Relative errors of the latent; measured 0.0028, 0.034 and 0.
@pytest.mark.parametrize(("kind", "bound"), [("Q8_0", 0.006), ("Q4_K_M", 0.07), ("BF16", 1e-6)])
def test_gguf(comfyui: Any, kind: str, bound: float) -> None:
    name = f"converted-{kind}.gguf"
    text = convert(comfyui, kind, output_name=name)
    assert text.startswith(f"{name}: ")
    assert error(comfyui, node("LoadGGUF", gguf_name=name)) < bound


# Measured 0.017, 0.0095, 0.061, 0.015 and 0.044.
@pytest.mark.parametrize(
    ("kind", "bound"),
    [
        *[("comfy-fp8-e4m3fn", 0.035), ("comfy-int8", 0.02), ("comfy-nvfp4", 0.13), ("comfy-mxfp8", 0.03)],
        ("comfy-w4a8", 0.09),
    ],
)
def test_native_files_open_in_the_stock_loader(comfyui: Any, kind: str, bound: float) -> None:
    convert(comfyui, kind, output_name=f"native-{kind}.safetensors")
    found = error(comfyui, unet(f"native-{kind}.safetensors"))
    assert 0 < found < bound, found


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        *[("comfy-fp8-e4m3fn", "comfy-metadata"), ("comfy-w4a8", "comfy-metadata"), ("comfy-nvfp4", "comfy-metadata")],
        ("comfy-fp8-e4m3fn", "scaled-fp8"),
    ],
)
def test_other_layouts_give_the_same_in_the_stock_loader(comfyui: Any, kind: str, layout: str) -> None:
    """The same layers with their format told in another way; scaled fp8 asks for full-precision products as well."""
    latents: list[Any] = []
    for chosen in ("comfy", layout):
        name = f"layout-{kind}-{chosen}.safetensors"
        convert(comfyui, kind, output_name=name, layout=chosen)
        latents.append(comfyui.latent(sampled(("q", 0), {"q": unet(name)})))
    first, second = latents
    bound = 0.035 if layout == "scaled-fp8" else 0.0
    assert float((second - first).norm() / first.norm()) <= bound
    assert error(comfyui, unet(f"layout-{kind}-{layout}.safetensors")) > 0


def test_the_way_back_opens_in_the_stock_loader(comfyui: Any) -> None:
    convert(comfyui, "Q8_0", output_name="there.gguf")
    graph = {"c": node("ConvertModel", model_name="diffusion_models/there.gguf", type="BF16", overwrite=True)}
    assert comfyui.run(graph)["c"]["text"][0].startswith("there-BF16.safetensors: ")
    assert error(comfyui, unet("there-BF16.safetensors")) < 0.006


def test_dry_run(comfyui: Any) -> None:
    text = convert(comfyui, "Q3_K_M", dry_run=True, keep_layers="img_mlp")
    assert "bits a weight; nothing was written" in text
    assert "excluded" in text
