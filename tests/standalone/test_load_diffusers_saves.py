"""Folders that diffusers itself quantized and saved, against the model that diffusers has in memory.

bitsandbytes is missing here: diffusers quantizes with it on a GPU only.
"""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from quantwire.hosts.standalone import flux
from quantwire.hosts.standalone.models import DiffusionModel, load_diffusion_model
from quantwire.hosts.standalone.quantized import load_quantized
from torch import Tensor

pytestmark = pytest.mark.slow


def config_of(name: str) -> Any:
    import diffusers

    if name == "quanto":
        return diffusers.QuantoConfig(weights_dtype="int8")
    if name == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return diffusers.TorchAoConfig(Int8WeightOnlyConfig())
    from sdnq import SDNQConfig

    return SDNQConfig(weights_dtype="uint4")


@pytest.fixture(scope="module")
def plain(demo_models: Path) -> DiffusionModel:
    return load_diffusion_model(demo_models / "diffusion_models" / "digits_flux.safetensors")


@pytest.fixture(scope="module")
def saved(plain: DiffusionModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "transformer"
    plain.transformer.save_pretrained(folder)  # type: ignore[operator]
    return folder


def velocity(model: DiffusionModel) -> Tensor:
    seed, c = torch.Generator().manual_seed(3), model.config
    x = torch.randn(1, c.in_channels // 4, 8, 8, generator=seed)
    context, pooled = torch.randn(1, 5, c.context_dim, generator=seed), torch.randn(1, c.pooled_dim, generator=seed)
    with torch.inference_mode():
        return flux.velocity(model.transformer, x, 0.7, context, pooled, 3.5, model.dtype)


# torchao multiplies in bfloat16 after the scale was rounded to it; measured 0.0065.
@pytest.mark.parametrize(
    ("name", "format_id", "layers", "tolerance"),
    [("quanto", "quanto-qint8", 44, 0.0), ("torchao", "torchao-int8wo", 44, 0.01), ("sdnq", "sdnq-uint4", 33, 0.0)],
)
def test_folders_of_diffusers(
    plain: DiffusionModel, saved: Path, tmp_path: Path, name: str, format_id: str, layers: int, tolerance: float
) -> None:
    from diffusers import FluxTransformer2DModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers will drop quanto
        theirs: Any = FluxTransformer2DModel.from_pretrained(
            saved, quantization_config=config_of(name), torch_dtype=plain.dtype
        ).eval()
        theirs.save_pretrained(tmp_path / "model")
    expected = velocity(dataclasses.replace(plain, transformer=theirs))
    loaded, report = load_quantized(tmp_path / "model")
    assert (report.format_id, loaded.dtype) == (format_id, plain.dtype)
    assert sum(e.action == "quantize" for e in report.entries) == layers
    assert not any("input_scale" in note for note in report.notes)
    found = velocity(loaded)
    assert float((found - expected).norm() / expected.norm()) <= tolerance
