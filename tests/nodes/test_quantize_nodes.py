"""QuantizeModel, QuantizeTextEncoder and QuantConfig in graphs that sample the demo model."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from quantwire.hosts import use
from quantwire.hosts.standalone.executor import Executor
from quantwire.hosts.standalone.host import StandaloneHost
from quantwire.hosts.standalone.validate import InvalidWorkflow
from quantwire.nodes.quantize import QuantConfig, QuantizeTextEncoder
from quantwire.quantizers.errors import SpecError, WeightError
from quantwire.quantizers.registry import available_formats
from safetensors.torch import load_file, save_file
from torch import Tensor

CARRIERS = ("quantwire", "library")
# Relative distance of the two carriers' latents after two steps on the demo model. Measured: 0 for bnb-int8,
# quanto-qint8, quanto-qfloat8-e4m3fn and gguf-q4-0, and 0.0069 to 0.0077 for the other four, whose libraries round in
# another order.
CARRIER_TOLERANCE = 0.02
# Relative distance to the full-precision latents; measured 0.008 (gguf-q8-0, quanto-qint8) to 0.062 (bnb-fp4).
EFFECT = {8: (1e-4, 0.05), 4: (1e-3, 0.2)}


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def latents(executor: Executor, graph: dict[str, Any]) -> Tensor:
    return executor.run(graph).results["latent"][0]["samples"]


def snapshot(module: torch.nn.Module) -> dict[str, tuple[int, Tensor]]:
    return {n: (id(p), p.detach().clone()) for n, p in module.named_parameters()}


def unchanged(module: torch.nn.Module, before: dict[str, tuple[int, Tensor]]) -> bool:
    now = dict(module.named_parameters())
    same = all(id(now[n]) == i and torch.equal(now[n], p) for n, (i, p) in before.items())
    return same and set(now) == set(before)


@pytest.mark.parametrize("format_id", available_formats())
def test_every_format_samples_with_both_carriers(
    executor: Executor, sampled: Any, make_node: Any, format_id: str
) -> None:
    full = latents(executor, sampled())
    found: dict[str, Tensor] = {}
    for carrier in CARRIERS:
        quantize = make_node("QuantizeModel", model=["model", 0], format=format_id, carrier=carrier)
        result = executor.run(sampled("q", q=quantize))
        found[carrier] = result.results["latent"][0]["samples"]
        image = result.results["image"][0]
        assert image.shape == (1, 64, 64, 3)
        assert torch.isfinite(image).all()
        report = result.outputs["q"]["report"][0]
        assert (report["format_id"], report["carrier"], report["warnings"]) == (format_id, carrier, [])
        assert sum(e["action"] == "quantize" for e in report["entries"]) == 29
        assert report["totals"]["nbytes_out"] < report["totals"]["nbytes_in"]
    assert distance(found["quantwire"], found["library"]) < CARRIER_TOLERANCE
    low, high = EFFECT[8 if "8" in format_id else 4]
    assert all(low < distance(x, full) < high for x in found.values())


def test_other_branch_stays_bit_equal_and_the_input_unchanged(executor: Executor, sampled: Any, make_node: Any) -> None:
    alone = latents(executor, sampled())
    graph = sampled("q", q=make_node("QuantizeModel", model=["model", 0], format="bnb-nf4"))
    graph["sampler2"] = copy.deepcopy(graph["sampler"])
    graph["sampler2"]["inputs"]["model"] = ["model", 0]
    graph["latent2"] = make_node("Keep", value=["sampler2", 0])
    graph["input"] = make_node("Keep", value=["model", 0])
    model = executor.run({k: graph[k] for k in ("model", "input")}).results["input"][0]
    before, modules = snapshot(model.transformer), dict(model.transformer.named_modules())
    result = executor.run(graph)
    assert result.results["input"][0] is model
    assert unchanged(model.transformer, before)
    assert all(modules[n] is m for n, m in model.transformer.named_modules())
    assert torch.equal(result.results["latent2"][0]["samples"], alone)
    assert not torch.equal(result.results["latent"][0]["samples"], alone)
    assert torch.equal(latents(executor, sampled()), alone)


def test_keep_layers(executor: Executor, sampled: Any, make_node: Any) -> None:
    keep = "*.attn.to_out.*, single_transformer_blocks\n"
    quantize = make_node("QuantizeModel", model=["model", 0], format="quanto-qint8", keep_layers=keep)
    graph = {"model": sampled()["model"], "q": quantize, "out": make_node("Keep", value=["q", 0])}
    result = executor.run(graph)
    kept = {e["name"] for e in result.outputs["q"]["report"][0]["entries"] if e["reason"] == "excluded"}
    assert kept == {
        "transformer_blocks.0.attn.to_out.0.weight", "transformer_blocks.1.attn.to_out.0.weight",
        *(f"single_transformer_blocks.0.{n}.weight" for n in ("proj_mlp", "attn.to_q", "attn.to_k", "attn.to_v")),
        "single_transformer_blocks.0.proj_out.weight", "single_transformer_blocks.0.norm.linear.weight",
    }  # fmt: skip
    transformer = result.results["out"][0].transformer
    assert type(transformer.get_submodule("transformer_blocks.1.attn.to_out.0")) is torch.nn.Linear
    graph["q"]["inputs"]["keep_layers"] = "no_such_layer"
    with pytest.raises(SpecError, match="no_such_layer"):
        executor.run(graph)


@pytest.fixture
def damaged(tmp_path: Path, demo_models: Path) -> str:
    """The demo model with a value in one weight that no float16 scale holds."""
    tensors = load_file(demo_models / "diffusion_models" / "digits_flux.safetensors")
    weight = tensors["double_blocks.1.img_mlp.0.weight"]
    weight[3, 5] = 1e8
    folder = tmp_path / "models" / "diffusion_models"
    folder.mkdir(parents=True)
    save_file(tensors, folder / "damaged.safetensors")
    return "damaged.safetensors"


def test_failure_stops_the_graph(executor: Executor, sampled: Any, make_node: Any, damaged: str) -> None:
    quantize = make_node("QuantizeModel", model=["model", 0], format="bnb-int8")
    graph = sampled("q", q=quantize)
    graph["model"]["inputs"]["unet_name"] = damaged
    with pytest.raises(WeightError, match=r"ff\.net\.0\.proj\.weight': bnb-int8 gives non-finite") as caught:
        executor.run(graph)
    assert caught.value.node_place.class_type == "QuantizeModel"  # type: ignore[attr-defined]


def test_failure_left_at_full_precision_is_visible(
    executor: Executor, sampled: Any, make_node: Any, damaged: str, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"format": "bnb-int8", "on_failure": "full precision"}
    graph = {
        "model": sampled()["model"],
        "q": make_node("QuantizeModel", model=["model", 0], **options),
        "out": make_node("Keep", value=["q", 0]),
    }
    graph["model"]["inputs"]["unet_name"] = damaged
    name = "transformer_blocks.1.ff.net.0.proj.weight"
    with caplog.at_level(logging.WARNING):
        result = executor.run(graph)
    report, text = result.outputs["q"]["report"][0], result.outputs["q"]["text"][0]
    assert any(name in r.message and "full precision" in r.message for r in caplog.records)
    assert [e["name"] for e in report["entries"] if e["action"] == "full precision"] == [name]
    assert len(report["warnings"]) == 1
    assert f"WARNING: {name} stays at full precision" in text
    layer = result.results["out"][0].transformer.get_submodule(name.removesuffix(".weight"))
    assert type(layer) is torch.nn.Linear


def test_config(executor: Executor, sampled: Any, make_node: Any) -> None:
    uri = "bnb;bits=4;bits4-quant-type=nf4;bits4-use-double-quant=true;exclude=*.to_q"
    graph = {
        "model": sampled()["model"],
        "c": make_node("QuantConfig", uri=uri),
        "q": make_node(
            "QuantizeModel", model=["model", 0], format="from config", config=["c", 0], keep_layers="*.to_k"
        ),
        "out": make_node("Keep", value=["q", 1]),
    }
    report = executor.run(graph).results["out"][0]
    assert report.format_id == "bnb-nf4"
    assert "double-quant=true" in report.uri
    excluded = {e.name.rsplit(".", 2)[1] for e in report.entries if e.reason == "excluded"}
    assert excluded == {"to_q", "to_k"}
    graph["q"]["inputs"]["format"] = "bnb-nf4"
    assert executor.run(graph).results["out"][0].uri == report.uri
    graph["q"]["inputs"]["format"] = "bnb-fp4"
    with pytest.raises(SpecError, match=r"format is bnb-fp4, but the linked config is for bnb-nf4"):
        executor.run(graph)
    del graph["q"]["inputs"]["config"]
    graph["q"]["inputs"]["format"] = "from config"
    with pytest.raises(SpecError, match="no QuantConfig is linked"):
        executor.run(graph)


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("bnb;bits=5", "5"),
        ("bnb;bit=4", "bits"),
        ("nonsense", "nonsense"),
        ("bnb;bits=8;bits4-quant-type=nf4", "bits=4"),
        ("bnb-nf4;bits=8", "bits"),
        ("bnb;exclude='a", "not closed"),
    ],
)
def test_config_is_refused_before_anything_runs(
    executor: Executor, sampled: Any, make_node: Any, uri: str, said: str
) -> None:
    answer = QuantConfig.VALIDATE_INPUTS(uri)
    assert isinstance(answer, str)
    assert said in answer
    assert "\n" not in answer
    graph = sampled("q", q=make_node("QuantizeModel", model=["model", 0], format="from config", config=["c", 0]))
    with pytest.raises(InvalidWorkflow):
        executor.run({**graph, "c": make_node("QuantConfig", uri=uri)})


def test_quantized_twice_is_refused(executor: Executor, sampled: Any, make_node: Any) -> None:
    graph = {
        "model": sampled()["model"],
        "q": make_node("QuantizeModel", model=["model", 0], format="bnb-int8"),
        "q2": make_node("QuantizeModel", model=["q", 0], format="bnb-nf4"),
        "out": make_node("Keep", value=["q2", 0]),
    }
    with pytest.raises(WeightError, match="already quantized"):
        executor.run(graph)


@pytest.mark.parametrize("carrier", CARRIERS)
def test_text_encoder(executor: Executor, sampled: Any, make_node: Any, carrier: str) -> None:
    quantize = make_node(
        "QuantizeTextEncoder", clip=["clip", 0], format="quanto-qint8", encoders="clip_l", carrier=carrier
    )
    full, graph = sampled(), sampled(clip="q", q=quantize)
    for g in (full, graph):
        g["cond"] = make_node("Keep", value=["prompt", 0])
    full["input"] = make_node("Keep", value=["clip", 0])
    plain = executor.run(full)
    clip = plain.results["input"][0]
    before = snapshot(clip.encoders["clip_l"].module)
    result = executor.run(graph)
    assert unchanged(clip.encoders["clip_l"].module, before)
    (context, extra), (want, _) = result.results["cond"][0][0], plain.results["cond"][0][0]
    assert 1e-4 < distance(context, want) < 0.05
    assert torch.isfinite(extra["pooled_output"]).all()
    entries = result.outputs["q"]["report"][0]["entries"]
    assert sum(e["action"] == "quantize" for e in entries) == 12
    assert torch.isfinite(result.results["image"][0]).all()


def test_text_encoder_that_is_not_loaded(executor: Executor, sampled: Any, make_node: Any) -> None:
    quantize = make_node("QuantizeTextEncoder", clip=["clip", 0], format="bnb-nf4", encoders="t5xxl")
    with pytest.raises(SpecError, match="no t5xxl encoder here, only clip_l"):
        executor.run(sampled(clip="q", q=quantize))
    quantize["inputs"]["encoders"] = "t5"
    with pytest.raises(InvalidWorkflow, match="t5xxl"):
        executor.run(sampled(clip="q", q=quantize))


def test_two_encoders_name_their_entries(host: StandaloneHost, demo_models: Path) -> None:
    from quantwire.hosts.standalone.text_encoders import TextEncoder, load_text_encoder

    one = load_text_encoder([demo_models / "text_encoders" / "digits_clip.safetensors"]).encoders["clip_l"]
    with use(host):
        report = QuantizeTextEncoder().quantize(TextEncoder({"clip_l": one, "t5xxl": one}, "two"), "bnb-int8")[
            "result"
        ][1]
    assert report.title == "clip_l + t5xxl"
    assert {e.name.partition(".")[0] for e in report.entries} == {"clip_l", "t5xxl"}


def test_fp8_storage_is_refused_or_kept(executor: Executor, sampled: Any, make_node: Any) -> None:
    """A model whose weights were already rounded to fp8 is no full-precision model."""
    graph: dict[str, Any] = sampled("q", q=make_node("QuantizeModel", model=["model", 0], format="quanto-qint8"))
    graph["model"]["inputs"]["weight_dtype"] = "fp8_e4m3fn"
    with pytest.raises(WeightError, match=r"dtype is torch\.float8_e4m3fn"):
        executor.run(graph)
    del graph["q"]
    graph["sampler"]["inputs"]["model"] = ["model", 0]
    plain = latents(executor, graph)
    options = {"format": "quanto-qint8", "on_failure": "full precision"}
    graph["q"] = make_node("QuantizeModel", model=["model", 0], **options)
    graph["sampler"]["inputs"]["model"] = ["q", 0]
    assert torch.equal(latents(executor, graph), plain), "all layers stay, and their casting hooks work in the copy"
