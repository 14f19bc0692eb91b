"""OffloadCompat: every conflict of the table stops the graph before the sampler, and its three actions."""

from __future__ import annotations

import dataclasses
import logging
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from quantwire.hosts.offload import OffloadSettings
from quantwire.hosts.standalone.executor import Executor
from quantwire.hosts.standalone.progress import Listener
from quantwire.hosts.standalone.workflow import PromptNode
from quantwire.nodes.offload import AUTO, OffloadCompat
from quantwire.quantizers.apply import make_layer
from quantwire.quantizers.compat.matrix import answer
from quantwire.quantizers.compat.modes import HOST_MODES, Carrier, HostName, OffloadMode, VerdictLevel
from quantwire.quantizers.errors import OffloadConflict, SpecError, WorkflowError
from quantwire.quantizers.registry import available_formats, get_quantizer
from quantwire.quantizers.spec import QuantSpec

MODES = HOST_MODES[HostName.STANDALONE]
# What the widgets of the node say when nobody touches them.
BY_DEFAULT = {OffloadMode.SEQUENTIAL: "memory", OffloadMode.BALANCED: "split", OffloadMode.GROUP: "block"}


def level(carrier: Carrier, format_id: str, mode: OffloadMode) -> VerdictLevel:
    return answer(carrier, format_id, mode, host=HostName.STANDALONE, variant=BY_DEFAULT.get(mode, "")).level


# Backends with a layer of their own, or one that the host makes (diffusers' of GGUF).
LAYERS = ("bnb", "quanto", "gguf", "sdnq", "torchao")


# GGUF types that diffusers cannot hold.
NO_LAYER = tuple(f"gguf-{n}" for n in ("iq1", "iq2", "iq3", "tq", "mxfp4", "nvfp4"))


def carriers(format_id: str) -> tuple[Carrier, ...]:
    has_layer = format_id.startswith(LAYERS) and not format_id.startswith(NO_LAYER)
    return (Carrier.QUANTWIRE, Carrier.LIBRARY) if has_layer else (Carrier.QUANTWIRE,)


CASES = [(f, c, m) for f in available_formats() for c in carriers(f) for m in MODES]
CONFLICTS = [case for case in CASES if level(case[1], case[0], case[2]) is VerdictLevel.BLOCK]


class Started(Listener):
    def __init__(self) -> None:
        self.kinds: list[str] = []

    def node_start(self, node: PromptNode) -> None:
        self.kinds.append(node.class_type)


@pytest.fixture
def checked(sampled: Any, make_node: Any) -> Any:
    def build(format_id: str, carrier: str, mode: str, action: str = "block", **settings: Any) -> dict[str, Any]:
        return sampled(
            "check",
            q=make_node("QuantizeModel", model=["model", 0], format=format_id, carrier=carrier),
            check=make_node("OffloadCompat", model=["q", 0], mode=mode, action=action, **settings),
        )

    return build


def test_the_table_has_conflicts_for_every_library() -> None:
    # Layers of sdnq run in every mode, torchao's stop only where a part is on disk.
    assert {f.partition("-")[0] for f, _, _ in CONFLICTS} == {"bnb", "quanto", "gguf"}
    assert all(c is Carrier.LIBRARY for _, c, _ in CONFLICTS)
    assert {m for _, _, m in CONFLICTS} == {OffloadMode.SEQUENTIAL, OffloadMode.BALANCED, OffloadMode.GROUP}


@pytest.mark.parametrize(("format_id", "carrier", "mode"), CONFLICTS, ids=lambda v: getattr(v, "value", v))
def test_conflict_blocks_before_sampling(
    executor: Executor, checked: Any, format_id: str, carrier: Carrier, mode: OffloadMode
) -> None:
    executor._listener = started = Started()
    with pytest.raises(OffloadConflict) as caught:
        executor.run(checked(format_id, carrier.value, mode.value))
    first, *rest = str(caught.value).splitlines()
    assert first.startswith(f"transformer: {format_id} (")
    assert f"cannot run with {mode.value} offload" in first
    ways = rest[rest.index("Ways out:") + 1 :]
    assert 2 <= len(ways) <= 3
    assert "carrier" in ways[0]
    assert "KSampler" not in started.kinds


def test_quantwire_layers_pass_in_every_mode(executor: Executor, checked: Any) -> None:
    for mode in MODES:
        result = executor.run(checked("bnb-nf4", "quantwire", mode.value))
        assert [v["level"] for v in result.outputs["check"]["report"][0]["verdicts"]["transformer"]] == ["ok"]


