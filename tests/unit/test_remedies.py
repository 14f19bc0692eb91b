"""Ways out of a conflict: every blocked and warned cell of the table has some, and each is ok in the table itself."""

from __future__ import annotations

import pytest
from quantwire.quantizers.compat.comfyui_rules import LAUNCH_FLAGS
from quantwire.quantizers.compat.find import Found
from quantwire.quantizers.compat.matrix import answer, rows
from quantwire.quantizers.compat.modes import HOST_MODES, VARIANTS, Carrier, HostName, OffloadMode, VerdictLevel
from quantwire.quantizers.compat.remedies import LIMIT, RemedyKind, Space, offered, remedies_for, settings_of
from quantwire.quantizers.registry import format_ids, get_entry

BAD = [r for r in rows() if r.verdict in (VerdictLevel.BLOCK, VerdictLevel.WARN)]
FLAGS = {f.flag: f for f in LAUNCH_FLAGS}
STANDALONE, COMFYUI = HostName.STANDALONE, HostName.COMFYUI


def test_the_table_has_such_cells_on_both_hosts() -> None:
    assert {r.host for r in BAD} == set(HostName)
    assert len(BAD) > 100


@pytest.mark.parametrize("host", list(HostName), ids=lambda h: h.value)
@pytest.mark.parametrize("known", [True, False], ids=["variant", "any-variant"])
def test_every_conflict_has_two_ways_out_that_are_ok(host: HostName, known: bool) -> None:
    for row in (r for r in BAD if r.host is host):
        variant = row.variant if known else None
        ways = offered(row.carrier, row.format_id, row.mode, host=host, variant=variant)
        assert 2 <= len(ways) <= LIMIT, row.cell.key
        assert len({(w.kind, w.value, w.cell) for w in ways}) == len(ways), row.cell.key
        for way in ways:
            carrier, key, mode, leads_to = way.cell
            assert way.host is host
            assert mode in HOST_MODES[host]
            assert leads_to in VARIANTS[mode]
            level = answer(carrier, key, mode, host=host, variant=leads_to).level
            assert level is VerdictLevel.OK, (row.cell.key, way)
            # What it leads to is not what it leads away from.
            assert way.cell != row.cell
            assert way.text.endswith(".")
            assert "\n" not in way.text


