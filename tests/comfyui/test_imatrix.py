"""RecordImatrix and SaveImatrix in the real ComfyUI: names, sums, and the model that is left as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from graphs import Graph, node, sampled, unet
from quantwire.hosts import use
from quantwire.hosts.standalone.core_nodes import CORE_NODES
from quantwire.hosts.standalone.executor import Executor
from quantwire.hosts.standalone.host import StandaloneHost
from quantwire.nodes import NODE_CLASS_MAPPINGS
from quantwire.quantizers.files.checkpoint import read_checkpoint
from quantwire.quantizers.files.imatrix import Imatrix, read_imatrix


def recording(name: str, *, file: str = "digits_flux.safetensors", latent: Any = None, **inputs: Any) -> Graph:
    nodes = {"model": unet(file), "record": node("RecordImatrix", model=["model", 0])}
    save = {"imatrix": ["record", 1], "after": ["sampler", 0], "filename": name, "if_exists": "replace it", **inputs}
    return sampled(("record", 0), {**nodes, "write": node("SaveImatrix", **save)}, steps=2, latent=latent)


def written(comfyui: Any, name: str) -> Imatrix:
    return read_imatrix(comfyui.base / "output" / f"{name}.gguf")


def test_names_counts_and_importance_are_those_of_the_embedded_host(
    comfyui: Any, demo_models: Path, tmp_path: Path
) -> None:
    """Where text has no say: ComfyUI pads prompts to 77 tokens, the embedded host to what the demo's file says."""
    graph = recording("imatrix/digits")
    text = comfyui.run(graph)["write"]["text"][0]
    assert "33 weights, 2 model calls" in text
    here = {n: v for n, v in graph.items() if n != "save"}
    with use(StandaloneHost([demo_models], tmp_path)):
        Executor({**CORE_NODES, **NODE_CLASS_MAPPINGS}).run(here)
    theirs, ours = written(comfyui, "imatrix/digits"), read_imatrix(tmp_path / "imatrix" / "digits.gguf")
    file = read_checkpoint(comfyui.base / "models" / "diffusion_models" / "digits_flux.safetensors")
    assert set(theirs.entries) == set(ours.entries) == {n for n, t in file.tensors.items() if t.ndim == 2}
    text_layers = ("txt_in", "txt_attn", "txt_mlp", "single_blocks")
    for name, sums in theirs.entries.items():
        if not any(part in name for part in text_layers) or "mod" in name:
            assert torch.equal(sums.counts, ours.entries[name].counts), name
    for name in (
        "img_in.weight",
        *(f"{e}_in.{part}_layer.weight" for e in ("time", "guidance") for part in ("in", "out")),
    ):
        a, b = (m.entries[name].importance()[0] for m in (theirs, ours))
        assert float((a - b).norm() / b.norm()) < 0.02, name


def test_every_run_is_recorded_and_runs_add_up(comfyui: Any) -> None:
    comfyui.run(recording("imatrix/again"))
    once = written(comfyui, "imatrix/again")
    comfyui.run(recording("imatrix/again", if_exists="add to it"))
    twice = written(comfyui, "imatrix/again")
    for name, sums in twice.entries.items():
        assert torch.equal(sums.counts, 2 * once.entries[name].counts)
        assert torch.allclose(sums.squares, 2 * once.entries[name].squares, rtol=1e-6)


def test_the_input_model_records_nothing_and_samples_are_the_same(comfyui: Any) -> None:
    plain = comfyui.latent(sampled(("model", 0), {"model": unet()}, steps=2))
    assert torch.equal(comfyui.latent(recording("imatrix/same")), plain)
    graph = recording("imatrix/none")
    graph["sampler"]["inputs"]["model"] = ["model", 0]
    assert "Nothing was recorded" in comfyui.fail(graph)["exception_message"]


def test_another_family_under_the_names_of_its_file(comfyui: Any) -> None:
    wan = node("EmptyHunyuanLatentVideo", width=128, height=128, length=5, batch_size=1)
    comfyui.run(recording("imatrix/wan", file="tiny_wan21.safetensors", latent=wan))
    names = set(read_checkpoint(comfyui.base / "models" / "diffusion_models" / "tiny_wan21.safetensors").tensors)
    found = set(written(comfyui, "imatrix/wan").entries)
    assert found
    assert found <= names
