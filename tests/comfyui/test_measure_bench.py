"""BenchmarkModel in the real ComfyUI: its own sampler, two formats."""

from __future__ import annotations

import json
from typing import Any

import torch
from graphs import node, sampled, unet


def test_two_formats(comfyui: Any) -> None:
    given = {
        "model": ["model", 0], "positive": ["prompt", 0], "negative": ["prompt", 0], "latent_image": ["empty", 0],
        "seed": 7, "steps": 3, "cfg": 1.0, "sampler_name": "heun", "scheduler": "simple", "denoise": 1.0,
        "repeats": 2, "warmup": 1, "folder": "bench/digits", "against": "gguf-q8-0",
    }  # fmt: skip
    graph = sampled(("model", 0), {"model": unet(), "bench": node("BenchmarkModel", **given)}, steps=2)
    graph["preview"] = node("PreviewImage", images=["bench", 1])
    before = comfyui.latent(graph)
    said = comfyui.run({**graph, "bench": node("BenchmarkModel", **given, audio_seconds=2.0)})
    assert len(said["preview"]["images"]) == 4
    folder = comfyui.base / "output" / "bench" / "digits"
    data = json.loads((folder / "benchmark_results.json").read_text(encoding="utf-8"))
    assert data["host"] == "comfyui"
    full, small = data["variants"]
    assert [full["name"], small["name"]] == ["full precision", "gguf-q8-0"]
    assert len(small["step_s"]["samples"]) == 4  # two of three steps, twice
    assert small["memory"]["weights_nbytes"] < full["memory"]["weights_nbytes"]
    assert 0 < small["difference"]["relative_error"] < 0.1
    assert small["difference"]["of"] == "latent"
    assert full["real_time_factor"] == full["generation_s"]["median"] / 2
    assert torch.equal(comfyui.latent(graph), before)
