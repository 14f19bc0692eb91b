"""QuantPlan: which tensor becomes what, and why. Made from names, shapes and dtypes alone, before any work."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch

from .base import Quantizer
from .errors import SpecError
from .families import LARGE_NBYTES, UNKNOWN, Family, find_family, in_first_block, reason_to_keep, shown_reason
from .registry import availability, format_ids, get_quantizer
from .rules import KEEP, Hit, layer_name, matches, resolve
from .spec import QuantSpec
from .weight import TensorMeta

__all__ = [
    "Action",
    "Decision",
    "QuantPlan",
    "Slot",
    "make_plan",
    "matches",
    "sensitive_reason",
]


class Action(str, Enum):
    QUANTIZE = "quantize"
    KEEP = "keep"
    REFUSE = "refuse"  # asked for, but the format cannot hold this tensor


@dataclass(frozen=True)
class Slot:
    """A tensor of a model as the plan sees it.

    Attributes:
        linear: whether it is the weight of a linear layer.
        stays: why a linear layer cannot be replaced, whatever the format; empty where it can.
    """

    meta: TensorMeta
    linear: bool
    stays: str = ""


@dataclass(frozen=True)
class Decision:
    """What happens to one tensor.

    Attributes:
        nbytes_out: the predicted size.
        spec: format and options of a tensor that is quantized, or refused by that format; no layer patterns. None where
            it is kept, or where no format could take it.
    """

    meta: TensorMeta
    action: Action
    reason: str
    nbytes_out: int
    spec: QuantSpec | None = None


@dataclass(frozen=True)
class QuantPlan:
    """The decisions, in the order of the slots.

    Attributes:
        spec: what was asked for.
        family: of the model, as far as it is known; else empty.
        notes: what the reader should know of the built-in rules and of the formats here.
    """

    spec: QuantSpec
    decisions: tuple[Decision, ...]
    family: str = ""
    notes: tuple[str, ...] = ()

    @property
    def format_ids(self) -> list[str]:
        """The formats that its layers get, in order of first use."""
        return list(dict.fromkeys(d.spec.format_id for d in self.to_quantize if d.spec is not None))

    @property
    def to_quantize(self) -> list[Decision]:
        return [d for d in self.decisions if d.action is Action.QUANTIZE]

    @property
    def refused(self) -> list[Decision]:
        return [d for d in self.decisions if d.action is Action.REFUSE]

    @property
    def nbytes_in(self) -> int:
        return sum(d.meta.nbytes for d in self.decisions)

    @property
    def nbytes_out(self) -> int:
        return sum(d.nbytes_out for d in self.decisions)

    def raise_on_refusal(self, among: Sequence[str] | None = None) -> None:
        """Stop before any work if a tensor cannot be quantized as asked.

        Args:
            among: formats that may be suggested instead; default: all that can be made.
        Raises:
            SpecError: names the first tensor, the reason, and a format that would take all of the refused ones.
        """
        if not self.refused:
            return
        first = self.refused[0]
        more = f" (and {len(self.refused) - 1} more)" if len(self.refused) > 1 else ""
        candidates = format_ids() if among is None else among
        fit = next((f for f in candidates if all(d.spec and _fits(f, d.meta) for d in self.refused)), None)
        other = f"Use {fit}, or add" if fit else "Add"
        raise SpecError(
            f"'{first.meta.name}': {first.reason}{more}.\n{other} the layer to the layers to keep (`exclude`)."
        )


def make_plan(slots: Iterable[Slot], spec: QuantSpec, quantizer: Quantizer) -> QuantPlan:
    """Decide for every tensor.

    What the user says wins over the built-in rules of the model's family: `exclude` and rules to keep, rules with a
    format, and `include`, which leaves its layers the format of the spec.

    Args:
        quantizer: of `spec.format_id`; those of the rules are looked up.
    Raises:
        SpecError: a pattern matches no linear layer, or two contradict each other.
    """
    slots = list(slots)
    layers = {layer_name(s.meta.name): s.meta for s in slots if s.linear}
    hits = resolve(spec.rules, spec.exclude, spec.include, list(layers))
    family = find_family(s.meta for s in slots)
    asked = {name for name in layers if name in hits or any(matches(p, name) for p in spec.include)}
    fixed = {layer_name(s.meta.name) for s in slots if s.stays}
    kept, notes = built_in(family, layers, asked | fixed)
    base = _without_patterns(spec)
    specs = {spec.format_id: base}
    decisions: list[Decision] = []
    for slot in slots:
        name = layer_name(slot.meta.name)
        if not slot.linear:
            decisions.append(_kept(slot.meta, "not a linear weight"))
        elif name in hits and hits[name].target == KEEP:
            decisions.append(_kept(slot.meta, _why_kept(hits[name])))
        elif slot.stays:
            action = Action.REFUSE if name in asked else Action.KEEP
            decisions.append(Decision(slot.meta, action, slot.stays, slot.meta.nbytes))
        elif name in hits:
            target = hits[name].target
            chosen = specs.setdefault(target, QuantSpec.from_uri(target))
            chosen_by = f"linear weight, rule '{hits[name].source}'"
            decisions.append(_quantized(slot.meta, chosen, get_quantizer(chosen.format_id), chosen_by))
        elif name in kept:
            decisions.append(_kept(slot.meta, kept[name]))
        else:
            decisions.append(_quantized(slot.meta, base, quantizer, "linear weight"))
    made = dict.fromkeys(d.spec.format_id for d in decisions if d.spec is not None and d.action is Action.QUANTIZE)
    notes += [advice for format_id in made if (advice := get_quantizer(format_id).advice())]
    return QuantPlan(spec, tuple(decisions), family.name, tuple(notes))


def _without_patterns(spec: QuantSpec) -> QuantSpec:
    return QuantSpec(spec.format_id, options=spec.options) if spec.include or spec.exclude or spec.rules else spec


def built_in(
    family: Family, layers: Mapping[str, TensorMeta], decided: Collection[str]
) -> tuple[dict[str, str], list[str]]:
    """Reasons of the layers that stay by the family's rules, and what to say of those that are too large to.

    Args:
        decided: layers that these rules have no say in. They count for how large layers of a kind are together, so that
            a rule on some of them changes nothing for the others.
    """
    found = {name: keep for name in layers if (keep := reason_to_keep(family, name)) is not None}
    reasons: dict[str, str] = {}
    notes: list[str] = []
    for keep in dict.fromkeys(found.values()):
        names = [name for name, k in found.items() if k is keep]
        nbytes = sum(layers[name].nbytes for name in names)
        names = [name for name in names if name not in decided]
        if names and keep.unless_large and nbytes > LARGE_NBYTES:
            names = [name for name in names if in_first_block(name)]
            notes.append(
                f"{keep.reason} layers take {nbytes / 2**30:.1f} GiB of this model, so they are quantized too, except "
                "in the first blocks; a rule such as `... = keep` keeps them"
            )
        halves = [name for name in names if layers[name].dtype is torch.float16]
        if keep.not_float16 and halves:
            notes.append(
                f"'{halves[0]}' is float16, as are {len(halves) - 1} more such layers: their products can overflow to "
                "inf; load the model in bfloat16 or float32"
            )
        reasons |= dict.fromkeys(names, shown_reason(family, keep))
    return reasons, notes


def _kept(meta: TensorMeta, reason: str) -> Decision:
    return Decision(meta, Action.KEEP, reason, meta.nbytes)


def _why_kept(hit: Hit) -> str:
    return "excluded" if hit.source.startswith("exclude=") else f"rule '{hit.source}'"


def _quantized(meta: TensorMeta, spec: QuantSpec, quantizer: Quantizer, reason: str) -> Decision:
    refusal = refusal_of(quantizer, spec, meta)
    if refusal:
        return Decision(meta, Action.REFUSE, f"{spec.format_id}: {refusal}", meta.nbytes, spec)
    return Decision(meta, Action.QUANTIZE, reason, quantizer.predict_nbytes(spec, meta), spec)


def refusal_of(quantizer: Quantizer, spec: QuantSpec, meta: TensorMeta) -> str | None:
    """Why a tensor cannot be quantized so, or None; what no format takes, and what this one does not."""
    if len(meta.shape) == 2 and not meta.numel:
        return f"N={meta.shape[0]} by K={meta.shape[1]} holds no values"
    return quantizer.refuse(spec, meta)


def sensitive_reason(layer: str) -> str | None:
    """Why a layer stays at full precision by default in a model of unknown family, or None; by its name alone."""
    keep = reason_to_keep(UNKNOWN, layer)
    return None if keep is None else shown_reason(UNKNOWN, keep)


def _fits(format_id: str, meta: TensorMeta) -> bool:
    if get_quantizer(format_id).refuse(QuantSpec(format_id), meta) is not None:
        return False
    return availability(format_id).works  # a format whose library is missing is no way out
