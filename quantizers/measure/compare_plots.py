"""The pictures of a comparison: layers by SQNR, numbers of images, and images beside one another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .compare import Comparison
from .images import ImagesCompared, side_by_side
from .layers import LayersCompared
from .plots import BAD, COLOURS, GOOD, new_figure

NAMED = 14  # layers with a name
SHOWN = 4  # rows of images, from the first pair to the last
ROW_INCHES = 2.2


def plot(found: Comparison, images: Tensor | None = None) -> Any:
    """Everything that was compared, in one figure.

    Args:
        images: of `side_by_side`, for the same pairs; None shows their numbers only.
    Raises:
        BackendUnavailable: matplotlib is not installed.
    """
    rows = ("layers",) if found.layers is not None else ()
    rows += ("images",) if found.images is not None else ()
    shown = 0 if images is None else min(SHOWN, len(images))
    heights = [4.6 if row == "layers" else 3.2 for row in rows]
    if shown and images is not None:
        heights.append(shown * min(9.0 * images.shape[1] / images.shape[2], ROW_INCHES) + 0.4)
    figure = new_figure(10.0, sum(heights) + 0.6)
    figure.suptitle(_title(found), fontsize=10, color=BAD if found.broken else "black")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, row in zip(parts, rows, strict=False):
        if row == "layers" and found.layers is not None:
            draw_layers(part, found.layers)
        elif found.images is not None:
            draw_images(part, found.images)
    if shown and images is not None:
        _draw_pictures(parts[-1], [images[i * len(images) // shown] for i in range(shown)], (found.a, found.b))
    return figure


def draw_layers(figure: Any, layers: LayersCompared) -> None:
    """Left: all tensors that differ, sorted by SQNR. Right: the worst by name."""
    changed = layers.changed
    all_, worst = figure.subplots(1, 2, width_ratios=(1, 1.1))
    kinds = list(dict.fromkeys(layer.now for layer in changed))
    for number, kind in enumerate(kinds):
        points = [(i, x.sqnr_db) for i, x in enumerate(changed) if x.now == kind and x.sqnr_db is not None]
        if points:
            colour = COLOURS[number % len(COLOURS)]
            all_.plot(*zip(*points, strict=True), "o", markersize=4, color=colour, label=kind[:28])
    all_.set_xlabel("tensors that differ, worst first")
    all_.set_ylabel("SQNR (dB)")
    all_.xaxis.get_major_locator().set_params(integer=True)
    all_.axhline(0, color=BAD, linewidth=0.8, linestyle="--")
    all_.grid(alpha=0.3)
    if any(x.sqnr_db is not None for x in changed):
        all_.legend(fontsize=7, loc="lower right")
    named = changed[:NAMED]
    values = [0.0 if layer.sqnr_db is None else layer.sqnr_db for layer in named]
    worst.barh(range(len(named)), values, color=[BAD if layer.broken else COLOURS[0] for layer in named])
    worst.set_yticks(range(len(named)), [_end(layer.name) for layer in named], fontsize=7)
    worst.invert_yaxis()
    worst.set_xlabel("SQNR (dB)")
    for row, layer in enumerate(named):
        text = "nan or inf" if layer.max_error is None else f"max error {layer.max_error:.3g}"
        worst.text(max(values[row], 0), row, f" {text}", va="center", fontsize=6)
    worst.margins(x=0.25)
    if not changed:
        worst.text(0.5, 0.5, "no tensor differs", ha="center", va="center", transform=worst.transAxes)


def draw_images(figure: Any, images: ImagesCompared) -> None:
    """PSNR, SSIM, FLIP and luminosity, a bar for each pair."""
    axes = figure.subplots(1, 4)
    numbers = range(len(images.pairs))
    for axis, name, title in zip(
        axes, ("psnr_db", "ssim", "flip"), ("PSNR (dB), higher is nearer", "SSIM, 1 is equal", "FLIP, 0 is equal"),
        strict=False,
    ):  # fmt: skip
        values = [getattr(pair, name) for pair in images.pairs]
        axis.bar(numbers, [0.0 if v is None else v for v in values], color=COLOURS[0])
        axis.set_title(title, fontsize=8)
        if all(v is None for v in values):
            axis.text(0.5, 0.5, "none", ha="center", va="center", transform=axis.transAxes)
    for values, colour, label in (
        ([pair.luminosity_a for pair in images.pairs], "#666666", "reference"),
        ([pair.luminosity_b for pair in images.pairs], GOOD, "other"),
    ):
        axes[3].plot(numbers, [float("nan") if v is None else v for v in values], "o-", color=colour, label=label)
    axes[3].set_title("mean luminosity", fontsize=8)
    axes[3].set_ylim(0, 1)
    axes[3].legend(fontsize=7)
    for axis in axes:
        axis.set_xlabel("pair", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.set_xticks([*numbers] if len(numbers) <= 12 else [])


def _draw_pictures(figure: Any, images: Sequence[Tensor], labels: tuple[str, str]) -> None:
    axes = figure.subplots(len(images), 1, squeeze=False)[:, 0]
    for axis, image in zip(axes, images, strict=True):
        axis.imshow(image.numpy(), interpolation="nearest")
        axis.set_axis_off()
    axes[0].set_title(f"{labels[0]}   |   {labels[1]}   |   difference", fontsize=8)


def pictures(a: Tensor, b: Tensor, gain: float) -> Tensor:
    """`side_by_side`, so that callers need this module only."""
    return side_by_side(a, b, gain)


def _title(found: Comparison) -> str:
    text = f"{found.b} against {found.a}: {found.verdict}"
    return text if len(text) <= 140 else f"{text[:137]}..."


def _end(name: str, most: int = 44) -> str:
    name = name.removesuffix(".weight")
    return name if len(name) <= most else f"...{name[3 - most :]}"