@pytest.mark.parametrize("action", ["warn", "report"])
def test_other_actions_let_the_graph_run(
    executor: Executor, checked: Any, action: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        result = executor.run(checked("bnb-nf4", "library", "sequential", action))
    said = [r.message for r in caplog.records if "sequential offload" in r.message]
    assert bool(said) is (action == "warn")
    assert "cannot run with sequential offload" in result.outputs["check"]["text"][0]
    (verdict,) = result.outputs["check"]["report"][0]["verdicts"]["transformer"]
    assert (verdict["level"], verdict["evidence"]) == ("block", "probed")
    assert result.results["latent"]


def test_unknown_is_a_warning_and_no_block(executor: Executor, checked: Any, caplog: pytest.LogCaptureFixture) -> None:
    known = answer(Carrier.LIBRARY, "gguf-q8-0", OffloadMode.GROUP, host=HostName.STANDALONE, variant="block-stream")
    assert known.level is VerdictLevel.UNKNOWN
    with caplog.at_level(logging.WARNING):
        executor.run(checked("gguf-q8-0", "library", "group", use_stream=True))
    assert any("is not known to run" in r.message for r in caplog.records)


def test_auto_is_what_the_host_does(executor: Executor, checked: Any, host: Any, make_node: Any) -> None:
    graph = checked("bnb-nf4", "library", AUTO)
    graph["through"] = make_node("Keep", value=["check", 0])
    result = executor.run(graph)
    (model,) = result.results["through"]
    assert host.offload_now(model) == (OffloadMode.NONE, "")
    report = result.outputs["check"]["report"][0]
    assert (report["mode"], report["now"]) == ("none", {"transformer": {"mode": "none", "variant": ""}})


def test_full_precision_is_safe(executor: Executor, sampled: Any, make_node: Any) -> None:
    graph = sampled("check", check=make_node("OffloadCompat", model=["model", 0], mode="sequential", action="block"))
    result = executor.run(graph)
    assert result.outputs["check"]["text"] == ["No quantized layers; offload mode sequential is safe."]


def test_text_encoders_are_checked_too(executor: Executor, sampled: Any, make_node: Any) -> None:
    quantize = make_node("QuantizeTextEncoder", clip=["clip", 0], format="bnb-nf4", encoders="all", carrier="library")
    check = {"model": ["model", 0], "clip": ["q", 0], "mode": "sequential", "action": "block"}
    graph = sampled("check", clip="q", q=quantize, check=make_node("OffloadCompat", **check))
    with pytest.raises(OffloadConflict, match=r"^clip_l: bnb-nf4"):
        executor.run(graph)
    graph["check"]["inputs"]["mode"] = "model"
    graph["through"] = make_node("Keep", value=["check", 2])
    graph["given"] = make_node("Keep", value=["q", 0])
    result = executor.run(graph)
    through, given = result.results["through"][0], result.results["given"][0]
    assert through.encoders is given.encoders
    assert (given.guard, through.guard.action.value) == (None, "block")


def test_text_encoder_output_without_input_is_named(executor: Executor, sampled: Any, make_node: Any) -> None:
    graph = sampled("check", check=make_node("OffloadCompat", model=["model", 0], mode="none", action="block"))
    graph["prompt"]["inputs"]["clip"] = ["check", 2]
    with pytest.raises(Exception, match="was given no text encoder"):
        executor.run(graph)


def test_modes_offered_are_those_of_the_table() -> None:
    assert OffloadCompat.INPUT_TYPES()["required"]["mode"][0] == [AUTO, *(m.value for m in OffloadMode)]


def test_the_interface_of_the_first_release_is_a_part_of_this_one() -> None:
    """Old workflows hold widget values by position and links by the numbers of outputs."""
    types = OffloadCompat.INPUT_TYPES()
    inputs = {**types["required"], **types["optional"]}
    widgets = [n for n, spec in inputs.items() if isinstance(spec[0], list) or spec[0] in ("BOOLEAN", "INT", "FLOAT")]
    assert widgets[:2] == ["mode", "action"]
    assert OffloadCompat.RETURN_TYPES[:3] == ("MODEL", "REPORT", "CLIP")
    assert OffloadCompat.RETURN_NAMES[:3] == ("model", "report", "clip")
    assert {"model", "clip"} <= set(inputs)


def test_settings_are_those_of_offload_settings() -> None:
    fields = {f.name: f.default for f in dataclasses.fields(OffloadSettings) if f.name != "mode"}
    optional = OffloadCompat.INPUT_TYPES()["optional"]
    assert {name: optional[name][1]["default"] for name in fields} == fields


def test_nothing_linked_is_a_named_error(executor: Executor, host: Any, make_node: Any) -> None:
    graph = {"check": make_node("OffloadCompat", mode="auto", action="block")}
    graph["out"] = make_node("Keep", value=["check", 1])
    with pytest.raises(SpecError, match=r"^OffloadCompat has nothing to check"):
        executor.run(graph)


def test_null_for_a_mode_is_a_named_error(executor: Executor, host: Any, checked: Any) -> None:
    """ComfyUI lets null through, because VALIDATE_INPUTS cannot tell it from a link."""
    with pytest.raises(SpecError, match=r"mode None is not among its choices\.\nChoose one of: auto, none"):
        OffloadCompat().check(None, "block")  # type: ignore[arg-type]
    with pytest.raises(WorkflowError, match=r"mode: None: not one of: auto"):
        executor.run(checked("bnb-nf4", "quantwire", None))


def test_a_mode_of_the_other_host_is_an_error_that_names_those_of_this_one(executor: Executor, checked: Any) -> None:
    with pytest.raises(SpecError, match="no offload mode dynamic; it has none, model, sequential, balanced, group"):
        executor.run(checked("bnb-nf4", "quantwire", "dynamic"))


def test_a_conflict_in_a_mode_of_the_other_host_is_told_first(executor: Executor, checked: Any) -> None:
    with pytest.raises(OffloadConflict) as caught:
        executor.run(checked("bnb-nf4", "library", "novram"))
    first, second, *_ = str(caught.value).splitlines()
    assert first.startswith("transformer: bnb-nf4 (")
    assert "cannot run with novram offload" in first
    assert second.startswith("The embedded host has no offload mode novram; it has none, model")


def test_a_report_may_be_about_the_other_host(executor: Executor, checked: Any) -> None:
    result = executor.run(checked("bnb-nf4", "library", "novram", "report"))
    report = result.outputs["check"]["report"][0]
    (verdict,) = report["verdicts"]["transformer"]
    assert (report["host"], verdict["host"], verdict["mode"]) == ("comfyui", "comfyui", "novram")
    wanted = answer(Carrier.LIBRARY, "bnb-nf4", OffloadMode.NOVRAM, host=HostName.COMFYUI, variant="")
    assert verdict["level"] == wanted.level.value
    assert result.results["latent"]


def test_settings_tell_the_variant_that_is_checked(executor: Executor, checked: Any) -> None:
    assert executor.run(checked("torchao-int8wo", "library", "sequential")).results["latent"]
    with pytest.raises(OffloadConflict, match=r"cannot run with sequential offload \(disk\)") as caught:
        executor.run(checked("torchao-int8wo", "library", "sequential", keep_on="disk"))
    assert "Set `keep_on` to memory" in str(caught.value)


def test_the_report_has_causes_evidence_and_changes(executor: Executor, checked: Any) -> None:
    result = executor.run(checked("bnb-nf4", "library", "sequential", "report"))
    (verdict,) = result.outputs["check"]["report"][0]["verdicts"]["transformer"]
    assert verdict["cause"]
    assert verdict["kind"] == "Params4bit"
    assert verdict["changes"][0]["kind"] == "carrier"
    assert [c["text"] for c in verdict["changes"]] == verdict["remedies"]
    text = result.outputs["check"]["text"][0]
    assert all(remedy in text for remedy in verdict["remedies"])


def test_set_mode_runs_in_that_mode(executor: Executor, checked: Any, host: Any, make_node: Any) -> None:
    plain = executor.run(checked("bnb-nf4", "quantwire", AUTO)).results["latent"][0]["samples"]
    graph = checked("bnb-nf4", "quantwire", "sequential", set_mode=True)
    graph |= {"through": make_node("Keep", value=["check", 0]), "given": make_node("Keep", value=["q", 0])}
    result = executor.run(graph)
    report = result.outputs["check"]["report"][0]
    assert report["set"].startswith("sequential")
    assert report["now"] == {"transformer": {"mode": "sequential", "variant": "memory"}}
    assert [v["level"] for v in report["verdicts"]["transformer"]] == ["ok"]
    assert host.offload_now(result.results["through"][0]) == (OffloadMode.SEQUENTIAL, "memory")
    assert host.offload_now(result.results["given"][0]) == (OffloadMode.NONE, "")
    assert torch.equal(result.results["latent"][0]["samples"], plain)


def test_set_mode_is_refused_where_the_layers_would_break(executor: Executor, checked: Any) -> None:
    with pytest.raises(OffloadConflict, match=r"^transformer: bnb-nf4"):
        executor.run(checked("bnb-nf4", "library", "sequential", set_mode=True))


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"mode": "auto", "set_mode": True}, "names no mode"),
        ({"mode": "partial", "set_mode": True}, "no offload mode 'partial'"),
        ({"mode": "model", "set_mode": True, "keep_on": "disk"}, "keep_on disk has no meaning"),
        ({"mode": "group", "set_mode": True, "use_stream": True, "keep_on": "disk"}, "use_stream copies from memory"),
        ({"mode": "fast"}, "mode 'fast' is not among its choices"),
        ({"mode": "group", "group_level": "row"}, "group_level 'row' is not among its choices"),
        ({"mode": "balanced", "set_mode": True, "low_watermark": 0.9}, "above high_watermark"),
        ({"mode": "balanced", "device_gib": -1}, "device_gib -1.0 is not in its range, 0.0 to 4096.0"),
    ],
    ids=lambda v: v.get("mode") if isinstance(v, dict) else "",
)
def test_wrong_inputs_are_told_before_anything_is_loaded(
    executor: Executor, checked: Any, inputs: dict[str, Any], said: str
) -> None:
    graph = checked("bnb-nf4", "quantwire", "none")
    graph["check"]["inputs"] |= inputs
    executor._listener = started = Started()
    with pytest.raises(WorkflowError) as caught:
        executor.run(graph)
    assert said in str(caught.value)
    assert started.kinds == []


