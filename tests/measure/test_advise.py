"""Advice on a model of FLUX.1's size, from its names and shapes: what fits where, and the order of the formats."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from quantwire.quantizers.base import Availability
from quantwire.quantizers.compat.modes import HostName
from quantwire.quantizers.errors import SpecError
from quantwire.quantizers.measure.advise import FULL, Advice, Place, advise, ranked
from quantwire.quantizers.measure.native import parse_device
from quantwire.quantizers.measure.parts import ModelPart, Role
from quantwire.quantizers.measure.plots import to_image
from quantwire.quantizers.measure.ranking import ONE_BIT_DB, bands, best_first
from quantwire.quantizers.measure.tiers import TIERS, TIERS_GB, with_memory
from quantwire.quantizers.plan import Slot
from quantwire.quantizers.spec import QuantSpec
from quantwire.quantizers.weight import TensorMeta

GIB = 1 << 30
FORMATS = ("gguf-q8-0", "gguf-q4-k", "gguf-q2-k", "comfy-int8", "comfy-fp8-e4m3fn", "comfy-w4a8", "layerwise-fp8-e5m2")


def flux(formats: dict[str, int] | None = None) -> ModelPart:
    """As many bytes in as many kinds of layers, in a quarter of the blocks, since every layer takes time to plan."""
    w = 6144
    shapes = {"img_in.weight": (w, 64), "txt_in.weight": (w, 4096), "final_layer.linear.weight": (64, w)}
    for i in range(5):
        for side in ("img", "txt"):
            b = f"double_blocks.{i}.{side}"
            shapes |= {f"{b}_attn.qkv.weight": (3 * w, w), f"{b}_attn.proj.weight": (w, w)}
            shapes |= {
                f"{b}_mlp.0.weight": (4 * w, w),
                f"{b}_mlp.2.weight": (w, 4 * w),
                f"{b}_mod.lin.weight": (6 * w, w),
            }
    for i in range(10):
        b = f"single_blocks.{i}"
        shapes |= {f"{b}.linear1.weight": (7 * w, w), f"{b}.linear2.weight": (w, 5 * w)}
        shapes |= {f"{b}.modulation.lin.weight": (3 * w, w)}
    slots = tuple(Slot(TensorMeta(n, s, torch.bfloat16), True) for n, s in shapes.items())
    held = sum(s.meta.nbytes for s in slots)
    return ModelPart("transformer", Role.DIFFUSION, "flux", slots, held, "a test", formats or {})


@pytest.fixture(scope="module")
def part() -> ModelPart:
    return flux()


def on(part: ModelPart, device: str, gigabytes: float, host: HostName = HostName.COMFYUI, **more: object) -> Advice:
    formats = more.pop("formats", FORMATS)
    return advise([part], parse_device(device, round(gigabytes * GIB)), host, formats=formats, **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def twelve(part: ModelPart) -> Advice:
    return on(part, "cuda:8.9", 12, tiers=True)


def test_the_best_fits_and_nothing_better_does(twelve: Advice) -> None:
    best = twelve.best
    assert best is not None
    assert best.place is Place.FITS
    assert best.forecast.fits
    assert best.nbytes < 12 * GIB
    for row in twelve.rows[: twelve.rows.index(best)]:
        assert not row.usable
    assert [row.place for row in twelve.rows] == sorted(row.place for row in twelve.rows)
    assert {row.format_id for row in twelve.rows} == {FULL, *FORMATS}
    assert twelve.spec() == QuantSpec(best.format_id)


def test_sizes_are_those_of_the_plan(twelve: Advice, part: ModelPart) -> None:
    for row in twelve.rows:
        assert row.nbytes == (part.full_nbytes if row.format_id == FULL else part.nbytes(QuantSpec(row.format_id)))


def test_of_equals_the_native_one_is_first(part: ModelPart) -> None:
    rows = on(part, "cuda:8.9", 48).rows
    names = [row.format_id for row in rows if row.place is Place.FITS]
    assert names[0] == FULL  # nothing is as good as what loses nothing
    assert names.index("comfy-int8") < names.index("gguf-q8-0")  # native, and less than one bit apart
    assert names.index("gguf-q8-0") < names.index("comfy-fp8-e4m3fn")  # native, and more than one bit worse
    by_name = {row.format_id: row for row in rows}
    better, native = by_name["gguf-q8-0"].score_db, by_name["comfy-int8"].score_db
    assert better is not None
    assert native is not None
    assert 0 < better - native < ONE_BIT_DB
    # Outside ComfyUI it is not native, so quality alone decides.
    names = [row.format_id for row in on(part, "cuda:8.9", 48, HostName.STANDALONE).rows]
    assert names.index("gguf-q8-0") < names.index("comfy-int8")


def test_formats_below_4_bits_come_after_copying_weights(part: ModelPart) -> None:
    rows = on(part, "cuda:8.6", 6).rows
    places = {row.format_id: row.place for row in rows}
    assert places["gguf-q4-k"] is Place.STREAMS
    assert places["gguf-q2-k"] is Place.FEW_BITS
    streaming = [row for row in rows if row.place is Place.STREAMS]
    band = bands(row.mode.streamed for row in streaming)
    copied = [band[row.mode.streamed] for row in streaming]
    assert copied == sorted(copied)
    assert len(set(copied)) > 1
    assert streaming[-1].format_id == FULL


def test_a_byte_more_that_is_copied_costs_no_quality() -> None:
    """Bands begin at the least, so that no edge lies between two that copy nearly the same."""
    step = 1 << 28
    assert bands([8 * step - 1, 8 * step, 8 * step + 1]) == {8 * step - 1: 0, 8 * step: 0, 8 * step + 1: 0}
    assert bands([8 * step, 10 * step, 10 * step + 1]) == {8 * step: 0, 10 * step: 0, 10 * step + 1: 1}
    assert bands([100 * step, 110 * step, 111 * step]) == {100 * step: 0, 110 * step: 0, 111 * step: 1}  # a tenth
    assert bands([0, 1]) == {0: 0, 1: 1}, "nothing is as good as copying nothing"


def test_the_key_is_quality_in_bands_of_a_bit_then_native() -> None:
    items = {"exact": (math.inf, True, 9), "a": (50.0, False, 5), "b": (45.0, True, 5), "c": (43.5, True, 1)}
    items |= {"unknown": (-math.inf, True, 1)}
    assert best_first(items, items.__getitem__) == ["exact", "b", "a", "c", "unknown"]


def test_encoders_that_keep_a_better_format_from_fitting_are_named(part: ModelPart) -> None:
    """T5 in 16 bits takes 9 GiB of a CPU's memory, where everything is held at once."""
    found = on(part, "cpu", 16)
    assert "t5xxl" in found.hint
    assert "--text-format" in found.hint
    assert found.hint.partition(" (")[0] in str(found)
    assert on(part, "cpu", 96).hint == ""


