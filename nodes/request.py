"""What the Quantize nodes do with their inputs: which components, in which format each, and then the work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..hosts import current
from ..hosts.base import Host
from ..quantizers.apply import planning_slots, quantize_linears
from ..quantizers.auto import Choice, DeviceFacts, candidates, choose_format, predict_sizes
from ..quantizers.choices import AUTO, LoraMode, OnFailure, OnQuantized
from ..quantizers.compat.modes import Carrier
from ..quantizers.dequantize import stored_nbytes
from ..quantizers.errors import SpecError
from ..quantizers.families import find_family
from ..quantizers.plan import Slot, make_plan
from ..quantizers.registry import format_ids, get_quantizer
from ..quantizers.report import QuantReport, merge
from ..quantizers.rules import KEEP, RuleSet, layer_name, matches, named_layers, parse_rules
from ..quantizers.spec import QuantSpec, canonical
from .common import ALL, LLM, patterns, spec_from_inputs

LLM_FAMILIES = ("llm", "qwen-vl")


@dataclass(frozen=True)
class Request:
    """The widgets of a Quantize node."""

    format: str
    carrier: str
    config: QuantSpec | RuleSet | None
    keep_layers: str
    lora: str
    on_failure: str
    on_quantized: str
    encoders: str = ALL
    per_encoder: str = ""


@dataclass(frozen=True)
class Part:
    """One component that is to be quantized; `target` is a format of its own, or empty."""

    module: nn.Module
    slots: list[Slot]
    target: str = ""

    @property
    def layers(self) -> list[str]:
        return [layer_name(s.meta.name) for s in self.slots if s.linear]


def quantize(model: Any, asked: Request) -> tuple[Any, QuantReport]:
    """A new model object with quantized layers, and the report.

    Raises:
        QuantwireError: before any work, for whatever the plan of any component can tell.
    """
    host = current()
    mode = LoraMode(asked.lora)
    model = host.prepare_lora(model, Carrier(asked.carrier), mode)
    components = host.components(model)
    parts, kept = _parts(components, asked)
    others = {name: module for name, module in components.items() if name not in parts}
    spec, choice = _base_spec(host, model, asked, parts, others)
    specs = {name: _own_spec(spec, part, parts) for name, part in parts.items()}
    layers: dict[str, Any] = {}
    reports: list[QuantReport] = []
    for name, part in parts.items():
        layers[name], report = quantize_linears(
            part.module,
            specs[name],
            carrier=Carrier(asked.carrier),
            on_failure=OnFailure(asked.on_failure),
            make_layer=lambda weight, bias, kind: host.make_layer(weight, bias, kind, mode),
            device=host.compute_device(model),
            progress=host.progress,
            title=name,
            on_quantized=OnQuantized(asked.on_quantized),
        )
        reports.append(report)
    merged = merge(reports)
    merged.notes[:0] = [choice.why] if choice is not None and choice.fits else []
    merged.warnings[:0] = [choice.why] if choice is not None and not choice.fits else []
    merged.notes += [f"{name} stays as it is (per_encoder)" for name in kept]
    return host.with_layers(model, layers), merged


def check_encoders(per_encoder: str) -> None:
    """Refuse a text that no model could make valid.

    Raises:
        SpecError: a line that is no rule, a bad format, an encoder named twice.
    """
    _formats(per_encoder)


def _formats(per_encoder: str) -> dict[str, str]:
    """Encoder -> `keep`, format id or URI."""
    found: dict[str, str] = {}
    for rule in map(canonical, parse_rules(per_encoder)):
        if found.setdefault(rule.pattern, rule.target) != rule.target:
            raise SpecError(f"per_encoder: '{rule.pattern}' is to be both {found[rule.pattern]} and {rule.target}.")
    return found


def _parts(components: Mapping[str, nn.Module], asked: Request) -> tuple[dict[str, Part], list[str]]:
    """The components to quantize, and the names of those that per_encoder keeps."""
    chosen = _named(components, asked.encoders) if asked.encoders != ALL else list(components)
    targets: dict[str, str] = {}
    for key, target in _formats(asked.per_encoder).items():
        for name in _named(components, key):
            if name not in chosen:
                raise SpecError(f"per_encoder names {name}, but encoders is set to {asked.encoders}.\nSet it to {ALL}.")
            if targets.setdefault(name, target) != target:
                raise SpecError(f"per_encoder: {name} is to be both {targets[name]} and {target}.")
    kept = [name for name in chosen if targets.get(name) == KEEP]
    if len(kept) == len(chosen):
        raise SpecError(f"per_encoder keeps {', '.join(kept)}, so nothing is left to quantize.")
    on_quantized = OnQuantized(asked.on_quantized)
    parts = {
        name: Part(components[name], planning_slots(components[name], on_quantized), targets.get(name, ""))
        for name in chosen
        if name not in kept
    }
    return parts, kept


def _named(components: Mapping[str, nn.Module], key: str) -> list[str]:
    """The components that a name means.

    Raises:
        SpecError: none; lists those that are there.
    """
    found = [name for name in components if name == key]
    if key == LLM:
        slots = {name: planning_slots(m, OnQuantized.DEQUANTIZE) for name, m in components.items()}
        found = [n for n, held in slots.items() if find_family(s.meta for s in held).name in LLM_FAMILIES]
    if not found:
        raise SpecError(f"There is no {key} encoder here, only {', '.join(components)}.")
    return found


def _base_spec(
    host: Host, model: Any, asked: Request, parts: Mapping[str, Part], others: Mapping[str, nn.Module]
) -> tuple[QuantSpec, Choice | None]:
    """The spec of the components that have no format of their own; chosen here where the format is `auto`.

    Args:
        others: components that stay as they are.
    """
    if asked.format != AUTO:
        return spec_from_inputs(asked.format, asked.config, asked.keep_layers), None
    if isinstance(asked.config, QuantSpec):
        raise SpecError(
            f"format is auto, but the linked config is for {asked.config.format_id}.\n"
            "Set format to 'from config', or link a QuantRules without a base config."
        )
    rules = asked.config.rules if asked.config is not None else ()
    exclude = patterns(asked.keep_layers)
    device = host.memory(model)
    ranked = candidates(device)
    # Patterns name layers of any component; a spec to narrow needs some format.
    patterns_only = QuantSpec(format_ids()[0], exclude=exclude, rules=rules)
    shared = {name: part for name, part in parts.items() if not part.target} or parts
    sized = [(part.slots, *_lists(_narrowed(patterns_only, part.layers, parts))) for part in shared.values()]
    beside = {
        name: _predicted(_own_spec(patterns_only, part, parts), part.slots)
        for name, part in parts.items()
        if name not in shared
    }
    beside |= {name: stored_nbytes(module) for name, module in others.items() if not _counted(device, module)}
    choice = choose_format(device, *predict_sizes(sized, ranked), beside)
    return QuantSpec(choice.format_id, exclude=exclude, rules=rules), choice


def _predicted(spec: QuantSpec, slots: list[Slot]) -> int:
    return make_plan(slots, spec, get_quantizer(spec.format_id)).nbytes_out


def _counted(device: DeviceFacts, module: nn.Module) -> bool:
    """Whether a component that stays has been taken off what is free: on a CPU it is in that memory already."""
    return device.kind == "cpu" and all(p.device.type == "cpu" for p in module.parameters())


def _lists(spec: QuantSpec) -> tuple[Any, Any]:
    return spec.rules, spec.exclude


def _own_spec(spec: QuantSpec, part: Part, parts: Mapping[str, Part]) -> QuantSpec:
    own = _narrowed(spec, part.layers, parts)
    if not part.target:
        return own
    chosen = QuantSpec.from_uri(part.target)
    return replace(chosen, include=own.include, exclude=own.exclude, rules=own.rules)


def _narrowed(spec: QuantSpec, layers: Sequence[str], parts: Mapping[str, Part]) -> QuantSpec:
    """The spec without the patterns that name layers of other components only.

    Raises:
        SpecError: a pattern names no layer of any.
    """
    every = [layer for part in parts.values() for layer in part.layers]

    def here(pattern: str) -> bool:
        named_layers(pattern, every)
        return any(matches(pattern, layer) for layer in layers)

    return replace(
        spec,
        include=tuple(p for p in spec.include if here(p)),
        exclude=tuple(p for p in spec.exclude if here(p)),
        rules=tuple(r for r in spec.rules if here(r.pattern)),
    )
