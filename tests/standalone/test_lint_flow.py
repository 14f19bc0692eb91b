"""How quantized weights are followed from the node that makes them to the one that runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from quantwire.hosts.lint.graph import Level
from quantwire.hosts.lint.lint import FileReport, Linter, Options
from quantwire.nodes import NODE_CLASS_MAPPINGS
from quantwire.quantizers.compat.modes import OffloadMode

LINTERS = {
    mode: Linter(Options(mode, find_models=False, known=("Foreign*",)), NODE_CLASS_MAPPINGS)
    for mode in (None, OffloadMode.SEQUENTIAL)
}
UNET = {"unet_name": "a.safetensors", "weight_dtype": "default"}


def entry(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": {k: list(v) if isinstance(v, tuple) else v for k, v in inputs.items()}}


def quantize(model: str, carrier: str = "library", **more: Any) -> dict[str, Any]:
    return entry("QuantizeModel", model=(model, 0), format="bnb-nf4", carrier=carrier, **more)


def sampler(model: str, output: int = 0) -> dict[str, Any]:
    more = {"seed": 1, "steps": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    return entry("KSampler", model=(model, output), positive=("c", 0), negative=("c", 0), latent_image=("l", 0), **more)


def check(tmp_path: Path, mode: OffloadMode | None = OffloadMode.SEQUENTIAL, **nodes: dict[str, Any]) -> FileReport:
    graph = {
        "u": entry("UNETLoader", **UNET),
        "k": entry("CLIPLoader", clip_name="c.safetensors", type="flux"),
        "c": entry("CLIPTextEncode", text="", clip=("k", 0)),
        "l": entry("EmptyLatentImage", width=64, height=64, batch_size=1),
        "v": entry("VAELoader", vae_name="v.safetensors"),
        "d": entry("VAEDecode", samples=("s", 0), vae=("v", 0)),
        "o": entry("SaveImage", images=("d", 0), filename_prefix="x"),
        **nodes,
    }
    path = tmp_path / "workflow.json"
    path.write_text(json.dumps(graph), encoding="utf-8")
    report = LINTERS[mode].check(path)
    assert not [f for f in report.findings if f.level is Level.ERROR], report.findings
    return report


def blocked(report: FileReport) -> list[tuple[str, str]]:
    """(node where it is reported, node that it comes from)"""
    return [(f.place.node_id, f.data["from"]) for f in report.findings if f.level is Level.BLOCK and f.place]


LORA = {"lora_name": "x.safetensors", "strength_model": 1.0, "strength_clip": 1.0}


def test_through_nodes_with_two_outputs(tmp_path: Path) -> None:
    lora = entry("LoraLoader", model=("q", 0), clip=("k", 0), **LORA)
    report = check(tmp_path, q=quantize("u"), r=lora, s=sampler("r"), c=entry("CLIPTextEncode", text="", clip=("r", 1)))
    assert blocked(report) == [("s", "q")], "the text encoders beside are plain"


@pytest.mark.parametrize("output", [0, 3])
def test_through_a_node_that_is_not_known(output: int, tmp_path: Path) -> None:
    """In API form its types are not known; what the sampler's input takes decides."""
    report = check(tmp_path, q=quantize("u"), f=entry("ForeignPatch", anything=("q", 0)), s=sampler("f", output))
    assert blocked(report) == [("s", "q")]


def test_into_a_node_that_is_not_known(tmp_path: Path) -> None:
    report = check(tmp_path, q=quantize("u"), s=entry("ForeignSampler", model=("q", 0)))
    assert blocked(report) == [("s", "q")]


def test_both_sides_of_a_merge(tmp_path: Path) -> None:
    merge = entry("ModelMergeSimple", model1=("q", 0), model2=("p", 0), ratio=0.5)
    report = check(tmp_path, q=quantize("u"), p=quantize("u"), m=merge, s=sampler("m"))
    assert sorted(blocked(report)) == [("s", "p"), ("s", "q")]


