"""OffloadCompat in the real host: conflicts that come up after the node, and guards on every kind of object."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from graphs import Graph, node, sampled, unet

RAW = "Cannot copy out of meta tensor; no data!"


def compat(source: str = "model", mode: str = "auto", **inputs: Any) -> dict[str, Any]:
    return node("OffloadCompat", **{"model": [source, 0], "mode": mode, "action": "block", **inputs})


def library(source: str = "model") -> dict[str, Any]:
    return node("QuantizeModel", model=[source, 0], format="bnb-nf4", carrier="library")


def lora(source: str) -> dict[str, Any]:
    return node("LoraLoaderModelOnly", model=[source, 0], lora_name="lora.safetensors", strength_model=1.0)


def told(comfyui: Any, graph: Graph, node_id: str = "tell") -> dict[str, Any]:
    return json.loads(comfyui.run(graph)[node_id]["text"][0])


@pytest.fixture
def restored(comfyui: Any) -> Iterator[None]:
    """Give the host its own memory mode back."""
    yield
    comfyui.run({"restore": node("ProbeVram", state="restore")})


def test_auto_is_the_hosts_own_mode(comfyui: Any) -> None:
    output = comfyui.run(sampled(("check", 0), {"model": unet(), "q": library(), "check": compat("q")}))
    report = output["check"]["report"][0]
    assert (report["host"], report["mode"]) == ("comfyui", "none")  # it was started with --cpu
    assert report["now"] == {"diffusion_model": {"mode": "none", "variant": ""}}
    (verdict,) = report["verdicts"]["diffusion_model"]
    assert (verdict["format_id"], verdict["kind"], verdict["level"]) == ("bnb-nf4", "Params4bit", "ok")


def test_a_mode_that_the_host_does_not_have_is_named(comfyui: Any) -> None:
    error = comfyui.fail(sampled(("check", 0), {"model": unet(), "check": compat(mode="sequential")}))
    assert error["node_type"] == "OffloadCompat"
    first, *_ = error["exception_message"].splitlines()
    assert first == "ComfyUI has no offload mode sequential; it has none, partial, novram, dynamic."


def test_a_conflict_in_a_mode_of_another_host_is_told_first(comfyui: Any) -> None:
    """The shipped workflow `conflict` is stopped in both hosts."""
    nodes = {"model": unet(), "q": library(), "check": compat("q", "sequential")}
    error = comfyui.fail(sampled(("check", 0), nodes))
    assert error["exception_type"].rpartition(".")[2] == "OffloadConflict"
    first, second, *_ = error["exception_message"].splitlines()
    assert "cannot run with sequential offload" in first
    assert second.startswith("ComfyUI has no offload mode sequential")


def test_set_mode_says_how_to_start_the_host(comfyui: Any) -> None:
    graph = sampled(("check", 0), {"model": unet(), "check": compat(mode="novram", set_mode=True)})
    with pytest.raises(AssertionError, match="start ComfyUI with --novram"):  # refused when it is queued
        comfyui.queue(graph)


def test_nothing_linked(comfyui: Any) -> None:
    graph = {
        "check": node("OffloadCompat", mode="auto", action="block"),
        "show": node("PreviewAny", source=["check", 1]),
    }
    assert comfyui.fail(graph)["exception_message"].startswith("OffloadCompat has nothing to check")


@pytest.mark.parametrize("mode", ["partial", "novram"])
def test_a_conflict_known_at_the_node_stops_there(comfyui: Any, mode: str) -> None:
    error = comfyui.fail(sampled(("check", 0), {"model": unet(), "q": library(), "check": compat("q", mode)}))
    assert (error["node_type"], error["exception_type"].rpartition(".")[2]) == ("OffloadCompat", "OffloadConflict")
    first, *rest = error["exception_message"].splitlines()
    assert first.startswith("diffusion_model: bnb-nf4 (")
    assert f"cannot run with {mode} offload" in first
    assert rest.count("Ways out:") == 1
    assert any("Start ComfyUI with --" in line for line in rest)


def test_layers_quantized_after_the_node_stop_at_the_sampler(comfyui: Any) -> None:
    """The node sees full precision; what breaks under the chosen mode comes later."""
    nodes = {"model": unet(), "check": compat(mode="novram"), "q": library("check")}
    error = comfyui.fail(sampled(("q", 0), nodes))
    assert (error["node_type"], error["exception_type"].rpartition(".")[2]) == ("KSampler", "OffloadConflict")
    first, second, *_ = error["exception_message"].splitlines()
    assert first.startswith("diffusion_model: bnb-nf4 (")
    assert "right before the model ran" in second


def test_a_mode_changed_after_the_node_stops_at_the_sampler(comfyui: Any, restored: None) -> None:
    nodes = {"model": unet(), "q": library(), "check": compat("q"), "lora": lora("check")}
    nodes["shift"] = node("ProbeVram", model=["lora", 0], state="NO_VRAM")
    error = comfyui.fail(sampled(("shift", 0), nodes))
    assert (error["node_type"], error["exception_type"].rpartition(".")[2]) == ("KSampler", "OffloadConflict")
    first, second, *_ = error["exception_message"].splitlines()
    assert first.startswith("diffusion_model: bnb-nf4 (")
    assert "cannot run with novram offload" in first
    assert "right before the model ran" in second


def test_the_mode_changes_while_the_node_is_cached(comfyui: Any, restored: None) -> None:
    nodes = {"model": unet(), "q": library(), "check": compat("q")}
    comfyui.run(sampled(("check", 0), nodes))
    nodes["shift"] = node("ProbeVram", model=["check", 0], state="NO_VRAM")
    entry = comfyui.wait(comfyui.queue(sampled(("shift", 0), nodes)))
    error = comfyui.error(entry)
    assert (error["node_type"], error["exception_type"].rpartition(".")[2]) == ("KSampler", "OffloadConflict")
    cached = next(data["nodes"] for kind, data in entry["status"]["messages"] if kind == "execution_cached")
    assert "check" in cached  # so it was the guard, and not the node


@pytest.mark.parametrize(("reserve", "variant"), [(0, "whole"), (1 << 20, "split")])
def test_what_is_forecast_is_what_the_host_does(comfyui: Any, restored: None, reserve: int, variant: str) -> None:
    """As with --reserve-vram: what is left decides whether the model is loaded whole."""
    shift = node("ProbeVram", model=["q", 0], state="NORMAL_VRAM", reserve_gib=reserve)
    ours = node("QuantizeModel", model=["model", 0], format="bnb-nf4")
    nodes = {"model": unet(), "q": ours, "shift": shift, "check": compat("shift")}
    before = comfyui.log.read_text(errors="replace").count("loaded partially")
    report = comfyui.run(sampled(("check", 0), nodes))["check"]["report"][0]
    assert report["now"] == {"diffusion_model": {"mode": "partial", "variant": variant}}
    said = comfyui.log.read_text(errors="replace").count("loaded partially") - before
    assert (said > 0) is (variant == "split")
    nodes["q"] = library()
    graph = sampled(("check", 0), nodes)
    if variant == "whole":
        comfyui.run(graph)
        return
    error = comfyui.fail(graph)
    assert error["node_type"] == "OffloadCompat"
    first, *rest = error["exception_message"].splitlines()
    assert "cannot run with partial offload (split)" in first
    assert any("MiB are free for it)" in line for line in rest)


def test_our_layers_run_when_the_mode_changes(comfyui: Any, restored: None) -> None:
    quantized = node("QuantizeModel", model=["model", 0], format="bnb-nf4")
    nodes = {"model": unet(), "q": quantized, "check": compat("q"), "lora": lora("check")}
    plain = comfyui.latent(sampled(("lora", 0), nodes))
    nodes["shift"] = node("ProbeVram", model=["lora", 0], state="NO_VRAM")
    before = comfyui.log.read_text(errors="replace").count("loaded partially")
    streamed = comfyui.latent(sampled(("shift", 0), nodes))
    assert comfyui.log.read_text(errors="replace").count("loaded partially") > before
    assert torch.allclose(streamed, plain, rtol=1e-5, atol=1e-5)


def test_what_the_host_really_did_counts(comfyui: Any) -> None:
    """The host says nothing before of a load that another node forces; after it, the model tells."""
    nodes = {
        "model": unet(),
        "q": library(),
        "check": compat("q"),
        "force": node("ProbeLoad", model=["check", 0], mode="partial"),
    }
    error = comfyui.fail(sampled(("force", 0), nodes))
    assert error["node_type"] == "KSampler"
    assert "cannot run with partial offload (split)" in error["exception_message"].splitlines()[0]


def test_an_error_of_a_library_is_explained(comfyui: Any) -> None:
    """Another pack offloads the layers by itself, which the host's memory mode does not show."""
    nodes = {"model": unet(), "q": library(), "check": compat("q")}
    nodes["hooks"] = node("ProbeHooks", model=["check", 0])
    error = comfyui.fail(sampled(("hooks", 0), nodes))
    assert (error["node_type"], error["exception_type"].rpartition(".")[2]) == ("KSampler", "OffloadConflict")
    assert "bnb-nf4" in error["exception_message"].splitlines()[0]
    assert RAW in "".join(error["traceback"]) + error["exception_message"]


