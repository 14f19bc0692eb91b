"""How quantized weights are followed from the node that makes them to the one that runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from quantwire.hosts.lint.graph import Finding, Level
from quantwire.hosts.lint.lint import FileReport, Linter, Options
from quantwire.nodes import NODE_CLASS_MAPPINGS
from quantwire.quantizers.compat.modes import HostName, OffloadMode

LINTERS = {
    mode: Linter(Options(mode, find_models=False, known=("Foreign*",)), NODE_CLASS_MAPPINGS)
    for mode in (None, OffloadMode.SEQUENTIAL, OffloadMode.PARTIAL)
}
UNET = {"unet_name": "a.safetensors", "weight_dtype": "default"}


def entry(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": {k: list(v) if isinstance(v, tuple) else v for k, v in inputs.items()}}


def quantize(model: str, carrier: str = "library", **more: Any) -> dict[str, Any]:
    return entry("QuantizeModel", model=(model, 0), format="bnb-nf4", carrier=carrier, **more)


def sampler(model: str, output: int = 0) -> dict[str, Any]:
    more = {"seed": 1, "steps": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    return entry("KSampler", model=(model, output), positive=("c", 0), negative=("c", 0), latent_image=("l", 0), **more)


def offload(model: str, mode: Any, action: str = "block", **more: Any) -> dict[str, Any]:
    return entry("OffloadCompat", model=(model, 0), mode=mode, action=action, **more)


def check(
    tmp_path: Path,
    mode: OffloadMode | None = OffloadMode.SEQUENTIAL,
    errors: tuple[str, ...] = (),
    **nodes: dict[str, Any],
) -> FileReport:
    """The report of a graph that has errors of these kinds alone."""
    graph = {
        "u": entry("UNETLoader", **UNET),
        "k": entry("CLIPLoader", clip_name="c.safetensors", type="stable_diffusion"),
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
    assert tuple(f.code for f in report.findings if f.level is Level.ERROR) == errors, report.findings
    return report


def check_run(
    tmp_path: Path, mode: OffloadMode | None = OffloadMode.SEQUENTIAL, *args: Any, **nodes: Any
) -> FileReport:
    """The same with nodes that `quantwire run` has too, for which it is checked then."""
    latent = entry("EmptySD3LatentImage", width=64, height=64, batch_size=1)
    report = check(tmp_path, mode, *args, l=latent, **nodes)
    assert report.host is HostName.STANDALONE
    return report


def blocked(report: FileReport) -> list[tuple[str, str]]:
    """(node where it is reported, node that it comes from)"""
    return [(f.place.node_id, f.data["from"]) for f in report.findings if f.level is Level.BLOCK and f.place]


def levels(report: FileReport) -> list[tuple[str, str]]:
    """(node where it is reported, level)"""
    return [(f.place.node_id, f.level.value) for f in report.findings if f.place]


def only(report: FileReport) -> Finding:
    (found,) = report.findings
    return found


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
    report = check(tmp_path, x=entry("ForeignText"), q=node, s=sampler("q"))
    assert blocked(report) == []
    told = [(f.level, f.code) for f in report.findings if f.code != "other-host"]
    assert told == ([] if "carrier" in inputs else [(Level.NOTE, "not-judged")]), "and a note says so"


def test_auto_in_plain_tensors_needs_no_note(tmp_path: Path) -> None:
    node = quantize("u", "quantwire")
    node["inputs"]["format"] = "auto"
    assert check_run(tmp_path, q=node, s=sampler("q")).findings == ()


# --- several checks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("action", "level"), [("report", "note"), ("warn", "warning")])
def test_a_check_that_goes_on_hides_no_later_one(action: str, level: str, tmp_path: Path) -> None:
    first, second = offload("q", "sequential", action), offload("a", "sequential")
    report = check_run(tmp_path, None, q=quantize("u"), a=first, b=second, s=sampler("b"))
    assert levels(report) == [("a", level), ("b", "block")]
    again = check_run(
        tmp_path,
        None,
        q=quantize("u"),
        a=second | offload("q", "sequential"),
        b=offload("a", "sequential", action),
        s=sampler("b"),
    )
    assert levels(again) == [("a", "block")], "what is no worse is not said again"


def test_a_variant_that_runs_hides_none_that_stops(tmp_path: Path) -> None:
    node = entry("QuantizeModel", model=("u", 0), format="torchao-int8wo", carrier="library")
    memory, disk = offload("q", "group", keep_on="memory"), offload("a", "group", keep_on="disk")
    report = check_run(tmp_path, None, q=node, a=memory, b=disk, s=sampler("b"))
    assert levels(report) == [("b", "block")]


@pytest.mark.parametrize(("action", "level"), [("report", "note"), ("warn", "warning")])
@pytest.mark.parametrize("mode", ["auto", "sequential"])
def test_the_mode_of_the_command_line_stops_whatever_a_check_does(
    mode: str, action: str, level: str, tmp_path: Path
) -> None:
    report = check_run(tmp_path, q=quantize("u"), a=offload("q", mode, action), s=sampler("a"))
    assert levels(report) == [("a", level), ("s", "block")]


@pytest.mark.parametrize("action", ["warn", "report"])
def test_a_mode_that_is_set_stops_whatever_the_check_does(action: str, tmp_path: Path) -> None:
    report = check_run(
        tmp_path, None, q=quantize("u"), a=offload("q", "sequential", action, set_mode=True), s=sampler("a")
    )
    assert blocked(report) == [("s", "q")]


def test_the_mode_that_is_set_last_holds(tmp_path: Path) -> None:
    """The guard of a node that sets a mode looks at what the host does in the end."""
    first, last = offload("u", "sequential", set_mode=True), offload("q", "model", set_mode=True)
    report = check_run(tmp_path, None, a=first, q=quantize("a"), b=last, s=sampler("b"))
    assert report.findings == ()
    without = check_run(tmp_path, None, a=first, q=quantize("a"), s=sampler("q"))
    assert blocked(without) == [("s", "q")]


def test_balanced_that_is_set_splits_only_what_does_not_fit(tmp_path: Path) -> None:
    sets = check_run(
        tmp_path, None, q=quantize("u"), a=offload("q", "balanced", set_mode=True, device_gib=8.0), s=sampler("a")
    )
    found = only(sets)
    assert found.level is Level.WARNING
    assert "cannot run with balanced offload if the model must be split" in found.message
    assert any("fit the device whole" in remedy for remedy in found.remedies)
    asks = check_run(tmp_path, None, q=quantize("u"), a=offload("q", "balanced"), s=sampler("a"))
    assert blocked(asks) == [("a", "q")], "a check of it means splitting, as the node does"


# --- modes and texts from other nodes ------------------------------------------------------------------------------


def test_a_mode_from_a_link_is_not_taken_for_auto(tmp_path: Path) -> None:
    node = offload("q", ("x", 0))
    found = only(check(tmp_path, None, x=entry("ForeignText"), q=quantize("u"), a=node, s=sampler("a")))
    assert (found.level, found.code) == (Level.NOTE, "not-judged")
    assert "its mode comes from a link" in found.message


@pytest.mark.parametrize("mode", ["parital", None], ids=["typo", "null"])
def test_a_word_that_is_no_mode_is_not_taken_for_auto(mode: Any, tmp_path: Path) -> None:
    report = check_run(tmp_path, None, ("bad-value",), q=quantize("u"), a=offload("q", mode), s=sampler("a"))
    assert only(report).code == "bad-value"


@pytest.mark.parametrize("run", [check, check_run], ids=["comfyui", "standalone"])
def test_null_for_a_format(run: Any, tmp_path: Path) -> None:
    node = quantize("u")
    node["inputs"]["format"] = None
    assert "format: None" in only(run(tmp_path, None, ("bad-value",), q=node, s=sampler("q"))).message


def test_texts_of_primitive_nodes_are_followed(tmp_path: Path) -> None:
    node = quantize("u", config=("c2", 0))
    node["inputs"]["format"] = "from config"
    text = entry("PrimitiveString", value="bnb;bits=4;bits4-quant-type=nf4")
    report = check(tmp_path, t=text, c2=entry("QuantConfig", uri=("t", 0)), q=node, s=sampler("q"))
    assert blocked(report) == [("s", "q")]


def test_a_mode_from_a_primitive_node_is_a_link_that_comfyui_refuses(tmp_path: Path) -> None:
    text = entry("PrimitiveString", value="partial")
    report = check(tmp_path, None, ("bad-link",), t=text, q=quantize("u"), a=offload("q", ("t", 0)), s=sampler("a"))
    assert blocked(report) == [("a", "q")]


@pytest.mark.parametrize("mode", ["auto", "partial"])
def test_comfyui_sets_no_mode(mode: str, tmp_path: Path) -> None:
    node = offload("q", mode, set_mode=True)
    report = check(tmp_path, None, ("bad-mode",), q=quantize("u", "quantwire"), a=node, s=sampler("a"))
    assert "set_mode is on" in only(report).message


# --- ways out -----------------------------------------------------------------------------------------------------


def remedies(report: FileReport) -> tuple[str, ...]:
    (found,) = [f for f in report.findings if f.level is Level.BLOCK]
    return found.remedies


def test_ways_out_name_the_node_that_quantizes(tmp_path: Path) -> None:
    first, *rest = remedies(check_run(tmp_path, q=quantize("u"), a=offload("q", "auto"), s=sampler("a")))
    assert first.startswith("Set `carrier` of node q (QuantizeModel) to quantwire: ")
    assert any("in OffloadCompat" in text for text in rest), "the file has one"


def test_ways_out_without_an_offload_check(tmp_path: Path) -> None:
    texts = remedies(check_run(tmp_path, q=quantize("u"), s=sampler("q")))
    assert any("in an OffloadCompat that you put before node s (KSampler)" in text for text in texts)
    assert not any("in OffloadCompat" in text for text in texts)


@pytest.mark.parametrize("mode", [OffloadMode.SEQUENTIAL, OffloadMode.PARTIAL])
def test_ways_out_of_a_loader_of_another_pack(mode: OffloadMode, tmp_path: Path) -> None:
    """ComfyUI has no mode that OffloadCompat can set, and the file has no QuantizeModel."""
    loader = entry("CheckpointLoaderNF4", ckpt_name="x.safetensors")
    first, *rest = remedies(check(tmp_path, mode, q=loader, s=sampler("q")))
    assert first.startswith("Load the full-precision model and put QuantizeModel behind it, with carrier quantwire")
    assert not any("set_mode" in text or "of QuantizeModel" in text for text in rest)
    assert any("--" in text for text in rest) is (mode is OffloadMode.PARTIAL), "options of ComfyUI for its own modes"


def test_ways_out_of_a_gguf_loader_of_the_pack(tmp_path: Path) -> None:
    loader = entry("LoadGGUF", gguf_name="x.gguf", carrier="library")
    texts = remedies(check(tmp_path, g=loader, s=sampler("g")))
    assert texts[0].startswith("Set `carrier` of node g (LoadGGUF) to quantwire: ")
    assert not any("`format`" in text for text in texts), "LoadGGUF has no such widget"
