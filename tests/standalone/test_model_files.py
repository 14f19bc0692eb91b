"""Damaged and unsuitable model files through the command line, and `quantwire convert`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from quantwire.cli import main
from quantwire.quantizers.files.gguf_header import read_gguf_header
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def flux_tensors(demo_models: Path) -> dict[str, torch.Tensor]:
    return load_file(demo_models / "diffusion_models" / "digits_flux.safetensors")


def damaged(models: Path, demo_models: Path, how: str) -> str:
    """Write a damaged copy of a demo file; returns the override that chooses it."""
    whole = (demo_models / "diffusion_models" / "digits_flux.safetensors").read_bytes()
    content = {
        "truncated": whole[:-1000],
        "in-header": whole[:500],
        "empty": b"",
        "garbage": bytes(range(256)) * 4,
        "bad-json": whole[:8] + b"x" * (len(whole) - 8),
        "pickle": b"PK\x03\x04" + bytes(200),
    }[how]
    (models / "diffusion_models" / "damaged.safetensors").write_bytes(content)
    return "Model.unet_name=damaged.safetensors"


@pytest.mark.parametrize("how", ["truncated", "in-header", "empty", "garbage", "bad-json", "pickle"])
def test_damaged_safetensors(quantwire: Any, models: Path, demo_models: Path, how: str) -> None:
    done = quantwire("full_precision", "--set", damaged(models, demo_models, how))
    done.assert_refused("FileError: node 1 'Model' (UNETLoader): damaged.safetensors")


@pytest.mark.parametrize("cut", [0, 3, 100, 5000, -1000], ids=str)
def test_damaged_gguf(quantwire: Any, models: Path, gguf_file: Path, cut: int) -> None:
    (models / "diffusion_models" / "damaged.gguf").write_bytes(gguf_file.read_bytes()[:cut])
    done = quantwire("gguf", "--set", "LoadGGUF.gguf_name=damaged.gguf")
    done.assert_refused("FileError: node 2 'GGUF model' (LoadGGUF): damaged.gguf")


def test_gguf_of_another_family(quantwire: Any, models: Path) -> None:
    writer = gguf.GGUFWriter(str(models / "diffusion_models" / "wan.gguf"), "wan")
    names = ("blocks.0.self_attn.q.weight", "text_embedding.0.weight", "head.head.weight")
    for name in names:
        writer.add_tensor(name, torch.zeros(32, 32).numpy())
    writer.add_tensor("head.modulation", torch.zeros(1, 2, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    done = quantwire("gguf", "--set", "LoadGGUF.gguf_name=wan.gguf")
    done.assert_refused(
        "FileError: node 2 'GGUF model' (LoadGGUF): wan.gguf: a model of architecture wan",
        "the embedded host runs flux",
    )
    assert "LoadGGUF opens wan in ComfyUI" in done.err


@pytest.fixture(scope="module")
def gguf_file(demo_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("gguf") / "demo.gguf"
    source = demo_models / "diffusion_models" / "digits_flux.safetensors"
    assert main(["convert", str(source), str(target), "--type", "q4_0"]) == 0
    return target


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["nan", "inf"])
def test_weights_that_are_not_finite(quantwire: Any, models: Path, demo_models: Path, value: float) -> None:
    tensors = flux_tensors(demo_models)
    tensors["single_blocks.0.linear1.weight"][900, 5] = value  # rows 768 and on are diffusers' proj_mlp
    save_file(tensors, models / "diffusion_models" / "bad.safetensors")
    done = quantwire("quantized", "--set", "Model.unet_name=bad.safetensors")
    done.assert_refused("WeightError: node 1", "single_blocks.0.linear1.weight", "1 of 458752 values")


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["nan", "inf"])
@pytest.mark.parametrize(
    ("folder", "file", "tensor", "override"),
    [
        ("diffusion_models", "digits_flux.safetensors", "img_in.weight", "Model.unet_name"),
        ("diffusion_models", "digits_flux.safetensors", "double_blocks.0.img_attn.qkv.bias", "Model.unet_name"),
        ("text_encoders", "digits_clip.safetensors", "final_layer_norm.weight", "CLIPLoader.clip_name"),
        ("vae", "digits_tae.safetensors", "taesd_decoder.1.weight", "VAELoader.vae_name"),
    ],
)
def test_full_precision_files_that_are_not_finite(
    quantwire: Any, models: Path, demo_models: Path, folder: str, file: str, tensor: str, override: str, value: float
) -> None:
    with safe_open(demo_models / folder / file, "pt") as opened:
        tensors, metadata = {n: opened.get_tensor(n) for n in opened.keys()}, opened.metadata()  # noqa: SIM118
    name = next(n for n in tensors if n.endswith(tensor))
    tensors[name].view(-1)[3] = value
    save_file(tensors, models / folder / "bad.safetensors", metadata)
    done = quantwire("full_precision", "--set", f"{override}=bad.safetensors")
    done.assert_refused("WeightError: node", tensor, f"1 of {tensors[name].numel()} values are nan or inf")


@pytest.mark.parametrize("tensor", ["img_in.weight", "double_blocks.0.img_attn.qkv.weight"], ids=["plain", "blocks"])
def test_gguf_that_is_not_finite(quantwire: Any, models: Path, gguf_file: Path, tensor: str) -> None:
    types = {int(t): (t.name, *s) for t, s in gguf.GGML_QUANT_SIZES.items()}
    (found,) = [t for t in read_gguf_header(gguf_file, types).tensors if t.name == tensor]
    content = bytearray(gguf_file.read_bytes())
    content[found.start : found.start + 2] = b"\xff\x7f"  # nan as bfloat16 and as the float16 scale of a block
    (models / "diffusion_models" / "bad.gguf").write_bytes(content)
    done = quantwire("gguf", "--set", "LoadGGUF.gguf_name=bad.gguf")
    done.assert_refused("WeightError: node 2 'GGUF model' (LoadGGUF)", f"'{tensor}'", "values are nan or inf")


@pytest.fixture
def odd_clip(models: Path, demo_models: Path) -> str:
    """The demo's text encoder with an MLP of 100, which no block of 32 divides."""
    with safe_open(demo_models / "text_encoders" / "digits_clip.safetensors", "pt") as file:
        tensors, metadata = {n: file.get_tensor(n) for n in file.keys()}, file.metadata()  # noqa: SIM118
    for name in list(tensors):
        if ".mlp.fc1" in name:
            tensors[name] = tensors[name][:100].clone()
        elif name.endswith("mlp.fc2.weight"):
            tensors[name] = tensors[name][:, :100].clone()
    config = json.loads(metadata["config"]) | {"intermediate_size": 100}
    save_file(tensors, models / "text_encoders" / "odd.safetensors", metadata | {"config": json.dumps(config)})
    return "odd.safetensors"


