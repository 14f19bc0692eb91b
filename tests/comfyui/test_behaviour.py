"""The pack as a citizen of the real host: workflows, saving, errors, interruption, memory, start-up."""

from __future__ import annotations

import copy
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graphs import chain, node, sampled, unet
from PIL import Image
from quantwire.quantizers.registry import format_ids, get_entry
from quantwire.workflows import build

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "workflows" / "api").glob("*.json"))
NATIVE = [f for f in format_ids() if get_entry(f).backend == "comfy"]


def test_start_up_costs_the_host_under_a_tenth_of_a_second(comfyui: Any) -> None:
    log = comfyui.log.read_text(errors="replace")
    found = re.search(r"([\d.]+) seconds: \S*custom_nodes/quantwire$", log, re.M)
    assert found, log[-3000:]  # the host adds "(IMPORT FAILED)" before the colon
    assert float(found[1]) < 0.1


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_shipped_workflows_name_only_nodes_that_the_host_has(comfyui: Any, path: Path) -> None:
    known = comfyui.get("/object_info")
    editor = json.loads((ROOT / "workflows" / path.name).read_text(encoding="utf-8"))
    notes = {"MarkdownNote", "Note"}  # drawn by the front end, unknown to the server
    assert {n["type"] for n in editor["nodes"]} - notes <= set(known)
    assert {n["class_type"] for n in json.loads(path.read_text(encoding="utf-8")).values()} <= set(known)


# The templates' models are published ones, which are not here: test_templates.py holds what the host says of them.
DEMO = [path for path in WORKFLOWS if path.stem in {workflow.name for workflow in build.DEMO}]


@pytest.mark.parametrize("path", DEMO, ids=lambda p: p.stem)
def test_shipped_workflows_run(comfyui: Any, path: Path) -> None:
    graph = json.loads(path.read_text(encoding="utf-8"))
    if path.stem == "conflict":
        error = comfyui.fail(graph)
        assert error["exception_type"].endswith("OffloadConflict")
        assert "bnb-nf4" in error["exception_message"].splitlines()[0]
        assert "sequential" in error["exception_message"].splitlines()[0]
        return
    outputs = comfyui.run(graph)
    images = [image for ui in outputs.values() for image in ui.get("images", [])]
    assert images
    for image in images:
        pixels = (
            np.asarray(Image.open(comfyui.base / "output" / image["subfolder"] / image["filename"]), np.float32) / 255
        )
        assert pixels.shape == (64, 64, 3)
        assert read_digit(pixels) == 7


def read_digit(pixels: np.ndarray) -> int:
    """The demo's classifier: "a handwritten seven" must give a seven here too."""
    sys.path.insert(0, str(ROOT / "demo"))
    from digits import read_digits, train_classifier

    return int(read_digits(pixels[None], train_classifier()[0])[0])


@pytest.mark.parametrize("format_id", NATIVE)
def test_saved_native_models_load_with_the_stock_loader(comfyui: Any, format_id: str) -> None:
    nodes = {"model": unet(), "q": node("QuantizeModel", model=["model", 0], format=format_id)}
    made = comfyui.latent(sampled(("q", 0), nodes))
    name = f"saved_{format_id}"
    save = node("ModelSave", model=["q", 0], filename_prefix=name)
    comfyui.run({**nodes, "save": save})
    (written,) = (comfyui.base / "output").glob(f"{name}_*.safetensors")
    target = comfyui.base / "models" / "diffusion_models" / f"{name}.safetensors"
    written.replace(target)
    whole = 2 * (target.parent / "digits_flux.safetensors").stat().st_size  # a CPU host holds bfloat16 as float32
    assert target.stat().st_size < 0.6 * whole
    loaded = comfyui.latent(sampled(("model", 0), {"model": unet(target.name)}))
    assert float((loaded - made).norm() / made.norm()) < 1e-5


