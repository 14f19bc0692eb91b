"""QuantizeModel, QuantizeTextEncoder and QuantConfig in graphs that sample the demo model."""

from __future__ import annotations

import copy
import dataclasses
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from quantwire.hosts import use
from quantwire.hosts.standalone.executor import Executor
from quantwire.hosts.standalone.host import StandaloneHost
from quantwire.hosts.standalone.validate import InvalidWorkflow
from quantwire.nodes.common import spec_from_inputs
from quantwire.nodes.quantize import QuantConfig, QuantizeTextEncoder
from quantwire.quantizers.apply import quantize_tensor
from quantwire.quantizers.auto import MIN_RESERVE, DeviceFacts, candidates
from quantwire.quantizers.compat.modes import Carrier
from quantwire.quantizers.dequantize import stored_nbytes
from quantwire.quantizers.errors import SpecError, WeightError
from quantwire.quantizers.registry import available_formats, get_entry
from quantwire.quantizers.rules import RuleSet
from quantwire.quantizers.spec import QuantSpec
from quantwire.quantizers.weight import QuantizedLinear
from safetensors.torch import load_file, save_file
from torch import Tensor

CARRIERS = ("quantwire", "library")
# Relative distance of the two carriers' latents after two steps on the demo model. Measured: 0 for half of the
# formats, and up to 0.0170 (comfy-int8) for the others, whose libraries round in another order or quantize activations
# too. That is much at 4 bits: 0.117.
CARRIER_TOLERANCE = {"comfy-w4a4-convrot": 0.2}
# Relative distance to the full-precision latents, by bits a weight up to the key. Measured: 0.0083 (gguf-q8-0) to
# 0.0442 (layerwise-fp8-e5m2), 0.0337 (sdnq-uint5) to 0.107 (sdnq-uint3), 0.40 (quanto-qint2).
EFFECT = {2.7: (1e-2, 0.6), 5: (1e-3, 0.2), 8.5: (1e-4, 0.06)}
# Three values a weight, by the largest of a block: for models that were trained so. Of others little is left.
TERNARY, TERNARY_EFFECT = ("gguf-tq1-0", "gguf-tq2-0"), (0.1, 1.5)


# One format of each backend, and those with bounds of their own; the others differ in numbers alone: slow tests.
USUAL = {f.split("-", 1)[0]: f for f in reversed(available_formats())}
SOON = {*USUAL.values(), *CARRIER_TOLERANCE, *TERNARY, "bnb-nf4", "gguf-q4-k", "quanto-qint2"}


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


def refused_library(format_id: str) -> str:
    """Why the format's library has no layer that could hold the demo model; empty where it has."""
    weight, _ = quantize_tensor("w.weight", torch.randn(64, 256), QuantSpec(format_id))
    try:
        StandaloneHost().make_layer(weight, None, Carrier.LIBRARY)
    except SpecError as err:
        return str(err).splitlines()[0]
    return ""


@pytest.mark.parametrize(
    "format_id", [f if f in SOON else pytest.param(f, marks=pytest.mark.slow) for f in available_formats()]
)
def test_every_format_samples_with_both_carriers(
    executor: Executor, sampled: Any, make_node: Any, format_id: str
) -> None:
    full = latents(executor, sampled())
    found: dict[str, Tensor] = {}
    for carrier in CARRIERS:
        quantize = make_node("QuantizeModel", model=["model", 0], format=format_id, carrier=carrier)
        graph = sampled("q", q=quantize)
        if carrier == "library" and (reason := refused_library(format_id)):
            with pytest.raises(SpecError, match=re.escape(reason)):
                executor.run(graph)
            continue
        result = executor.run(graph)
        found[carrier] = result.results["latent"][0]["samples"]
        image = result.results["image"][0]
        assert image.shape == (1, 64, 64, 3)
        assert torch.isfinite(image).all()
        report = result.outputs["q"]["report"][0]
        assert (report["format_id"], report["carrier"], report["warnings"]) == (format_id, carrier, [])
        assert sum(e["action"] == "quantize" for e in report["entries"]) == 29
        assert report["totals"]["nbytes_out"] < report["totals"]["nbytes_in"]
    if "library" in found:
        assert distance(found["quantwire"], found["library"]) < CARRIER_TOLERANCE.get(format_id, 0.02)
    low, high = EFFECT[min(b for b in EFFECT if b >= get_entry(format_id).bits)]
    low, high = TERNARY_EFFECT if format_id in TERNARY else (low, high)
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


def test_null_for_a_format_is_a_named_error(
    executor: Executor, host: StandaloneHost, sampled: Any, make_node: Any
) -> None:
    """ComfyUI lets null through, because VALIDATE_INPUTS cannot tell it from a link."""
    graph = sampled("q", q=make_node("QuantizeModel", model=["model", 0], format=None))
    with pytest.raises(InvalidWorkflow, match="format: None: not among its"):
        executor.run(graph)
    for config in (None, RuleSet(())):
        with pytest.raises(SpecError, match="format is None, which is no name of a format"):
            spec_from_inputs(None, config, "")  # type: ignore[arg-type]


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