def test_every_wrong_input_is_told_at_once(executor: Executor, checked: Any) -> None:
    graph = checked("bnb-nf4", "quantwire", "balanced", set_mode=True, use_stream=True)
    graph["check"]["inputs"] |= {"device_gib": -1.0, "low_watermark": 0.9, "blocks_per_group": -2}
    with pytest.raises(WorkflowError) as caught:
        executor.run(graph)
    for said in ("device_gib -1.0", "low_watermark 0.9 is above", "blocks_per_group -2", "use_stream has no meaning"):
        assert said in str(caught.value)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine's accelerator has streams")
def test_a_stream_without_a_device_for_it_is_told_before_anything_is_loaded(executor: Executor, checked: Any) -> None:
    executor._listener = started = Started()
    with pytest.raises(WorkflowError, match="cpu has no streams for it"):
        executor.run(checked("bnb-nf4", "quantwire", "group", set_mode=True, use_stream=True))
    assert started.kinds == []


def test_a_misspelt_input_is_warned_of(executor: Executor, checked: Any, caplog: pytest.LogCaptureFixture) -> None:
    graph = checked("bnb-nf4", "library", AUTO, modes="sequential")
    with caplog.at_level(logging.WARNING):
        assert executor.run(graph).results["latent"]
    (said,) = [r.message for r in caplog.records if "no such input" in r.message]
    assert said.startswith("node check (OffloadCompat).modes: ")
    assert "Did you mean mode" in said