def test_what_fits_only_within_the_error_is_the_last_resort(part: ModelPart) -> None:
    """The mode must fit with the error of the activations on top, as in `fit`."""
    row = next(r for r in on(part, "cuda:8.6", 48, HostName.STANDALONE).rows if r.format_id == "gguf-q8-0")
    mode = row.forecast.modes[0]
    assert mode.error_nbytes > 0
    tight = replace(row, forecast=replace(row.forecast, modes=(mode,), room=mode.peak))
    assert tight.place is Place.TIGHT
    assert replace(tight, forecast=replace(tight.forecast, room=2 * mode.peak)).place is Place.FITS


def test_tiers_are_what_each_memory_alone_would_give(twelve: Advice, part: ModelPart) -> None:
    assert [tier.gigabytes for tier, _ in twelve.tiers] == list(TIERS_GB) == [6, 8, 12, 16, 24]
    for tier, row in twelve.tiers:
        alone = on(part, "cuda:8.9", tier.gigabytes).best
        assert alone is not None
        assert row is not None
        assert (row.format_id, row.verdict, row.forecast.room) == (alone.format_id, alone.verdict, alone.forecast.room)


def test_budget(part: ModelPart) -> None:
    found = on(part, "cuda:8.9", 48, budget=7 * GIB)
    assert found.best is not None
    assert found.best.nbytes <= 7 * GIB
    over = next(row for row in found.rows if row.format_id == "gguf-q8-0")
    assert over.place is Place.TOO_LARGE
    assert over.verdict.endswith("over the budget")


def test_what_a_device_cannot_run_is_told_with_its_source(part: ModelPart) -> None:
    found = on(part, "mps", 24)
    rows = {row.format_id: row for row in found.rows}
    assert rows["comfy-fp8-e4m3fn"].place is rows["comfy-int8"].place is Place.NOT_RUNNABLE
    assert rows["gguf-q8-0"].usable
    assert "Not runnable on Apple GPU:" in str(found)
    assert "pytorch/issues/148420" in str(found)


