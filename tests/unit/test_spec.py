"""The URI form: what round-trips, and what every refusal says."""

from __future__ import annotations

from typing import Any

import pytest
from quantwire.quantizers import spec
from quantwire.quantizers.errors import SpecError
from quantwire.quantizers.formats import Argument
from quantwire.quantizers.registry import format_ids
from quantwire.quantizers.spec import QuantSpec


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
        "bnb;bits=8;bits4-use-double-quant=false",
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
            "Layer pattern 'don''t' is empty or holds a comma, a quote or outer blanks.",
            id="quote-in-a-pattern",
        ),
    ],
)
def test_refusals(uri: str, first_line: str) -> None:
    shown = refusal(uri).splitlines()[0]
    # A list of near names may go on after the nearest.
    assert shown == first_line or ("Did you mean" in first_line and shown.startswith(first_line))


def test_an_unknown_argument_lists_the_valid_ones() -> None:
    assert refusal("gguf;size=1").splitlines()[1] == "Valid arguments: type, include, exclude."


def test_an_unknown_backend_lists_backends_and_formats() -> None:
    assert refusal("xyz").splitlines()[1] == (
        "Backends: bnb, quanto, gguf, comfy. Formats: " + ", ".join(format_ids()) + "."
    )


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"options": (("bits4-compute-dtype", "int8"),)}, "must be one of float16, bfloat16, float32, got 'int8'"),
        ({"options": (("bits", 4),)}, "argument 'bits' is fixed by the format id 'bnb-nf4'"),
        ({"options": (("size", 4),)}, "unknown argument 'size'"),
        ({"include": ("a,b",)}, "Layer pattern 'a,b' is empty or holds a comma"),
        ({"exclude": ("",)}, "Layer pattern '' is empty"),
    ],
    ids=["value", "selector", "unknown", "comma", "empty-pattern"],
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
