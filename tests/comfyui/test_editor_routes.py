"""The routes of the editor's extension in a real ComfyUI server: its classes, its models, its memory mode."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

SHIPPED = Path(__file__).resolve().parents[2] / "workflows"


@pytest.fixture
def prompt(comfyui: Any) -> dict[str, Any]:
    """A conflict, with models that the server has: bitsandbytes' layers under --novram."""
    found = json.loads((SHIPPED / "api" / "conflict.json").read_text(encoding="utf-8"))
    info = comfyui.get("/object_info")
    for node_id, name in (("1", "unet_name"), ("4", "clip_name"), ("10", "vae_name")):
        kind = info[found[node_id]["class_type"]]["input"]["required"][name]
        found[node_id]["inputs"][name] = (kind[0] if isinstance(kind[0], list) else kind[1]["options"])[0]
    found["3"]["inputs"]["mode"] = "novram"
    return found


def findings(comfyui: Any, prompt: dict[str, Any]) -> list[tuple[str, str, str]]:
    answer = comfyui.post("/quantwire/check", {"prompt": prompt})
    assert (answer["host"], answer["mode"]) == ("comfyui", "none")  # it was started with --cpu
    return [(f["level"], f["code"], f["node"]) for f in answer["findings"]]


def test_the_hosts_own_classes_and_models_decide(comfyui: Any, prompt: dict[str, Any]) -> None:
    assert findings(comfyui, prompt) == [("block", "offload-conflict", "3")]
    other = copy.deepcopy(prompt)
    other["1"]["inputs"]["unet_name"] = "not_there.safetensors"
    other["12"]["class_type"] = "VAEDecodeNotThere"
    found = findings(comfyui, other)
    assert ("error", "missing-model", "1") in found
    assert ("error", "unknown-node", "12") in found


def test_every_click_cures(comfyui: Any, prompt: dict[str, Any]) -> None:
    """Also under /api, as the editor asks; what is cured the server then takes."""
    (found,) = comfyui.post("/api/quantwire/check", {"prompt": prompt})["findings"]
    clicks = [r["changes"] for r in found["remedies"] if r["changes"]]
    assert {(c["widget"], c["value"]) for changes in clicks for c in changes} >= {
        ("carrier", "quantwire"),
        ("mode", "auto"),
    }
    for changes in clicks:
        changed = copy.deepcopy(prompt)
        for c in changes:
            changed[c["node"]]["inputs"][c["widget"]] = c["value"]
        assert findings(comfyui, changed) == []
    changed["2"]["inputs"]["carrier"] = "quantwire"
    comfyui.queue(changed)


def test_the_predicted_size_is_that_of_the_run(comfyui: Any, prompt: dict[str, Any]) -> None:
    told = comfyui.post("/quantwire/sizes", {"prompt": prompt, "node": "2", "formats": ["bnb-nf4", "comfy-int8"]})
    for format_id in ("bnb-nf4", "comfy-int8"):
        preview = {"class_type": "PreviewAny", "inputs": {"source": ["2", 1]}}
        graph = {"1": prompt["1"], "2": copy.deepcopy(prompt["2"]), "5": preview}
        # Of a node that another test ran so, the server would tell nothing again.
        graph["2"]["inputs"] |= {"format": format_id, "carrier": "quantwire", "on_failure": "full precision"}
        (badge,) = comfyui.run(graph)["2"]["quantwire"]
        assert told["sizes"][format_id] == badge["nbytes_after"]
        assert told["base_nbytes"] == badge["nbytes_before"]


def test_formats_and_bad_questions(comfyui: Any) -> None:
    told = comfyui.get("/quantwire/formats")
    (carrier,) = told["nodes"]["QuantizeModel"]["depends"]["carrier"]["when"]
    assert "bnb-nf4" in carrier["in"]
    assert "gguf-q8-0" not in carrier["in"]  # diffusers' layer, which ComfyUI does not have
    with pytest.raises(AssertionError, match="400"):
        comfyui.post("/quantwire/check", {})
