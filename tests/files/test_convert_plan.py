"""What a conversion refuses and warns of before any work, and what it keeps."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from quantwire.cli import main
from quantwire.quantizers.errors import FileError, SpecError
from quantwire.quantizers.files.architectures import comfyui_targets, detect
from quantwire.quantizers.files.convert_plan import Request, plan_conversion
from quantwire.quantizers.files.converting import convert, describe
from quantwire.quantizers.files.stacks import missing_from_one, refuse_gaps
from quantwire.quantizers.rules import Rule
from real_models import IMAGE_MODELS, image_shapes, metas_of
from safetensors.torch import load_file, save_file
from torch import Tensor

WIDTH = 64
QKV = "double_blocks.0.img_attn.qkv.weight"


class Bar:
    def update(self, n: int, /) -> None:
        """Nobody looks."""


def run(request: Request) -> Any:
    return convert(request, lambda total: nullcontext(Bar()))


def flux(blocks: int = 3, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Values that every machine forms alike."""
    shapes: dict[str, tuple[int, ...]] = {"img_in.weight": (WIDTH, 64), "img_in.bias": (WIDTH,)}
    shapes |= {"txt_in.weight": (WIDTH, 128), "final_layer.linear.weight": (64, WIDTH)}
    for i in range(blocks):
        b = f"double_blocks.{i}"
        shapes |= {f"{b}.img_attn.qkv.weight": (3 * WIDTH, WIDTH), f"{b}.img_attn.qkv.bias": (3 * WIDTH,)}
        shapes |= {f"{b}.img_mlp.0.weight": (2 * WIDTH, WIDTH), f"{b}.img_mlp.2.weight": (WIDTH, 2 * WIDTH)}
        shapes |= {f"single_blocks.{i}.linear1.weight": (3 * WIDTH, WIDTH)}
    return {n: ((torch.arange(torch.Size(s).numel()) * 7) % 101 / 96).reshape(s).to(dtype) for n, s in shapes.items()}


def save(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), path)
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save(tmp_path / "flux.safetensors", flux())


def kinds(request: Request) -> dict[str, str]:
    return {c.target.name: c.kind for c in plan_conversion(request).choices}


# Whole models


def sharded(folder: Path, parts: int = 2, suffix: str = ".safetensors") -> Path:
    """A folder as diffusers writes it."""
    tensors = flux()
    names = [f"diffusion_pytorch_model-{i + 1:05}-of-{parts:05}{suffix}" for i in range(parts)]
    where = {n: names[i % parts] for i, n in enumerate(tensors)}
    for name in names:
        save(folder / name, {n: tensors[n] for n in tensors if where[n] == name})
    index = folder / f"diffusion_pytorch_model{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return index


def test_the_parts_must_hold_what_the_index_names(tmp_path: Path) -> None:
    index = sharded(tmp_path / "t")
    assert len(plan_conversion(Request(index, tmp_path / "a.gguf", "Q8_0")).choices) == len(flux())
    part = tmp_path / "t" / json.loads(index.read_text())["weight_map"][QKV]
    kept = load_file(part)
    del kept[QKV]
    save(part, kept)
    for given in (index, index.parent):
        with pytest.raises(FileError) as caught:
            plan_conversion(Request(given, tmp_path / "a.gguf", "Q8_0"))
        assert f"{index.name}: '{QKV}' is to be in '{part.name}', which does not hold it" in str(caught.value)


def test_one_part_is_no_model(tmp_path: Path) -> None:
    index = sharded(tmp_path / "t")
    part = index.parent / "diffusion_pytorch_model-00001-of-00002.safetensors"
    with pytest.raises(FileError, match=r"00001-of-00002\.safetensors: one of 2 parts of a model") as caught:
        plan_conversion(Request(part, tmp_path / "a.gguf", "Q8_0"))
    assert f"Give their index '{index}', or the folder." in str(caught.value)
    index.unlink()
    with pytest.raises(FileError, match=r"'diffusion_pytorch_model\.safetensors\.index\.json', which is not beside it"):
        plan_conversion(Request(part, tmp_path / "a.gguf", "Q8_0"))
    with pytest.raises(FileError, match=r"(?s)no weights of one model.*It holds 2 parts such as .*but not their index"):
        plan_conversion(Request(index.parent, tmp_path / "a.gguf", "Q8_0"))
    alone = save(tmp_path / "model-00001-of-00001.safetensors", flux())
    plan_conversion(Request(alone, tmp_path / "a.gguf", "Q8_0"))


def test_an_index_of_pickles(tmp_path: Path) -> None:
    index = sharded(tmp_path / "t", suffix=".bin")
    other = index.with_name("diffusion_pytorch_model.safetensors.index.json")
    other.write_text(index.read_text())
    for given in (index, other, other.parent):
        with pytest.raises(FileError, match=r"00001-of-00002\.bin: a file of torch\.save is not read"):
            plan_conversion(Request(given, tmp_path / "a.gguf", "Q8_0"))


