"""The compatibility table against the real libraries: what `quantwire compat --probe` measured, and that it can fail.

The whole set of probes runs in `make probe`. Here the stored outcomes are held against the table, some cells are probed
anew, and probes, the check and the runner are made to fail.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from quantwire import cli
from quantwire.quantizers.compat import matrix, standalone_rules
from quantwire.quantizers.compat.find import find_carriers
from quantwire.quantizers.compat.matrix import find_row, measured, probe_cells, rows
from quantwire.quantizers.compat.modes import HOST_MODES, VARIANTS, Carrier, HostName, OffloadMode, VerdictLevel
from quantwire.quantizers.compat.probes import cell as cells
from quantwire.quantizers.compat.probes import held, moving, record, runner
from quantwire.quantizers.compat.probes import place as placing
from quantwire.quantizers.compat.probes.build import NARROW, WIDTH, build, quiet
from quantwire.quantizers.compat.probes.cell import Result, control, probe
from quantwire.quantizers.compat.probes.net import compute_device, full_precision, has_streams, inputs, linears
from quantwire.quantizers.compat.probes.optional import Unavailable
from quantwire.quantizers.compat.row import PROBES_OWN, Cell, Row, Rule
from quantwire.quantizers.compat.rules import check

STANDALONE = HostName.STANDALONE
LIBRARY, QUANTWIRE, HOST = Carrier.LIBRARY, Carrier.QUANTWIRE, Carrier.HOST
SEQUENTIAL, BALANCED, GROUP = OffloadMode.SEQUENTIAL, OffloadMode.BALANCED, OffloadMode.GROUP
WAYS = [(mode, variant) for mode in HOST_MODES[STANDALONE] for variant in VARIANTS[mode]]
MODEL = OffloadMode.MODEL
NF4, SDNQ = Cell(LIBRARY, "bnb-nf4", SEQUENTIAL, "memory"), Cell(LIBRARY, "sdnq-int8", SEQUENTIAL, "memory")
STREAM = Cell(LIBRARY, "sdnq-int8", GROUP, "leaf-stream")
# Of a library that loads at once.
OURS = [Cell(QUANTWIRE, "gguf-q8-0", SEQUENTIAL, variant) for variant in VARIANTS[SEQUENTIAL]]
# Imported in a second or two; the others are probed by `make probe`.
FAST = [(LIBRARY, "bnb-nf4"), (LIBRARY, "bnb-int8"), (QUANTWIRE, "bnb-nf4"), (HOST, "comfy-int8")]


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> None:
    quiet()


@pytest.fixture
def fresh() -> Iterator[None]:
    """A table that a test may change."""
    matrix.forget()
    yield
    matrix.forget()


def streamed(variant: str) -> bool:
    return variant.endswith("stream")


def stored() -> dict[Cell, Result]:
    seen = ((cell, measured().get(cell.key)) for cell in probe_cells())
    return {cell: Result(m.outcome, m.error, m.reason) for cell, m in seen if m is not None}


# The table


@pytest.mark.parametrize("carrier", list(Carrier))
def test_every_row_is_complete(carrier: Carrier) -> None:
    for row in (row for row in rows() if row.carrier is carrier):
        assert row.cause, row
        assert not row.cause.endswith("."), row
        if row.evidence == "probed":
            assert row.source, row
            assert row.versions, row
        if row.verdict in (VerdictLevel.BLOCK, VerdictLevel.WARN):
            assert len(row.remedies) >= 2, row
        elif row.verdict is VerdictLevel.OK:
            assert not row.raw_error, row
            assert not row.observed, row


def test_every_blocked_row_that_was_probed_quotes_the_error_or_says_what_was_seen() -> None:
    blocked = [r for r in rows() if r.host is STANDALONE and r.verdict is VerdictLevel.BLOCK and r.evidence == "probed"]
    assert blocked
    assert [r.cell.key for r in blocked if bool(r.observed) is (": " in r.raw_error)] == []


def test_an_exception_of_the_probes_is_no_error_of_a_library() -> None:
    own = {moving.LeftBehind.__name__, held.KeptNear.__name__}
    assert own == set(PROBES_OWN)
    assert {m.error.partition(":")[0] for m in measured().values()} > own
    assert [row.cell.key for row in rows() if row.raw_error.startswith(PROBES_OWN)] == []
    seen = [row for row in rows() if row.observed]
    assert seen
    assert all("stayed" in row.observed or "still holds" in row.observed for row in seen)


def test_only_formats_of_the_table_count_as_probed() -> None:
    """A rule's patterns cover more than a test measured."""
    for host in HostName:
        listed = {(row.carrier, row.format_id) for row in rows() if row.host is host}
        for key in ("quanto-unfrozen", "torchao-affine-int8", "bnb-unknown", "nncf-nf4", "gguf-iq1-s", "gguf-unknown"):
            for mode in HOST_MODES[host]:
                for variant in VARIANTS[mode]:
                    row = find_row(LIBRARY, key, mode, host=host, variant=variant)
                    if row is not None and (LIBRARY, key) not in listed:
                        assert row.evidence != "probed", row
                        if row.evidence == "documented" and not row.needs:
                            assert "which is not this format" in row.source, row


