"""Benchmark results: data there and back, the schemas, the page, and what audio files and meters tell."""

from __future__ import annotations

import dataclasses
import json
import struct
import wave
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from quantwire.hosts import bench
from quantwire.nodes.bench_run import save_sample
from quantwire.quantizers.errors import FileError
from quantwire.quantizers.measure import bench_plots, html
from quantwire.quantizers.measure.html import page
from quantwire.quantizers.measure.meter import PeakMeter
from quantwire.quantizers.measure.results import (
    CONFIG,
    RESULTS,
    BenchmarkResults,
    Difference,
    LayerError,
    Memory,
    Seconds,
    Variant,
    write,
)

SCHEMAS = Path(__file__).resolve().parents[2] / "docs" / "schemas"


def schema(name: str) -> dict[str, Any]:
    return json.loads((SCHEMAS / f"{name}.schema.json").read_text(encoding="utf-8"))


def results() -> BenchmarkResults:
    tensors = {"a.weight": {"action": "quantize", "format": "bnb-nf4", "reason": "linear"}}
    config = {"format": "bnb-nf4", "carrier": "quantwire", "family": "flux", "tensors": tensors}
    full = Variant("full precision", "", Seconds((2.0, 1.0, 9.0)), Seconds((0.5,)), memory=Memory({"transformer": 100}))
    small = Variant(
        "bnb-nf4 <b>", "bnb;bits=4", Seconds((4.0,)), Seconds((0.25, 0.75)), 1.0, 0.5,
        Memory({"transformer": 30}, 500, 600, 10, "CPU: high-water mark"),
        (LayerError("a.weight", "bnb-nf4", 20.5, 0.1, 30),),
        Difference(0.01, 38.0, "image"), 8.0, "", config,
    )  # fmt: skip
    failed = Variant("gguf-q4-0", error="SpecError: K")
    device = {"kind": "cpu", "name": "CPU", "total_nbytes": 2**30}
    settings = {"repeats": 3, "warmup": 1, "order": "interleaved"}
    return BenchmarkResults(
        "t", "standalone", device, settings, {"torch": "2"}, "2026-01-01T00:00:00+00:00", (full, small, failed)
    )


def test_there_and_back() -> None:
    made = results()
    again = BenchmarkResults.from_dict(json.loads(json.dumps(made.to_dict())))
    assert again.to_dict() == made.to_dict()
    with pytest.raises(FileError, match="version"):
        BenchmarkResults.from_dict({"version": 99})


def test_text() -> None:
    text = str(results())
    assert text.startswith("Fastest: full precision. Against full precision: bnb-nf4 <b> takes 2.00 x the time, 30 %")
    assert "FAILED: gguf-q4-0: SpecError: K" in text
    assert max(map(len, text.splitlines())) <= 120
    assert results().variants[1].real_time_factor == 0.5


def test_files_fit_their_schemas(tmp_path: Path) -> None:
    write(tmp_path, results(), "page")
    for file, name in ((RESULTS, "benchmark_results"), (CONFIG, "quantization_config")):
        jsonschema.Draft202012Validator.check_schema(schema(name))
        jsonschema.validate(json.loads((tmp_path / file).read_text(encoding="utf-8")), schema(name))
    bad = results().to_dict()
    bad["variants"][0]["generation_s"]["median"] = "fast"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(bad, schema("benchmark_results"))


def test_the_page_asks_nothing_of_the_network() -> None:
    made = page(results())
    assert "bnb-nf4 &lt;b&gt;" in made
    assert "bnb-nf4 <b>" not in made
    assert "<script" not in made
    assert made.count("prefers-color-scheme: dark") == 1 + 4  # the style, and each plot
    for attribute in ("src='http", "href=", "url(", "@import", "srcset='http"):
        assert attribute not in made


def compared(names: tuple[str, ...], reference: str, of: str = "image") -> BenchmarkResults:
    """Results of these variants, where all but the reference have a difference."""
    layers = (LayerError("a.weight", "bnb-nf4", 20.5, 0.1, 30),)
    made = results()
    variants = tuple(
        Variant(
            name, generation=Seconds((1.0 + i,)), step=Seconds((0.0449,)),
            memory=Memory({"transformer": (i + 1) * 10 * 2**20}, 543 * 2**20, None, 486 * 2**20, "CPU"),
            layers=layers, difference=None if name == reference else Difference(0.01, 30.0 + i, of),
        )
        for i, name in enumerate(names)
    )  # fmt: skip
    return dataclasses.replace(made, variants=variants, reference=reference)


def test_the_reference_is_a_line_and_no_point() -> None:
    made = compared(("bnb-nf4 (workflow)", "full precision", "gguf-q4-0"), "full precision")
    axes = bench_plots.size_plot(made, bench_plots.LIGHT).axes[0]
    dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
    points = [line.get_ydata()[0] for line in axes.lines if line.get_marker() == "o"]
    assert [line.get_xdata()[0] for line in dashed] == [20.0]
    assert points == [30.0, 32.0]  # PSNR alone; the layers have an SQNR of 20.5
    assert axes.get_ylabel() == "PSNR of the image (dB)"
    assert str(made).startswith("Fastest: bnb-nf4 (workflow). Against full precision: bnb-nf4 (workflow) takes 0.50 x")
    assert "quantized itself" not in str(made) + html._table(made)


