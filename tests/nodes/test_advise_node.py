"""AdviseFormat in the embedded host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quantwire.hosts.standalone.executor import Executor
from quantwire.hosts.standalone.host import StandaloneHost
from quantwire.nodes import NODE_CLASS_MAPPINGS
from quantwire.nodes.advise import DEVICES, VRAM, AdviseFormat
from quantwire.quantizers.errors import QuantwireError
from quantwire.quantizers.measure import tiers
from quantwire.quantizers.measure.native import KINDS, parse_device


@pytest.mark.slow  # imports every library
def test_the_best_format_quantizes(host: StandaloneHost, executor: Executor, make_node: Any) -> None:
    size = {"width": 64, "height": 64}
    graph = {
        "model": make_node("UNETLoader", unet_name="digits_flux.safetensors", weight_dtype="default"),
        "advise": make_node("AdviseFormat", model=["model", 0], device="cuda:8.6", vram="8 GB", budget="8MiB", **size),
        "quantize": make_node("QuantizeModel", model=["model", 0], format="from config", config=["advise", 0]),
        "report": make_node("Keep", value=["quantize", 1]),
        "advice": make_node("Keep", value=["advise", 2]),
        "text": make_node("Keep", value=["advise", 1]),
        "plot": make_node("Keep", value=["advise", 3]),
    }
    results = executor.run(graph).results
    advice, report, image = results["advice"][0], results["report"][0], results["plot"][0]
    best = advice.best_format
    assert report.format_id == best.format_id
    assert report.nbytes_out == best.nbytes <= 8 << 20
    assert results["text"][0] == str(advice)
    assert image.shape[0] == 1
    assert image.shape[3] == 3
    assert image.dtype is torch.float32


def test_widgets_are_what_the_measures_know() -> None:
    assert [*VRAM] == tiers.names()
    kinds = {parse_device(name, 1).kind for name in DEVICES if name != tiers.THIS_DEVICE}
    assert kinds == set(KINDS)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, True),
        ({"budget": "6.5GB", "device": "cuda:8.6", "vram": "8 GB"}, True),
        ({"budget": None, "device": None, "vram": None}, True),
        ({"budget": "lots"}, "budget: 'lots' is no size."),
        ({"device": "cuda:8.6", "vram": "this device"}, "so its memory must be told"),
        ({"device": "cuda"}, "is not among its choices"),
        ({"vram": "7 GB"}, "is not among its choices"),
    ],
)
def test_bad_widgets_are_told_early(given: dict[str, Any], said: bool | str) -> None:
    found = AdviseFormat.VALIDATE_INPUTS(**given)
    assert found is True if said is True else said in str(found)


def test_what_is_no_model_is_refused(host: StandaloneHost) -> None:
    with pytest.raises(QuantwireError):
        NODE_CLASS_MAPPINGS["AdviseFormat"]().advise("text", "8 GB", "cuda:8.6")