def test_layers_of_packs_that_move_them_themselves_are_not_known() -> None:
    for host in HostName:
        for mode in HOST_MODES[host]:
            assert matrix.answer(LIBRARY, "other-gguf-unknown", mode, host=host).level is VerdictLevel.UNKNOWN


def test_every_cell_that_a_probe_can_run_was_measured() -> None:
    assert [cell.key for cell in probe_cells() if cell.key not in measured()] == []
    skipped = {cell for cell, result in stored().items() if result.outcome == "skipped"}
    assert {cell.key for cell in skipped if not streamed(cell.variant)} == set()
    assert all(measured()[cell.key].reason for cell in skipped)


def test_nothing_that_a_cpu_can_probe_is_unknown() -> None:
    unknown = [
        row.cell.key
        for row in rows()
        if row.host is STANDALONE and row.verdict is VerdictLevel.UNKNOWN and not row.needs
    ]
    assert unknown == []


def test_at_least_120_cells_are_probed() -> None:
    assert len([r for r in stored().values() if r.outcome != "skipped"]) >= 120
    assert sum(row.evidence == "probed" for row in rows()) >= 120


def test_stored_outcomes_and_verdicts_agree() -> None:
    assert [str(d) for d in record.disagreements(stored(), require_all=True)] == []


def test_our_carrier_passes_every_mode() -> None:
    ours = {cell: result for cell, result in stored().items() if cell.carrier is QUANTWIRE}
    assert {c.key for c, r in ours.items() if r.outcome != "equal" and not streamed(c.variant)} == set()
    assert {(c.mode, c.variant) for c in ours} == set(WAYS)


