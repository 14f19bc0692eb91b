"""Plots of a benchmark: size against quality, time, memory and layer errors; in colours for light and dark pages.

Figures are small with large letters, so that they stay readable at the width of a phone.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .plots import COLOURS, new_figure, to_image
from .results import BenchmarkResults, Variant, show_number, show_peak
from .units import show_size

if TYPE_CHECKING:
    from torch import Tensor

WIDTH, HEIGHT = 4.5, 3.5  # inches: letters of 10 points are as large on a phone
DPI = 200  # of images of a graph
MIB = 2**20
_NAME, _GAP = 18, 7  # letters of a name in a line, points between a bar and its label
_MOST_LINES = 12  # of layer errors in one plot


@dataclass(frozen=True)
class Theme:
    """Colours of a plot; `back` is empty for a page's own background."""

    text: str
    grid: str
    back: str


LIGHT = Theme("#1c1e21", "#d5d9df", "")
DARK = Theme("#e6e8eb", "#444a53", "")
PICTURE = Theme("#1c1e21", "#d5d9df", "#ffffff")  # images of a graph have no background of their own


def plots(results: BenchmarkResults, theme: Theme) -> dict[str, Any]:
    """Name -> figure, of the plots that there is data for."""
    if not results.done:
        return {}
    found: dict[str, Callable[[BenchmarkResults, Theme], Any]] = {"Time": time_plot}
    if any(_quality(results, v) is not None for v in results.done) and all(
        v.memory.weights_total for v in results.done
    ):
        found = {"Size against quality": size_plot, **found}
    if any(v.memory.weights_total for v in results.done):
        found["Memory"] = memory_plot
    if any(layer.sqnr_db is not None for v in results.done for layer in v.layers):
        found["Layer errors"] = layer_plot
    return {name: draw(results, theme) for name, draw in found.items()}


def images(results: BenchmarkResults) -> Tensor:
    """All plots as a batch of images (B, H, W, 3) float32 in [0, 1]."""
    import torch

    drawn = plots(results, PICTURE).values()
    for figure in drawn:
        figure.set_dpi(DPI)
    return torch.cat([to_image(figure) for figure in drawn])


def to_svg(figure: Any) -> str:
    """The figure as SVG whose letters are paths, so that it looks alike wherever it is opened."""
    out = io.BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue().decode()


def quality_name(results: BenchmarkResults) -> str:
    """What the vertical axis of size against quality is."""
    compared = [v.difference for v in results.done if v.difference]
    if not compared:
        return "SQNR of the weights (dB)"
    of, base = compared[0].of, results.quantized_base
    against = f"\nagainst {base}, quantized itself" if base else ""
    return ("PSNR of the image (dB)" if of == "image" else f"SNR of the {of} (dB)") + against


def _quality(results: BenchmarkResults, v: Variant) -> float | None:
    """Height of a point, the same quantity for all: of the outputs, or of the weights where no output was compared."""
    if any(other.difference for other in results.done):
        if v.difference is None:
            return None
        return v.difference.psnr_db if v.difference.of == "image" else v.difference.snr_db
    rated = [layer.sqnr_db for layer in v.layers if layer.sqnr_db is not None]
    return sum(rated) / len(rated) if rated else None


