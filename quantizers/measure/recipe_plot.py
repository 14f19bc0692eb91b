"""The picture of a recipe: error against size for mixtures and single formats, and which layers matter."""

from __future__ import annotations

import math
from typing import Any

from ..rules import KEEP
from .plots import BAD, COLOURS, GOOD, new_figure
from .recipe import Recipe, find_recipe
from .sensitivity import Sensitivities

MOST_LAYERS = 24
POINTS = 24


def plot_recipe(recipe: Recipe, found: Sensitivities) -> Any:
    """A matplotlib Figure.

    Raises:
        BackendUnavailable: matplotlib is not installed.
    """
    figure = new_figure(12.0, 5.5)
    sizes, layers = figure.subplots(1, 2, width_ratios=(3, 2))
    _sizes(sizes, recipe, found)
    _layers(layers, recipe, found)
    return figure


def _sizes(axes: Any, recipe: Recipe, found: Sensitivities) -> None:
    least = found.fixed_nbytes + sum(min(e.nbytes for e in found.effects[u.name].values()) for u in found.units)
    budgets = [least + (found.full_nbytes - least) * i // POINTS for i in range(POINTS)]
    curve = [find_recipe(found, budget) for budget in budgets]
    axes.plot(
        [_mib(r.nbytes) for r in curve], [100 * r.predicted_error for r in curve], color=COLOURS[0], label="mixtures"
    )
    for index, single in enumerate(sorted(recipe.singles, key=lambda s: s.nbytes)):
        axes.plot(_mib(single.nbytes), 100 * single.predicted_error, "o", color=COLOURS[3])
        place = (4, 4 if index % 2 else -12)  # formats of one size would print their names over each other
        axes.annotate(
            single.format,
            (_mib(single.nbytes), 100 * single.predicted_error),
            place,
            textcoords="offset points",
            size=8,
        )
    axes.plot(_mib(recipe.nbytes), 100 * recipe.predicted_error, "*", markersize=16, color=GOOD, label="this recipe")
    axes.axvline(_mib(recipe.budget), color=BAD, linestyle=":", label="budget")
    if found.floor:
        axes.axhline(100 * found.floor, color=COLOURS[7], linestyle="--", label="rounding of the model's dtype")
    axes.set_yscale("log")
    axes.set_xlabel("weights, MiB")
    axes.set_ylabel(f"predicted error of the {'output' if found.measured else 'weights'}, %")
    axes.legend(fontsize=8)


def _layers(axes: Any, recipe: Recipe, found: Sensitivities) -> None:
    """The effect of each unit in the coarsest candidate, by the format that it gets."""
    coarse = {u.name: max((e.error2 for e in found.effects[u.name].values()), default=0.0) for u in found.units}
    ranked = sorted(coarse, key=lambda name: -coarse[name])[:MOST_LAYERS][::-1]
    colours = {t: COLOURS[i % len(COLOURS)] for i, t in enumerate(sorted(recipe.formats, key=lambda t: (t != KEEP, t)))}
    values = [100 * math.sqrt(coarse[name]) for name in ranked]
    axes.barh(range(len(ranked)), values, color=[colours[recipe.targets[name]] for name in ranked])
    axes.set_yticks(range(len(ranked)), ranked, fontsize=7)
    axes.set_xlabel("error in the coarsest candidate, %")
    for target, colour in colours.items():
        axes.barh(0, 0, color=colour, label=target)
    axes.legend(fontsize=8, loc="lower right")


def _mib(nbytes: int) -> float:
    return nbytes / 2**20
