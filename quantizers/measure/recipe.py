"""A mixed recipe: the format of each layer with which a model's output changes least, under a budget of bytes.

The squared errors of units add up (`sensitivity`), so the best recipe is the cheapest choice of one format a unit
under the budget, which `knapsack` finds. Layers that the rules of a family keep at full precision may be quantized
where their effect was measured: in small models they are a third of the bytes, and at 8 bits hardly any of the error.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..errors import SpecError
from ..plan import Slot
from ..rules import KEEP, Rule, RuleSet, parse_rules
from ..spec import QuantSpec
from .knapsack import knapsack
from .rule_text import rules_text
from .sensitivity import Sensitivities, Unit
from .units import show_size


@dataclass(frozen=True)
class Single:
    """One format for all layers, by the default rules, beside a recipe.

    Attributes:
        predicted_error, measured_error: as the recipe's.
    """

    format: str
    nbytes: int
    predicted_error: float
    measured_error: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Recipe:
    """A format for every layer of one component; where no mixture measured better, the same for all of them.

    Attributes:
        part: its name.
        targets: unit (a weight of the model's file) -> `keep`, format id or URI.
        rules: the same as text for QuantRules and `--rules`; it names every layer, so it goes with any format.
        budget: bytes that were allowed.
        nbytes: of the whole component, exact.
        full_nbytes: at full precision.
        predicted_error: relative error of the model's output, its rounding included, or of its weights where no run was
            measured.
        measured_error: the same, measured with the whole recipe; None where it was not.
        floor: relative error by rounding alone, below which errors cannot be told apart.
        singles: the single formats among the candidates that hold every layer.
        exact: whether no other choice can have a smaller predicted error; else it is at most `gap` of it away.
        how: what it rests on.
        single: the format that measured better than the mixture, and took its place; empty for a mixture.
    """

    part: str
    targets: Mapping[str, str]
    rules: str
    budget: int
    nbytes: int
    full_nbytes: int
    predicted_error: float
    how: str
    exact: bool = True
    gap: float = 0.0
    floor: float = 0.0
    measured: bool = True
    measured_error: float | None = None
    singles: tuple[Single, ...] = ()
    notes: tuple[str, ...] = field(default=())
    single: str = ""

    @property
    def parsed(self) -> tuple[Rule, ...]:
        return parse_rules(self.rules)

    @property
    def rule_set(self) -> RuleSet:
        """For the input `config` of the Quantize nodes."""
        return RuleSet(self.parsed)

    @property
    def quantizes(self) -> bool:
        """False where the budget holds the whole part at full precision."""
        return any(target != KEEP for target in self.targets.values())

    @property
    def formats(self) -> Counter[str]:
        """Format or `keep` -> units, most first."""
        return Counter(self.targets.values())

    def spec(self) -> QuantSpec:
        """For `quantize_linears` and QUANT_CONFIG: the most frequent format, and the rules.

        Raises:
            SpecError: nothing is quantized.
        """
        found = [target for target, _ in self.formats.most_common() if target != KEEP]
        if not found:
            raise _needless(self.part, self.full_nbytes, self.budget)
        return replace(QuantSpec.from_uri(found[0]), rules=self.parsed)

    def to_dict(self) -> dict[str, Any]:
        return {
            "part": self.part,
            "budget": self.budget,
            "nbytes": self.nbytes,
            "full_nbytes": self.full_nbytes,
            "predicted_error": self.predicted_error,
            "measured_error": self.measured_error,
            "floor": self.floor,
            "measured": self.measured,
            "how": self.how,
            "exact": self.exact,
            "gap": self.gap,
            "single": self.single,
            "targets": dict(self.targets),
            "rules": self.rules.splitlines(),
            "singles": [single.to_dict() for single in self.singles],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        what = "output error" if self.measured else "weight error"
        share = 100 * self.nbytes / self.full_nbytes if self.full_nbytes else 0.0
        lines = [
            f"{self.part}: {show_size(self.nbytes)} of {show_size(self.budget)} ({share:.1f} % of full precision), "
            f"{what} {100 * self.predicted_error:.2f} % predicted{_got(self.measured_error)}",
            ", ".join(
                f"{n} in {target}" if target != KEEP else f"{n} kept" for target, n in self.formats.most_common()
            ),
        ]
        for s in sorted(self.singles, key=lambda s: s.nbytes):
            errors = f"{100 * s.predicted_error:.2f} % predicted{_got(s.measured_error)}"
            lines.append(f"  {s.format} alone: {show_size(s.nbytes)}, {errors}")
        lines.append(f"from {self.how}")
        if self.floor:
            lines.append(f"errors below {100 * self.floor:.2f} % are rounding of the model's own dtype")
        if not self.exact:
            lines.append(f"no choice can be better by more than {100 * self.gap:.1f} % of the predicted error")
        return "\n".join([*lines, *self.notes])


def _got(error: float | None) -> str:
    return "" if error is None else f", {100 * error:.2f} % measured"


def check_possible(
    part: str, slots: Sequence[Slot], units: Iterable[Unit], formats: Sequence[str], budget: int, measured: bool
) -> None:
    """See before anything is measured that a budget needs a recipe, and that a mixture keeps to it.

    Args:
        measured: whether effects on the output will be; else units that stay by default take what they have.
    Raises:
        SpecError: the model fits as it is, or no mixture of the formats is so small.
    """
    units = tuple(units)
    within = {meta.name for unit in units for meta in unit.metas}
    full = sum(slot.meta.nbytes for slot in slots)
    if budget >= full:
        raise _needless(part, full, budget)
    least = sum(slot.meta.nbytes for slot in slots if slot.meta.name not in within)
    for unit in units:
        targets = formats if measured or not unit.kept else ()
        least += min(n for t in (KEEP, *targets) if (n := unit.nbytes(t)) is not None)
    check_budget(part, least, budget, formats)


def _needless(part: str, full_nbytes: int, budget: int) -> SpecError:
    return SpecError(
        f"{part}: takes {show_size(full_nbytes)} at full precision, which fits into the budget of {show_size(budget)}, "
        "so no layer would be quantized.\nUse the model as it is, or give a smaller budget."
    )


def check_budget(part: str, least: int, budget: int, formats: Iterable[str]) -> None:
    """Raises: SpecError: no mixture of the formats is so small."""
    if least > budget:
        raise SpecError(
            f"{part}: the smallest mixture of {', '.join(formats)} takes {show_size(least)} ({least} bytes), and the "
            f"budget is {show_size(budget)}.\nAllow smaller formats, or a larger budget."
        )


def checked(recipe: Recipe, found: Sensitivities, errors: Mapping[str, float], on: str) -> Recipe:
    """The recipe with measured errors; where a single format that fits measured better, that format in its place.

    Args:
        found: what the recipe was made of.
        errors: relative errors of the whole model: of `recipe`, and by format.
        on: what they were measured on, for people.
    """
    mine = errors["recipe"]
    singles = tuple(replace(s, measured_error=errors.get(s.format)) for s in recipe.singles)
    recipe = replace(recipe, measured_error=mine, singles=singles, notes=(*recipe.notes, f"measured on {on}"))
    rivals = [(s.measured_error, s) for s in singles if s.measured_error is not None and s.nbytes <= recipe.budget]
    error, best = min(rivals, key=lambda pair: pair[0], default=(mine, None))
    if best is None or error >= mine:
        return recipe
    targets = found.mixture(best.format)
    least = recipe.predicted_error * (1 - recipe.gap)
    gap = max(0.0, 1 - least / best.predicted_error) if best.predicted_error else 0.0
    said = (
        f"NOTE: {best.format} alone measured {100 * error:.2f} %, less than the mixture's {100 * mine:.2f} %: "
        "the recipe is that format"
    )
    return replace(
        recipe,
        single=best.format,
        targets=targets,
        rules=rules_text(targets, {unit.name: unit.layers for unit in found.units}),
        nbytes=best.nbytes,
        predicted_error=best.predicted_error,
        measured_error=error,
        exact=gap == 0.0,
        gap=gap,
        notes=(*recipe.notes, said),
    )


def find_recipe(found: Sensitivities, budget: int, formats: Iterable[str] | None = None) -> Recipe:
    """The recipe with the least predicted error.

    Args:
        found: of `sensitivity.by_weights`, or of a run.
        budget: bytes of the whole component, biases and norms among them.
        formats: to choose from; default: all that were measured.
    Raises:
        SpecError: the budget is below the smallest choice, or a format was not measured.
    """
    allowed = found.formats if formats is None else tuple(formats)
    for target in allowed:
        if target not in found.formats:
            raise SpecError(f"'{target}' was not measured, only {', '.join(found.formats)}.\nMeasure it too.")
    names = [unit.name for unit in found.units]
    options = [[t for t in (KEEP, *allowed) if t in found.effects[name]] for name in names]
    sizes = [[found.effects[n][t].nbytes for t in row] for n, row in zip(names, options, strict=True)]
    costs = [[found.effects[n][t].error2 for t in row] for n, row in zip(names, options, strict=True)]
    check_budget(found.part, found.fixed_nbytes + sum(map(min, sizes)), budget, allowed)
    picks = knapsack(sizes, costs, budget - found.fixed_nbytes)
    targets = {name: row[o] for name, row, o in zip(names, options, picks.options, strict=True)}
    quantized = any(target != KEEP for target in targets.values())
    error = math.sqrt(picks.cost + found.floor**2) if quantized else 0.0
    singles = [(target, found.single(target)) for target in allowed]
    return Recipe(
        found.part,
        targets,
        rules_text(targets, {unit.name: unit.layers for unit in found.units}),
        budget,
        found.fixed_nbytes + picks.nbytes,
        found.full_nbytes,
        error,
        found.how,
        picks.exact,
        1 - math.sqrt(picks.bound + found.floor**2) / error if error else 0.0,
        found.floor,
        found.measured,
        singles=tuple(Single(t, e.nbytes, math.sqrt(e.error2 + found.floor**2)) for t, e in singles if e is not None),
    )
