"""Every format x how it came in x with and without a LoRA x how the host loads it, in the real host.

The formats are those of the registry; one that the host's Python cannot run is skipped with its reason.
What is compared: one model call (the latent after one step from pure noise). Plain: against full precision, with a
bound a format. LoRA: the cosine between what the LoRA changes on the quantized model and what it changes at full
precision. Partial and novram: against the full load of the same graph.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import torch
from gguf_files import OTHER_TYPES
from graphs import MODES, chain, every_call, node, sampled, unet
from quantwire.quantizers.registry import format_ids, get_entry

# Relative error of one model call against full precision; about twice what was measured, see docs/comfyui.md.
ERROR_BOUND = {
    "bnb-int8": 0.02,
    "bnb-nf4": 0.12,
    "bnb-fp4": 0.15,
    "quanto-qint8": 0.015,
    "quanto-qint4": 0.10,
    "quanto-qint2": 0.6,
    "quanto-qfloat8-e4m3fn": 0.04,
    "quanto-qfloat8-e5m2": 0.06,
    "comfy-fp8-e4m3fn": 0.04,
    "comfy-fp8-e5m2": 0.08,
    "comfy-nvfp4": 0.12,
    "comfy-mxfp8": 0.04,
    "comfy-int8": 0.02,
    "comfy-int8-convrot": 0.02,
    "comfy-w4a4-convrot": 0.30,
    "comfy-w4a8": 0.10,
    "sdnq-int8": 0.01,
    "sdnq-uint8": 0.01,
    "sdnq-int6": 0.03,
    "sdnq-uint6": 0.03,
    "sdnq-int5": 0.06,
    "sdnq-uint5": 0.06,
    "sdnq-int4": 0.12,
    "sdnq-uint4": 0.08,
    "sdnq-uint3": 0.15,
    "sdnq-uint2": 0.4,
    "sdnq-float8-e4m3fn": 0.04,
    "sdnq-float4-e2m1fn": 0.2,
    "torchao-int8wo": 0.01,
    "torchao-int8dyn": 0.02,
    "torchao-int4wo": 0.1,
    "torchao-float8wo": 0.04,
    "nncf-int8-sym": 0.01,
    "nncf-int8-asym": 0.01,
    "nncf-int4-sym": 0.12,
    "nncf-int4-asym": 0.1,
    "nncf-nf4": 0.12,
    "layerwise-fp8-e4m3fn": 0.03,
    "layerwise-fp8-e5m2": 0.08,
    "gguf-q8-0": 0.01,
    "gguf-q6-k": 0.02,
    "gguf-q5-0": 0.05,
    "gguf-q4-0": 0.10,
    "gguf-q4-k": 0.10,
    "gguf-iq4-xs": 0.10,
    "gguf-mxfp4": 0.15,
    "gguf-q2-k": 0.4,
}
COSINE = 0.98
# W4A4 rounds activations to 4 bits; a layer with a LoRA computes without that rounding, so what the LoRA changes and
# what the rounding changed come together. 2 bits leave a model so far off that a LoRA meets other activations.
COSINE_SHORT = {"comfy-w4a4-convrot": 0.96, "sdnq-uint2": 0.92, "quanto-qint2": 0.88, "gguf-q2-k": 0.92}
# Streamed layers compute as loaded ones do; the host casts them by another route, which may round once more.
SAME = 1e-5
# GGUF types differ in how a block is read alone, which the conformance suite checks bit for bit.
QUANTIZED_GGUF = ("gguf-q8-0", "gguf-q4-0", "gguf-q4-k")
CASES = [
    *((f, "QuantizeModel") for f in format_ids() if get_entry(f).backend != "gguf" or f in QUANTIZED_GGUF),
    *((f"gguf-{kind.lower().replace('_', '-')}", "LoadGGUF") for kind in ("Q8_0", "Q4_0", *OTHER_TYPES)),
]
CALLS = [(lora, mode) for lora in (False, True) for mode in MODES]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))


@functools.cache
def latents(comfyui: Any, source: str, format_id: str) -> dict[tuple[bool, str], torch.Tensor]:
    """Without and with the LoRA, in every mode; from one graph, so that a format is quantized once."""
    graph, saves = every_call(source, format_id)
    before = partial_loads(comfyui)
    outputs = comfyui.run(graph)
    # Four of the six calls took the offloaded path, or it was not tested at all.
    assert partial_loads(comfyui) - before == 4
    return {call: comfyui.read_latent(outputs[save]) for call, save in saves.items()}


def partial_loads(comfyui: Any) -> int:
    """How often the host has said that it left layers of a model offloaded."""
    return comfyui.log.read_text(errors="replace").count("loaded partially")


@pytest.fixture(scope="session")
def host_formats(comfyui: Any) -> dict[str, str]:
    """Format id -> why the host's Python cannot run it; empty where it can."""
    return json.loads(comfyui.run({"tell": node("ProbeFormats")})["tell"]["text"][0])


