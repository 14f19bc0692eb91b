"""Conversions of files that are quantized already: shapes, what is copied, what a file tells of its past."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from quantwire.quantizers.files.convert_plan import Request
from quantwire.quantizers.files.converting import convert, describe
from quantwire.quantizers.files.model_file import open_model
from quantwire.quantizers.files.schemes.scan import scan
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_flux import MLP, QKV, flux, save, whole_numbers

FP8 = "comfy-fp8-e4m3fn"


class Bar:
    def update(self, n: int, /) -> None:
        pass


def run(source: Path, target: Path, kind: str = FP8, **options: Any) -> Any:
    return convert(Request(source, target, kind, threads=1, **options), lambda total: nullcontext(Bar()))


def note(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["quantwire_conversion"])


def conf(path: Path, name: str) -> dict[str, Any]:
    return json.loads(bytes(load_file(path)[name.replace("weight", "comfy_quant")].tolist()))


def actions(report: Any) -> dict[str, str]:
    return {e.name: e.action for e in report.entries}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("source") / "in.safetensors", flux(1))


# Padded layers


@pytest.mark.parametrize("layout", ["", "comfy-metadata"])
@pytest.mark.parametrize("kind", ["comfy-nvfp4", "comfy-mxfp8"])
@pytest.mark.parametrize("bias", [True, False])
def test_padded_layers_come_back_in_their_shape(tmp_path: Path, kind: str, layout: str, bias: bool) -> None:
    tensors = flux(1) | {MLP: whole_numbers(500, 261, step=7).bfloat16()}
    tensors |= {MLP.replace("weight", "bias"): torch.ones(500).bfloat16()} if bias else {}
    path = save(tmp_path / "in.safetensors", tensors)
    run(path, tmp_path / "a.safetensors", kind, layout=layout)
    layers = scan(open_model(tmp_path / "a.safetensors")).layers
    assert (layers[MLP].shape, layers[QKV].shape) == ((500, 261), (768, 256))
    report = run(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "BF16")
    assert not any("columns of zeros" in w for w in report.warnings)
    back = load_file(tmp_path / "b.safetensors")[MLP].float()
    assert back.shape == (500, 261)
    assert (back - tensors[MLP].float()).norm() < 0.12 * tensors[MLP].float().norm()
    copied = run(tmp_path / "a.safetensors", tmp_path / "c.safetensors", kind)
    assert actions(copied)[MLP] == "copy"
    assert conf(tmp_path / "c.safetensors", MLP)["orig_shape"] == [500, 261]
    assert "orig_shape" not in conf(tmp_path / "c.safetensors", QKV)


def _with_conf(path: Path, name: str, value: dict[str, Any]) -> Path:
    """The file with another JSON object of one layer."""
    tensors = load_file(path)
    tensors[name.replace("weight", "comfy_quant")] = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("case", ["bias", "size"])
def test_padded_layers_of_others_are_doubtful(tmp_path: Path, case: str) -> None:
    """A bias tells that rows were added; a size just below the columns that others have."""
    shape = (500, 320) if case == "bias" else (640, 246)
    beside = {MLP.replace("weight", "bias"): torch.ones(500).bfloat16()}
    if case == "size":
        beside = {"double_blocks.0.img_attn.extra.scale": torch.ones(246).bfloat16()}
    tensors = flux(1, 320) | {MLP: whole_numbers(*shape, step=7).bfloat16()} | beside
    run(save(tmp_path / "in.safetensors", tensors), tmp_path / "a.safetensors", "comfy-nvfp4")
    path = _with_conf(tmp_path / "a.safetensors", MLP, {"format": "nvfp4"})
    report = run(path, tmp_path / "b.safetensors", "BF16")
    assert any(MLP in w and "columns of zeros" in w for w in report.warnings)


@pytest.mark.parametrize("told", [[500], [513, 256], [496, 256], [500, 300], "500", [500.0, 246]])
def test_a_shape_that_does_not_fit_is_a_fault(tmp_path: Path, told: Any) -> None:
    tensors = flux(1) | {MLP: whole_numbers(500, 246, step=7).bfloat16()}
    run(save(tmp_path / "in.safetensors", tensors), tmp_path / "a.safetensors", "comfy-nvfp4")
    path = _with_conf(tmp_path / "a.safetensors", MLP, {"format": "nvfp4", "orig_shape": told})
    found = scan(open_model(path))
    assert [f.tensor for f in found.faults if f.fatal] == [MLP]


# What is copied


@pytest.mark.parametrize(
    ("kind", "again", "copied"),
    [
        ("bnb-nf4", "bnb-nf4;bits4-block-size=128", False),
        ("bnb-nf4;bits4-block-size=128", "bnb-nf4;bits4-block-size=128", True),
        ("bnb-nf4;bits4-block-size=128", "bnb-nf4", True),
        ("bnb-nf4", "bnb-nf4;bits4-use-double-quant=true", False),
    ],
)
def test_options_decide_what_is_copied(tmp_path: Path, source: Path, kind: str, again: str, copied: bool) -> None:
    run(source, tmp_path / "a.safetensors", kind)
    plan = describe(Request(tmp_path / "a.safetensors", tmp_path / "b.safetensors", again))
    report = run(tmp_path / "a.safetensors", tmp_path / "b.safetensors", again)
    assert actions(report)[QKV] == ("copy" if copied else "quantize")
    assert ("copy: " in str(plan)) is copied
    for warnings in (plan.data["warnings"], report.warnings):
        assert any("quantized a second time" in w for w in warnings) is not copied


@pytest.mark.parametrize("layout", ["scaled-fp8", "quantwire"])
def test_factors_that_a_layout_cannot_hold_are_told(tmp_path: Path, source: Path, layout: str) -> None:
    run(source, tmp_path / "a.safetensors")
    factors = {QKV.replace("weight", "pre_quant_scale"): torch.full((256,), 2.0)}
    save_file(load_file(tmp_path / "a.safetensors") | factors, tmp_path / "a.safetensors")
    plan = describe(Request(tmp_path / "a.safetensors", tmp_path / "b.safetensors", FP8, layout=layout))
    report = run(tmp_path / "a.safetensors", tmp_path / "b.safetensors", layout=layout)
    assert (actions(report)[QKV], actions(report)[MLP]) == ("quantize", "copy")
    for warnings in (plan.data["warnings"], report.warnings):
        assert any("1 tensors are quantized a second time" in w for w in warnings)


@pytest.mark.parametrize("layout", ["", "comfy-metadata"])
def test_products_at_full_precision_stay_so(tmp_path: Path, source: Path, layout: str) -> None:
    run(source, tmp_path / "a.safetensors")
    path = _with_conf(tmp_path / "a.safetensors", MLP, {"format": "float8_e4m3fn", "full_precision_matrix_mult": True})
    run(path, tmp_path / "b.safetensors", layout=layout)
    run(tmp_path / "b.safetensors", tmp_path / "c.safetensors")
    assert conf(tmp_path / "c.safetensors", MLP) == conf(path, MLP)
    assert conf(tmp_path / "c.safetensors", QKV) == {"format": "float8_e4m3fn"}
    run(source, tmp_path / "old.safetensors", layout="scaled-fp8")  # asks for it in all layers
    run(tmp_path / "old.safetensors", tmp_path / "d.safetensors")
    assert conf(tmp_path / "d.safetensors", QKV) == conf(path, MLP)


# What a file tells


def test_a_file_tells_of_a_few_earlier_conversions(tmp_path: Path, source: Path) -> None:
    path, sizes = source, list[int]()
    for i, kind in enumerate([FP8, "BF16"] * 4):
        path, before = tmp_path / f"{i}.safetensors", path
        run(before, path, kind)
        told = note(path)
        assert (told["source"]["name"], told["layout"]) == (before.name, "plain" if kind == "BF16" else "comfy")
        assert [b["source"]["name"] for b in told.get("before", [])] == [
            "in.safetensors" if k == 0 else f"{k - 1}.safetensors" for k in range(i - 1, max(i - 4, -1), -1)
        ]
        assert not any("before" in b for b in told.get("before", []))
        sizes.append(len(json.dumps(told)))
    assert max(sizes) < 2 * sizes[3]


def test_nothing_to_quantize_and_tensors_over_the_limit_are_told(tmp_path: Path, source: Path) -> None:
    report = run(source, tmp_path / "a.safetensors", exclude=("*",))
    assert any("nothing is quantized" in w for w in report.warnings)
    plan = describe(Request(source, tmp_path / "b.safetensors", FP8, shard_nbytes=150_000))
    assert any("larger than asked for" in n for n in plan.data["notes"])
    report = run(source, tmp_path / "b.safetensors", shard_nbytes=150_000)
    assert any("larger than asked for" in n for n in report.notes)


@pytest.mark.parametrize(("kind", "name"), [(FP8, "a.safetensors"), ("BF16", "a.safetensors"), ("Q8_0", "a.gguf")])
def test_what_a_checkpoint_loses_is_told(tmp_path: Path, kind: str, name: str) -> None:
    tensors = {f"model.diffusion_model.{n}": t for n, t in flux(1).items()}
    tensors |= {"first_stage_model.decoder.conv_in.weight": torch.ones(8, 4).bfloat16()}
    tensors |= {"text_encoders.clip_l.transformer.text_projection.weight": torch.ones(8, 8).bfloat16()}
    path = save(tmp_path / "in.safetensors", tensors)
    plan = describe(Request(path, tmp_path / name, kind))
    report = run(path, tmp_path / name, kind)
    for warnings in (plan.data["warnings"], report.warnings):
        (said,) = [w for w in warnings if "only the diffusion model" in w]
        assert "the VAE and text encoders from in.safetensors" in said
        assert "diffusion_models" in said