def test_fp8_storage_is_refused(executor: Executor, sampled: Any, make_node: Any) -> None:
    """A model whose weights were already rounded to fp8 is no full-precision model."""
    graph: dict[str, Any] = sampled("q", q=make_node("QuantizeModel", model=["model", 0], format="quanto-qint8"))
    graph["model"]["inputs"]["weight_dtype"] = "fp8_e4m3fn"
    for on_failure in ("error", "full precision"):
        graph["q"]["inputs"]["on_failure"] = on_failure
        with pytest.raises(WeightError, match=r"already quantized \(layerwise-fp8-e4m3fn, library carrier\)"):
            executor.run(graph)


def encoders(host: StandaloneHost, demo_models: Path) -> Any:
    """A CLIP with the demo encoder under two names."""
    from quantwire.hosts.standalone.text_encoders import TextEncoder, load_text_encoder

    one = load_text_encoder([demo_models / "text_encoders" / "digits_clip.safetensors"]).encoders["clip_l"]
    return TextEncoder({"clip_l": one, "t5xxl": one}, "two")


def quantize_encoders(clip: Any, **inputs: Any) -> tuple[Any, Any]:
    return QuantizeTextEncoder().quantize(clip, **{"format": "bnb-int8", **inputs})["result"]


def held(clip: Any) -> dict[str, set[str]]:
    return {
        name: {m.format_id for m in e.module.modules() if isinstance(m, QuantizedLinear)}
        for name, e in clip.encoders.items()
    }


def test_formats_of_single_encoders(host: StandaloneHost, demo_models: Path) -> None:
    clip = encoders(host, demo_models)
    made, report = quantize_encoders(clip, per_encoder="t5xxl = bnb;bits=4;bits4-quant-type=nf4")
    assert held(made) == {"clip_l": {"bnb-int8"}, "t5xxl": {"bnb-nf4"}}
    assert str(report).startswith("clip_l + t5xxl: 24 linear layers: 12 in bnb-int8, 12 in bnb-nf4")
    made, report = quantize_encoders(clip, per_encoder="# nothing for CLIP\nclip_l = keep")
    assert held(made) == {"clip_l": set(), "t5xxl": {"bnb-int8"}}
    assert report.title == "t5xxl"
    assert "clip_l stays as it is (per_encoder)" in str(report)
    assert held(clip) == {"clip_l": set(), "t5xxl": set()}


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"per_encoder": "clip_g = keep"}, "There is no clip_g encoder here, only clip_l, t5xxl."),
        ({"per_encoder": "llm = keep"}, "There is no llm encoder here, only clip_l, t5xxl."),
        (
            {"encoders": "clip_l", "per_encoder": "t5xxl = keep"},
            "per_encoder names t5xxl, but encoders is set to clip_l.",
        ),
        ({"per_encoder": "clip_l = keep\nt5xxl = keep"}, "per_encoder keeps clip_l, t5xxl, so nothing is left"),
        ({"keep_layers": "no_such"}, "Pattern 'no_such' matches none of the 24 linear layers"),
    ],
)
def test_refused_encoders(host: StandaloneHost, demo_models: Path, inputs: dict[str, str], said: str) -> None:
    with pytest.raises(SpecError) as failure:
        quantize_encoders(encoders(host, demo_models), **inputs)
    assert str(failure.value).startswith(said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("t5xxl", "Line 1: Rule 't5xxl' is not of the form"),
        ("t5xxl = nf4", "Rule 't5xxl = nf4': Unknown backend or format 'nf4'"),
        ("t5xxl = keep\nt5xxl = bnb-nf4", "per_encoder: 't5xxl' is to be both keep and bnb-nf4."),
    ],
)
def test_encoder_lines_are_refused_before_anything_runs(
    executor: Executor, sampled: Any, make_node: Any, text: str, said: str
) -> None:
    answer = QuantizeTextEncoder.VALIDATE_INPUTS(text)
    assert isinstance(answer, str)
    assert said in answer
    quantize = make_node("QuantizeTextEncoder", clip=["clip", 0], format="bnb-nf4", encoders="all", per_encoder=text)
    with pytest.raises(InvalidWorkflow):
        executor.run(sampled(clip="q", q=quantize))


def test_a_pattern_may_name_layers_of_one_encoder_only(host: StandaloneHost, demo_models: Path) -> None:
    from quantwire.hosts.standalone.text_encoders import TextEncoder, load_text_encoder

    clip = load_text_encoder([demo_models / "text_encoders" / "digits_clip.safetensors"]).encoders["clip_l"]
    tiny = transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=64, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4)
    )
    two = TextEncoder({"clip_l": clip, "t5xxl": dataclasses.replace(clip, module=tiny)}, "two")
    made, report = quantize_encoders(two, keep_layers="SelfAttention, *.mlp.fc1")
    kept = {e.name for e in report.entries if e.reason == "excluded"}
    assert {name.partition(".")[0] for name in kept} == {"clip_l", "t5xxl"}
    wo = [e for e in report.entries if e.name.endswith("DenseReluDense.wo.weight")]
    assert [e.reason for e in wo] == ["t5: wo (its products exceed float16)"]
    assert held(made) == {"clip_l": {"bnb-int8"}, "t5xxl": {"bnb-int8"}}