def test_another_variant_of_the_mode_that_was_set_is_found(executor: Executor, checked: Any, make_node: Any) -> None:
    graph = checked("torchao-int8wo", "library", "sequential", "report", keep_on="disk", set_mode=True)
    second = {"model": ["check", 0], "mode": "sequential", "action": "block"}
    graph["second"] = make_node("OffloadCompat", **second)
    graph["sampler"]["inputs"]["model"] = ["second", 0]
    with pytest.raises(OffloadConflict, match=r"cannot run with sequential offload \(disk\)"):
        executor.run(graph)


def test_each_component_is_judged_by_its_own_mode(host: Any) -> None:
    from accelerate import cpu_offload

    plain = torch.nn.Sequential(torch.nn.Linear(64, 64))
    cpu_offload(plain, torch.device("cpu"))
    quantized = torch.nn.Sequential(make_layer(quantize_weight("bnb-nf4"), None, Carrier.LIBRARY))
    pipe = SimpleNamespace(text_encoder=plain, transformer=quantized)
    report = OffloadCompat().check(AUTO, "block", pipeline=pipe)["result"][1]
    assert report.now == {
        "text_encoder": (OffloadMode.SEQUENTIAL, "memory"),
        "transformer": (OffloadMode.NONE, ""),
    }
    assert [v.level for v in report.verdicts["transformer"]] == [VerdictLevel.OK]