@pytest.mark.parametrize("row", BAD[:: max(1, len(BAD) // 60)], ids=lambda r: f"{r.host.value}-{r.cell.key}")
def test_what_a_remedy_names_is_what_it_leads_to(row: object) -> None:
    r = next(b for b in BAD if b is row)
    for way in r.remedies:
        assert way.value in way.text or way.kind in (RemedyKind.SETTING, RemedyKind.FIT)
        if way.kind is RemedyKind.MODE:
            assert way.cell.mode is OffloadMode(way.value)
            assert (way.cell.carrier, way.cell.format_id) == (r.carrier, r.format_id)
        elif way.kind is RemedyKind.FORMAT:
            assert way.value in format_ids()
            assert (way.cell.format_id, way.cell.mode) == (way.value, r.mode)
            own_file = r.host is COMFYUI and way.cell.carrier is Carrier.HOST and "UNETLoader" in way.text
            assert own_file or way.cell.carrier is r.carrier
        elif way.kind is RemedyKind.CARRIER:
            assert way.cell.carrier is Carrier.QUANTWIRE is Carrier(way.value)
            assert way.cell.mode is r.mode
        elif way.kind is RemedyKind.SETTING:
            wanted = settings_of(way.cell.mode, way.cell.variant)
            changes = dict(item.split("=") for item in way.value.split(";"))
            assert changes
            assert changes.items() <= wanted.items()
            assert all(f"`{name}` to {value}" in way.text for name, value in changes.items())
        elif way.kind is RemedyKind.FLAG:
            assert r.host is COMFYUI
            assert way.cell.mode is FLAGS[way.value].mode
            # On other GPUs the option leads elsewhere, and the layers run there too.
            elsewhere = FLAGS[way.value].elsewhere
            level = answer(r.carrier, r.format_id, elsewhere, host=COMFYUI, variant=VARIANTS[elsewhere][0]).level
            assert level is VerdictLevel.OK
        else:
            assert way.cell.variant == "whole"


def test_our_carrier_comes_first() -> None:
    for row in BAD:
        if row.carrier is Carrier.LIBRARY:
            assert row.remedies[0].kind is RemedyKind.CARRIER, row.cell.key


def test_a_cell_that_is_ok_has_none_to_offer_of_itself() -> None:
    ok = next(r for r in rows() if r.verdict is VerdictLevel.OK)
    assert ok.remedies == ()


def test_gguf_tensors_of_another_pack_are_loaded_by_ours() -> None:
    found = Found("blocks.0", Carrier.LIBRARY, "gguf-q4-k", 3, kind="GGMLTensor")
    first, *_ = remedies_for(found, OffloadMode.SEQUENTIAL, host=STANDALONE, variant="memory")
    assert first.kind is RemedyKind.CARRIER
    assert "LoadGGUF" in first.text
    assert first.cell.format_id == "gguf-q4-k"


def test_a_format_that_is_not_known_here_is_replaced_by_one_of_as_many_bits() -> None:
    first, *_ = offered(Carrier.LIBRARY, "bnb-nf3", OffloadMode.SEQUENTIAL, host=STANDALONE, variant="memory")
    assert first.kind is RemedyKind.CARRIER
    assert first.cell.format_id in first.text
    assert first.cell.format_id in format_ids()


def test_disk_is_given_up_before_the_mode_is() -> None:
    ways = offered(Carrier.LIBRARY, "torchao-int8wo", OffloadMode.SEQUENTIAL, host=STANDALONE, variant="disk")
    assert [w.kind for w in ways[:2]] == [RemedyKind.CARRIER, RemedyKind.SETTING]
    assert ways[1].value == "keep_on=memory"


def test_what_would_have_to_fit_is_told_in_bytes() -> None:
    space = Space(12 << 30, 9 << 30)
    ways = offered(Carrier.LIBRARY, "bnb-nf4", OffloadMode.PARTIAL, host=COMFYUI, variant="split", space=space)
    (fit,) = (w for w in ways if w.kind is RemedyKind.FIT)
    assert "takes 12.0 GiB and 9.0 GiB are free" in fit.text


def test_a_mode_is_offered_only_where_the_layers_run_in_it() -> None:
    """Of formats that sequential stops, those that can be grouped get group offered, and no others."""
    seen: set[bool] = set()
    for format_id in (f for f in format_ids() if not f.startswith("comfy-")):
        known = {
            mode: answer(Carrier.LIBRARY, format_id, mode, host=STANDALONE, variant=variant).level
            for mode, variant in ((OffloadMode.SEQUENTIAL, "memory"), (OffloadMode.GROUP, "leaf"))
        }
        if known[OffloadMode.SEQUENTIAL] is not VerdictLevel.BLOCK:
            continue
        ways = offered(Carrier.LIBRARY, format_id, OffloadMode.SEQUENTIAL, host=STANDALONE, variant="memory")
        grouped = any(w.cell.mode is OffloadMode.GROUP and w.cell.variant == "leaf" for w in ways)
        assert grouped is (known[OffloadMode.GROUP] is VerdictLevel.OK)
        seen.add(grouped)
    assert seen == {True, False}


def test_a_format_of_twice_the_bits_is_not_offered() -> None:
    for row in BAD:
        if row.format_id in format_ids():
            for way in row.remedies:
                if way.kind is RemedyKind.FORMAT:
                    assert get_entry(way.value).bits <= 1.5 * get_entry(row.format_id).bits, (row.cell.key, way)


def test_what_streaming_costs_these_layers_is_said() -> None:
    ways = offered(Carrier.LIBRARY, "nncf-int8-sym", OffloadMode.PARTIAL, host=COMFYUI, variant="split")
    (novram,) = (w for w in ways if w.value == "--novram")
    assert "in host memory, where NNCF decompresses them" in novram.text
    ways = offered(Carrier.LIBRARY, "bnb-nf4", OffloadMode.GROUP, host=STANDALONE, variant="leaf")
    assert not [w for w in ways if "disk" in w.value], "from disk they run only if they were on the device before"
