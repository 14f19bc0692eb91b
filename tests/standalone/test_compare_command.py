"""`quantwire compare`: weights, images of a real workflow, the demo's task, pictures, and wrong input."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from quantwire.cli import main
from quantwire.hosts.standalone.executor import Executor
from quantwire.quantizers.measure import layers
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
WORKFLOW = str(ROOT / "workflows" / "api" / "quantized.json")
QUICK = ["--set", "Sampler.steps=1"]


@pytest.fixture(scope="module")
def source(demo_models: Path) -> Path:
    return demo_models / "diffusion_models" / "digits_flux.safetensors"


@pytest.fixture(scope="module")
def broken(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The halves of the rows of every large matrix exchanged, as between two layouts of one model."""
    path = tmp_path_factory.mktemp("broken") / "digits_flux.safetensors"
    tensors = load_file(source)
    for name, t in tensors.items():
        if t.dim() == 2 and "blocks" in name:
            tensors[name] = torch.cat([t[len(t) // 2 :], t[: len(t) // 2]])
    save_file(tensors, path)
    return path


def test_weights(source: Path, broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "c.json", tmp_path / "sub" / "c.png"
    assert main(["compare", str(source), str(broken), "--json", str(out), "--plot", str(picture)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("weights broken: ")
    assert all(len(line) <= 120 for line in said.splitlines())
    data = json.loads(out.read_text())
    assert data["status"] == "ok"
    assert data["broken"] is True
    assert data["images"] is None
    with Image.open(picture) as image:
        assert image.width == 1000
    assert main(["compare", str(source), str(source), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"].startswith("weights: identical")


@pytest.mark.slow
def test_images_of_a_workflow(source: Path, broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The nodes that quantize are left out: both files are drawn as they are."""
    out = tmp_path / "pairs"
    command = ["compare", str(source), str(broken), "--workflow", WORKFLOW, "--seeds", "2", "--no-weights", "--json"]
    assert main([*command, "--out", str(out), "--plot", str(tmp_path / "p.png"), *QUICK]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [image["kind"] for image in data["noise"]["images"]] == ["noise"] * 2
    assert len(data["images"]["pairs"]) == 2
    assert data["images"]["pairs"][0] != data["images"]["pairs"][1]
    with Image.open(out / "compared_0001.png") as image:
        assert image.size == (3 * 64 + 2 * 2, 64)
    assert main(["compare", str(source), str(source), "--workflow", WORKFLOW, "--no-weights", "--json", *QUICK]) == 0
    assert json.loads(capsys.readouterr().out)["images"]["verdict"].startswith("identical")


@pytest.mark.slow
def test_task(source: Path, broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = tmp_path / "task.py"
    task.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT / 'demo')!r})\n"
        "import task\nread = task.read\ndef cases(): return task.cases()[:3]\n"
    )
    command = [
        "compare",
        str(source),
        str(broken),
        "--workflow",
        WORKFLOW,
        "--task",
        str(task),
        "--no-weights",
        "--json",
    ]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)["task"]
    assert found["a"] == 1.0
    assert found["b"] < 0.5
    assert found["count"] == 12
    task.write_text("def cases(): return [(['Sampler.steps=1'], 1)]\n")
    assert main(command) == 2
    assert "read" in capsys.readouterr().err


def test_two_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = (np.indices((48, 64)).sum(0) % 64 * 4).astype(np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    Image.fromarray(values // 2).save(tmp_path / "b.png")
    assert main(["compare", str(tmp_path / "a.png"), str(tmp_path / "b.png"), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["layers"] is None
    assert 5 < data["images"]["medians"]["psnr_db"] < 20
    (tmp_path / "c.png").write_bytes(b"none")
    assert main(["compare", str(tmp_path / "a.png"), str(tmp_path / "c.png")]) == 2
    assert "cannot be read as a picture" in capsys.readouterr().err


def test_no_picture_starts_a_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import EpsImagePlugin

    (tmp_path / "gs").write_text(f"#!/bin/sh\necho called > {tmp_path}/called\nexit 1\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # Pillow looks once and remembers
    Image.new("RGB", (4, 4)).save(tmp_path / "e.png", "EPS")
    assert main(["compare", str(tmp_path / "e.png"), str(tmp_path / "e.png")]) == 2
    assert "cannot be read as a picture" in capsys.readouterr().err
    assert not (tmp_path / "called").exists()


def test_16_bits_and_transparency(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = (np.indices((48, 64)).sum(0) % 64 * 4).astype(np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    Image.fromarray(values.astype(np.uint16) * 257).save(tmp_path / "wide.png")
    with Image.open(tmp_path / "wide.png") as image:
        assert image.mode.startswith("I")
    assert main(["compare", str(tmp_path / "a.png"), str(tmp_path / "wide.png"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"]["verdict"].startswith("identical")
    clear = np.dstack([values, values, values, values])
    Image.fromarray(clear).save(tmp_path / "clear.png")
    assert main(["compare", str(tmp_path / "a.png"), str(tmp_path / "clear.png")]) == 2
    assert "transparent" in capsys.readouterr().err
    clear[..., 3] = 255
    Image.fromarray(clear).save(tmp_path / "opaque.png")
    assert main(["compare", str(tmp_path / "a.png"), str(tmp_path / "opaque.png"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"]["verdict"].startswith("identical")
    command = ["compare", str(tmp_path / "a.png"), str(tmp_path / "a.png")]
    assert main([*command, "--no-weights", "--seeds", "4", "--set", "a=b"]) == 2
    assert "--set, --seeds, --no-weights" in capsys.readouterr().err


def test_interrupted(source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The first Ctrl-C while the first node runs, as the executor takes it."""
    run = Executor.run

    def told(self: Executor, *args: Any) -> Any:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        return run(self, *args)

    monkeypatch.setattr(Executor, "run", told)
    command = [
        "compare",
        str(source),
        str(source),
        "--workflow",
        WORKFLOW,
        "--no-weights",
        "--set",
        "Sampler.steps=500",
    ]
    assert main(command) == 130
    assert capsys.readouterr().err.strip().endswith("Interrupted.")


def test_wrong_runs_are_told_before_the_weights(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compared(*_: Any) -> Any:
        raise AssertionError("the weights were read")

    monkeypatch.setattr(layers, "compare_files", compared)
    command = ["compare", str(source), str(source), "--workflow"]
    for more in (["none.json"], [WORKFLOW, "--task", "none.py"], [WORKFLOW, "--set", "No.x=1"]):
        assert main([*command, *more]) == 2
    assert main(["compare", str(source.parent), str(source), "--workflow", WORKFLOW]) == 2
    assert "single files only" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--seeds", "0", "--workflow", WORKFLOW], "--seeds is 0"),
        (["--gain", "0"], "--gain is 0"),
        (["--no-weights"], "leaves nothing"),
        (["--task", "x.py"], "--task is about images"),
        (["--plot", "x.jpg"], "PNG"),
        (["--seeds", "2"], "--seeds is about images"),
        (["--workflow", WORKFLOW, "--task", "x.py", "--seeds", "2"], "both say"),
        (["--workflow", WORKFLOW, "--task", "none.py"], "is no file"),
        (["--workflow", str(ROOT / "workflows" / "api" / "none.json")], "none.json"),
        (["--workflow", WORKFLOW, "--no-weights", "--set", "Nothing.x=1"], "Nothing"),
    ],
)
def test_wrong_options(source: Path, more: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(source), str(source), *more]) == 2
    assert said in capsys.readouterr().err


def test_wrong_files(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(source), str(tmp_path / "none.gguf")]) == 2
    assert "does not exist" in capsys.readouterr().err
    (tmp_path / "a.png").write_bytes(b"")
    assert main(["compare", str(source), str(tmp_path / "a.png")]) == 2
    assert "not of one kind" in capsys.readouterr().err
    workflow: dict[str, Any] = json.loads(Path(WORKFLOW).read_text())
    workflow["1b"] = workflow["1"]
    (tmp_path / "two.json").write_text(json.dumps(workflow))
    assert main(["compare", str(source), str(source), "--workflow", str(tmp_path / "two.json"), "--no-weights"]) == 2
    assert "one loader" in capsys.readouterr().err