@pytest.mark.parametrize(("target", "kind"), [("a.gguf", "Q8_0"), ("a.safetensors", "comfy-int8")])
def test_blocks_without_a_gap(tmp_path: Path, target: str, kind: str) -> None:
    tensors = {n: t for n, t in flux(6).items() if not n.startswith(("double_blocks.2.", "double_blocks.4."))}
    path = save(tmp_path / "in.safetensors", tensors)
    with pytest.raises(
        FileError, match=r"^in\.safetensors: no whole model: double_blocks\.2, double_blocks\.4 missing"
    ):
        describe(Request(path, tmp_path / target, kind))


@pytest.mark.parametrize(("target", "kind"), [("a.gguf", "Q8_0"), ("a.safetensors", "comfy-int8")])
def test_a_tensor_that_only_one_block_lacks(tmp_path: Path, target: str, kind: str) -> None:
    tensors = flux()
    del tensors["double_blocks.1.img_attn.qkv.bias"]
    path = save(tmp_path / "in.safetensors", tensors)
    warned = [f"WARNING: {w}" for w in describe(Request(path, tmp_path / target, kind)).data["warnings"]]
    text = str(describe(Request(path, tmp_path / target, kind)))
    assert any("like it: double_blocks.1.img_attn.qkv.bias;" in w and w in text for w in warned)
    assert missing_from_one(flux()) == []


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_real_models_are_whole(name: str) -> None:
    metas = metas_of(image_shapes(name))
    names = [t.name for t in comfyui_targets(detect(metas), metas)]
    refuse_gaps(name, names)
    assert missing_from_one(names) == []


# The architecture that the user names


LORA = {"double_blocks.0.img_attn.qkv.lora_A.weight": torch.zeros(4, 64)}
CONTROLNET = flux() | {"controlnet_blocks.0.weight": torch.zeros(64, 64)}
VAE = {n: torch.zeros(8, 4, 3, 3) for n in ("decoder.conv_in.weight", "encoder.conv_in.weight")}
STRANGE = {f"blocks.{i}.odd.weight": torch.ones(64, 64) for i in range(3)}


@pytest.mark.parametrize(
    ("tensors", "architecture", "said"),
    [
        pytest.param(flux(), "fluxx", r"^Unknown architecture 'fluxx'\. Did you mean flux", id="typo"),
        pytest.param(LORA, "flux", "A LoRA, no model", id="lora"),
        pytest.param(CONTROLNET, "flux", "A ControlNet, no diffusion model", id="controlnet"),
        pytest.param(VAE, "flux", "A VAE, no diffusion model", id="vae"),
        pytest.param(flux(), "t5", r"^'t5' is the architecture of a text encoder, and .* diffusion model", id="other"),
        pytest.param(STRANGE, "t5", "No known diffusion model or text encoder", id="unknown-text"),
    ],
)
def test_what_no_architecture_permits(tmp_path: Path, tensors: dict[str, Tensor], architecture: str, said: str) -> None:
    path = save(tmp_path / "in.safetensors", tensors)
    with pytest.raises((FileError, SpecError), match=said):
        plan_conversion(Request(path, tmp_path / "a.gguf", "Q8_0", architecture=architecture))


def test_an_architecture_in_place_of_what_the_tensors_say(tmp_path: Path, source: Path) -> None:
    plan = plan_conversion(Request(source, tmp_path / "a.gguf", "Q8_0", architecture="sd3"))
    assert plan.found.architecture == "sd3"
    assert plan.warnings == ("architecture sd3 as asked for, though the tensors are those of flux",)
    assert not plan_conversion(Request(source, tmp_path / "a.gguf", "Q8_0", architecture="flux")).warnings
    inner = {f"model.diffusion_model.{n}": t for n, t in STRANGE.items()}
    path = save(tmp_path / "in.safetensors", inner | {f"first_stage_model.{n}": t for n, t in VAE.items()})
    plan = plan_conversion(Request(path, tmp_path / "a.gguf", "Q8_0", architecture="wan"))
    assert [c.target.name for c in plan.choices] == list(STRANGE)
    assert "taken for wan as asked for" in plan.warnings[0]


# What is kept


def test_plain_safetensors_keep_what_they_are_asked_to(tmp_path: Path) -> None:
    path = save(tmp_path / "in.safetensors", flux(dtype=torch.float32))
    rules = (Rule("*.img_mlp.0", "f16"), Rule("txt_in", "keep"))
    run(Request(path, tmp_path / "a.safetensors", "BF16", rules=rules, exclude=("img_attn.qkv",)))
    found = load_file(tmp_path / "a.safetensors")
    assert found[QKV].dtype is found["txt_in.weight"].dtype is torch.float32
    assert torch.equal(found[QKV], flux(dtype=torch.float32)[QKV])
    assert found["double_blocks.0.img_mlp.0.weight"].dtype is torch.float16
    assert found["img_in.weight"].dtype is found[QKV.replace("weight", "bias")].dtype is torch.bfloat16
    for bad in ("Q4_K", "comfy-int8"):
        with pytest.raises(SpecError, match=rf"^Rule 'txt_in = {bad}': a safetensors file of F16 cannot hold {bad}"):
            run(Request(path, tmp_path / "b.safetensors", "F16", rules=(Rule("txt_in", bad),)))