@pytest.mark.parametrize(
    ("key", "begins"),
    [
        ("library/bnb-nf4/sequential/memory", "NotImplementedError: Cannot copy out of meta tensor; no data!"),
        ("library/bnb-fp4/balanced/split-disk", "NotImplementedError: Cannot copy out of meta tensor; no data!"),
        ("library/quanto-qint8/sequential/memory", "TypeError: WeightQBytesTensor.__new__() missing 6 required"),
        ("library/quanto-qint4/balanced/split", "TypeError: WeightQBitsTensor.__new__() missing 7 required"),
        ("library/quanto-qint8/balanced/whole", "TypeError: WeightQBytesTensor.__new__() missing 6 required"),
        (
            "library/bnb-int8/model",
            "LeftBehind: accelerate moved proj_in (Linear8bitLt), and these stayed: weight",
        ),
        (
            "library/bnb-int8/sequential/memory",
            "KeptNear: after its weight was offloaded, proj_in (Linear8bitLt)",
        ),
        (
            "library/bnb-int8/balanced/split-disk",
            "KeptNear: after its weight was offloaded, blocks.1.fc1 ",
        ),
        (
            "library/bnb-int8/group/leaf-disk",
            "LeftBehind: diffusers moved proj_in.weight (Int8Params), and",
        ),
        (
            "library/bnb-nf4/group/block-disk",
            "LeftBehind: diffusers moved proj_in.weight (Params4bit), and",
        ),
        ("library/quanto-qint8/group/block", "LeftBehind: diffusers moved proj_in.weight (WeightQBytesTensor)"),
        ("library/gguf-q8-0/sequential/disk", "KeyError: None"),
        ("library/torchao-int8wo/sequential/disk", "NotImplementedError: Int8Tensor dispatch: attempting to run"),
        ("library/torchao-int4wo/balanced/split-disk", "NotImplementedError: Int4OpaqueTensor dispatch: attempting"),
        ("library/torchao-float8wo/sequential/disk", "NotImplementedError: Float8Tensor dispatch: attempting to run"),
        ("library/torchao-int8wo/group/leaf-disk", "ValueError: Disk offloading is not supported for TorchAO"),
        ("library/nncf-int8-asym/sequential/memory", "NotImplementedError: Cannot copy out of meta tensor; no data!"),
        ("library/nncf-int4-sym/group/leaf-disk", "LeftBehind: diffusers moved these, and they stayed: proj_in.weight"),
        ("host/comfy-int8/sequential/memory", "TypeError: QuantizedTensor.__new__() got an unexpected keyword"),
    ],
)
def test_the_errors_are_those_of_the_libraries(key: str, begins: str) -> None:
    assert measured()[key].outcome == "error"
    assert measured()[key].error.startswith(begins)


def test_both_of_quantos_classes_for_grouped_weights_are_seen() -> None:
    data = json.loads(matrix.MEASURED.read_text(encoding="utf-8"))["cells"]["library/quanto-qint4/sequential/memory"]
    assert data["error"].startswith("TypeError: WeightQBitsTensor.__new__() missing 7")
    (other,) = data["also"]
    assert other.startswith("TypeError: TinyGemmWeightQBitsTensor.__new__() missing 6")


# Probes


@pytest.mark.parametrize(("mode", "variant"), WAYS, ids=[f"{m.value}-{v or 'whole'}" for m, v in WAYS])
@pytest.mark.parametrize("width", [NARROW, WIDTH])
def test_full_precision_runs_under_the_same_calls(mode: OffloadMode, variant: str, width: int) -> None:
    """A failure of quantized layers is then their own, not that of the calls."""
    if streamed(variant) and not has_streams(compute_device()):
        pytest.skip("copying on a stream of its own needs an accelerator")
    assert control(mode, variant, width) == Result("equal")


@pytest.mark.parametrize(("mode", "variant"), WAYS, ids=[f"{m.value}-{v or 'whole'}" for m, v in WAYS])
@pytest.mark.parametrize(("carrier", "format_id"), FAST, ids=[f"{c.value}-{f}" for c, f in FAST])
def test_a_cell_probed_here_is_as_it_is_stored(
    carrier: Carrier, format_id: str, mode: OffloadMode, variant: str
) -> None:
    cell = Cell(carrier, format_id, mode, variant)
    result = probe(cell)
    if result.outcome == "skipped":
        pytest.skip(result.reason)
    assert record.disagreements({cell: result}) == []
    assert result.error.partition(":")[0] == measured()[cell.key].error.partition(":")[0]


