"""OffloadCompat: every conflict of the table stops the graph before the sampler, and its three actions."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from quantwire.hosts.standalone.executor import Executor
from quantwire.hosts.standalone.progress import Listener
from quantwire.hosts.standalone.workflow import PromptNode
from quantwire.nodes.offload import AUTO, OffloadCompat
from quantwire.quantizers.compat.matrix import ROWS, find_row
from quantwire.quantizers.compat.modes import Carrier, OffloadMode, VerdictLevel
from quantwire.quantizers.errors import OffloadConflict
from quantwire.quantizers.registry import available_formats

MODES = (OffloadMode.NONE, OffloadMode.MODEL, OffloadMode.SEQUENTIAL, OffloadMode.BALANCED)


def level(carrier: Carrier, format_id: str, mode: OffloadMode) -> VerdictLevel:
    row = find_row(carrier, format_id, mode)
    assert row is not None
    return row.verdict


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
    def build(format_id: str, carrier: str, mode: str, action: str = "block") -> dict[str, Any]:
        return sampled(
            "check",
            q=make_node("QuantizeModel", model=["model", 0], format=format_id, carrier=carrier),
            check=make_node("OffloadCompat", model=["q", 0], mode=mode, action=action),
        )

    return build


def test_the_table_has_conflicts_for_every_library() -> None:
    # Layers of sdnq run in every mode, torchao's stop only where a part is on disk.
    assert {f.partition("-")[0] for f, _, _ in CONFLICTS} == {"bnb", "quanto", "gguf"}
    assert all(c is Carrier.LIBRARY for _, c, _ in CONFLICTS)
    assert any(r.verdict is VerdictLevel.BLOCK for r in ROWS)


@pytest.mark.parametrize(("format_id", "carrier", "mode"), CONFLICTS, ids=lambda v: getattr(v, "value", v))
def test_conflict_blocks_before_sampling(
    executor: Executor, checked: Any, format_id: str, carrier: Carrier, mode: OffloadMode
) -> None:
    executor._listener = started = Started()
    with pytest.raises(OffloadConflict) as caught:
        executor.run(checked(format_id, carrier.value, mode.value))
    first, *rest = str(caught.value).splitlines()
    assert format_id in first
    assert f"cannot run with {mode.value} offload" in first
    assert any("Ways out" in line for line in rest)
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
    assert find_row(Carrier.LIBRARY, "bnb-nf4", OffloadMode.GROUP) is None
    with caplog.at_level(logging.WARNING):
        executor.run(checked("bnb-nf4", "library", "group"))
    assert any("is not known to run" in r.message for r in caplog.records)


def test_auto_is_what_the_host_does(executor: Executor, checked: Any, host: Any) -> None:
    result = executor.run(checked("bnb-nf4", "library", AUTO))
    assert result.outputs["check"]["report"][0]["mode"] == host.offload_mode(None).value == "none"


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
    assert result.results["through"][0] is result.results["given"][0]


def test_text_encoder_output_without_input_is_named(executor: Executor, sampled: Any, make_node: Any) -> None:
    graph = sampled("check", check=make_node("OffloadCompat", model=["model", 0], mode="none", action="block"))
    graph["prompt"]["inputs"]["clip"] = ["check", 2]
    with pytest.raises(Exception, match="was given no text encoder"):
        executor.run(graph)


def test_modes_offered_are_those_of_the_table() -> None:
    assert OffloadCompat.INPUT_TYPES()["required"]["mode"][0] == [AUTO, *(m.value for m in OffloadMode)]