def _axes(theme: Theme, xlabel: str, ylabel: str) -> tuple[Any, Any]:
    figure = new_figure(WIDTH, HEIGHT)
    figure.patch.set_facecolor(theme.back or "none")
    axes = figure.add_subplot()
    axes.set_facecolor("none")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(theme.grid)
    axes.tick_params(colors=theme.text, labelsize=10)
    axes.grid(color=theme.grid, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(xlabel, color=theme.text, fontsize=11)
    axes.set_ylabel(ylabel, color=theme.text, fontsize=11)
    return figure, axes


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def size_plot(results: BenchmarkResults, theme: Theme) -> Any:
    """Weights against quality; the reference, and what equals it, has no finite ratio and is a dashed line."""
    figure, axes = _axes(theme, "weights (MiB)", quality_name(results))
    points: list[tuple[str, float, float]] = []
    compared = any(v.difference for v in results.done)
    for i, v in enumerate(results.done):
        size, quality = (v.memory.weights_total or 0) / MIB, _quality(results, v)
        if quality is None and compared and v.difference is None and v is not results.base:
            continue  # it has an output of another size, or nan: neither good nor equal
        if quality is None:
            axes.axvline(size, color=_colour(i), linestyle="--", linewidth=1.5)
            axes.annotate(
                v.name, (size, 0.02), xycoords=("data", "axes fraction"), xytext=(-5, 0), textcoords="offset points",
                rotation=90, fontsize=10, color=theme.text, ha="right", va="bottom",
            )  # fmt: skip
            continue
        axes.plot(size, quality, "o", color=_colour(i), markersize=9)
        points.append((v.name, size, quality))
    axes.margins(0.25, 0.25)
    _label(figure, axes, points, theme)
    return figure


_PLACES = ((0, 9, "center", "bottom"), (0, -9, "center", "top"), (9, 0, "left", "center"), (-9, 0, "right", "center"))


def _label(figure: Any, axes: Any, points: list[tuple[str, float, float]], theme: Theme) -> None:
    """Names at points, each at the first side where it covers neither another name nor a point."""
    figure.draw_without_rendering()  # positions in dots are known after the layout only
    dots: Any = axes.transData.transform([(x, y) for _, x, y in points]) if points else ()
    taken: list[Any] = []
    for i, (name, x, y) in enumerate(points):
        for dx, dy, ha, va in _PLACES:
            text = axes.annotate(
                name, (x, y), xytext=(dx, dy), textcoords="offset points", fontsize=10, color=theme.text, ha=ha, va=va
            )
            box = text.get_window_extent()
            free = not any(box.overlaps(other) for other in taken)
            if free and not any(box.contains(*dot) for j, dot in enumerate(dots) if j != i):
                break
            if (dx, dy, ha, va) != _PLACES[-1]:
                text.remove()
        taken.append(box)  # pyright: ignore[reportPossiblyUnboundVariable]


def _bars(results: BenchmarkResults, theme: Theme, xlabel: str) -> tuple[Any, Any]:
    figure, axes = _axes(theme, xlabel, "")
    names = [textwrap.fill(v.name, _NAME) for v in results.done]
    lines = sum(max(2, name.count("\n") + 1) for name in names)
    figure.set_size_inches(WIDTH, max(HEIGHT, 1 + 0.21 * lines))
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure, axes


def time_plot(results: BenchmarkResults, theme: Theme) -> Any:
    """Median of each, with a line from the fastest to the slowest run."""
    figure, axes = _bars(results, theme, "seconds (median, fastest, slowest)")
    labels: list[tuple[float, Any]] = []
    for i, v in enumerate(results.done):
        assert v.generation is not None
        low, high = min(v.generation.samples), max(v.generation.samples)
        axes.barh(i, v.generation.median, height=0.6, color=_colour(i))
        axes.plot([low, high], [i, i], color=theme.text, linewidth=1.5, marker="|", markersize=8)
        step = f"\n{show_number(v.step.median)} a step" if v.step else ""
        labels.append((high, _at_end(axes, f"{show_number(v.generation.median)} s{step}", high, i, theme)))
    _make_room(figure, axes, labels)
    return figure


def _at_end(axes: Any, text: str, x: float, y: float, theme: Theme) -> Any:
    return axes.annotate(
        text, (x, y), xytext=(_GAP, 0), textcoords="offset points", va="center", fontsize=10, color=theme.text
    )


def _make_room(figure: Any, axes: Any, labels: list[tuple[float, Any]]) -> None:
    """Set the end of the horizontal axis so that no label behind a bar is cut off at the edge."""
    axes.set_xlim(0, max(x for x, _ in labels) or 1)
    for _ in range(2):  # letters on the axis change with its end, and its width with them
        figure.draw_without_rendering()  # widths are known after the layout only
        width = axes.bbox.width
        points = figure.dpi / 72
        ends = [
            x * width / max(width - text.get_window_extent().width - 2 * _GAP * points, 0.15 * width)
            for x, text in labels
        ]
        axes.set_xlim(0, max(ends) or 1)


def memory_plot(results: BenchmarkResults, theme: Theme) -> Any:
    """Weights, and the peak behind them where it was measured, without what the process held before the model."""
    peaks = any(v.memory.own_peak for v in results.done)
    figure, axes = _bars(results, theme, "MiB: weights" + (" (full), peak (light)" if peaks else ""))
    labels: list[tuple[float, Any]] = []
    for i, v in enumerate(results.done):
        weights, peak = (v.memory.weights_total or 0) / MIB, (v.memory.own_peak or 0) / MIB
        axes.barh(i, peak, height=0.6, color=_colour(i), alpha=0.35)
        axes.barh(i, weights, height=0.6, color=_colour(i))
        said = [show_size(v.memory.weights_total)] if v.memory.weights_total else []
        said += [f"peak {show_peak(v.memory)}"] if v.memory.own_peak is not None else []
        end = max(weights, peak)
        labels.append((end, _at_end(axes, "\n".join(said), end, i, theme)))
    _make_room(figure, axes, labels)
    return figure


def layer_plot(results: BenchmarkResults, theme: Theme) -> Any:
    """SQNR of every layer, worst first, a line for each variant."""
    figure, axes = _axes(theme, "layers, worst first", "SQNR of the weight (dB)")
    shown = 0
    for i, v in enumerate(results.done):
        rated = sorted(layer.sqnr_db for layer in v.layers if layer.sqnr_db is not None)
        if rated and shown < _MOST_LINES:
            axes.plot(range(1, len(rated) + 1), rated, color=_colour(i), linewidth=2, label=v.name, marker=".")
            shown += 1
    legend = axes.legend(fontsize=10, frameon=False)
    for text in legend.get_texts():
        text.set_color(theme.text)
    return figure
