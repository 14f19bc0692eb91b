"""QuantRules: their text and JSON forms, what they match, and what contradicts what."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from quantwire.quantizers.errors import SpecError
from quantwire.quantizers.files.gguf_writer import write_gguf
from quantwire.quantizers.rules import KEEP, Rule, matches, parse_rules, resolve, to_json, to_text
from quantwire.quantizers.spec import QuantSpec, canonical

LAYERS = ["blocks.0.attn.qkv", "blocks.0.mlp.fc1", "blocks.1.attn.qkv", "blocks.10.attn.qkv", "img_in"]
TEXT = r"""
# attention in four bits
*.attn.* = bnb-nf4     # nf4
re:blocks\.(0|1)\. = keep

re:a{1,2}#b = bnb;bits=8
img_in=gguf-q8-0
"""
RULES = (
    Rule("*.attn.*", "bnb-nf4"),
    Rule(r"re:blocks\.(0|1)\.", KEEP),
    Rule("re:a{1,2}#b", "bnb;bits=8"),
    Rule("img_in", "gguf-q8-0"),
)


def test_lines() -> None:
    assert parse_rules(TEXT) == RULES
    assert parse_rules(to_text(RULES)) == RULES
    assert parse_rules("") == parse_rules("\n  # only a comment\n") == ()
    assert parse_rules("re:(?=a)b = keep") == (Rule("re:(?=a)b", KEEP),), "the blanks around = separate"


def test_json() -> None:
    assert parse_rules(json.dumps(to_json(RULES))) == RULES
    assert parse_rules(json.dumps({r.pattern: r.target for r in RULES})) == RULES
    assert parse_rules("[ab].x = keep") == (Rule("[ab].x", KEEP),), "a glob may begin with a bracket"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = keep\nb", "Line 2: Rule 'b' is not of the form: pattern = format, URI or keep."),
        ("= keep", "Line 1: Rule '= keep' is not of the form"),
        ("a =", "Line 1: Rule 'a =' is not of the form"),
        ("a = keep\nre:( = keep", "Line 2: Layer pattern 're:(' is no regular expression: missing )"),
        ('[{"pattern": "a"}]', 'Rule {"pattern": "a"} is not of the form {"pattern": ..., "format": ...}.'),
        ('["a"]', 'Rule "a" is not of the form'),
        ('{"a": 4}', 'Rule {"pattern": "a", "format": 4} is not of the form'),
        ('{"a": ', "The rules are neither lines nor JSON"),
    ],
)
def test_refused_text(text: str, message: str) -> None:
    with pytest.raises(SpecError) as failure:
        parse_rules(text)
    assert str(failure.value).startswith(message)


@pytest.mark.parametrize(
    ("pattern", "hit"),
    [
        ("re:qkv$", True),
        (r"re:qkv\.weight$", True),
        (r"re:^blocks\.(0|1)\.", True),
        (r"re:^attn", False),
        (r"re:\.\d{2}\.", False),
        ("re:QKV", False),
        ("re:(?i)QKV", True),
    ],
)
def test_regular_expressions(pattern: str, hit: bool) -> None:
    assert matches(pattern, "blocks.0.attn.qkv") is hit


def test_targets_become_canonical() -> None:
    assert canonical(Rule("a", "KEEP")) == Rule("a", "keep")
    assert canonical(Rule("a", "bnb;bits=4;bits4-quant-type=nf4")) == Rule("a", "bnb-nf4")
    assert canonical(Rule("a", "bnb-int8;int8-threshold=0")) == Rule("a", "bnb;bits=8;int8-threshold=0")


def test_resolve() -> None:
    rules = (Rule("*.attn.*", "bnb-nf4"), Rule("blocks.1", "bnb-nf4"), Rule("img_in", KEEP))
    found = resolve(rules, ["mlp"], ["blocks.0.mlp.fc1"], LAYERS)
    assert {layer: (hit.target, hit.source) for layer, hit in found.items()} == {
        "blocks.0.mlp.fc1": (KEEP, "exclude=mlp"),
        "blocks.0.attn.qkv": ("bnb-nf4", "*.attn.* = bnb-nf4"),
        "blocks.1.attn.qkv": ("bnb-nf4", "*.attn.* = bnb-nf4"),
        "blocks.10.attn.qkv": ("bnb-nf4", "*.attn.* = bnb-nf4"),
        "img_in": (KEEP, "img_in = keep"),
    }


@pytest.mark.parametrize(
    ("rules", "exclude", "include", "first_line"),
    [
        (
            (Rule("*.qkv", "bnb-nf4"), Rule("blocks.1", KEEP)),
            (),
            (),
            "'*.qkv = bnb-nf4' and 'blocks.1 = keep' both match 'blocks.1.attn.qkv'.",
        ),
        (
            (Rule("blocks.1", "bnb-fp4"), Rule("*.qkv", "bnb-nf4")),
            (),
            (),
            "'blocks.1 = bnb-fp4' and '*.qkv = bnb-nf4' both match 'blocks.1.attn.qkv'.",
        ),
        ((Rule("*.qkv", "bnb-nf4"),), ("blocks.0",), (), "'exclude=blocks.0' and '*.qkv = bnb-nf4' both match"),
        ((Rule("img_in", KEEP),), (), ("img_in",), "'include=img_in' and 'img_in = keep' both match 'img_in'."),
    ],
    ids=["format-and-keep", "two-formats", "exclude", "include"],
)
def test_contradictions_show_both_rules_and_a_layer(
    rules: tuple[Rule, ...], exclude: tuple[str, ...], include: tuple[str, ...], first_line: str
) -> None:
    with pytest.raises(SpecError) as failure:
        resolve(rules, exclude, include, LAYERS)
    said, advice = str(failure.value).splitlines()
    assert said.startswith(f"Rules contradict each other: {first_line}")
    assert advice.startswith("Narrow one of the patterns")


def test_a_rule_that_matches_nothing_is_refused() -> None:
    with pytest.raises(SpecError, match=r"^Pattern 're:block\\\.' matches none of the 5 linear layers \(such as "):
        resolve((Rule(r"re:block\.", KEEP),), (), (), LAYERS)


def test_a_gguf_file_takes_rules_with_its_own_types_only(tmp_path: Path) -> None:
    import gguf

    names = ["double_blocks.0.img_attn.qkv", "double_blocks.0.img_mlp.0", "single_blocks.0.linear1", "txt_in"]
    names += ["img_in", "final_layer.linear"]
    tensors = {f"{n}.weight": torch.randn(64, 64, dtype=torch.bfloat16) for n in names}
    path = tmp_path / "model.gguf"
    write_gguf(path, tensors, QuantSpec("gguf-q4-0", rules=(Rule("img_attn", "gguf-q8-0"),)))
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(str(path)).tensors}
    assert types == dict(zip(tensors, ("Q8_0", "Q4_0", "Q4_0", "BF16", "BF16", "BF16"), strict=True))
    with pytest.raises(SpecError, match=r"^A GGUF file cannot hold bnb-nf4\."):
        write_gguf(path, tensors, QuantSpec("gguf-q4-0", rules=(Rule("img_attn", "bnb-nf4"),)))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": "keep", "a": "bnb-nf4"}', '\'a\' stands twice in one JSON object, as "keep" and as "bnb-nf4".'),
        ('[{"pattern": "a", "format": "keep", "format": "bnb-nf4"}]', "'format' stands twice in one JSON object"),
    ],
)
def test_a_key_that_stands_for_two_things_in_json(text: str, said: str) -> None:
    with pytest.raises(SpecError) as failure:
        parse_rules(text)
    assert str(failure.value).startswith(f"Rules contradict each other: {said}")
    assert parse_rules('{"a": "keep", "a": "keep"}') == (Rule("a", KEEP),)
