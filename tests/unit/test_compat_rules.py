"""What the verdicts on found layers say, and how a conflict is told."""

from __future__ import annotations

import json
from typing import Any

import pytest
from quantwire.quantizers.compat.find import Found
from quantwire.quantizers.compat.matrix import Row, answer, rows
from quantwire.quantizers.compat.modes import HOST_MODES, Carrier, HostName, OffloadMode, VerdictLevel
from quantwire.quantizers.compat.rules import check, described, explain
from quantwire.quantizers.registry import available_formats

LIBRARY, QUANTWIRE = Carrier.LIBRARY, Carrier.QUANTWIRE
SEQUENTIAL, BALANCED, GROUP = OffloadMode.SEQUENTIAL, OffloadMode.BALANCED, OffloadMode.GROUP
STANDALONE = HostName.STANDALONE
BLOCKED = [r for r in rows() if r.verdict is VerdictLevel.BLOCK]


def found(format_id: str = "bnb-nf4", layers: int = 20, carrier: Carrier = LIBRARY, **kwargs: Any) -> Found:
    return Found("blocks.0.attn.to_q", carrier, format_id, layers, **kwargs)


def found_for(row: Row) -> Found:
    """Layers whose key in the table is the row's."""
    if row.format_id == "quanto-unfrozen":
        return found("quanto-qint8", carrier=row.carrier, frozen=False)
    if row.format_id.startswith("comfyui-"):
        return found(row.format_id.removeprefix("comfyui-"), carrier=row.carrier, kind="GGMLTensor")
    return found(row.format_id, carrier=row.carrier)


def message(entry: Found, mode: OffloadMode = SEQUENTIAL, **kwargs: Any) -> str:
    (verdict,) = check([entry], mode, **kwargs)
    return explain(verdict, "transformer")


# Verdicts


@pytest.mark.parametrize(
    ("format_id", "mode", "variant", "level"),
    [
        ("bnb-nf4", BALANCED, None, VerdictLevel.BLOCK),
        ("bnb-nf4", BALANCED, "split", VerdictLevel.BLOCK),
        ("bnb-nf4", BALANCED, "whole", VerdictLevel.OK),
        ("bnb-nf4", SEQUENTIAL, None, VerdictLevel.BLOCK),
        ("bnb-nf4", SEQUENTIAL, "disk", VerdictLevel.BLOCK),
        ("bnb-nf4", OffloadMode.MODEL, None, VerdictLevel.OK),
        ("bnb-nf4", GROUP, "leaf", VerdictLevel.BLOCK),
        ("bnb-nf4", GROUP, "leaf-disk", VerdictLevel.WARN),
        ("bnb-nf4", GROUP, "leaf-stream", VerdictLevel.WARN),
        ("bnb-nf4", GROUP, None, VerdictLevel.BLOCK),  # in memory it stops by block and by leaf
        ("bnb-int8", OffloadMode.NONE, None, VerdictLevel.OK),
        ("bnb-int8", OffloadMode.MODEL, None, VerdictLevel.WARN),
        ("bnb-int8", BALANCED, "whole", VerdictLevel.OK),
        ("bnb-int8", BALANCED, "split", VerdictLevel.WARN),
        ("bnb-int8", SEQUENTIAL, "memory", VerdictLevel.WARN),
        ("bnb-int8", GROUP, "leaf", VerdictLevel.BLOCK),
        ("bnb-int8", GROUP, "block-disk", VerdictLevel.WARN),
        ("quanto-qint4", BALANCED, None, VerdictLevel.BLOCK),
        ("quanto-qint8", GROUP, "leaf", VerdictLevel.BLOCK),
        ("gguf-q5-1", SEQUENTIAL, None, VerdictLevel.BLOCK),
        # torchao runs in each of these from memory, and stops on disk.
        ("torchao-int8wo", SEQUENTIAL, None, VerdictLevel.WARN),
        ("torchao-int8wo", BALANCED, None, VerdictLevel.WARN),
        ("torchao-int8wo", BALANCED, "split", VerdictLevel.OK),
        ("torchao-int8wo", BALANCED, "split-disk", VerdictLevel.BLOCK),
        ("gguf-q8-0", OffloadMode.NONE, None, VerdictLevel.OK),
    ],
)
def test_the_variant_decides_only_the_cells_that_depend_on_it(
    format_id: str, mode: OffloadMode, variant: str | None, level: VerdictLevel
) -> None:
    (verdict,) = check([found(format_id)], mode, variant=variant)
    assert (verdict.level, verdict.variant, verdict.host) == (level, variant, STANDALONE)


@pytest.mark.parametrize("mode", HOST_MODES[STANDALONE])
@pytest.mark.parametrize("format_id", available_formats())
def test_every_registered_format_has_a_verdict_in_both_carriers(format_id: str, mode: OffloadMode) -> None:
    library, ours = check([found(format_id), found(format_id, carrier=QUANTWIRE)], mode)
    # Outside ComfyUI there are no layers of its formats.
    assert (library.level is VerdictLevel.UNKNOWN) == format_id.startswith("comfy-")
    assert ours.level is VerdictLevel.OK
    assert ours.remedies == ()