# sha256 of the whole file. It may change only with the layout of the files or the recipe, never with a library.
GOLDEN = {
    "Q8_0": "714787d975f45416e17cbe55ba8aa147cab7d8aa06fa6ac82e3a9028479a790b",
    "BF16": "207c397862772a397df6bcc93044b372aa5f0b24cb0048def34b4ace2974c58e",
}


@pytest.mark.parametrize("kind", GOLDEN)
def test_golden_bytes_of_a_float32_source(tmp_path: Path, kind: str) -> None:
    path = save(tmp_path / "in.safetensors", flux(dtype=torch.float32))
    run(Request(path, tmp_path / "a.gguf", kind, exclude=("img_mlp.2",)))
    assert hashlib.sha256((tmp_path / "a.gguf").read_bytes()).hexdigest() == GOLDEN[kind]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_what_the_user_keeps_loses_nothing(tmp_path: Path, dtype: torch.dtype) -> None:
    conv = ((torch.arange(320 * 320 * 9) % 1013) / 911).reshape(320, 320, 3, 3)
    tensors = flux(dtype=dtype) | {"double_blocks.0.conv.weight": conv.to(dtype)}
    path = save(tmp_path / "in.safetensors", tensors)
    run(Request(path, tmp_path / "a.gguf", "Q8_0", exclude=("img_mlp.2", "conv"), rules=(Rule("txt_in", "keep"),)))
    found = {t.name: t for t in gguf.GGUFReader(str(tmp_path / "a.gguf")).tensors}
    for name in ("double_blocks.0.img_mlp.2.weight", "double_blocks.0.conv.weight", "txt_in.weight"):
        values = gguf.dequantize(found[name].data, found[name].tensor_type).reshape(tensors[name].shape)
        assert torch.equal(torch.tensor(values), tensors[name].float()), name


def test_what_is_rounded_says_so(tmp_path: Path) -> None:
    conv, large = torch.ones(320, 320, 3, 3), torch.ones(64, (1 << 18) + 64)
    tensors = flux(dtype=torch.float32) | {"double_blocks.0.conv.weight": conv, "txt_in.weight": large}
    path = save(tmp_path / "in.safetensors", tensors)
    plan = plan_conversion(Request(path, tmp_path / "a.gguf", "Q8_0"))
    chosen = {c.target.name: (c.kind, c.reason) for c in plan.choices}
    assert chosen["img_in.weight"][0] == chosen["final_layer.linear.weight"][0] == "F32"
    assert chosen["double_blocks.0.conv.weight"] == ("F16", "not a linear weight; F32 rounded to F16")
    kind, reason = chosen["txt_in.weight"]
    assert kind == "BF16"
    assert reason.endswith("; F32 rounded to BF16")
    assert any(n.startswith("2 kept tensors are rounded, such as ") for n in plan.notes)
    # img_in and final_layer, not what was rounded
    assert "kept at full precision (flux): 1 final layer, 1 input projection" in str(run(plan.request))


# Types and targets


@pytest.mark.parametrize(
    ("target", "kind", "said"),
    [
        ("a.safetensors", "fp8", r"^Unknown type 'fp8'\. Did you mean comfy-fp8-e4m3fn, comfy-fp8-e5m2"),
        ("a.safetensors", "comfy-fp8", r"^Unknown type 'comfy-fp8'\. Did you mean comfy-fp8-e4m3fn"),
        (
            "a.safetensors",
            "BF17",
            r"^Unknown type 'BF17'\. Did you mean BF16.*\nA safetensors file takes F32, F16, BF16",
        ),
        ("a.gguf", "comfy-int4", r"^Unknown type 'comfy-int4'\. Did you mean comfy-int8"),
        ("a.gguf", "Q4_KM", r"^Unknown GGUF type 'Q4_KM'\. Did you mean Q4_K_M.*\nTypes: F32"),
    ],
)
def test_typos_in_types(tmp_path: Path, source: Path, target: str, kind: str, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        describe(Request(source, tmp_path / target, kind))


@pytest.mark.parametrize(("target", "kind"), [("a.gguf", "Q8_0"), ("a.safetensors", "comfy-int8")])
def test_a_dry_run_needs_no_place_to_write(
    tmp_path: Path, source: Path, target: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / target).write_bytes(b"old")
    assert main(["convert", str(source), str(tmp_path / target), "--type", kind, "--dry-run"]) == 0
    assert f"WARNING: {tmp_path / target} is there already; --overwrite replaces it" in capsys.readouterr().out
    assert (tmp_path / target).read_bytes() == b"old"
    below = source / target  # below a file, which no rights make a folder of
    assert main(["convert", str(source), str(below), "--type", kind, "--dry-run"]) == 0
    assert f"cannot be written: '{source}' is not a writable folder" in capsys.readouterr().out
    assert main(["convert", str(source), str(below), "--type", kind]) == 2
    assert describe(Request(source, tmp_path / target, kind, overwrite=True)).data["warnings"] == []
