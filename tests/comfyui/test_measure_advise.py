"""AdviseFormat in the real ComfyUI: its config quantizes as it foretold, and its native products are the host's."""

from __future__ import annotations

from typing import Any

import pytest
from graphs import Graph, node, sampled, unet

SIZE = {"width": 64, "height": 64}


def advised(**inputs: Any) -> Graph:
    return {
        "model": unet(),
        "advise": node(
            "AdviseFormat", model=["model", 0], **{"vram": "this device", "device": "this device", **inputs}
        ),
        "plot": node("PreviewImage", images=["advise", 3]),
    }


def test_the_best_format_quantizes_as_foretold(comfyui: Any) -> None:
    nodes = advised(clip=["clip", 0], **SIZE)
    nodes["q"] = node("QuantizeModel", model=["model", 0], format="from config", config=["advise", 0])
    graph = sampled(("q", 0), nodes)
    graph["shown"] = node("PreviewAny", source=["q", 1])
    outputs = comfyui.run(graph)
    report = outputs["advise"]["report"][0]
    best = report["best_format"]
    row = next(r for r in report["rows"] if r["format"] == best)
    assert report["host"] == "comfyui"
    assert report["device"]["kind"] == "cpu"
    assert row["usable"]
    assert row["runs"]["evidence"] == "measured"
    assert outputs["plot"]["images"]
    assert best in outputs["advise"]["text"][0]
    assert best in outputs["shown"]["text"][0]
    made = outputs["q"]["report"][0]
    assert made["format_id"] == best
    assert made["totals"]["nbytes_out"] == row["nbytes"]
    assert comfyui.read_latent(outputs["save"]).isfinite().all()


def test_another_device(comfyui: Any) -> None:
    outputs = comfyui.run(advised(device="cuda:12.0", vram="16 GB", **SIZE))
    report = outputs["advise"]["report"][0]
    rows = {r["format"]: r for r in report["rows"]}
    assert rows["comfy-nvfp4"]["runs"]["level"] == "native"
    assert rows["gguf-q4-k"]["runs"]["level"] == "emulated"
    assert report["device"]["total_nbytes"] == 16 << 30
    assert {r["mode"] for r in report["rows"]} <= {"dynamic", "partial", "novram", "none", None}


@pytest.mark.parametrize(
    ("inputs", "said"),
    [({"device": "cuda:8.6"}, "so its memory must be told"), ({"budget": "lots"}, "'lots' is no size")],
)
def test_bad_widgets_are_told_before_the_run(comfyui: Any, inputs: dict[str, str], said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        comfyui.post("/prompt", {"prompt": advised(**inputs)})
