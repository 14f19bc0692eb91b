"""The URI form: what round-trips, and what every refusal says."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest
from quantwire.quantizers import spec
from quantwire.quantizers.errors import SpecError
from quantwire.quantizers.formats import BACKENDS, Argument, Backend
from quantwire.quantizers.registry import format_ids
from quantwire.quantizers.rules import Rule, check_pattern
from quantwire.quantizers.spec import QuantSpec, canonical


def refusal(uri: str) -> str:
    with pytest.raises(SpecError) as failure:
        QuantSpec.from_uri(uri)
    return str(failure.value)


@pytest.mark.parametrize("format_id", format_ids())
def test_every_bare_format_id_round_trips(format_id: str) -> None:
    spec = QuantSpec.from_uri(format_id)
    assert spec == QuantSpec(format_id)
    assert QuantSpec.from_uri(spec.to_uri()) == spec


@pytest.mark.parametrize(
    ("uri", "canonical"),
    [
        ("bnb", "bnb;bits=8"),
        ("bnb;bits=4", "bnb;bits=4;bits4-quant-type=fp4"),
        ("bnb; bits = 4 ;bits4-quant-type=nf4", "bnb;bits=4;bits4-quant-type=nf4"),
        (
            "bnb;bits4-use-double-quant=yes;bits=4;bits4-compute-dtype=bfloat16",
            "bnb;bits=4;bits4-quant-type=fp4;bits4-compute-dtype=bfloat16;bits4-use-double-quant=true",
        ),
        ("bnb-int8;int8-threshold=3.1234567", "bnb;bits=8;int8-threshold=3.1234567"),
        ("bnb-int8;int8-threshold=0", "bnb;bits=8;int8-threshold=0"),
        ("quanto", "quanto;weights=qint8"),
        ("quanto;weights=qfloat8-e4m3fn", "quanto;weights=qfloat8-e4m3fn"),
        ("gguf;type=q4_0", "gguf;type=q4_0"),
        ("gguf;include=img_in, txt_in ;exclude=*.to_out.*", "gguf;type=q8_0;include=img_in,txt_in;exclude=*.to_out.*"),
        ("gguf;exclude='a;b,c'", "gguf;type=q8_0;exclude='a;b,c'"),
        ("gguf;exclude='a,b', c ,\"d;e\"", "gguf;type=q8_0;exclude='a,b',c,'d;e'"),
        ("gguf;exclude=\"a;'b'\"", "gguf;type=q8_0;exclude=\"a;'b'\""),
        (r"gguf;exclude='don\'t'", 'gguf;type=q8_0;exclude="don\'t"'),
        (r"gguf;exclude=don\'t", 'gguf;type=q8_0;exclude="don\'t"'),
        (r"gguf;exclude='re:\bb\.\d{1,2}'", r"gguf;type=q8_0;exclude='re:\bb\.\d{1,2}'"),
        ("gguf; type = 'q4_0'", "gguf;type=q4_0"),
        ("bitsandbytes;bits=4", "bnb;bits=4;bits4-quant-type=fp4"),
        ("gguf;rules=a = keep,*.b=bnb-nf4", "gguf;type=q8_0;rules=a = keep,*.b = bnb-nf4"),
        (
            "gguf;rules='*.b = bnb;bits=8;int8-threshold=0',\"c = bnb;bits='4'\"",
            "gguf;type=q8_0;rules='*.b = bnb;bits=8;int8-threshold=0',c = bnb-fp4",
        ),
        ('gguf;exclude="blocks.[0-3].*"', "gguf;type=q8_0;exclude=blocks.[0-3].*"),
    ],
)
def test_uri_round_trip(uri: str, canonical: str) -> None:
    spec = QuantSpec.from_uri(uri)
    assert spec.to_uri() == canonical
    assert QuantSpec.from_uri(canonical) == spec


@pytest.mark.parametrize(
    ("uri", "format_id"),
    [
        ("bnb;bits=4;bits4-quant-type=nf4", "bnb-nf4"),
        ("bnb;bits=4", "bnb-fp4"),
        ("bnb;bits=8", "bnb-int8"),
        ("quanto;weights=qint4", "quanto-qint4"),
        ("gguf;type=q8_0", "gguf-q8-0"),
    ],
)
def test_arguments_choose_the_format(uri: str, format_id: str) -> None:
    assert QuantSpec.from_uri(uri).format_id == format_id


@pytest.mark.parametrize(
    "uri",
    [
        "bnb-int8;int8-threshold=6.0",
        "bnb-nf4;bits4-use-double-quant=false",
        "gguf;include=;exclude=' '",
    ],
)
def test_defaults_and_empty_lists_are_dropped(uri: str) -> None:
    spec = QuantSpec.from_uri(uri)
    assert (spec.options, spec.include, spec.exclude) == ((), (), ())


def test_lists() -> None:
    spec = QuantSpec.from_uri("bnb-nf4;include=img_in,txt_in;exclude='single_blocks.*'")
    assert spec.include == ("img_in", "txt_in")
    assert spec.exclude == ("single_blocks.*",)


def test_options_made_in_code_equal_those_of_a_uri() -> None:
    made = QuantSpec(
        "bnb-nf4", options=(("bits4-use-double-quant", True), ("bits4-compute-dtype", "float16")), exclude=("a",)
    )
    assert made == QuantSpec.from_uri("bnb-nf4;bits4-compute-dtype=float16;bits4-use-double-quant=1;exclude=a")
    assert made.option("bits4-use-double-quant", False) is True
    assert made.option("int8-threshold", 6.0) == 6.0
    assert QuantSpec("bnb-int8", options=(("int8-threshold", 6.0),)) == QuantSpec("bnb-int8")


@pytest.mark.parametrize(
    ("uri", "first_line"),
    [
        pytest.param("bnbb", "Unknown backend or format 'bnbb' in 'bnbb'. Did you mean bnb", id="unknown-backend"),
        pytest.param("", "Unknown backend or format '' in ''.", id="empty"),
        pytest.param("bnb-nf3", "Unknown backend or format 'bnb-nf3' in 'bnb-nf3'. Did you mean bnb-nf4", id="format"),
        pytest.param("bnb;bit=4", "bnb: unknown argument 'bit'. Did you mean bits", id="unknown-argument"),
        pytest.param("gguf;bits=4", "gguf: unknown argument 'bits'.", id="argument-of-another-backend"),
        pytest.param("bnb;bits=5", "bnb: argument 'bits' must be 4 or 8, got 5.", id="unlisted-number"),
        pytest.param("bnb;bits=4.0", "bnb: argument 'bits' must be a whole number, got '4.0'.", id="no-whole-number"),
        pytest.param(
            "bnb;bits=4;bits4-quant-type=nf5",
            "bnb: argument 'bits4-quant-type' must be one of fp4, nf4, got 'nf5'. Did you mean nf4",
            id="unlisted-word",
        ),
        pytest.param(
            "bnb-nf4;bits4-use-double-quant=maybe",
            "bnb: argument 'bits4-use-double-quant' must be true or false, got 'maybe'.",
            id="no-bool",
        ),
        pytest.param(
            "bnb;int8-threshold=much", "bnb: argument 'int8-threshold' must be a number, got 'much'.", id="no-number"
        ),
        pytest.param(
            "bnb;int8-threshold=11", "bnb: argument 'int8-threshold' must be between 0 and 10, got 11.", id="beyond"
        ),
        pytest.param(
            "bnb;int8-threshold=nan", "bnb: argument 'int8-threshold' must be between 0 and 10, got nan.", id="nan"
        ),
        pytest.param("bnb;bits", "bnb: 'bits' in 'bnb;bits' is not of the form argument=value.", id="no-value"),
        pytest.param("bnb;=4", "bnb: '=4' in 'bnb;=4' is not of the form argument=value.", id="no-name"),
        pytest.param("bnb;", "bnb: '' in 'bnb;' is not of the form argument=value.", id="trailing-separator"),
        pytest.param("bnb;bits=4;bits=8", "bnb: argument 'bits' is given twice in 'bnb;bits=4;bits=8'.", id="twice"),
        pytest.param(
            "bnb;exclude=a;exclude=b",
            "bnb: argument 'exclude' is given twice in 'bnb;exclude=a;exclude=b'.",
            id="list-twice",
        ),
        pytest.param("bnb;exclude='a", "The quote ' in 'bnb;exclude='a' is not closed.", id="open-quote"),
        pytest.param(
            "bnb-nf4;bits=8",
            "bnb: argument 'bits' is fixed by the format id 'bnb-nf4' in 'bnb-nf4;bits=8'.",
            id="contradicts-the-id",
        ),
        pytest.param(
            "bnb;bits=8;bits4-quant-type=nf4",
            "bnb: argument 'bits4-quant-type' needs bits=4, got bits=8.",
            id="contradicts-bits",
        ),
        pytest.param(
            "bnb;bits=8;bits4-use-double-quant=true",
            "bnb: argument 'bits4-use-double-quant' does not apply to bnb-int8, only to bnb-nf4 and bnb-fp4.",
            id="does-not-apply",
        ),
        pytest.param(
            "bnb;bits=4;int8-threshold=1",
            "bnb: argument 'int8-threshold' does not apply to bnb-fp4, only to bnb-int8.",
            id="does-not-apply-to-4-bit",
        ),
        pytest.param(
            "gguf;exclude=don''t",
            "gguf: argument 'exclude': A quote stands in the middle of 'don''t'.",
            id="quote-in-a-pattern",
        ),
    ],
)
def test_refusals(uri: str, first_line: str) -> None:
    shown = refusal(uri).splitlines()[0]
    # A list of near names may go on after the nearest.
    assert shown == first_line or ("Did you mean" in first_line and shown.startswith(first_line))


def test_an_unknown_argument_lists_the_valid_ones() -> None:
    assert refusal("gguf;size=1").splitlines()[1] == "Valid arguments: type, include, exclude, rules."


def test_an_unknown_backend_lists_backends_and_formats() -> None:
    assert refusal("xyz").splitlines()[1] == (
        f"Backends: {', '.join(b.name for b in BACKENDS)}. Formats: {', '.join(format_ids())}."
    )


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("gguf;rules=a", "gguf: argument 'rules': Rule 'a' is not of the form"),
        ("gguf;rules=a = nf5", "Rule 'a = nf5': Unknown backend or format 'nf5'"),
        ("gguf;rules='a = bnb;bit=4'", "Rule 'a = bnb;bit=4': bnb: unknown argument 'bit'. Did you mean bits"),
        ("gguf;rules='a = bnb;exclude=b'", "its format has layer patterns of its own"),
        ("gguf;rules=re:( = keep", "is no regular expression"),
        ("gguf;exclude='a'b", "gguf: argument 'exclude': Text follows the quoted part of ''a'b'"),
        ("gguf;type=q8_0'x'", "gguf: argument 'type': A quote stands in the middle"),
    ],
)
def test_refused_rules_and_quotes_name_the_argument(uri: str, message: str) -> None:
    assert message in refusal(uri)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"options": (("int8-threshold", 6.0),)},
            "argument 'int8-threshold' does not apply to bnb-nf4, only to bnb-int8",
        ),
        ({"options": (("bits4-compute-dtype", "int8"),)}, "must be one of float16, bfloat16, float32, got 'int8'"),
        ({"options": (("bits", 4),)}, "argument 'bits' is fixed by the format id 'bnb-nf4'"),
        ({"options": (("size", 4),)}, "unknown argument 'size'"),
        ({"include": ("a\nb",)}, "Layer pattern 'a\nb' is empty or holds outer blanks or a line break"),
        ({"include": ("re:(",)}, "Layer pattern 're:(' is no regular expression: missing ), unterminated subpattern"),
        ({"include": ("re:",)}, "Layer pattern 're:' is empty"),
        ({"exclude": (r"re:a\'",)}, "holds a backslash before a quote"),
        ({"exclude": ("",)}, "Layer pattern '' is empty"),
    ],
    ids=[
        "default-of-others",
        "value",
        "selector",
        "unknown",
        "line-break",
        "regex",
        "empty-regex",
        "escape",
        "empty-pattern",
    ],
)
def test_specs_made_in_code_are_checked_too(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as failure:
        QuantSpec("bnb-nf4", **kwargs)
    assert message in str(failure.value)


def test_a_backend_without_a_row_is_no_other_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(spec.ARGUMENTS, "other", {"type": Argument("q8_0", ("q8_0",))})
    monkeypatch.setitem(spec.SELECTORS, "other", ("type",))
    with pytest.raises(SpecError, match=r"^other: no format has type=q8_0\.$"):
        QuantSpec.from_uri("other;type=q8_0")
    monkeypatch.delitem(spec.FORMAT_ARGUMENTS, "comfy-int8")
    with pytest.raises(SpecError, match=r"^comfy-int8: no arguments of a URI choose this format\.$"):
        QuantSpec("comfy-int8").to_uri()


def values_of(argument: Argument, rng: random.Random) -> Any:
    """A valid value that the argument's declaration allows."""
    if argument.kind == "bool":
        return rng.random() < 0.5
    if argument.choices:
        word = rng.choice(argument.choices)
        return {"int": int, "float": float, "word": str}[argument.kind](word)
    assert argument.low is not None, argument
    assert argument.high is not None, argument
    if argument.kind == "int":
        return rng.randint(int(argument.low), int(argument.high))
    return rng.choice([argument.low, argument.high, rng.uniform(argument.low, argument.high), 1e-07 + argument.low])