@pytest.mark.parametrize("format_id", ["bnb-nf4", "quanto-qint8", "comfy-nvfp4"])
def test_the_other_branch_is_bit_equal_to_a_graph_without_the_pack(comfyui: Any, format_id: str) -> None:
    alone = comfyui.latent(sampled(("model", 0), {"model": unet()}))
    nodes = {"model": unet(), "q": node("QuantizeModel", model=["model", 0], format=format_id)}
    both = sampled(("q", 0), nodes)
    both["sampler2"] = copy.deepcopy(both["sampler"])
    both["sampler2"]["inputs"]["model"] = ["model", 0]
    both["save2"] = node("SaveLatent", samples=["sampler2", 0], filename_prefix="latents/other")
    assert torch.equal(comfyui.latent(both, "save2"), alone)
    assert not torch.equal(comfyui.latent(both, "save"), alone)


@pytest.mark.parametrize("source", ["QuantizeModel", "LoadGGUF"])
def test_sizes_and_reload(comfyui: Any, source: str) -> None:
    model, nodes = chain(source, "gguf-q4-0", False, "default")
    tell = {**nodes, "tell": node("ProbeModel", model=list(model))}
    facts = json.loads(comfyui.run(tell)["tell"]["text"][0])
    full = {"model": unet(), "tell": node("ProbeModel", model=["model", 0])}
    whole = json.loads(comfyui.run(full)["tell"]["text"][0])
    assert facts["quantized_layers"] >= 18
    assert facts["cached"]
    assert facts["size"] < 0.6 * whole["size"]
    remade = {**nodes, "remade": node("ProbeRemake", model=list(model))}
    again = comfyui.latent(sampled(("remade", 0), remade))
    assert torch.equal(again, comfyui.latent(sampled(model, nodes)))


def test_a_lora_before_quantizing_is_kept(comfyui: Any) -> None:
    lora = node("LoraLoaderModelOnly", model=["model", 0], lora_name="lora.safetensors", strength_model=1.0)
    before = {
        "model": unet(),
        "lora": lora,
        "q": node("QuantizeModel", model=["lora", 0], format="quanto-qint8"),
    }
    after, nodes = chain("QuantizeModel", "quanto-qint8", True, "default")
    got, wanted = comfyui.latent(sampled(("q", 0), before)), comfyui.latent(sampled(after, nodes))
    assert float((got - wanted).norm() / wanted.norm()) < 1e-5


@pytest.mark.parametrize("format_id", ["bnb-nf4", "quanto-qint8", "comfy-int8"])
def test_text_encoders(comfyui: Any, format_id: str) -> None:
    graph = sampled(("model", 0), {"model": unet()})
    full = comfyui.latent(graph)
    graph["q"] = node("QuantizeTextEncoder", clip=["clip", 0], format=format_id, encoders="clip_l")
    graph["prompt"]["inputs"]["clip"] = ["q", 0]
    got = comfyui.latent(graph)
    assert 0 < float((got - full).norm() / full.norm()) < 0.2


def test_an_error_is_one_readable_line(comfyui: Any) -> None:
    nodes = {
        "model": unet(),
        "q": node("QuantizeModel", model=["model", 0], format="bnb-nf4", keep_layers="no_such_layer"),
    }
    error = comfyui.fail(sampled(("q", 0), nodes))
    assert error["node_type"] == "QuantizeModel"
    assert error["exception_type"].endswith("SpecError")
    first = error["exception_message"].strip().splitlines()[0]
    assert first.startswith("Pattern 'no_such_layer' matches none of the ")


def test_a_quantized_model_is_not_quantized_again(comfyui: Any) -> None:
    nodes = {
        "model": unet(),
        "q": node("QuantizeModel", model=["model", 0], format="bnb-nf4"),
        "r": node("QuantizeModel", model=["q", 0], format="quanto-qint8"),
    }
    error = comfyui.fail(sampled(("r", 0), nodes))
    assert "already quantized (bnb-nf4" in error["exception_message"]


def test_library_layers_are_recognised_and_blocked(comfyui: Any) -> None:
    nodes = {
        "model": unet(),
        "q": node("QuantizeModel", model=["model", 0], format="bnb-nf4", carrier="library"),
        "check": node("OffloadCompat", model=["q", 0], mode="novram", action="block"),
    }
    error = comfyui.fail(sampled(("check", 0), nodes))
    assert error["exception_type"].endswith("OffloadConflict")
    nodes["check"]["inputs"]["mode"] = "auto"  # a CPU host keeps models whole
    assert comfyui.run(sampled(("check", 0), nodes))


