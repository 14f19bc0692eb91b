"""QuantRules in graphs: with and without a base config, and what it refuses before anything runs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from quantwire.hosts.standalone.executor import Executor
from quantwire.hosts.standalone.validate import InvalidWorkflow
from quantwire.nodes.quantize import QuantRules
from quantwire.quantizers.errors import SpecError
from quantwire.quantizers.report import QuantReport
from quantwire.quantizers.rules import Rule, RuleSet
from quantwire.quantizers.spec import QuantSpec

RULES = """
# attention in eight bits, the first block as it is
re:^transformer_blocks\\.1\\.attn\\. = gguf-q8-0
transformer_blocks.0 = keep
context_embedder = bnb;bits=8;int8-threshold=0
"""


@pytest.fixture
def graph(sampled: Any, make_node: Any) -> dict[str, Any]:
    return {
        "model": sampled()["model"],
        "r": make_node("QuantRules", rules=RULES),
        "q": make_node("QuantizeModel", model=["model", 0], format="bnb-nf4", config=["r", 0]),
        "out": make_node("Keep", value=["q", 1]),
    }


def run(executor: Executor, graph: dict[str, Any]) -> QuantReport:
    return executor.run(graph).results["out"][0]


def formats(report: QuantReport) -> dict[str, str]:
    return {e.name.removesuffix(".weight"): e.format_id for e in report.entries if e.action == "quantize"}


def test_rules_join_the_format_of_the_node(executor: Executor, graph: dict[str, Any]) -> None:
    report = run(executor, graph)
    found = formats(report)
    assert found["context_embedder"] == "bnb-int8", "the built-in list keeps it; a rule with a format wins"
    assert {f for n, f in found.items() if n.startswith("transformer_blocks.1.attn.")} == {"gguf-q8-0"}
    assert {f for n, f in found.items() if n.startswith("single_transformer_blocks.")} == {"bnb-nf4"}
    assert not any(n.startswith("transformer_blocks.0.") for n in found)
    reasons = {e.name: e.reason for e in report.entries}
    assert reasons["transformer_blocks.0.attn.to_q.weight"] == "rule 'transformer_blocks.0 = keep'"
    assert reasons["x_embedder.weight"] == "flux: input projection", "the built-in list goes on"
    head = str(report).splitlines()[0]
    for part in (f"{list(found.values()).count(f)} in {f}" for f in ("bnb-nf4", "gguf-q8-0", "bnb-int8")):
        assert part in head
    spec = QuantSpec.from_uri(report.uri)
    assert [r.pattern for r in spec.rules] == [
        r"re:^transformer_blocks\.1\.attn\.", "transformer_blocks.0", "context_embedder",
    ]  # fmt: skip


def test_rules_on_a_base_config_and_on_rules(executor: Executor, graph: dict[str, Any], make_node: Any) -> None:
    graph["c"] = make_node("QuantConfig", uri="quanto-qint8;exclude=*.to_v")
    graph["r"]["inputs"]["config"] = ["c", 0]
    graph["r2"] = make_node("QuantRules", rules=json.dumps({"single_transformer_blocks": "bnb-fp4"}), config=["r", 0])
    graph["q"]["inputs"] |= {"format": "from config", "config": ["r2", 0], "keep_layers": "*.ff_context.*"}
    with pytest.raises(SpecError) as failure:
        run(executor, graph)
    assert "'exclude=*.to_v' and 're:^transformer_blocks\\.1\\.attn\\. = gguf-q8-0' both match" in str(failure.value)
    graph["c"]["inputs"]["uri"] = "quanto-qint8"
    found = formats(run(executor, graph))
    assert set(found.values()) == {"quanto-qint8", "gguf-q8-0", "bnb-int8", "bnb-fp4"}
    assert not any("ff_context" in n for n in found)


def test_from_config_needs_a_base(executor: Executor, graph: dict[str, Any]) -> None:
    graph["q"]["inputs"]["format"] = "from config"
    with pytest.raises(SpecError, match="the linked QuantRules has no base config"):
        run(executor, graph)


def test_rules_with_auto(executor: Executor, graph: dict[str, Any]) -> None:
    graph["q"]["inputs"]["format"] = "auto"
    report = run(executor, graph)
    assert report.notes[0].startswith("auto: ")
    assert formats(report)["context_embedder"] == "bnb-int8"


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ("*.attn.*", "Line 1: Rule '*.attn.*' is not of the form"),
        ("a = bnb-nf3", "Unknown backend or format 'bnb-nf3'"),
        ("re:( = keep", "is no regular expression"),
        ("a = bnb;bits=5", "argument 'bits' must be 4 or 8"),
    ],
)
def test_refused_before_anything_runs(executor: Executor, graph: dict[str, Any], rules: str, said: str) -> None:
    answer = QuantRules.VALIDATE_INPUTS(rules)
    assert isinstance(answer, str)
    assert said in answer
    assert "\n" not in answer
    graph["r"]["inputs"]["rules"] = rules
    with pytest.raises(InvalidWorkflow):
        run(executor, graph)


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ("to_q = keep\n*.attn.* = bnb-fp4", "Rules contradict each other: 'to_q = keep' and '*.attn.* = bnb-fp4'"),
        ("no_such_layer = keep", "Pattern 'no_such_layer' matches none of the"),
    ],
)
def test_what_only_the_model_can_tell(executor: Executor, graph: dict[str, Any], rules: str, said: str) -> None:
    graph["r"]["inputs"]["rules"] = rules
    with pytest.raises(SpecError) as failure:
        run(executor, graph)
    assert str(failure.value).startswith(said)


def test_the_node_alone() -> None:
    assert QuantRules.VALIDATE_INPUTS(None) is True
    assert QuantRules().parse("a = bnb;bits=8") == (RuleSet((Rule("a", "bnb-int8"),)),)
    base = QuantSpec("bnb-nf4", rules=(Rule("b", "keep"),))
    assert QuantRules().parse("a = keep", base) == (QuantSpec("bnb-nf4", rules=(Rule("b", "keep"), Rule("a", "keep"))),)
