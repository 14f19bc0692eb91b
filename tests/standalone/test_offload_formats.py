"""Every format of our carrier under every offload mode: bit-equal to no offload, through accelerate and diffusers."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from offload_models import VARIANTS, same, settings, tiny_flux, velocities
from quantwire.hosts import use
from quantwire.hosts.standalone.host import StandaloneHost
from quantwire.hosts.standalone.models import DiffusionModel, store_as
from quantwire.hosts.standalone.offload import placed_now, set_offload
from quantwire.nodes.quantize import QuantizeModel
from quantwire.quantizers.errors import OffloadConflict, QuantwireError, SpecError
from quantwire.quantizers.registry import available_formats
from torch import Tensor

# One of each way to store values; the rest takes minutes.
QUICK = ("bnb-nf4", "quanto-qint8", "gguf-q4-k")
STORED = {"stored-fp8-e4m3fn": torch.float8_e4m3fn, "stored-fp8-e5m2": torch.float8_e5m2}


@pytest.fixture(autouse=True)
def _quiet_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NNCF_CI", "1")  # no telemetry
    monkeypatch.setenv("SDNQ_USE_TORCH_COMPILE", "0")


@functools.lru_cache(maxsize=1)  # tests come format by format
def quantized(format_id: str, carrier: str = "quantwire") -> tuple[DiffusionModel, list[Tensor]]:
    """A model in a format, made as the executor makes it, and its outputs without offloading."""
    with use(StandaloneHost()), torch.inference_mode():
        model = tiny_flux()
        if format_id in STORED:
            model = store_as(model, STORED[format_id])
        elif format_id != "full-precision":
            model = QuantizeModel().quantize(model, format_id, carrier)["result"][0]
    return model, velocities(model)


def cells(formats: Any) -> Any:
    pairs = [(f, v) for f in formats for v in VARIANTS]
    return pytest.mark.parametrize(("format_id", "variant"), pairs, ids=["-".join(pair) for pair in pairs])


def agree(format_id: str, variant: str) -> None:
    model, wanted = quantized(format_id)
    asked = settings(variant, model.transformer)
    offloaded = set_offload(model, asked)
    for _ in range(2):
        assert same(velocities(offloaded), wanted)
    (placed,) = placed_now(offloaded).values()
    away = [p.is_meta for p in placed.module.parameters()]
    if asked.mode.value == "sequential":
        assert all(away)
    if variant.startswith("balanced-split"):
        assert any(away)
        assert not all(away)
    assert not any(p.is_meta for p in model.transformer.parameters())
    assert same(velocities(model), wanted), "the model without an offload mode is as it was"


@cells(QUICK)
def test_bit_equal(format_id: str, variant: str) -> None:
    agree(format_id, variant)


@pytest.mark.slow
@cells(["full-precision", *STORED, *(f for f in available_formats() if f not in QUICK)])
def test_bit_equal_in_every_format(format_id: str, variant: str) -> None:
    agree(format_id, variant)


# --- libraries' own layers ---

# Where the library survives the mode, and where it does not; the others of a format are like one of these.
RUN = ("none", "model", "balanced-whole", "group-block", "group-leaf")
LIBRARIES = {
    "bnb-int8": (*RUN, "sequential", "sequential-disk", "balanced-split"),
    "bnb-nf4": RUN,
    "gguf-q8-0": (*RUN, "group-leaf-disk"),
    "quanto-qint8": ("none", "model", "balanced-whole"),
    "torchao-int8wo": (*RUN, "sequential"),
}
STOPPED = {
    "bnb-nf4": ("sequential", "sequential-disk", "balanced-split"),
    "gguf-q8-0": ("sequential", "balanced-split-disk"),
    "quanto-qint8": ("sequential", "balanced-split", "group-leaf-disk"),
    "torchao-int8wo": ("sequential-disk", "group-block-disk"),
}


def library(cells: dict[str, tuple[str, ...]]) -> Any:
    pairs = [(f, v) for f, variants in cells.items() for v in variants]
    return pytest.mark.parametrize(("format_id", "variant"), pairs, ids=["-".join(pair) for pair in pairs])


@library(LIBRARIES)
def test_layers_of_libraries_are_bit_equal_where_they_survive(format_id: str, variant: str) -> None:
    model, wanted = quantized(format_id, "library")
    offloaded = set_offload(model, settings(variant, model.transformer))
    for _ in range(2):
        assert same(velocities(offloaded), wanted)
    assert same(velocities(model), wanted), (
        "bitsandbytes' layers have a state beside their weights, which a copy shares"
    )


@library(STOPPED)
def test_layers_of_libraries_that_do_not_survive_leave_the_model_whole(format_id: str, variant: str) -> None:
    """diffusers empties tensors that it wrote to disk; those of the model itself must not be among them."""
    model, wanted = quantized(format_id, "library")
    offloaded = set_offload(model, settings(variant, model.transformer))
    with pytest.raises(QuantwireError) as caught:
        velocities(offloaded)
    assert isinstance(caught.value, (OffloadConflict, SpecError))
    assert placed_now(offloaded) == {}
    assert same(velocities(model), wanted)