def test_auto(executor: Executor, sampled: Any, make_node: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = {
        "model": sampled()["model"],
        "q": make_node("QuantizeModel", model=["model", 0], format="auto"),
        "out": make_node("Keep", value=["q", 1]),
    }
    report = executor.run(graph).results["out"][0]
    assert report.format_id in candidates(DeviceFacts("cpu", "CPU", 1, 1))
    assert report.warnings == []
    assert report.notes[0].startswith("auto: CPU with ")
    assert "it would fit at full precision too" in str(report)
    assert {e.format_id for e in report.entries if e.action == "quantize"} == {report.format_id}
    size = sum(e.nbytes_out for e in report.entries)
    free = MIN_RESERVE + size - 1  # one byte too few for what was chosen with more
    monkeypatch.setattr(StandaloneHost, "memory", lambda *_: DeviceFacts("cpu", "CPU", free, 1024**3))
    graph["q"]["inputs"]["keep_layers"] = "*.attn.to_q"
    less = executor.run(graph).results["out"][0]
    assert less.warnings == []
    assert sum(e.nbytes_out for e in less.entries) < size
    assert get_entry(less.format_id).bits < get_entry(report.format_id).bits
    monkeypatch.setattr(StandaloneHost, "memory", lambda *_: DeviceFacts("cpu", "CPU", MIN_RESERVE, 1024**3))
    graph["q"]["inputs"]["keep_layers"] = "*.attn.to_k"
    least = executor.run(graph).results["out"][0]
    assert least.notes == []
    assert "so part of it must be offloaded" in least.warnings[0]


def test_auto_takes_no_options_of_another_format(executor: Executor, sampled: Any, make_node: Any) -> None:
    graph = {
        "model": sampled()["model"],
        "c": make_node("QuantConfig", uri="bnb-nf4"),
        "q": make_node("QuantizeModel", model=["model", 0], format="auto", config=["c", 0]),
        "out": make_node("Keep", value=["q", 1]),
    }
    with pytest.raises(SpecError, match="format is auto, but the linked config is for bnb-nf4"):
        executor.run(graph)


@pytest.mark.parametrize("carrier", CARRIERS)
def test_dequantize_first(executor: Executor, sampled: Any, make_node: Any, carrier: str) -> None:
    graph = sampled(
        "q2",
        q=make_node("QuantizeModel", model=["model", 0], format="bnb-nf4", carrier=carrier),
        q2=make_node("QuantizeModel", model=["q", 0], format="gguf-q8-0", on_quantized="dequantize first"),
    )
    result = executor.run(graph)
    report = result.outputs["q2"]["report"][0]
    assert sum(e["action"] == "quantize" for e in report["entries"]) == 29
    assert report["warnings"][0].startswith("29 layers were quantized already (bnb-nf4)")
    assert "WARNING: 29 layers were quantized already" in result.outputs["q2"]["text"][0]
    once = latents(executor, sampled("q", q=graph["q"]))
    # Rounding to 8 bits on top of 4 changes little beside what the 4 bits changed.
    assert 0 < distance(result.results["latent"][0]["samples"], once) < 0.05


@pytest.mark.parametrize(
    "others", [{"per_encoder": "t5xxl = bnb-int8"}, {"per_encoder": "t5xxl = keep"}, {"encoders": "clip_l"}]
)
def test_auto_counts_the_encoders_that_it_does_not_choose_for(
    host: StandaloneHost, demo_models: Path, monkeypatch: pytest.MonkeyPatch, others: dict[str, str]
) -> None:
    clip = encoders(host, demo_models)

    def auto(kind: str, nbytes: int) -> tuple[dict[str, int], Any]:
        """Bytes of both encoders, and the report, with room for so many bytes beside the reserve."""
        facts = DeviceFacts(kind, "GPU", nbytes + MIN_RESERVE, nbytes + MIN_RESERVE)
        monkeypatch.setattr(StandaloneHost, "memory", lambda *_: facts)
        made, report = quantize_encoders(clip, format="auto", **others)
        return {n: stored_nbytes(e.module) for n, e in made.encoders.items()}, report

    held, report = auto("xpu", 2**28)
    assert "of which t5xxl takes " in report.notes[0]
    held, report = auto("xpu", sum(held.values()))
    assert report.warnings == [], "both fit exactly"
    _, report = auto("xpu", held["t5xxl"])
    assert "so part of it must be offloaded" in report.warnings[0], "clip_l fits, but not beside t5xxl"
    assert held["clip_l"] <= held["t5xxl"]
    if "bnb-int8" not in others.get("per_encoder", ""):
        _, report = auto("cpu", held["t5xxl"])
        assert report.warnings == [], "what stays is in that memory already, so it is not free"
