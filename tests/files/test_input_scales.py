"""Scales of activations in converted files: from a calibration, and those that a source has."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from quantwire.quantizers.errors import FileError, QuantwireError
from quantwire.quantizers.files.calibration import Calibration, Inputs, write_calibration
from quantwire.quantizers.files.convert_plan import Request
from quantwire.quantizers.files.converting import convert
from quantwire.quantizers.registry import get_quantizer
from quantwire.quantizers.weight import QuantizedWeight
from safetensors.torch import load_file, save_file
from scheme_files import looked
from torch import Tensor

LAYER = "double_blocks.0.img_attn.qkv"


@pytest.fixture(scope="module")
def demo(demo_models: Path) -> Path:
    return demo_models / "diffusion_models" / "digits_flux.safetensors"


@pytest.fixture(scope="module")
def calibration(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "a.json"
    matrices = {name: t for name, t in load_file(demo).items() if t.ndim == 2 and name.endswith(".weight")}
    layers = {name: Inputs(i + 1.0, 4, t.shape[1]) for i, (name, t) in enumerate(sorted(matrices.items()))}
    write_calibration(path, Calibration(layers, ("test",), 1))
    return path


def made(source: Path, target: Path, type: str, **more: Any) -> dict[str, Tensor]:
    convert(Request(source, target, type, **more), lambda total: contextlib.nullcontext(Silent()))  # type: ignore[arg-type]
    return load_file(target)


class Silent:
    def update(self, n: int, /) -> None:
        pass


@pytest.mark.parametrize(
    ("type", "layout", "suffix", "largest"),
    [
        ("comfy-fp8-e4m3fn", "", "input_scale", 448),
        ("comfy-fp8-e5m2", "comfy-metadata", "input_scale", 57344),
        ("comfy-nvfp4", "", "input_scale", 448 * 6),
        ("comfy-fp8-e4m3fn", "scaled-fp8", "scale_input", 448),
    ],
)
def test_every_layer_gets_its_scale(
    tmp_path: Path, demo: Path, calibration: Path, type: str, layout: str, suffix: str, largest: int
) -> None:
    from quantwire.quantizers.files.calibration import read_calibration

    tensors = made(demo, tmp_path / "a.safetensors", type, layout=layout, scales=calibration)
    layers = read_calibration(calibration).layers
    found = looked(tmp_path / "a.safetensors")
    assert not [f for f in found.faults if f.fatal]
    assert found.layers
    for name in found.layers:
        scale = tensors[f"{name.removesuffix('weight')}{suffix}"]
        assert scale.dtype == torch.float32
        assert scale.shape == ()
        assert torch.equal(scale, torch.tensor(layers[name].amax / largest))


def test_what_has_none_is_refused(tmp_path: Path, demo: Path, calibration: Path) -> None:
    cases = {
        ("comfy-int8", "a.safetensors"): "comfy-int8 has no input_scale: it scales inputs as they come",
        ("bnb-nf4", "a.safetensors"): "The layout bnb has no input_scale",
        ("Q4_K_M", "a.gguf"): "Q4_K_M has no input_scale",
        ("BF16", "a.safetensors"): "BF16 has no input_scale",
    }
    for (type, target), error in cases.items():
        with pytest.raises(QuantwireError, match=error):
            made(demo, tmp_path / target, type, scales=calibration)
    assert list(tmp_path.iterdir()) == []


def test_a_calibration_of_another_model_is_refused(tmp_path: Path, demo: Path) -> None:
    path = tmp_path / "a.json"
    write_calibration(path, Calibration({"x.weight": Inputs(1.0, 1, 8)}))
    with pytest.raises(FileError, match="holds none of the layers"):
        made(demo, tmp_path / "a.safetensors", "comfy-nvfp4", scales=path)
    write_calibration(path, Calibration({f"{LAYER}.weight": Inputs(1.0, 1, 8)}))
    with pytest.raises(FileError, match=r"has 8 columns there, 256 in digits_flux.safetensors"):
        made(demo, tmp_path / "a.safetensors", "comfy-nvfp4", scales=path)


def test_layers_that_no_input_reached_are_told(tmp_path: Path, demo: Path) -> None:
    path = tmp_path / "a.json"
    write_calibration(path, Calibration({f"{LAYER}.weight": Inputs(2.0, 1, 256)}))
    report = convert(
        Request(demo, tmp_path / "a.safetensors", "comfy-fp8-e4m3fn", scales=path),
        lambda total: contextlib.nullcontext(Silent()),  # type: ignore[arg-type]
    )
    assert any("no input was recorded, so there is no input_scale" in w for w in report.warnings)
    scales = [n for n in load_file(tmp_path / "a.safetensors") if n.endswith("input_scale")]
    assert scales == [f"{LAYER}.input_scale"]


def test_copied_layers_keep_theirs(tmp_path: Path, demo: Path, calibration: Path) -> None:
    before = made(demo, tmp_path / "a.safetensors", "comfy-fp8-e4m3fn", scales=calibration)
    after = made(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "comfy-fp8-e4m3fn", layout="scaled-fp8")
    assert torch.equal(after[f"{LAYER}.scale_input"], before[f"{LAYER}.input_scale"])
    assert torch.equal(after[f"{LAYER}.weight"].view(torch.uint8), before[f"{LAYER}.weight"].view(torch.uint8))
    back = made(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "comfy-fp8-e4m3fn")
    assert torch.equal(back[f"{LAYER}.input_scale"], before[f"{LAYER}.input_scale"])


def test_factors_of_inputs_stay_with_the_layer_or_go_into_its_columns(tmp_path: Path, demo: Path) -> None:
    tensors = made(demo, tmp_path / "a.safetensors", "comfy-nvfp4")
    factors = torch.linspace(0.5, 2.0, 256, dtype=torch.bfloat16)
    tensors[f"{LAYER}.pre_quant_scale"] = factors
    save_file(tensors, tmp_path / "awq.safetensors", {"format": "pt"})
    copied = made(tmp_path / "awq.safetensors", tmp_path / "copied.safetensors", "comfy-nvfp4")
    assert torch.equal(copied[f"{LAYER}.pre_quant_scale"], factors)
    assert torch.equal(copied[f"{LAYER}.weight"], tensors[f"{LAYER}.weight"])
    plain = made(tmp_path / "awq.safetensors", tmp_path / "plain.safetensors", "F32")
    weight = looked(tmp_path / "awq.safetensors").read(f"{LAYER}.weight")
    assert isinstance(weight, QuantizedWeight)
    expected = get_quantizer("comfy-nvfp4").dequantize(weight, torch.float32) * factors.float()
    torch.testing.assert_close(plain[f"{LAYER}.weight"], expected, rtol=1e-2, atol=1e-6)
    assert not [n for n in plain if n.endswith("pre_quant_scale")]
