"""fp8 files: scaled the old way and the new way, cast without a scale, and what is wrong with each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from quantwire.quantizers.errors import FileError
from small_scans import codes, dequantized, fault, raw, scan_of, weight_of
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
PREFIX = "model.diffusion_model."
Tensors = dict[str, Tensor]


def fp8(n: int = 16, k: int = 32, dtype: torch.dtype = E4M3) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(n + k)).to(dtype)


def old(prefix: str = "", dtype: torch.dtype = E4M3, marker: int = 0) -> Tensors:
    tensors = {f"{prefix}scaled_fp8": torch.zeros(marker, dtype=dtype)}
    for i, name in enumerate(("a", "b.0")):
        tensors |= {f"{prefix}{name}.weight": fp8(16 + i, dtype=dtype), f"{prefix}{name}.bias": torch.zeros(16 + i)}
        tensors[f"{prefix}{name}.scale_weight"] = torch.tensor(0.25 + i)
    tensors[f"{prefix}a.scale_input"] = torch.tensor(0.5)
    return tensors


@pytest.mark.parametrize("marker", [0, 2], ids=["fast", "full-precision"])
@pytest.mark.parametrize("prefix", ["", PREFIX, "text_encoders.t5xxl.transformer."], ids=["bare", "model", "text"])
def test_old(tmp_path: Path, prefix: str, marker: int) -> None:
    tensors = old(prefix, marker=marker)
    found = scan_of(tmp_path, tensors)
    assert found.faults == ()
    assert set(found.layers) == {f"{prefix}a.weight", f"{prefix}b.0.weight"}
    assert set(found.plain) == {f"{prefix}a.bias", f"{prefix}b.0.bias"}  # the marker is no tensor of the model
    for name, layer in found.layers.items():
        assert (layer.scheme, layer.type) == ("scaled-fp8", "scaled float8_e4m3fn")
        assert layer.format_id == "comfy-fp8-e4m3fn"
        assert layer.options.get("full_precision_matrix_mult", False) is (marker == 2)
        scale = tensors[name.replace("weight", "scale_weight")]
        assert torch.equal(dequantized(found, name, torch.float32), tensors[name].float() * scale)
        assert set(weight_of(found, name).tensors) == {"qdata", "scale"}
    assert found.layers[f"{prefix}a.weight"].options["input_scale"] is True
    assert "input_scale" not in found.layers[f"{prefix}b.0.weight"].options


def test_old_e5m2_is_exact_here_and_cast_by_comfyui(tmp_path: Path) -> None:
    tensors = old(dtype=E5M2)
    found = scan_of(tmp_path, tensors)
    assert codes(found) == ["tensor-dtype", "tensor-dtype"]
    assert codes(found, fatal=True) == []
    assert torch.equal(dequantized(found, "a.weight", torch.float32), tensors["a.weight"].float() * 0.25)


def test_old_without_its_marker(tmp_path: Path) -> None:
    tensors = old(PREFIX)
    del tensors[f"{PREFIX}scaled_fp8"]
    found = scan_of(tmp_path, tensors)
    assert codes(found) == ["scaled-fp8-missing"]
    assert "without their scales: noise" in fault(found, "scaled-fp8-missing").effect
    assert len(found.layers) == 2
    assert all(layer.format_id for layer in found.layers.values())


def test_marker_without_scales(tmp_path: Path) -> None:
    tensors = {name: t for name, t in old().items() if "scale_" not in name}
    found = scan_of(tmp_path, tensors)
    assert codes(found) == ["scaled-fp8-without-scales"]
    assert {layer.format_id for layer in found.layers.values()} == {"layerwise-fp8-e4m3fn"}
    assert set(found.plain) == {"a.bias", "b.0.bias"}


def test_old_damage(tmp_path: Path) -> None:
    tensors = old()
    tensors["c.scale_weight"] = torch.tensor(1.0)
    tensors["d.weight"], tensors["d.scale_weight"] = torch.ones(4, 4), torch.tensor(0.5)
    tensors["a.scale_weight"] = torch.ones(3)
    found = scan_of(tmp_path, tensors)
    assert sorted(codes(found)) == ["scale-shape", "scale-without-weight", "tensor-dtype"]
    assert {name for name, layer in found.layers.items() if not layer.format_id} == {"a.weight", "d.weight"}
    with pytest.raises(FileError, match="expected one value"):
        found.read("a.weight")


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (16, 1), (16,)], ids=str)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_new(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...], scale_dtype: torch.dtype) -> None:
    kind = "e4m3fn" if dtype is E4M3 else "e5m2"
    scale = torch.rand(shape).to(scale_dtype)
    tensors = {"a.weight": fp8(dtype=dtype), "a.weight_scale": scale, "a.input_scale": torch.tensor(0.5)}
    found = scan_of(tmp_path, tensors)
    rows = scale.numel() > 1
    layer = found.layers["a.weight"]
    assert layer.format_id == (f"quanto-qfloat8-{kind}" if rows else f"comfy-fp8-{kind}")
    assert layer.options == {"scale": "row" if rows else "tensor", "style": "new", "input_scale": True}
    assert found.plain == ()
    wanted = tensors["a.weight"].float() * (scale.float().reshape(-1, 1) if rows else scale.float())
    assert torch.equal(dequantized(found, "a.weight", torch.float32), wanted)
    assert codes(found) == ["comfy-quant-missing"]
    assert not found.faults[0].fatal


def test_new_in_a_folder_needs_no_comfy_quant(tmp_path: Path) -> None:
    tensors = {"a.weight": fp8(), "a.weight_scale": torch.tensor(0.5)}
    assert scan_of(tmp_path, tensors, config={"_class_name": "X"}).faults == ()


@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv"])
def test_scales_of_blocks_are_named(tmp_path: Path, name: str) -> None:
    found = scan_of(tmp_path, {"a.weight": fp8(256, 384), f"a.{name}": torch.rand(2, 3)})
    assert found.layers["a.weight"].type == "float8_e4m3fn in blocks"
    assert found.plain == ()
    with pytest.raises(FileError, match="blocks of rows and columns"):
        found.read("a.weight")


def test_new_damage(tmp_path: Path) -> None:
    found = scan_of(tmp_path, {"a.weight": fp8(), "a.weight_scale": torch.rand(5), "b.weight_scale": torch.rand(1)})
    assert set(codes(found)) == {"scale-shape", "scale-without-weight", "comfy-quant-missing"}
    assert found.layers["a.weight"].format_id == ""


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
def test_plain_cast(tmp_path: Path, dtype: torch.dtype) -> None:
    kind = "e4m3fn" if dtype is E4M3 else "e5m2"
    kept = {"a.bias": torch.zeros(16).to(dtype), "conv.weight": torch.ones(2, 2, 3, 3).to(dtype)}
    kept |= {"norm.weight": torch.ones(8).to(dtype), "table": fp8(4, 4, dtype)}
    found = scan_of(tmp_path, {"a.weight": fp8(dtype=dtype), **kept})
    assert found.faults == ()
    assert list(found.layers) == ["a.weight"]
    assert set(found.plain) == set(kept)
    layer = found.layers["a.weight"]
    assert (layer.scheme, layer.type, layer.format_id) == ("plain-fp8", f"float8_{kind}", f"layerwise-fp8-{kind}")
    assert torch.equal(raw(weight_of(found, "a.weight").tensors["qdata"]), raw(fp8(dtype=dtype)))
    assert torch.equal(dequantized(found, "a.weight", torch.bfloat16), fp8(dtype=dtype).to(torch.bfloat16))


def test_looking_imports_neither_torch_nor_numpy(tmp_path: Path) -> None:
    from quantwire.quantizers.files.quantized_file import write_quantized

    scan_of(tmp_path, {**old(), "c.weight": fp8(), "d.weight": fp8(), "d.weight_scale": torch.tensor(0.5)})
    write_quantized(tmp_path / "own.safetensors", [("x", torch.ones(3))], {})
    code = (
        "import sys; from pathlib import Path\n"
        "from quantwire.quantizers.files.model_file import open_model\n"
        "from quantwire.quantizers.files.schemes.scan import scan\n"
        "found = [scan(open_model(Path(path))) for path in sys.argv[1:]]\n"
        "print(len(found[0].layers), [name for name in ('torch', 'numpy', 'gguf') if name in sys.modules])\n"
    )
    paths = [str(tmp_path / "model.safetensors"), str(tmp_path / "own.safetensors")]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "4 []"


def learned() -> Tensors:
    """As converters that write a scale for every layer have it: 1 for those that are no fp8 matrices."""
    tensors = old()
    tensors |= {"kept.weight": torch.ones(16, 32, dtype=torch.bfloat16), "kept.scale_weight": torch.tensor(1.0)}
    tensors |= {"kept.scale_input": torch.tensor(1.0)}
    tensors |= {"norm.weight": torch.ones(16).to(E4M3), "norm.scale_weight": torch.ones(1)}
    conv = torch.ones(4, 2, 3, 3).to(E4M3)
    return tensors | {"conv.weight": conv, "conv.scale_weight": torch.tensor(1.0, dtype=torch.bfloat16)}


def test_scales_of_one_beside_other_weights_are_surplus(tmp_path: Path) -> None:
    found = scan_of(tmp_path, learned())
    assert set(found.layers) == {"a.weight", "b.0.weight"}
    assert set(found.plain) == {"a.bias", "b.0.bias", "kept.weight", "norm.weight", "conv.weight"}
    assert [(f.code, f.tensor, f.fatal) for f in found.faults] == [
        ("scale-surplus", "kept.scale_weight", False), ("scale-surplus", "norm.scale_weight", False),
    ]  # fmt: skip
    assert "2 scales are 1" in found.faults[1].text
    assert torch.equal(dequantized(found, "a.weight", torch.float32), fp8().float() * 0.25)


@pytest.mark.parametrize("name", ["kept", "norm", "conv"])
def test_other_scales_there_are_errors(tmp_path: Path, name: str) -> None:
    tensors = learned()
    tensors[f"{name}.scale_weight"] = torch.tensor(0.5)
    found = scan_of(tmp_path, tensors)
    assert len(codes(found, fatal=True)) == 1
    assert found.layers[f"{name}.weight"].format_id == ""


def test_the_doctor_drops_surplus_scales(tmp_path: Path) -> None:
    from quantwire.quantizers.files.doctor import diagnose
    from quantwire.quantizers.files.repair import repair
    from safetensors.torch import load_file

    source = scan_of(tmp_path, learned()).file.path
    done = repair(source, tmp_path / "mended.safetensors")
    assert "scale-surplus" not in [f.code for f in done.after.findings]
    assert done.after == diagnose(tmp_path / "mended.safetensors")
    kept = {n: t for n, t in learned().items() if not n.startswith(("kept.scale", "norm.scale", "conv.scale"))}
    mended = load_file(tmp_path / "mended.safetensors")
    assert set(mended) == set(kept)
    assert all(torch.equal(raw(t), raw(mended[n])) for n, t in kept.items())