def pattern_of(rng: random.Random) -> str:
    """A layer pattern of characters that quoting must get right."""
    alphabet = ["a", "b.0", "*", "[01]", "?", ",", ";", "'", '"', "=", " = ", "x y", "\\\\", "#", "{1,2}"]
    while True:
        body = "".join(rng.choice(alphabet) for _ in range(rng.randint(1, 6))).strip()
        pattern = rng.choice(["", "re:"]) + (re.escape(body) if rng.random() < 0.3 else body)
        try:
            check_pattern(pattern)
        except SpecError:
            continue
        return pattern


def rule_of(rng: random.Random) -> Rule:
    while True:
        try:
            return canonical(Rule(pattern_of(rng), rng.choice(["keep", *ALL_FORMATS])))
        except SpecError as err:  # ` = ` ends the pattern of a rule
            if "between blanks" not in str(err):
                raise


ALL_FORMATS = [e.format_id for b in BACKENDS for e in b.entries if e.writes]


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.entries], ids=lambda b: b.name)
def test_every_format_and_option_round_trips(backend: Backend) -> None:
    rng = random.Random(backend.name)
    ids = [e.format_id for e in backend.entries if e.writes]
    for format_id in [*ids, *rng.choices(ids, k=200)]:
        usable = {
            name: argument
            for name, argument in backend.arguments.items()
            if name not in backend.selectors and (not argument.applies or format_id in argument.applies)
        }
        names = rng.sample(list(usable), rng.randint(0, len(usable)))
        options = tuple((name, values_of(usable[name], rng)) for name in names)
        patterns = [pattern_of(rng) for _ in range(rng.randint(0, 3))]
        rules = tuple(rule_of(rng) for _ in range(rng.randint(0, 2)))
        made = QuantSpec(format_id, tuple(patterns[:1]), tuple(patterns[1:]), options, rules=rules)
        uri = made.to_uri()
        again = QuantSpec.from_uri(uri)
        assert again == made, uri
        assert hash(again) == hash(made)
        assert again.to_uri() == uri
        assert QuantSpec.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def test_every_option_is_refused_by_name_beyond_its_declaration() -> None:
    for backend in BACKENDS:
        for name, argument in backend.arguments.items():
            with pytest.raises(SpecError, match=rf"^{backend.name}: argument '{name}' must be "):
                argument.parse(backend.name, name, "no-such-value")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "The spec names no format."),
        ({"format": "bnb-nf4", "bits": 4}, "The spec has the unknown key 'bits'."),
        ({"format": "bnb-nf4", "version": 99}, "The spec has version 99, expected 1."),
    ],
)
def test_a_spec_from_json_is_checked(data: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as failure:
        QuantSpec.from_dict(data)
    assert str(failure.value).splitlines()[0] == message


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("comfy;type=fp8-e4m3fn;scale=row", "comfy: argument 'scale' does not apply to comfy-fp8-e4m3fn"),
        ("comfy;type=nvfp4;scale=row", "comfy: argument 'scale' does not apply to comfy-nvfp4"),
        ("bnb;bits=4;int8-threshold=6", "bnb: argument 'int8-threshold' does not apply to bnb-fp4"),
        (
            "bnb;bits=8;bits4-use-double-quant=false",
            "bnb: argument 'bits4-use-double-quant' does not apply to bnb-int8",
        ),
    ],
)
def test_an_argument_of_another_format_is_refused_at_its_default_too(uri: str, said: str) -> None:
    assert refusal(uri).startswith(said)


def test_a_rule_whose_arguments_would_go_to_the_whole() -> None:
    said, advice = refusal("bnb;rules=a=keep,b=bnb;bits=4").splitlines()
    assert said == "bnb: argument 'rules': 'b=bnb' ends at the ;, so 'bits=4' is no part of that rule."
    assert advice.startswith('Write rules="b=bnb;bits=4" if it is to be')
    assert refusal("gguf;rules=b = bitsandbytes;type=q4_0").startswith(
        "gguf: argument 'rules': 'b = bitsandbytes' ends"
    )
    for uri in (
        'bnb;rules="b = bnb;bits=4"',
        "bnb;bits=4;rules=b=bnb",
        "bnb;rules=b=bnb;exclude=c",
        "bnb;rules=;bits=4",
    ):
        QuantSpec.from_uri(uri)
    assert QuantSpec.from_uri('bnb;rules="b = bnb";bits=4').rules == (Rule("b", "bnb-int8"),)