def test_rows_that_no_block_divides(quantwire: Any, api: Any, odd_clip: str, caplog: pytest.LogCaptureFixture) -> None:
    graph = api("full_precision")
    graph["4"]["inputs"]["clip_name"] = odd_clip
    quantize = {"clip": ["4", 0], "format": "gguf-q8-0", "encoders": "all"}
    graph["30"] = {"class_type": "QuantizeTextEncoder", "inputs": quantize}
    graph["5"]["inputs"]["clip"] = ["30", 0]
    done = quantwire(graph)
    done.assert_refused("SpecError: node 30", "encoder.layers.0.mlp.fc2.weight", "100")
    assert "quanto-qint8" in done.err or "bnb-" in done.err, "a format that would take it is named"
    quantize["on_failure"] = "full precision"
    done = quantwire(graph)
    assert done.code == 0, done.err
    assert "encoder.layers.0.mlp.fc2.weight stays at full precision" in caplog.text
    assert "WARNING: encoder.layers.1.mlp.fc2.weight" in done.out


def test_text_encoder_of_another_model(quantwire: Any, models: Path, demo_models: Path) -> None:
    tensors = flux_tensors(demo_models)
    tensors["txt_in.weight"] = torch.zeros(256, 4096)
    save_file(tensors, models / "diffusion_models" / "wide.safetensors")
    done = quantwire("full_precision", "--set", "Model.unet_name=wide.safetensors")
    done.assert_refused("WorkflowError: node 11", "takes text encodings of width 4096", "got 128")


# --- convert ---


@pytest.fixture
def convert(tmp_path: Path, outcome: Any, capsys: pytest.CaptureFixture[str]) -> Any:
    """convert(source, name of the target in the folder `to`, type): one `quantwire convert`."""

    def run(source: Path, target: str, kind: str = "Q8_0") -> Any:
        capsys.readouterr()
        (tmp_path / "to").mkdir(exist_ok=True)
        code = main(["convert", str(source), str(tmp_path / "to" / target), "--type", kind, "--overwrite"])
        said = capsys.readouterr()
        return outcome(code, said.out, said.err, tmp_path / "to")

    return run


def test_convert(convert: Any, demo_models: Path) -> None:
    done = convert(demo_models / "diffusion_models" / "digits_flux.safetensors", "new/demo.gguf")
    assert done.code == 0, done.err
    assert done.files == ["new/demo.gguf"]
    assert "gguf-q8-0" in done.out
    assert "SQNR" in done.out


def test_convert_refuses(convert: Any, tmp_path: Path, demo_models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo = demo_models / "diffusion_models" / "digits_flux.safetensors"
    tensors = flux_tensors(demo_models)
    tensors["double_blocks.0.img_mlp.0.weight"][0, 0] = torch.nan
    save_file(tensors, tmp_path / "nan.safetensors")
    (tmp_path / "short.safetensors").write_bytes(demo.read_bytes()[:-10])
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    cases: list[tuple[Path, str, str, str]] = [
        (demo, "demo.gguf", "Q9_0", "Q8_0"),
        (demo, "demo.safetensors", "Q8_0", "A safetensors file cannot hold the GGUF type Q8_0"),
        (demo, "demo.bin", "Q8_0", "is a .gguf or .safetensors file"),
        (tmp_path / "none.safetensors", "demo.gguf", "Q8_0", "none.safetensors"),
        (tmp_path / "short.safetensors", "demo.gguf", "Q8_0", "truncated"),
        (tmp_path / "nan.safetensors", "demo.gguf", "Q8_0", "double_blocks.0.img_mlp.0.weight"),
        (demo_models / "vae" / "digits_tae.safetensors", "demo.gguf", "Q8_0", "A VAE, no diffusion model"),
        (demo, "../file/demo.gguf", "Q8_0", "OUT: cannot write in"),
    ]
    for source, target, kind, said in cases:
        convert(source, target, kind).assert_refused(said)
    assert main(["convert", str(tmp_path / "none.safetensors"), "x.gguf", "--type", "Q8_0", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_convert_keeps_the_old_file_when_it_fails(convert: Any, tmp_path: Path, demo_models: Path) -> None:
    tensors = flux_tensors(demo_models)
    tensors["single_blocks.0.linear2.weight"][0, 0] = torch.inf
    save_file(tensors, tmp_path / "inf.safetensors")
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "demo.gguf").write_bytes(b"old")
    assert convert(tmp_path / "inf.safetensors", "demo.gguf").files == ["demo.gguf"]
    assert (tmp_path / "to" / "demo.gguf").read_bytes() == b"old"