def test_ways_out_of_another_hosts_mode_can_be_followed_here(executor: Executor, checked: Any) -> None:
    with pytest.raises(OffloadConflict) as caught:
        executor.run(checked("bnb-nf4", "library", "partial"))
    ways = str(caught.value).partition("Ways out:\n")[2].splitlines()
    assert "carrier quantwire" in ways[0]
    assert not any("ComfyUI" in way for way in ways)


def test_a_conflict_that_does_not_stop_says_what_the_graph_does(executor: Executor, checked: Any) -> None:
    result = executor.run(checked("bnb-nf4", "library", "sequential", "report"))
    (note,) = result.outputs["check"]["report"][0]["notes"]
    assert note == "transformer: the verdict is about mode sequential; this graph runs it without offload."
    assert note in result.outputs["check"]["text"][0]


def test_a_mode_that_was_set_says_what_it_comes_to(executor: Executor, checked: Any) -> None:
    def notes(**settings: Any) -> list[str]:
        graph = checked("bnb-nf4", "quantwire", "balanced", set_mode=True, **settings)
        return executor.run(graph).outputs["check"]["report"][0]["notes"]

    whole, alone = notes(device_gib=64.0)
    assert re.fullmatch(
        r"transformer fits its share of the device and is not split "
        r"\(it takes \d+ MiB and 51\.2 GiB are free for it\)\.",
        whole,
    )
    assert alone == "Not linked here, so no mode was set for: clip, vae."
    split, _ = notes(device_gib=1e-6)
    assert "is larger than its share of the device, so layers that do not fit wait in memory (it takes" in split
    assert split.endswith("and 0 MiB are free for it).")


def test_library_layers_run_where_balanced_splits_nothing(executor: Executor, checked: Any) -> None:
    plain = executor.run(checked("quanto-qint8", "library", AUTO)).results["latent"][0]["samples"]
    graph = checked("quanto-qint8", "library", "balanced", set_mode=True, device_gib=64.0)
    assert torch.equal(executor.run(graph).results["latent"][0]["samples"], plain)
    graph["check"]["inputs"]["device_gib"] = 1e-6
    with pytest.raises(OffloadConflict, match=r"cannot run with balanced offload \(split\)"):
        executor.run(graph)


def test_without_offload_is_not_compared_with_itself(executor: Executor, checked: Any) -> None:
    text = executor.run(checked("bnb-nf4", "library", "none")).outputs["check"]["text"][0]
    assert "can run without offload: measured." in text


def test_a_vae_and_another_object_pass_through_checked(executor: Executor, sampled: Any, make_node: Any) -> None:
    check = {"vae": ["vae", 0], "pipeline": ["model", 0], "mode": "auto", "action": "block"}
    graph = sampled("check", check=make_node("OffloadCompat", **check))
    graph["sampler"]["inputs"]["model"] = ["check", 4]
    graph["decoded"]["inputs"]["vae"] = ["check", 3]
    graph |= {"vae_out": make_node("Keep", value=["check", 3]), "other_out": make_node("Keep", value=["check", 4])}
    result = executor.run(graph)
    report = result.outputs["check"]["report"][0]
    assert set(report["now"]) == {"decoder", "transformer"}
    assert report["notes"] == []
    assert result.results["vae_out"][0].guard is result.results["other_out"][0].guard is not None
    assert result.results["image"]


def test_layers_in_an_object_of_another_pack_are_found(host: Any) -> None:
    layer = make_layer(quantize_weight("bnb-nf4"), None, Carrier.LIBRARY)
    holder = SimpleNamespace(transformer=torch.nn.Sequential(layer))
    with pytest.raises(OffloadConflict, match=r"^transformer: bnb-nf4"):
        OffloadCompat().check("sequential", "block", pipeline=holder)
    result = OffloadCompat().check("model", "block", pipeline=holder)["result"]
    assert result[4] is holder
    assert "not again before it runs" in result[1].notes[0]


def test_an_object_without_modules_is_not_called_safe(host: Any) -> None:
    result = OffloadCompat().check("sequential", "block", pipeline=SimpleNamespace(name="nothing"))["result"]
    (note,) = result[1].notes
    assert note == "pipeline: no module was found in a types.SimpleNamespace, so nothing in it was checked."
    assert "safe" not in str(result[1])


def quantize_weight(format_id: str) -> Any:
    return get_quantizer(format_id).quantize(torch.randn(64, 64), QuantSpec(format_id))
