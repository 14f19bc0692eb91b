"""The column of ComfyUI in docs/files.md's table: the file of every type, opened by the node that detection names.

With `QUANTWIRE_WRITE_PAGES=1` what came out is written to tests/files/comfyui_loaded.json, without compared with it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from file_makers import Model
from file_types import TYPES, FileType
from graphs import node, sampled, unet
from quantwire.quantizers.files.detect import detect_file
from quantwire.quantizers.files.loading import COMFYUI

RECORD = Path(__file__).parents[1] / "files" / "comfyui_loaded.json"
INPUT = {"UNETLoader": "unet_name", "CheckpointLoaderSimple": "ckpt_name", "LoadGGUF": "gguf_name"}


@pytest.fixture(scope="module")
def model(comfyui: Any, tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = comfyui.base / "models" / "diffusion_models" / "digits_flux.safetensors"
    return Model(path, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(comfyui: Any) -> torch.Tensor:
    return comfyui.latent(sampled(("model", 0), {"model": unet()}))


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    return {}


def loading(loader: str, name: str) -> dict[str, Any]:
    if loader == "UNETLoader":
        return unet(name)
    return node(loader, **{INPUT.get(loader, "model_name"): name})


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.id)
def test_opened(comfyui: Any, model: Model, expected: torch.Tensor, outcomes: dict[str, str], kind: FileType) -> None:
    folder = comfyui.base / "models" / "diffusion_models"
    place = folder / "types" / kind.id
    place.mkdir(parents=True)
    path = kind.make(model, place)
    said = next(x for x in detect_file(path).loads if x.host == COMFYUI)
    file = min(path.glob("*.safetensors")) if path.is_dir() else path
    name = str(file.relative_to(folder))
    if said.node in ("", "CheckpointLoaderSimple"):
        # A checkpoint has no text encoder here, which that node wants.
        nodes = ("LoadQuantized",)
    else:
        nodes = (said.node,) if not kind.scheme or said.node != "UNETLoader" else (said.node, "LoadQuantized")
    if not said.node:
        message = comfyui.fail(sampled(("model", 0), {"model": loading(nodes[0], name)}))["exception_message"]
        assert (kind.refusal or "cannot be joined by rows") in message
        outcomes[kind.id] = "no"
        return
    latents = [comfyui.latent(sampled(("model", 0), {"model": loading(loader, name)})) for loader in nodes]
    for found in latents:
        assert torch.isfinite(found).all()
        off = float((found - expected).norm() / expected.norm())
        assert off <= kind.off, f"{kind.id}: {off}"
        assert bool(off) == bool(kind.off)
    assert all(torch.equal(found, latents[0]) for found in latents)
    outcomes[kind.id] = ", ".join(nodes)


def test_the_record_says_so(comfyui: Any, outcomes: dict[str, str]) -> None:
    missing = [kind.id for kind in TYPES if kind.id not in outcomes]
    if missing:
        pytest.skip(f"{len(missing)} types were not tried in this run, such as {missing[0]}")
    found = {"comfyui": comfyui.get("/system_stats")["system"]["comfyui_version"], **outcomes}
    if os.environ.get("QUANTWIRE_WRITE_PAGES"):
        RECORD.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    else:
        recorded = json.loads(RECORD.read_text(encoding="utf-8"))
        assert {**recorded, "comfyui": ""} == {**found, "comfyui": ""}
