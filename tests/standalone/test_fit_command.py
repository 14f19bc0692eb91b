"""`quantwire fit`: what it prints and writes, and a written workflow that runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from quantwire.cli import main
from quantwire.commands.fit_graph import KINDS, name_in, workflow
from quantwire.hosts.standalone.core_nodes import CORE_NODES
from quantwire.hosts.standalone.workflow import NodeSpec
from quantwire.nodes import NODE_CLASS_MAPPINGS
from quantwire.quantizers.errors import SpecError
from quantwire.quantizers.measure.activations import RunShape
from safetensors.torch import save_file


def run(demo_models: Path, *more: str, vram: str = "8GB") -> int:
    model = demo_models / "diffusion_models" / "digits_flux.safetensors"
    return main(["fit", str(model), "--vram", vram, "--resolution", "64", *more])


def files(demo_models: Path) -> tuple[str, ...]:
    text, vae = demo_models / "text_encoders/digits_clip.safetensors", demo_models / "vae/digits_tae.safetensors"
    return "--text-encoder", str(text), "--vae", str(vae)


def test_both_hosts(demo_models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(demo_models, *files(demo_models), vram="272MiB") == 0
    out = capsys.readouterr().out
    assert "In ComfyUI\n" in out
    assert "With `quantwire run`\n" in out
    assert max(map(len, out.splitlines())) <= 120


def test_json(demo_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(demo_models, "--host", "standalone", "--device", "cpu", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["hosts"]["standalone"]["picks"][0]["format"] is None
    assert told["vram_nbytes"] == 8 << 30
    report = tmp_path / "report.json"
    assert run(demo_models, "--host", "comfyui", "--json", str(report)) == 0
    saved = json.loads(report.read_text())
    assert saved["status"] == "ok"
    assert saved["hosts"]["comfyui"]["mode"] == "dynamic"


@pytest.mark.slow
def test_mixed(demo_models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(demo_models, "--host", "standalone", "--device", "cpu", "--mixed", "--json", vram="272MiB") == 0
    told = json.loads(capsys.readouterr().out)["hosts"]["standalone"]
    assert told["picks"][0]["name"] == "mixed recipe"
    assert "rules=" in told["picks"][0]["spec"]


def test_a_written_workflow_runs(demo_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "fit.json"
    assert run(demo_models, "--device", "cpu", *files(demo_models), "--out", str(out)) == 0
    graph = json.loads(out.read_text())
    graph["7"]["inputs"]["steps"] = 1
    out.write_text(json.dumps(graph))
    assert main(["run", str(out), "--models", str(demo_models), "--out", str(tmp_path / "images")]) == 0
    assert (tmp_path / "images" / "fit_00001_.png").is_file()
    assert "came out: transformer 12.0 MiB" in capsys.readouterr().out
    assert run(demo_models, *files(demo_models), "--out", str(out)) == 2  # it is there
    assert run(demo_models, *files(demo_models), "--out", str(out), "--overwrite") == 0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--vram", "much"), "no size"),
        (("--device", "cuda"), "compute capability"),
        (("--cfg", "nan"), "cfg"),
        (("--resolution", "wide"), "--resolution"),
        (("--batch", "0"), "batch is 0"),
        (("--text-encoder", "{vae}"), "holds no text encoder"),
        (("--out", "graph.json"), "needs the text encoders"),
        (("--out", "graph.txt"), "no .json file"),
        (("--vram", "257MiB", "--device", "cpu"), "Nothing fits"),
    ],
)
def test_wrong_input(demo_models: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], said: str) -> None:
    vae = demo_models / "vae" / "digits_tae.safetensors"
    assert run(demo_models, *(word.format(vae=vae) for word in more)) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("family", KINDS)
def test_graphs_have_inputs_of_their_nodes(family: str) -> None:
    """Those that this process knows; nodes that only ComfyUI has are checked against it in tests/comfyui."""
    known = {**CORE_NODES, **NODE_CLASS_MAPPINGS}
    for count in KINDS[family].clip:
        encoders = [Path(f"models/text_encoders/sub/{i}.safetensors") for i in range(count)]
        model, vae = Path("models/diffusion_models/m.safetensors"), Path("models/vae/v.safetensors")
        graph = workflow(family, model, encoders, vae, 8 << 30, RunShape(), "balanced")
        for node in graph.values():
            if node["class_type"] in known:
                declared = NodeSpec.of(known[node["class_type"]])
                assert all(declared.get(name) is not None for name in node["inputs"])
            for value in node["inputs"].values():
                assert not isinstance(value, list) or value[0] in graph


def test_what_no_graph_is_written_for() -> None:
    vae = Path("v.safetensors")
    with pytest.raises(SpecError, match="'wan'"):
        workflow("wan", vae, [vae], vae, 8 << 30, RunShape(), "balanced")
    with pytest.raises(SpecError, match="5 frames"):
        workflow("flux", vae, [vae], vae, 8 << 30, RunShape(frames=5), "balanced")
    with pytest.raises(SpecError, match="takes 1 or 2 text encoder files, got 3"):
        workflow("flux", vae, [vae] * 3, vae, 8 << 30, RunShape(), "balanced")


def test_guidance_of_the_family_is_that_of_the_graph() -> None:
    vae = Path("vae.safetensors")
    graph = workflow("sd3", vae, [vae], vae, 8 << 30, RunShape(cfg=4.5), "balanced")
    assert graph["1"]["inputs"]["cfg"] == graph["7"]["inputs"]["cfg"] == 4.5


@pytest.fixture
def other(tmp_path: Path) -> str:
    """Wan's layers in small: a family that only ComfyUI opens."""
    shapes = {"patch_embedding.weight": (64, 16, 1, 2, 2), "head.head.weight": (64, 64), "head.modulation": (1, 2, 64)}
    shapes |= {"text_embedding.0.weight": (64, 128)}
    for kind in ("self_attn", "cross_attn"):
        shapes |= {f"blocks.0.{kind}.{x}.weight": (64, 64) for x in "qkvo"}
    shapes |= {"blocks.0.ffn.0.weight": (256, 64), "blocks.0.ffn.2.weight": (64, 256)}
    path = tmp_path / "other.safetensors"
    save_file({name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}, path)
    return str(path)


def test_what_the_embedded_host_does_not_open_is_left_out(other: str, capsys: pytest.CaptureFixture[str]) -> None:
    size = ("--vram", "8GB", "--resolution", "64", "--device", "cuda:8.6")
    assert main(["fit", other, *size]) == 0
    out = capsys.readouterr().out
    assert "In ComfyUI\n" in out
    assert "With `quantwire run`\n" not in out
    assert "opens models of FLUX's layout only" in out
    assert "cfg 6" in out
    assert main(["fit", other, *size, "--host", "comfyui", "--json"]) == 0
    json.loads(capsys.readouterr().out, parse_constant=lambda x: pytest.fail(f"{x} is no JSON"))
    for command in ("fit", "advise"):
        assert main([command, other, *size, "--host", "standalone"]) == 2
        assert "Take --host comfyui" in capsys.readouterr().err


def test_names_below_model_folders() -> None:
    assert name_in(Path("/m/diffusion_models/flux/dev.safetensors"), ("diffusion_models",)) == "flux/dev.safetensors"
    assert name_in(Path("/elsewhere/dev.safetensors"), ("diffusion_models",)) == "dev.safetensors"