def test_a_missing_library_is_told_with_its_remedy(twelve: Advice) -> None:
    gone = Availability(False, "x is not installed.", "Run `pip install x`.")
    best = twelve.best_format
    assert best is not None
    rows = ranked([replace(row, state=gone) if row is best else row for row in twelve.rows])
    found = replace(twelve, rows=tuple(rows))
    assert rows[-1].place is Place.MISSING
    assert found.best is not None
    assert found.best.format_id != best.format_id
    assert f"  {best.format_id}: x is not installed. Run `pip install x`." in str(found).splitlines()


@pytest.mark.slow  # imports sdnq, 8 s
def test_formats_that_were_never_measured_are_the_last_of_their_place(part: ModelPart) -> None:
    found = on(part, "cuda:8.9", 48, formats=["gguf-q2-k", "sdnq-uint7", "gguf-q4-0"])
    usual = [row for row in found.rows if row.format_id in ("sdnq-uint7", "gguf-q4-0")]
    assert usual[-1].format_id == "sdnq-uint7"
    assert usual[-1].score_db is None
    if usual[-1].usable:
        assert "never measured" in str(found)


def test_text_encoders_are_ranked_by_their_own_error() -> None:
    shapes = {f"encoder.block.{i}.layer.0.SelfAttention.{x}.weight": (4096, 4096) for i in range(24) for x in "qkvo"}
    slots = tuple(Slot(TensorMeta(n, s, torch.bfloat16), True) for n, s in shapes.items())
    nbytes = sum(s.meta.nbytes for s in slots)
    encoder = ModelPart("t5", Role.TEXT, "t5", slots, nbytes, "a test")
    found = on(encoder, "cuda:8.6", 24, formats=["gguf-q8-0", "gguf-q4-0"])
    assert found.role is Role.TEXT
    row = next(row for row in found.rows if row.format_id == "gguf-q4-0")
    assert row.score_db == row.quality.score_db(Role.TEXT) != row.quality.score_db()
    assert "cos. error" in str(found)


def test_a_quantized_model_counts_as_it_was_before(part: ModelPart) -> None:
    found = on(replace(part, held_nbytes=part.held_nbytes // 2, formats={"bnb-int8": 300}), "cuda:8.9", 48)
    full = next(row for row in found.rows if row.format_id == FULL)
    assert full.nbytes == part.full_nbytes
    assert full.forecast.nbytes > part.full_nbytes
    assert any("quantized already (bnb-int8)" in note for note in found.notes)


def test_nothing_fits(part: ModelPart) -> None:
    found = on(part, "cuda:8.6", 0.5, HostName.STANDALONE)
    assert found.best is None
    assert str(found).startswith("Nothing fits for transformer")
    with pytest.raises(SpecError, match="No format of this model fits"):
        found.spec()


def test_results_are_data_text_and_picture(twelve: Advice) -> None:
    from quantwire.quantizers.measure.advise_plot import scatter

    data = json.loads(
        json.dumps(twelve.to_dict(), allow_nan=False, default=lambda x: pytest.fail(f"{x!r} is no JSON value"))
    )
    assert data["best"] == (twelve.best.format_id if twelve.best else None)
    assert len(data["rows"]) == len(FORMATS) + 1
    assert [row["format"] for row in data["rows"] if row["exact"]] == [FULL]
    assert next(row for row in data["rows"] if row["exact"])["score_db"] is None
    assert max(map(len, twelve.text().splitlines())) <= 120
    assert sum(f in twelve.text() for f in FORMATS) == len(FORMATS)
    image = to_image(scatter(twelve))
    assert image.shape[0] == 1
    assert image.dtype is torch.float32
    assert 0 <= float(image.min()) < float(image.max()) <= 1


def test_wrong_input(part: ModelPart) -> None:
    with pytest.raises(SpecError, match="There is no text encoder to choose a format for"):
        on(part, "cuda:8.6", 8, role=Role.TEXT)
    with pytest.raises(SpecError, match="Unknown format"):
        on(part, "cuda:8.6", 8, formats=["gguf-q9"])
    with pytest.raises(SpecError, match="There is no part 'x'"):
        on(part, "cuda:8.6", 8, beside={"x": QuantSpec("gguf-q8-0")}, formats=["gguf-q8-0"])


def test_memory_of_a_tier() -> None:
    device = parse_device("cuda:8.6", GIB)
    assert with_memory(device, "this device") is device
    assert with_memory(device, "10").total_nbytes == 10 * GIB
    for tier in TIERS:
        found = with_memory(device, str(tier))
        assert found.free_nbytes == found.total_nbytes == tier.nbytes
        assert found.capability == (8, 6)
        assert math.isclose(found.usable_nbytes, tier.nbytes * 0.95, rel_tol=1e-6)
    with pytest.raises(SpecError, match="Presets: 6 GB"):
        with_memory(device, "much")