@pytest.fixture
def calls(comfyui: Any, host_formats: dict[str, str]) -> Any:
    # Comfy is a mutable dataclass without a hash; the cache keys on its identity.
    type(comfyui).__hash__ = object.__hash__  # type: ignore[method-assign]

    def find(source: str, format_id: str) -> dict[tuple[bool, str], torch.Tensor]:
        if host_formats.get(format_id):
            pytest.skip(f"{format_id}: {host_formats[format_id]}")
        return latents(comfyui, source, format_id)

    return find


@pytest.mark.parametrize(("format_id", "source"), CASES, ids=lambda v: v)
def test_format(calls: Any, comfyui: Any, format_id: str, source: str) -> None:
    full, got = calls("full", ""), calls(source, format_id)
    plain, wanted = full[False, "default"], full[True, "default"] - full[False, "default"]
    for lora, mode in CALLS:
        row: dict[str, Any] = {"format": format_id, "source": source, "mode": mode}
        if lora:
            effect = got[True, mode] - got[False, "default"]
            comfyui.rows.append({**row, "cosine": cosine(effect, wanted)})
        else:
            comfyui.rows.append({**row, "error": relative(got[False, mode], plain)})
    for lora, mode in CALLS:
        found = got[lora, mode]
        assert torch.isfinite(found).all()
        assert relative(found, got[lora, "default"]) <= SAME
    assert 0 < relative(got[False, "default"], plain) <= ERROR_BOUND[format_id]
    assert cosine(got[True, "default"] - got[False, "default"], wanted) >= COSINE_SHORT.get(format_id, COSINE)


def test_the_lora_does_something_and_not_everything(calls: Any) -> None:
    """Or the cosines above would prove nothing."""
    full = calls("full", "")
    moved = relative(full[True, "default"], full[False, "default"])
    assert 0.1 < moved < 0.6


@pytest.mark.parametrize("format_id", ["bnb-nf4", "comfy-nvfp4", "sdnq-uint4"])
def test_requantizing_a_lora_is_an_option_and_is_worse(calls: Any, comfyui: Any, format_id: str) -> None:
    full, got = calls("full", ""), calls("QuantizeModel", format_id)
    wanted = full[True, "default"] - full[False, "default"]
    model, nodes = chain("QuantizeModel", format_id, True, "default", {"lora": "requantize"})
    effect = comfyui.latent(sampled(model, nodes)) - got[False, "default"]
    assert cosine(effect, wanted) < cosine(got[True, "default"] - got[False, "default"], wanted)


def test_requantizing_keeps_the_options_of_the_format(comfyui: Any) -> None:
    uri = "bnb;bits=4;bits4-quant-type=nf4;bits4-use-double-quant=true"
    options = {"lora": "requantize", "config": ["config", 0]}
    model, nodes = chain("QuantizeModel", "bnb-nf4", True, "default", options)
    graph = sampled(model, {**nodes, "config": node("QuantConfig", uri=uri)})
    graph["tell"] = node("ProbeModel", model=list(model), after=["sampler", 0])
    facts = json.loads(comfyui.run(graph)["tell"]["text"][0])
    assert facts["merged"] >= facts["quantized_layers"] > 0  # the host has merged the LoRA into every one of them
    assert facts["tensors"] == ["absmax", "nested_absmax", "nested_code", "offset", "scale"]  # the host's own is empty
    assert facts["meta"][0]["spec"] == uri


OTHER_FAMILIES = (
    *("bnb-int8", "bnb-nf4", "quanto-qint8", "gguf-q8-0", "comfy-int8", "comfy-nvfp4"),
    *("sdnq-uint4", "torchao-int8wo", "nncf-int4-asym", "layerwise-fp8-e4m3fn"),
)


@pytest.mark.parametrize("format_id", OTHER_FAMILIES)
@pytest.mark.parametrize("family", ["tiny_sd3", "tiny_wan21"])
def test_other_families(comfyui: Any, host_formats: dict[str, str], family: str, format_id: str) -> None:
    if host_formats[format_id]:
        pytest.skip(f"{format_id}: {host_formats[format_id]}")
    wan = node("EmptyHunyuanLatentVideo", width=128, height=128, length=5, batch_size=1)
    empty = wan if family == "tiny_wan21" else None
    base = unet(f"{family}.safetensors")
    full = comfyui.latent(sampled(("model", 0), {"model": base}, latent=empty))
    nodes = {"model": base, "q": node("QuantizeModel", model=["model", 0], format=format_id)}
    got = comfyui.latent(sampled(("q", 0), nodes, latent=empty))
    assert 0 < relative(got, full) <= 2 * ERROR_BOUND[format_id]