def test_interrupting_a_run_leaves_the_next_one_working(comfyui: Any) -> None:
    model, nodes = chain("QuantizeModel", "bnb-nf4", False, "default")
    wanted = comfyui.latent(sampled(model, nodes))
    long = sampled(model, nodes, steps=3000)
    long["sampler"]["inputs"]["seed"] = 99
    prompt_id = comfyui.queue(long)
    time.sleep(2)
    comfyui.post("/interrupt", {})
    entry = comfyui.wait(prompt_id)
    assert entry["status"]["status_str"] == "error"
    assert any(kind == "execution_interrupted" for kind, _ in entry["status"]["messages"])
    model, nodes = chain("QuantizeModel", "bnb-nf4", False, "default", {"keep_layers": ""})
    again = sampled(model, nodes)
    again["sampler"]["inputs"]["seed"] = 8
    assert torch.isfinite(comfyui.latent(again)).all()
    again["sampler"]["inputs"]["seed"] = 7
    assert torch.equal(comfyui.latent(again), wanted)


def test_twenty_runs_do_not_grow_memory(comfyui: Any) -> None:
    formats = ["bnb-nf4", "quanto-qint8", "gguf-q8-0", "comfy-int8"]

    def run(k: int) -> None:
        model, nodes = chain("QuantizeModel", formats[k % 4], bool(k % 2), "default")
        graph = sampled(model, nodes)
        graph["sampler"]["inputs"]["seed"] = 1000 + k
        comfyui.run(graph)

    for k in range(8):
        run(k)
    start = comfyui.rss_mib()
    for k in range(20):
        run(k)
    growth = (comfyui.rss_mib() - start) / start / 20
    comfyui.rows.append({"memory growth a run": growth, "start MiB": start})
    assert growth < 0.01


@pytest.mark.parametrize("format_id", ["bnb-nf4", "quanto-qint8", "comfy-int8", "gguf-q8-0"])
def test_controlnets(comfyui: Any, format_id: str) -> None:
    graph = sampled(("model", 0), {"model": unet()})
    without = comfyui.latent(graph)
    graph["net"] = node("ProbeControlNet")
    graph["q"] = node("QuantizeControlNet", control_net=["net", 0], format=format_id)
    graph["image"] = node("EmptyImage", width=64, height=64, batch_size=1, color=0x804020)
    control = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
    both = {"positive": ["prompt", 0], "negative": ["prompt", 0], "image": ["image", 0], **control}
    graph["apply"] = node("ControlNetApplyAdvanced", control_net=["net", 0], **both)
    graph["sampler"]["inputs"] |= {"positive": ["apply", 0], "negative": ["apply", 1]}
    full = comfyui.latent(graph) - without
    assert float(full.norm() / without.norm()) > 0.02  # the net does something
    graph["apply"]["inputs"]["control_net"] = ["q", 0]
    quantized = comfyui.latent(graph) - without
    assert 0 < float((quantized - full).norm() / full.norm()) < 0.2
    graph["apply"]["inputs"]["control_net"] = ["net", 0]
    graph["sampler"]["inputs"]["seed"] = 7
    assert torch.equal(comfyui.latent(graph) - without, full)


@pytest.mark.parametrize(
    ("state", "device", "mode"),
    [
        ("as it is", "cpu", "none"),
        ("NO_VRAM", "cuda", "novram"),
        ("NORMAL_VRAM", "cuda", "partial"),
        ("HIGH_VRAM", "cuda", "none"),
        ("NORMAL_VRAM", "cpu", "none"),
    ],
)
def test_memory_state_follows_the_host(comfyui: Any, state: str, device: str, mode: str) -> None:
    """The host's own variables are set for the moment of asking: this machine may have no GPU."""
    graph = {"model": unet(), "tell": node("ProbeMemory", model=["model", 0], state=state, device=device)}
    found = json.loads(comfyui.run(graph)["tell"]["text"][0])
    assert found["mode"] == mode
    assert found["smart_memory"] is True
    assert found["device"] == device