def test_errors_that_are_none_of_ours_pass_as_they_are(comfyui: Any) -> None:
    nodes = {
        "model": unet(),
        "check": compat(),
        "break": node("ProbeBreak", model=["check", 0], message="another thing"),
    }
    error = comfyui.fail(sampled(("break", 0), nodes))
    assert (error["exception_type"], error["exception_message"].strip()) == ("NotImplementedError", "another thing")


def test_guards_survive_and_do_not_pile_up(comfyui: Any) -> None:
    nodes = {
        "model": unet(),
        "one": compat(),
        "shift": node("ModelSamplingFlux", model=["one", 0], max_shift=1.15, base_shift=0.5, width=64, height=64),
        "q": node("QuantizeModel", model=["shift", 0], format="bnb-nf4"),
        "lora": lora("q"),
        "two": compat("lora"),
        "tell": node("ProbeGuard", model=["two", 0], given=["model", 0]),
        "middle": node("ProbeGuard", model=["lora", 0], given=["q", 0]),
        "compiled": node("TorchCompileModel", model=["one", 0], backend="inductor"),
        "compiled_tell": node("ProbeGuard", model=["compiled", 0]),
    }
    outputs = comfyui.run(sampled(("two", 0), nodes))
    found = json.loads(outputs["tell"]["text"][0])
    assert (found["model"], found["given"]) == ([1, 1], [0, 0])  # and the input model has none
    assert json.loads(outputs["compiled_tell"]["text"][0])["model"] == [1, 1]
    middle = json.loads(outputs["middle"]["text"][0])
    assert (middle["model"], middle["given"], middle["same_modules"]) == ([1, 1], [1, 1], True)