@pytest.mark.parametrize("format_id", ["quanto-qint8", "quanto-qint4", "quanto-qfloat8-e4m3fn", "gguf-q8-0"])
def test_balanced_works_where_nothing_moves_although_the_table_blocks_it(format_id: str, tmp_path: Path) -> None:
    """The part of the blocked cells that would have run, as their note says."""
    row = find_row(LIBRARY, format_id, BALANCED, host=STANDALONE, variant="whole")
    assert row is not None
    assert row.verdict is VerdictLevel.BLOCK
    assert "Where it already is on the device, it runs" in row.note
    device = compute_device()
    if device.type != "cpu":
        pytest.skip("layers are made on the CPU, so that dispatching moves them here")
    x = inputs(WIDTH)
    with torch.no_grad():
        expected = build(LIBRARY, format_id, WIDTH)(x)
        placed = placing.place(build(LIBRARY, format_id, WIDTH), BALANCED, "whole", device, tmp_path)
        placed.check()
        assert torch.equal(placed.module(x), expected)


@pytest.mark.parametrize(
    "cell",
    [
        cell
        for cell in probe_cells()
        if cell.mode is SEQUENTIAL and cell.variant == "memory" and not cell.format_id.startswith(runner.SLOW)
    ],
    ids=lambda cell: cell.key,
)
def test_what_a_probe_builds_is_found_and_judged_by_its_own_row(cell: Cell) -> None:
    try:
        net = build(cell.carrier, cell.format_id, WIDTH)
    except Unavailable as err:
        pytest.skip(str(err))
    (found,) = find_carriers(net)
    (verdict,) = check([found], cell.mode, host=STANDALONE, variant=cell.variant)
    row = find_row(cell.carrier, cell.format_id, cell.mode, host=STANDALONE, variant=cell.variant)
    assert row is not None
    assert (found.carrier, verdict.level) == (cell.carrier, row.verdict)
    assert verdict.cause == row.cause


# Probes can fail


