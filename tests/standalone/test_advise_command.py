"""`quantwire advise` on the demo model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from quantwire.cli import main

FEW = ("--formats", "gguf-q8-0", "gguf-q4-0", "comfy-int8", "layerwise-fp8-e4m3fn")


@pytest.fixture
def digits(demo_models: Path) -> str:
    return str(demo_models / "diffusion_models" / "digits_flux.safetensors")


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(["advise", *argv])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_text_json_and_plot(digits: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot, data = tmp_path / "new" / "advice.png", tmp_path / "advice.json"
    size = ("--resolution", "64", "--device", "cuda:8.6", "--vram", "8GB", "--tiers")
    code, out, _ = run(capsys, digits, *FEW, *size, "--plot", str(plot), "--json", str(data))
    assert code == 0
    assert out.startswith("full precision fits for transformer")
    assert "of the formats comfy-int8 is best" in " ".join(out.split())
    assert "Best by memory" in out
    assert max(map(len, out.splitlines())) <= 120
    with Image.open(plot) as image:
        assert image.size == (900, 540)
    found: dict[str, Any] = json.loads(data.read_text(), parse_constant=lambda x: pytest.fail(f"{x} is no JSON"))
    assert found["status"] == "ok"
    assert (found["best"], found["best_format"]) == ("full precision", "comfy-int8")
    assert [tier["gigabytes"] for tier in found["tiers"]] == [6, 8, 12, 16, 24]
    assert found["device"]["capability"] == [8, 6]
    rows = {row["format"]: row for row in found["rows"]}
    assert rows["comfy-int8"]["runs"]["level"] == "native"
    assert rows["gguf-q8-0"]["runs"]["level"] == "emulated"
    assert rows["gguf-q4-0"]["quality"]["psnr_db"] > 30


def test_this_device_and_json_on_standard_output(digits: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, digits, "--formats", "gguf-q8-0", "--host", "standalone", "--budget", "8MB", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["host"] == "standalone"
    assert found["budget_nbytes"] == 8_000_000
    assert found["best"] is None  # gguf-q8-0 takes 8.5 MiB
    assert {row["verdict"].partition(" over")[2] for row in found["rows"]} == {" the budget"}


def test_a_text_encoder(demo_models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(demo_models / "text_encoders" / "digits_clip.safetensors")
    code, out, _ = run(capsys, file, *FEW, "--device", "mps", "--vram", "8")
    assert code == 0
    assert "cos. error" in out
    assert "Not runnable on Apple GPU" in out
    code, _, err = run(capsys, file, *FEW, "--text-format", "gguf-q8-0")
    assert code == 2
    assert "--text-format is for encoders beside a diffusion model" in err


def test_the_format_of_encoders_beside_it_counts(
    digits: str, demo_models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = str(demo_models / "text_encoders" / "digits_clip.safetensors")
    peaks: list[int] = []
    for more in ([], ["--text-format", "gguf-q4-0"]):
        given = ("--text-encoder", clip, "--device", "cuda:8.6", "--vram", "8", "--host", "standalone")
        code, out, _ = run(capsys, digits, "--formats", "gguf-q8-0", *given, *more, "--resolution", "64", "--json")
        assert code == 0
        peaks.append(next(r["peak_nbytes"] for r in json.loads(out)["rows"] if r["format"] == "gguf-q8-0"))
    assert peaks[1] < peaks[0]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--device", "cuda"], "Write it as cuda:8.6"),
        (["--device", "cuda:8.6"], "Give its memory too: --vram 8GB, or --tiers"),
        (["--device", "toaster", "--vram", "8"], "'toaster' is no device"),
        (["--vram", "much"], "is no size"),
        (["--vram", "this device"], "is no size"),
        (["--budget", "0"], "zero bytes"),
        (["--formats", "gguf-q9"], "Unknown format 'gguf-q9'"),
        (["--resolution", "1"], "is no size of an image"),
        (["--text-encoder", "no.safetensors"], "'no.safetensors' is not there"),
    ],
)
def test_wrong_options(digits: str, argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, digits, *argv)
    assert code == 2
    assert said in err
    assert not out


def test_wrong_files(demo_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, str(demo_models / "vae" / "digits_tae.safetensors"))
    assert code == 2
    assert "no diffusion model or text encoder" in err
    workflow = tmp_path / "workflow.json"
    workflow.write_text("{}")
    code, _, err = run(capsys, str(workflow))
    assert code == 2
    assert "`quantwire forecast` takes workflows" in err