@pytest.mark.parametrize("mode", HOST_MODES[HostName.COMFYUI])
@pytest.mark.parametrize("format_id", available_formats())
def test_our_carrier_runs_in_every_mode_of_comfyui(format_id: str, mode: OffloadMode) -> None:
    (verdict,) = check([found(format_id, carrier=QUANTWIRE)], mode, host=HostName.COMFYUI)
    assert verdict.level is VerdictLevel.OK


def test_unfrozen_quanto_says_that_it_saves_nothing() -> None:
    entry = found("quanto-qint8", frozen=False)
    for mode in (OffloadMode.MODEL, SEQUENTIAL):
        (verdict,) = check([entry], mode)
        assert verdict.level is VerdictLevel.OK
        assert "not frozen" in verdict.headline
        assert "no memory is saved" in verdict.headline


@pytest.mark.parametrize("mode", [SEQUENTIAL, OffloadMode.NONE])
def test_unknown_pairs_are_said_to_be_unknown(mode: OffloadMode) -> None:
    (verdict,) = check([found("hqq-int4", kind="HQQLinear")], mode)
    assert verdict.level is VerdictLevel.UNKNOWN
    assert "hqq-int4 (20 library layers of HQQLinear) is not known to run" in verdict.headline
    assert verdict.row is None
    assert "held by HQQLinear" in verdict.cause


def test_an_unknown_verdict_names_what_is_known_to_run() -> None:
    (verdict,) = check([found("sdnq-int8")], GROUP, variant="leaf-stream")
    assert verdict.level is VerdictLevel.UNKNOWN
    assert verdict.remedies
    for way in verdict.remedies:
        carrier, key, mode, variant = way.cell
        assert answer(carrier, key, mode, host=STANDALONE, variant=variant).level is VerdictLevel.OK


@pytest.mark.parametrize(
    ("mode", "variant", "text"),
    [
        (OffloadMode.NONE, "", "without offload"),
        (SEQUENTIAL, None, "with sequential offload"),
        (SEQUENTIAL, "disk", "with sequential offload (disk)"),
        (OffloadMode.NOVRAM, "", "with novram offload"),
    ],
)
def test_described(mode: OffloadMode, variant: str | None, text: str) -> None:
    assert described(mode, variant) == text


# Messages


def test_there_are_conflicts_to_tell_of() -> None:
    assert {r.host for r in BLOCKED} == set(HostName)


@pytest.mark.parametrize("host", list(HostName), ids=lambda h: h.value)
def test_message_first_line_stands_alone_and_ways_out_follow(host: HostName) -> None:
    for row in (r for r in BLOCKED if r.host is host):
        entry = found_for(row)
        first, *lines = message(entry, row.mode, host=host, variant=row.variant).splitlines()
        held = "ComfyUI" if row.carrier is Carrier.HOST else row.carrier.value
        kind = " of ComfyUI-GGUF's GGMLTensor" if entry.kind else ""
        how = f"with {row.mode.value} offload" + (f" ({row.variant})" if row.variant else "")
        frozen = "" if entry.frozen else ", not frozen"
        wanted = f"transformer: {entry.format_id} (20 {held} layers{kind}{frozen}) cannot run {how}: {row.cause}."
        assert first == wanted
        assert len(first) < 280
        # The library's own error is quoted where it was seen; else what a probe saw, in its own words.
        quoted = [f"Without this check the library stops at 'blocks.0.attn.to_q' with `{row.raw_error}`."]
        told = [f"Measured with a small model: {row.observed}."] if row.observed else []
        assert lines[: -1 - len(row.remedies)] == (quoted if row.raw_error else told)
        assert "LeftBehind" not in "".join(lines)
        assert lines[-1 - len(row.remedies) :] == ["Ways out:", *(f"- {way.text}" for way in row.remedies)]
        assert len(row.remedies) >= 2


def test_message_counts_one_layer_and_names_no_layer_for_the_module_itself() -> None:
    text = message(Found("", LIBRARY, "gguf-q8-0", 1, "GGUFParameter"), variant="memory")
    start = "transformer: gguf-q8-0 (1 library layer of GGUFParameter) cannot run with sequential offload (memory): "
    assert text.startswith(start)
    assert "stops at" not in text


def test_what_a_probe_saw_is_not_told_as_an_error_of_the_library() -> None:
    text = message(found("bnb-nf4"), GROUP, variant="leaf")
    assert "Measured with a small model: diffusers moved proj_in.weight (Params4bit), and these stayed: quant" in text
    assert "Without this check" not in text


@pytest.mark.parametrize("host", list(HostName), ids=lambda h: h.value)
def test_verdicts_are_json(host: HostName) -> None:
    for mode in HOST_MODES[host]:
        for verdict in check([found(), found("hqq-int4"), found(carrier=QUANTWIRE)], mode, host=host):
            data = verdict.to_dict()
            assert json.loads(json.dumps(data)) == data
            assert (data["level"], data["mode"], data["host"]) == (verdict.level.value, mode.value, host.value)
            assert [change["text"] for change in data["changes"]] == data["remedies"]
