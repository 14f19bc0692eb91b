"""Doctor and RepairModel in the real ComfyUI: what a broken file does there, and that the repaired one is sound."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import node, sampled, unet
from quantwire.quantizers.files.doctor import diagnose
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

SOURCE = "diffusion_models/digits_flux.safetensors"
PREFIX = "model.diffusion_model."
KEY = "_quantization_metadata"
Tensors = dict[str, Tensor]
Damage = Callable[[Tensors, dict[str, str]], tuple[Tensors, dict[str, str]]]


def read(path: Path) -> tuple[Tensors, dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def unnamed(tensors: Tensors, metadata: dict[str, str]) -> tuple[Tensors, dict[str, str]]:
    return {n: t for n, t in tensors.items() if not n.endswith(".comfy_quant")}, metadata


def one_unnamed(tensors: Tensors, metadata: dict[str, str]) -> tuple[Tensors, dict[str, str]]:
    gone = next(n for n in tensors if n.endswith(".comfy_quant"))
    return {n: t for n, t in tensors.items() if n != gone}, metadata


def prefixed_metadata(tensors: Tensors, metadata: dict[str, str]) -> tuple[Tensors, dict[str, str]]:
    """The names of the layers go into the metadata, with a prefix that the tensors lack."""
    layers = {
        PREFIX + n.removesuffix(".comfy_quant"): json.loads(bytes(t.tolist()))
        for n, t in tensors.items()
        if n.endswith(".comfy_quant")
    }
    return unnamed(tensors, {**metadata, KEY: json.dumps({"format_version": "1.0", "layers": layers})})


def no_marker(tensors: Tensors, metadata: dict[str, str]) -> tuple[Tensors, dict[str, str]]:
    """As scaled fp8 was written before, and its marker lost."""
    kept, _ = unnamed(tensors, metadata)
    return {n.replace(".weight_scale", ".scale_weight"): t for n, t in kept.items()}, metadata


NOISE = ""
# Format, damage, code of the finding, and the node that fails with what it says; NOISE where none does.
CASES: dict[str, tuple[str, Damage, str, tuple[str, str]]] = {
    "fp8-unnamed": ("comfy-fp8-e4m3fn", unnamed, "comfy-quant-missing", (NOISE, "")),
    "nvfp4-unnamed": ("comfy-nvfp4", unnamed, "comfy-quant-missing", ("UNETLoader", "size mismatch for ")),
    "nvfp4-one-unnamed": ("comfy-nvfp4", one_unnamed, "comfy-quant-missing", ("KSampler", "Expected size ")),
    "nvfp4-prefix": (
        "comfy-nvfp4",
        prefixed_metadata,
        "metadata-prefix",
        ("UNETLoader", "Could not detect model type"),
    ),
    "scaled-fp8-unmarked": ("comfy-fp8-e4m3fn", no_marker, "scaled-fp8-missing", (NOISE, "")),
}


@pytest.mark.parametrize("case", CASES)
def test_the_broken_file_fails_and_the_repaired_one_does_not(comfyui: Any, case: str) -> None:
    kind, damage, code, (fails, message) = CASES[case]
    folder = comfyui.base / "models" / "diffusion_models"
    good, bad, new = f"good-{kind}.safetensors", f"bad-{case}.safetensors", f"bad-{case}-repaired.safetensors"
    if not (folder / good).exists():
        comfyui.run({"c": node("ConvertModel", model_name=SOURCE, type=kind, output_name=good)})
    tensors, metadata = damage(*read(folder / good))
    save_file(tensors, folder / bad, metadata)
    (found,) = [f for f in diagnose(folder / bad).findings if f.severity.value == "error"]
    assert found.code == code

    wanted = comfyui.latent(sampled(("m", 0), {"m": unet(good)}))
    broken = sampled(("m", 0), {"m": unet(bad)})
    if fails:
        error = comfyui.fail(broken)
        print(error["exception_message"][:300])
        assert error["node_type"] == fails
        assert message in error["exception_message"]
    else:
        got = comfyui.latent(broken)
        assert (got - wanted).norm() / wanted.norm() > 0.5  # measured 0.827

    if not found.fix:  # scales in tiles and scales by rows have the same size here, so no name is certain
        assert case == "nvfp4-unnamed"
        comfyui.run({"r": node("RepairModel", model_name=f"diffusion_models/{bad}")})
        assert not (folder / new).exists()
        return
    comfyui.run({"r": node("RepairModel", model_name=f"diffusion_models/{bad}")})
    assert torch.equal(comfyui.latent(sampled(("m", 0), {"m": unet(new)})), wanted)