def test_text_encoders_and_vaes_are_guarded(comfyui: Any, restored: None) -> None:
    vae = node("VAELoader", vae_name="digits_tae.safetensors")
    clip = node("CLIPLoader", clip_name="digits_clip.safetensors", type="stable_diffusion")
    check = compat(clip=["clip", 0], vae=["vae", 0])
    nodes = {"model": unet(), "vae": vae, "loaded": clip, "check": check}
    nodes["again"] = compat("check", clip=["check", 2], vae=["check", 3])
    nodes["tell"] = node("ProbeGuard", clip=["again", 2], vae=["again", 3])
    graph = sampled(("check", 0), nodes)
    found = told(comfyui, {k: graph[k] for k in ("model", "vae", "clip", "check", "again", "tell")})
    assert (found["clip"], found["vae"]) == (1, 1)
    encoder = node("QuantizeTextEncoder", clip=["check", 2], format="bnb-nf4", encoders="all", carrier="library")
    graph |= {"q": encoder, "prompt": node("CLIPTextEncode", clip=["forced", 0], text="seven")}
    graph["forced"] = node("ProbeLoadClip", clip=["q", 0], mode="partial")
    error = comfyui.fail(graph)
    assert (error["node_type"], error["exception_type"].rpartition(".")[2]) == ("CLIPTextEncode", "OffloadConflict")
    assert error["exception_message"].startswith("clip_l: bnb-nf4 (")
    # Once more: a load that was refused is not taken for one that is done.
    assert comfyui.fail(graph)["exception_type"].rpartition(".")[2] == "OffloadConflict"
    graph["decoded"] = node("VAEDecode", samples=["sampler", 0], vae=["check", 3])
    graph["show"] = node("PreviewImage", images=["decoded", 0])
    graph["prompt"] = node("CLIPTextEncode", clip=["check", 2], text="seven")
    assert comfyui.run(graph)["show"]["images"]


def test_another_object_is_searched(comfyui: Any) -> None:
    graph = {
        "net": node("ProbeControlNet"),
        "check": node("OffloadCompat", pipeline=["net", 0], mode="novram", action="block"),
        "show": node("PreviewAny", source=["check", 1]),
    }
    report = comfyui.run(graph)["check"]["report"][0]
    assert set(report["now"]) == {"control_model"}
    graph["q"] = node("QuantizeControlNet", control_net=["net", 0], format="bnb-nf4", carrier="library")
    graph["check"]["inputs"]["pipeline"] = ["q", 0]
    assert comfyui.fail(graph)["exception_message"].startswith("control_model: bnb-nf4 (")