def test_an_output_that_cannot_be_compared_is_no_line() -> None:
    made = compared(("full precision", "bnb-nf4", "gguf-q4-0"), "full precision")
    lost = dataclasses.replace(made.variants[2], difference=None)
    made = dataclasses.replace(made, variants=(*made.variants[:2], lost))
    axes = bench_plots.size_plot(made, bench_plots.LIGHT).axes[0]
    assert [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "--"] == [10.0]
    assert [line.get_ydata()[0] for line in axes.lines if line.get_marker() == "o"] == [31.0]


def test_a_reference_that_is_quantized_is_said_to_be() -> None:
    made = compared(("bnb-nf4", "gguf-q4-0"), "bnb-nf4")
    assert "PSNR dB*" in str(made)
    assert "* Against bnb-nf4, which is quantized itself" in str(made)
    assert "<th>PSNR to bnb-nf4 (dB)</th>" in html._table(made)
    assert bench_plots.quality_name(made).endswith("against bnb-nf4, quantized itself")
    assert max(map(len, str(made).splitlines())) <= 120


def test_peaks_are_over_what_the_libraries_took() -> None:
    made = compared(("full precision", "bnb-nf4"), "full precision")
    assert "+57.0 MiB" in str(made)
    assert "Peaks with a + are over the 486.0 MiB" in str(made)
    assert "Peaks with a + are over the 486.0 MiB" in html._table(made)
    axes = bench_plots.memory_plot(made, bench_plots.LIGHT).axes[0]
    assert max(bar.get_width() for bar in axes.patches) == 57.0
    assert Memory({"a": 1}, 5, None, 9).own_peak == 0


@pytest.mark.parametrize("draw", [bench_plots.time_plot, bench_plots.memory_plot])
def test_labels_are_not_cut_off(draw: Any) -> None:
    made = compared(("full precision (workflow)", "a;b=4;quant-type=nf4;double-quant=true", "bnb-nf4"), "bnb-nf4")
    figure = draw(made, bench_plots.LIGHT)
    figure.draw_without_rendering()
    axes, right = figure.axes[0], figure.bbox.x1
    assert len(axes.texts) == 3
    for text in axes.texts:
        assert text.get_window_extent().x1 <= right
    for text in axes.get_yticklabels():
        assert text.get_window_extent().x0 >= 0


def test_every_variant_has_its_turns() -> None:
    taken = bench.turns(2, 1, 2, bench.Order.INTERLEAVED)
    assert [t.variant for t in taken] == [0, 1, 0, 1, 0, 1]
    assert [t.measured for t in taken] == [False, False, True, True, True, True]
    alone = bench.turns(2, 1, 2, bench.Order.ONE_BY_ONE)
    assert [t.variant for t in alone] == [0, 0, 0, 1, 1, 1]
    assert [t.last for t in alone] == [False, False, True, False, False, True]


def test_difference() -> None:
    image = torch.full((1, 4, 4, 3), 0.5)
    assert bench.difference(image, image) == Difference(0.0, None, "image")
    found = bench.difference(image + 0.1, image)
    assert found is not None
    assert found.psnr_db == pytest.approx(20.0, abs=1e-4)
    assert found.relative_error == pytest.approx(0.2, abs=1e-6)
    assert bench.difference(image, image[:, :2]) is None
    for broken in (float("nan"), float("inf")):
        bad = {"samples": torch.full((1, 4, 2, 2), broken)}
        good = {"samples": torch.ones(1, 4, 2, 2)}
        assert bench.difference(bad, good) is None
        assert bench.difference(good, bad) is None
    sound = {"waveform": torch.ones(1, 2, 8), "sample_rate": 4}
    assert dataclasses.astuple(bench.difference(sound, sound)) == (0.0, None, "audio")  # type: ignore[arg-type]


def test_the_peak_holds_what_was_allocated() -> None:
    meter = PeakMeter(torch.device("cpu"))
    meter.start()
    before = meter.read().allocated
    torch.ones(2**24)  # 64 MiB, freed at once
    after = meter.read()
    assert before is not None
    assert after.allocated is not None
    assert "CPU: high-water mark of the whole process" in after.method
    if "of the run" in after.method:
        assert after.allocated - before > 32 * 2**20


def test_a_sound_is_kept_as_it_plays(tmp_path: Path) -> None:
    sound = {"waveform": torch.linspace(-1, 1, 24000).reshape(1, 2, 12000), "sample_rate": 8000}
    with wave.open(str(tmp_path / save_sample(sound, tmp_path, "a b"))) as file:
        assert (file.getnchannels(), file.getframerate(), file.getnframes()) == (2, 8000, 12000)
        left, right = struct.unpack("<2h", file.readframes(1))
    assert left == -32767
    assert right == pytest.approx(0, abs=2)