def test_a_branch_that_stays_plain(tmp_path: Path) -> None:
    second = {"s2": sampler("u"), "d2": entry("VAEDecode", samples=("s2", 0), vae=("v", 0))}
    second["o2"] = entry("SaveImage", images=("d2", 0), filename_prefix="y")
    assert blocked(check(tmp_path, q=quantize("u"), s=sampler("q"), **second)) == [("s", "q")]


def test_what_no_output_needs_is_not_judged(tmp_path: Path) -> None:
    assert blocked(check(tmp_path, q=quantize("u"), s=sampler("u"))) == []


def test_quantizing_again_replaces_what_was_there(tmp_path: Path) -> None:
    again = quantize("q", "quantwire", on_quantized="dequantize first")
    assert blocked(check(tmp_path, q=quantize("u"), p=again, s=sampler("p"))) == []


def test_a_scheduler_does_not_run_the_model(tmp_path: Path) -> None:
    sigmas = entry("BasicScheduler", model=("q", 0), scheduler="simple", steps=4, denoise=1.0)
    guider = entry("BasicGuider", model=("u", 0), conditioning=("c", 0))
    custom = entry("SamplerCustomAdvanced", noise=("n", 0), guider=("g", 0), sampler=("e", 0), sigmas=("b", 0))
    custom["inputs"]["latent_image"] = ["l", 0]
    rest = {"n": entry("RandomNoise", noise_seed=1), "e": entry("KSamplerSelect", sampler_name="euler")}
    assert blocked(check(tmp_path, q=quantize("u"), b=sigmas, g=guider, s=custom, **rest)) == []
    guider["inputs"]["model"] = ["q", 0]
    assert blocked(check(tmp_path, q=quantize("u"), b=sigmas, g=guider, s=custom, **rest)) == [("g", "q")]


def test_control_nets(tmp_path: Path) -> None:
    net = entry("ControlNetLoader", control_net_name="n.safetensors")
    quantized = entry("QuantizeControlNet", control_net=("n", 0), format="quanto-qint8", carrier="library")
    image = entry("EmptyImage", width=64, height=64, batch_size=1, color=0)
    apply = entry("ControlNetApplyAdvanced", positive=("c", 0), negative=("c", 0), control_net=("q", 0), image=("i", 0))
    apply["inputs"] |= {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
    with_net = sampler("u")
    with_net["inputs"]["positive"] = ["a", 0]
    report = check(tmp_path, n=net, q=quantized, i=image, a=apply, s=with_net)
    assert blocked(report) == [("a", "q")]
    assert "in the ControlNet" in next(f.message for f in report.findings if f.level is Level.BLOCK)


def test_one_finding_for_many_samplers(tmp_path: Path) -> None:
    second = {"s2": sampler("q"), "d2": entry("VAEDecode", samples=("s2", 0), vae=("v", 0))}
    second["o2"] = entry("SaveImage", images=("d2", 0), filename_prefix="y")
    assert len(blocked(check(tmp_path, q=quantize("u"), s=sampler("q"), **second))) == 1


def test_formats_of_a_config_and_of_rules(tmp_path: Path) -> None:
    """Every format that the rules may make is judged; `keep` makes none."""
    rules = entry("QuantRules", rules="*.attn.* = quanto-qint8\n*.mlp.* = keep", config=("b", 0))
    node = quantize("u", config=("r", 0)) | {}
    node["inputs"]["format"] = "from config"
    report = check(tmp_path, b=entry("QuantConfig", uri="bnb;bits=8"), r=rules, q=node, s=sampler("q"))
    found = {f.data["format"]: f.level for f in report.findings if "format" in f.data}
    assert found["quanto-qint8"] is Level.BLOCK
    assert set(found) <= {"quanto-qint8", "bnb-int8"}


@pytest.mark.parametrize(
    "inputs",
    [{"format": "auto"}, {"carrier": ["x", 0]}, {"format": ["x", 0]}],
    ids=["auto", "linked carrier", "linked format"],
)
def test_nothing_is_claimed_of_what_the_file_does_not_tell(inputs: dict[str, Any], tmp_path: Path) -> None:
    node = quantize("u")
    node["inputs"] |= inputs
    assert blocked(check(tmp_path, x=entry("ForeignText"), q=node, s=sampler("q"))) == []
