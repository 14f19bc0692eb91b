"""Codes that lost their scales: named, not loaded, and nothing that a sound file holds is taken for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from quantwire.quantizers.errors import FileError, WeightError
from quantwire.quantizers.files.detect import detect_file
from quantwire.quantizers.files.doctor import Severity, diagnose
from quantwire.quantizers.files.numbers import BLOCK_NBYTES, check_codes, check_plain
from small_scans import codes, fault, json_bytes, scan_of
from torch import Tensor

PREFIX = "model.diffusion_model."
E4M3 = torch.float8_e4m3fn
Tensors = dict[str, Tensor]


def integers(dtype: torch.dtype, shape: tuple[int, ...] = (16, 32)) -> Tensor:
    return torch.ones(shape, dtype=dtype)


def fp8(n: int = 16) -> Tensor:
    return torch.linspace(-400, 400, n * 32).reshape(n, 32).to(E4M3)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32], ids=str)
@pytest.mark.parametrize("shape", [(16, 32), (256, 1), (4, 2, 3, 3)], ids=str)
def test_integers_are_codes(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    found = scan_of(tmp_path, {"a.weight": integers(dtype, shape), "a.bias": torch.zeros(16)})
    assert codes(found) == ["scale-missing"]
    assert fault(found, "scale-missing").fatal
    assert "noise" in fault(found, "scale-missing").effect
    layer = found.layers["a.weight"]
    assert (layer.scheme, layer.format_id, layer.shape) == ("unclaimed", "", shape)
    assert found.plain == ("a.bias",)
    assert found.scheme(layer).title == "codes without scales"
    with pytest.raises(FileError, match=r"'a.weight' is [IU]\d+ codes: its codes have no scales.*\n.*quantize the"):
        found.read("a.weight")


def test_detect_and_doctor_say_so(tmp_path: Path) -> None:
    found = scan_of(tmp_path, {"double_blocks.0.img_attn.qkv.weight": integers(torch.int8)})
    facts = detect_file(found.file.path)
    assert [kind.type for kind in facts.types] == ["I8 codes"]
    assert all(not way.node for way in facts.loads)
    assert any("codes whose scales are missing" in text for text in facts.warnings)
    (finding,) = [f for f in diagnose(found.file.path).findings if f.code == "scale-missing"]
    assert (finding.severity, finding.fix) == (Severity.ERROR, "")


def test_what_is_beside_the_codes_is_named(tmp_path: Path) -> None:
    tensors = {"a.weight": integers(torch.int8), "a.weight_scale": torch.rand(16, 4), "a.weight.other": torch.ones(2)}
    text = fault(scan_of(tmp_path, tensors), "scale-missing").text
    assert text.startswith("'a.weight' is I8 [16, 32] beside weight_scale, weight.other: codes whose scales")


def test_sound_files_have_none(tmp_path: Path) -> None:
    """Integers that are no weights, and codes that other schemes know."""
    kept = {
        "embeddings.position_ids": torch.arange(77)[None],
        "norm.num_batches_tracked": torch.tensor(3),
        "attn.relative_position_index": integers(torch.int64),
        "text_encoders.t5xxl.spiece_model": torch.arange(33, dtype=torch.uint8),
        "tekken_model": torch.arange(33, dtype=torch.uint8),
        "token_ids.weight": torch.arange(5),
        "none.weight": torch.zeros(0, 4, dtype=torch.int8),
    }
    int8 = {"a.weight": integers(torch.int8), "a.weight_scale": torch.ones(16, 1)}
    int8["a.comfy_quant"] = json_bytes({"format": "int8_tensorwise"})
    bnb = {"b.weight": integers(torch.int8), "b.SCB": torch.ones(16)}
    found = scan_of(tmp_path, {**kept, **int8, **bnb})
    assert found.faults == ()
    assert {layer.scheme for layer in found.layers.values()} == {"comfy", "bnb"}
    assert set(found.plain) == set(kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_unnamed_int8_with_scales_of_any_dtype_is_comfyui_s(tmp_path: Path, dtype: torch.dtype) -> None:
    found = scan_of(tmp_path, {"a.weight": integers(torch.int8), "a.weight_scale": torch.ones(16, 1, dtype=dtype)})
    assert codes(found, fatal=True) == ["comfy-quant-missing"]
    assert found.layers["a.weight"].type == "int8_tensorwise"


def test_block_maxima_alone_are_bitsandbytes(tmp_path: Path) -> None:
    tensors = {"a.weight": integers(torch.uint8, (1024, 1)), "a.weight.absmax": torch.ones(32)}
    found = scan_of(tmp_path, tensors)
    assert codes(found, fatal=True) == ["quant-state-missing"]
    assert found.layers["a.weight"].scheme == "bnb"
    assert found.plain == ()


def scaled(style: str, prefix: str = "", value: float = 0.5) -> Tensors:
    tensors: Tensors = {f"{prefix}scaled_fp8": torch.zeros(0, dtype=E4M3)} if style == "old" else {}
    for name in ("a", "b", "c"):
        tensors[f"{prefix}{name}.weight"] = fp8()
        scale = "scale_weight" if style == "old" else "weight_scale"
        tensors[f"{prefix}{name}.{scale}"] = torch.tensor(value)
        if style == "comfy":
            tensors[f"{prefix}{name}.comfy_quant"] = json_bytes({"format": "float8_e4m3fn"})
    return tensors


def without_scale(tensors: Tensors, name: str) -> Tensors:
    return {n: t for n, t in tensors.items() if n == f"{name}.weight" or not n.startswith(f"{name}.")}


@pytest.mark.parametrize("prefix", ["", PREFIX], ids=["bare", "all-in-one"])
@pytest.mark.parametrize("style", ["old", "new", "comfy"])
def test_one_dropped_scale_of_scaled_fp8_is_an_error(tmp_path: Path, style: str, prefix: str) -> None:
    found = scan_of(tmp_path, without_scale(scaled(style, prefix), f"{prefix}b"))
    assert codes(found, fatal=True) == ["scale-missing"]
    told = fault(found, "scale-missing")
    assert told.text == f"'{prefix}b.weight' is F8_E4M3 without a scale, and 2 layers have one."
    assert "noise" in told.effect
    assert [name for name, layer in found.layers.items() if not layer.format_id] == [f"{prefix}b.weight"]
    with pytest.raises(FileError, match="it has no scale, and 2 other layers have one"):
        found.read(f"{prefix}b.weight")


def test_where_all_scales_are_one_none_is_missed(tmp_path: Path) -> None:
    found = scan_of(tmp_path, without_scale(scaled("old", value=1.0), "b"))
    assert found.faults == ()
    assert found.layers["b.weight"].format_id == "layerwise-fp8-e4m3fn"


def test_embeddings_by_plain_cast_are_a_warning(tmp_path: Path) -> None:
    found = scan_of(tmp_path, {**scaled("old"), "shared.weight": fp8(64), "model.embed_tokens.weight": fp8(32)})
    assert [(f.code, f.fatal) for f in found.faults] == [("scale-missing", False)] * 2
    assert all(layer.format_id for layer in found.layers.values())


def test_other_components_may_be_cast(tmp_path: Path) -> None:
    text = "text_encoders.t5xxl.transformer."
    tensors = {**scaled("old", text), f"{PREFIX}a.weight": fp8(), f"{PREFIX}b.weight": fp8()}
    found = scan_of(tmp_path, tensors)
    assert found.faults == ()
    assert found.layers[f"{PREFIX}a.weight"].format_id == "layerwise-fp8-e4m3fn"


def test_integers_are_no_plain_weights() -> None:
    with pytest.raises(WeightError, match=r"'a.weight': is a matrix of int8.*\n.*lost its scales"):
        check_plain("a.weight", integers(torch.int8))
    check_plain("position_ids", integers(torch.int64))


@pytest.mark.parametrize("dtype", [E4M3, torch.float8_e5m2], ids=str)
def test_every_code_that_is_no_number_is_found_wherever_it_stands(tmp_path: Path, dtype: torch.dtype) -> None:
    """In the blocks in which the file is read, whichever of its bytes it is."""
    from quantwire.quantizers.files.checkpoint import read_safetensors
    from quantwire.quantizers.files.model_file import open_model
    from safetensors.torch import save_file

    every = torch.arange(256, dtype=torch.uint8)
    bad = ~torch.isfinite(every.view(dtype).float())
    assert bad.sum() == (2 if dtype is E4M3 else 8)
    path = tmp_path / "codes.safetensors"
    tensors: Tensors = {f"code-{i}": every[i : i + 1].repeat(3).view(dtype) for i in range(256)}
    large = torch.zeros(BLOCK_NBYTES + 7, dtype=torch.uint8)
    for i in (0, BLOCK_NBYTES - 1, BLOCK_NBYTES, BLOCK_NBYTES + 6):
        tensors[f"large-{i}"] = large.index_fill(0, torch.tensor([i]), 0x7F).view(dtype)
    save_file({**tensors, "none": torch.zeros(0, dtype=dtype), "bytes": every}, path)
    entries = open_model(path).entries
    for name, t in read_safetensors(path).tensors.items():
        if name in ("none", "bytes") or bool(torch.isfinite(t.float()).all()):  # type: ignore[union-attr]
            check_codes(name, entries[name])
            continue
        with pytest.raises(WeightError, match=f"'{name}': its qdata holds nan or inf"):
            check_codes(name, entries[name])