@pytest.mark.parametrize(
    ("module", "call", "mode", "variant"),
    [
        ("accelerate", "cpu_offload", SEQUENTIAL, "memory"),
        ("accelerate", "disk_offload", SEQUENTIAL, "disk"),
        ("accelerate", "dispatch_model", BALANCED, "whole"),
        ("accelerate", "dispatch_model", BALANCED, "split"),
        ("diffusers.hooks", "apply_group_offloading", GROUP, "leaf"),
        ("diffusers.hooks", "apply_group_offloading", GROUP, "block-disk"),
    ],
)
def test_a_mode_that_is_not_in_force_is_no_result(
    module: str, call: str, mode: OffloadMode, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{module}.{call}", lambda net, *args, **kwargs: net)
    result = control(mode, variant, WIDTH)
    assert (result.outcome, result.error.partition(":")[0]) == ("error", "ProbeError")
    assert record.disagreements({Cell(LIBRARY, "bnb-nf4", mode, variant): result})


@pytest.mark.skipif(compute_device().type != "cpu", reason="on an accelerator the devices of the weights show it")
@pytest.mark.parametrize(("method", "what"), [("init_hook", "offload"), ("pre_forward", "forward")])
def test_a_hook_that_moves_no_module_is_no_result(method: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(self: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
        return module if method == "init_hook" else (args, kwargs)

    monkeypatch.setattr(f"accelerate.hooks.CpuOffload.{method}", nothing)
    result = control(MODEL, "", WIDTH)
    assert result.error.startswith(f"ProbeError: the hook's {what} did not move proj_in.weight, proj_in.bias")


def test_a_pipeline_that_never_offloads_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., placing.Placed] = placing._model
    monkeypatch.setattr(placing, "_model", lambda *args: placing.Placed(real(*args).module, lambda: None))
    assert control(MODEL, "", WIDTH).error.startswith("ProbeError: the hook's offload did not move")


@pytest.mark.skipif(compute_device().type != "cpu", reason="on an accelerator the product itself fails")
def test_a_state_that_does_not_move_with_its_weight_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell(LIBRARY, "bnb-nf4", MODEL, "")
    assert probe(cell) == Result("equal")
    monkeypatch.setattr("bitsandbytes.functional.QuantState.to", lambda self, device: None)
    result = probe(cell)
    assert result.error.startswith("LeftBehind: accelerate moved proj_in (Linear4bit), and these stayed: weight.quant")
    assert record.disagreements({cell: result})


@pytest.mark.parametrize(
    ("mode", "variant"), [(SEQUENTIAL, "memory"), (SEQUENTIAL, "disk"), (BALANCED, "split"), (GROUP, "leaf-disk")]
)
def test_a_layer_that_keeps_its_weight_near_is_seen(
    mode: OffloadMode, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., Any] = cells.build

    def keeping(*args: Any) -> Any:
        net = real(*args)
        for layer in linears(net).values():
            layer.second = type("State", (), {})()  # type: ignore[assignment]
            layer.second.copy = layer.weight.data.clone()  # type: ignore[union-attr]
        return net

    monkeypatch.setattr(cells, "build", keeping)
    result = control(mode, variant, WIDTH)
    assert result.error.startswith("KeptNear: after its weight was offloaded, ")
    assert result.error.endswith("(Linear) still holds all of it in second.copy")


@pytest.mark.parametrize(
    ("mode", "variant"), [(SEQUENTIAL, "memory"), (SEQUENTIAL, "disk"), (BALANCED, "split-disk"), (GROUP, "block-disk")]
)
def test_what_is_kept_away_is_what_a_pass_uses(
    mode: OffloadMode, variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, x = compute_device(), inputs(WIDTH).to(compute_device())
    with torch.no_grad():
        expected = full_precision(WIDTH).to(device)(x)
        placed = placing.place(full_precision(WIDTH), mode, variant, device, tmp_path)
        assert torch.equal(placed.module(x), expected)
        assert held.spoil(placed.module, variant, tmp_path)
        assert not torch.equal(placed.module(x), expected)
    monkeypatch.setattr(cells, "spoil", lambda *args: True)  # as if a pass did not notice
    assert control(mode, variant, WIDTH) == Result(
        "error", "KeptNear: what was offloaded was set to zeros, and the output stayed the same"
    )


def test_disk_offload_without_files_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    import accelerate

    def from_memory(net: Any, folder: str, execution_device: Any) -> Any:
        return accelerate.cpu_offload(net, execution_device=execution_device)

    monkeypatch.setattr("accelerate.disk_offload", from_memory)
    assert control(SEQUENTIAL, "disk", WIDTH).error.startswith("ProbeError: files on disk: []")


def test_another_output_is_seen_in_the_second_pass_too(monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., placing.Placed] = placing.place

    def spoiled(*args: Any) -> placing.Placed:
        placed = real(*args)
        return placing.Placed(placed.module, placed.check, lambda: placed.module.proj_in.bias.add_(1))  # type: ignore[union-attr, operator]

    monkeypatch.setattr(cells, "place", spoiled)
    assert control(OffloadMode.NONE, "", WIDTH) == Result("differs")


def test_cells_are_probed_only_where_full_precision_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.cpu_offload", lambda net, *args, **kwargs: net)
    cells._control.cache_clear()
    try:
        result = probe(Cell(LIBRARY, "bnb-nf4", SEQUENTIAL, "memory"))
    finally:
        cells._control.cache_clear()
    assert result.error.startswith("ProbeError: layers in full precision do not pass either: ProbeError: ")


@pytest.mark.parametrize(
    ("module", "cell", "reason"),
    [
        ("bitsandbytes", NF4, "bitsandbytes is not installed"),
        ("accelerate", OURS[0], "accelerate is not installed"),
        ("diffusers.hooks", Cell(QUANTWIRE, "gguf-q8-0", GROUP, "leaf"), "diffusers is not installed"),
    ],
)
def test_a_missing_library_is_a_reason_to_skip(
    module: str, cell: Cell, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cached in (cells._control, cells._expected):
        cached.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    try:
        assert probe(cell) == Result("skipped", reason=reason)
    finally:
        cells._control.cache_clear()


def test_full_precision_is_the_same_at_every_call() -> None:
    first, second = full_precision(WIDTH), full_precision(WIDTH)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


# The check


def row_of(cell: Cell) -> Row:
    row = find_row(cell.carrier, cell.format_id, cell.mode, host=STANDALONE, variant=cell.variant)
    assert row is not None
    return row


@pytest.mark.parametrize(
    ("cell", "result", "reason"),
    [
        (NF4, Result("error", "NotImplementedError: another wording"), ""),
        (NF4, Result("error", "ZeroDivisionError: division by zero"), "measured before as NotImplementedError"),
        (NF4, Result("error", "Crash: the process was ended by SIGSEGV"), "measured before as NotImplementedError"),
        (NF4, Result("equal"), "blocked, although it runs"),
        (NF4, Result("differs"), "blocked, although it runs"),
        (NF4, Result("error", "ProbeError: no"), "the probe itself failed"),
        (
            NF4,
            Result("skipped", reason="bitsandbytes is not installed"),
            "measured before as error, and not probed here",
        ),
        (SDNQ, Result("equal"), ""),
        (SDNQ, Result("differs"), "ok is twice the output"),
        (SDNQ, Result("error", "Crash: the process was ended by SIGSEGV"), "ok is twice the output"),
        (STREAM, Result("skipped", reason="no accelerator"), ""),
        (STREAM, Result("error", "RuntimeError: on a GPU"), ""),
    ],
)
def test_the_check_compares_outcome_verdict_and_what_was_measured_before(
    cell: Cell, result: Result, reason: str
) -> None:
    found = record.disagreements({cell: result}, require_all=True)
    assert bool(found) == bool(reason)
    if found:
        assert found[0].reason.startswith(reason)
        for part in (cell.key, row_of(cell).verdict.value, result.outcome, result.error or result.reason):
            assert part in str(found[0])


def test_another_text_of_the_same_error_is_told_and_no_more() -> None:
    same = {NF4: Result("error", measured()[NF4.key].error)}
    assert record.reworded(same) == []
    (line,) = record.reworded({NF4: Result("error", "NotImplementedError: another wording")})
    assert line.startswith(f"{NF4.key}: another text than before: NotImplementedError: another wording; before: Not")


def test_a_probe_that_breaks_for_blocked_layers_only_fails_the_check(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real: Callable[..., placing.Placed] = placing.place

    def broken(net: Any, *args: Any) -> placing.Placed:
        if any(type(m).__name__ == "Linear4bit" for m in net.modules()):
            raise ZeroDivisionError("planted")
        return real(net, *args)

    monkeypatch.setattr(cells, "place", broken)
    blocked = [NF4, NF4._replace(variant="disk")]
    assert len(record.disagreements({cell: probe(cell) for cell in blocked})) == 2


def test_a_missing_library_fails_only_where_all_is_required() -> None:
    skipped = {NF4: Result("skipped", reason="bitsandbytes is not installed")}
    assert record.disagreements(skipped) == []
    assert len(record.disagreements(skipped, require_all=True)) == 1


# The two of `OURS`, in a process of their own.
PROBE = ["compat", "--probe", "--carrier", "quantwire", "--format", "gguf-q8-0", "--mode", "sequential"]


@pytest.mark.slow
@pytest.mark.usefixtures("fresh")
def test_a_planted_wrong_verdict_fails_the_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planted = Rule(QUANTWIRE, ("gguf-q8-0",), SEQUENTIAL, VerdictLevel.BLOCK, "planted", variants=("disk",))
    monkeypatch.setattr(standalone_rules, "RULES", (planted, *standalone_rules.RULES))
    matrix.forget()
    assert cli.main([*PROBE, "--check", "--require-all"]) == 2
    err = capsys.readouterr().err
    wrong = f"{OURS[1].key}: the table says block, measured equal: blocked, although it runs"
    assert [line for line in err.splitlines() if "the table says" in line] == [wrong]
    assert "1 of 2 cells agree with the table." in err


@pytest.mark.usefixtures("fresh")
def test_write_puts_in_what_ran_and_keeps_the_rest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "measured.json"
    before = json.loads(matrix.MEASURED.read_text(encoding="utf-8"))
    before["cells"][OURS[0].key] = {"outcome": "error", "error": "E: x", "libraries": ["torch"], "device": "cpu"}
    before["cells"]["library/gone-1/none"] = {"outcome": "equal", "libraries": ["gone"], "device": "cpu"}
    before["versions"]["accelerate"] = "0.0.1"
    path.write_text(json.dumps(before), encoding="utf-8")
    for module in (matrix, record):
        monkeypatch.setattr(module, "MEASURED", path)
    matrix.forget()
    assert cli.main([*PROBE, "--write", "--check"]) == 2  # it was measured otherwise before
    assert f"{OURS[0].key}: the table says ok, measured equal: measured before as error" in capsys.readouterr().err
    after = json.loads(path.read_text(encoding="utf-8"))
    assert after["cells"][OURS[0].key]["outcome"] == "equal"
    assert "error" not in after["cells"][OURS[0].key]
    assert after["versions"]["accelerate"] != "0.0.1"
    assert "library/gone-1/none" not in after["cells"]
    ran = {cell.key for cell in OURS} | {"library/gone-1/none"}
    kept = {key: entry for key, entry in before["cells"].items() if key not in ran}
    assert {key: entry for key, entry in after["cells"].items() if key not in ran} == kept
    assert list(tmp_path.iterdir()) == [path]
    assert measured()[OURS[0].key].outcome == "equal"


def test_a_skipped_cell_keeps_what_was_measured_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    path.write_bytes(matrix.MEASURED.read_bytes())
    monkeypatch.setattr(record, "MEASURED", path)
    record.write({NF4: Result("skipped", reason="bitsandbytes is not installed")}, "cpu", probe_cells())
    assert path.read_bytes() == matrix.MEASURED.read_bytes()


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--check"], "--check needs --probe"),
        (["--write"], "--write needs --probe"),
        (["--probe", "--require-all"], "--require-all needs --check"),
        (["--format", "bnb-nf5"], "no format of the table fits 'bnb-nf5'. Did you mean bnb-nf4"),
        (["--mode", "partial", "--host", "standalone"], "No cell of the table fits all of these filters together"),
        (["--probe", "--host", "comfyui"], "No probe covers these rows"),
        (["--probe", "--host", "standalone", "--format", "comfyui-gguf*"], "other packs' tensors (comfyui-gguf-*)"),
    ],
)
def test_options_that_make_no_sense_are_refused(argv: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compat", *argv]) == 2
    assert text in capsys.readouterr().err


def test_json_prints_every_row_with_its_columns(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["compat", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert len(printed) == len(rows())
    columns = {"carrier", "format", "mode", "variant", "host", "verdict", "evidence", "cause", "remedy", "versions"}
    assert all(columns | {"raw_error", "source", "needs", "note"} <= set(row) for row in printed)
    assert cli.main(["compat", "--format", "bnb-*", "--mode", "group", "--json", str(tmp_path / "rows.json")]) == 0
    some = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert {row["mode"] for row in some} == {"group"}
    assert {row["format"] for row in some} == {"bnb-int8", "bnb-nf4", "bnb-fp4"}


# The runner

WORKER = "from quantwire.quantizers.compat.probes.worker import main"
FOUR = [Cell(QUANTWIRE, f"gguf-{kind}", OffloadMode.NONE, "") for kind in ("q8-0", "q4-0", "q5-0", "q4-1")]


def planted(monkeypatch: pytest.MonkeyPatch, code: dict[Cell, str]) -> None:
    """Let worker processes run some code in the place of a cell's probe."""
    plant = f"""
from quantwire.quantizers.compat.probes import cell
real, planted = cell.probe, {{{", ".join(f"{c.key!r}: {text!r}" for c, text in code.items())}}}
def probe(c):
    exec(planted.get(c.key, ""))
    return real(c)
cell.probe = probe
{WORKER}"""
    assert WORKER in runner.START
    monkeypatch.setattr(runner, "START", runner.START.replace(WORKER, plant))


@pytest.mark.slow
def test_a_process_that_dies_is_charged_to_its_cell_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, {FOUR[1]: "import os; os.abort()", FOUR[2]: "print('last words'); raise SystemExit(3)"})
    told: list[Cell] = []
    results = runner.run(FOUR, lambda cell, result, seconds: told.append(cell))
    assert results[FOUR[1]].outcome == "error"
    assert results[FOUR[1]].error.startswith("Crash: the process was ended by SIGABRT")
    assert results[FOUR[2]] == Result("error", "Crash: the process ended with code 3: last words")
    assert [results[cell].outcome for cell in (FOUR[0], FOUR[3])] == ["equal", "equal"]
    assert told == FOUR


@pytest.mark.slow
def test_a_cell_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, {FOUR[0]: "import time; time.sleep(600)"})
    results = runner.run(FOUR[:1], cell_s=5.0)
    assert results[FOUR[0]].outcome == "error"
    assert "Timeout: no result after 5 s" in results[FOUR[0]].error


@pytest.mark.slow
def test_the_processes_that_a_cell_started_end_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """quanto's first pass starts a compiler."""
    started = tmp_path / "pid"
    code = f"""
import subprocess, time, pathlib
child = subprocess.Popen(["sleep", "600"])
pathlib.Path({str(started)!r}).write_text(str(child.pid))
time.sleep(600)"""
    planted(monkeypatch, {FOUR[0]: code})
    results = runner.run(FOUR[:1], cell_s=8.0)
    assert "Timeout" in results[FOUR[0]].error
    status = Path(f"/proc/{started.read_text()}/stat")
    for _ in range(50):
        if not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the child goes on")


@pytest.mark.slow
def test_on_an_accelerator_a_process_ends_with_an_error_and_the_next_cells_get_a_new_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code = """
import torch
from quantwire.quantizers.compat.probes import cell, net
net.compute_device = lambda: torch.device("cuda", 0)  # as the worker sees it; `cell` has the real one
poisoned = False
def probe(c):
    global poisoned
    if poisoned: return cell.Result("error", "RuntimeError: an illegal memory access was encountered")
    poisoned = c.format_id == "gguf-q4-0"
    return cell.Result("error", "RuntimeError: first") if poisoned else real(c)
real, cell.probe = cell.probe, probe
"""
    monkeypatch.setattr(runner, "START", runner.START.replace(WORKER, code + WORKER))
    results = runner.run(FOUR)
    assert [results[cell].error for cell in FOUR if results[cell].outcome == "error"] == ["RuntimeError: first"]


def test_a_process_that_cannot_start_says_nothing_of_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "START", "raise SystemExit('no such thing')")
    results = runner.run(FOUR[:2])
    assert [r.error for r in results.values()] == [
        "ProbeError: before any cell began, Crash: the process ended with code 1: no such thing"
    ] * 2
    assert len(record.disagreements(results)) == 2


def test_a_pack_in_a_folder_of_any_name_can_probe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As a custom node the pack is a folder whose name need not be an identifier."""
    (tmp_path / "quantwire-main 2").symlink_to(runner.ROOT, target_is_directory=True)
    monkeypatch.setattr(runner, "ROOT", tmp_path / "quantwire-main 2")
    monkeypatch.chdir(tmp_path)
    assert [r.outcome for r in runner.run(FOUR[:1]).values()] == ["equal"]


def test_cells_that_share_a_library_share_a_process() -> None:
    by_group: dict[str, set[str]] = {}
    for cell in probe_cells():
        by_group.setdefault(runner.group_of(cell), set()).add(cell.format_id.partition("-")[0])
    assert all(len(backends) == 1 for backends in by_group.values())
    assert len(by_group) == 9
