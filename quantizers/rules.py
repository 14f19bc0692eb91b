r"""QuantRules: which layers get which format, as an ordered list of patterns.

    *.attn.* = bnb-nf4              glob over the whole layer name
    img_attn = bnb;bits=8           a dotted part of the name, where the pattern has no wildcard
    re:blocks\.(0|1)\. = keep       regular expression, found anywhere in the name

One rule a line; `#` starts a comment at the start of a line or after a blank. As JSON: a list of
`{"pattern": ..., "format": ...}` in order, or one object `{pattern: format}`.

The order serves the reader: two rules that want different things of one layer are an error that shows both. "First
wins" and "last wins" were not chosen, because either hides a mistake in a list that nobody reads twice. Rules extend
the built-in lists of layers to keep (`families.py`): a rule with a format takes its layers off those lists.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from .errors import SpecError
from .quoting import quotable

KEEP = "keep"
REGEX = "re:"
_COMMENT = re.compile(r"(^|\s)#.*$")


@dataclass(frozen=True)
class Rule:
    """One line.

    Attributes:
        pattern: of layer names.
        target: `keep`, a format id or a URI. A QuantSpec holds it in canonical form.
    """

    pattern: str
    target: str

    def __str__(self) -> str:
        return f"{self.pattern} = {self.target}"


@dataclass(frozen=True)
class Hit:
    """What applies to one layer: the target, and the text of the user's that asks for it."""

    target: str
    source: str


def matches(pattern: str, layer: str) -> bool:
    """Whether a pattern names a layer: see the module docstring.

    `.weight` at the end is ignored, because messages and reports name tensors so; a regular expression sees the name
    with and without it.
    """
    if pattern.startswith(REGEX):
        found = re.compile(pattern.removeprefix(REGEX))  # `re` keeps the last 512 of them
        return bool(found.search(layer) or found.search(f"{layer}.weight"))
    pattern = layer_name(pattern)
    if any(c in pattern for c in "*?["):
        return fnmatch.fnmatchcase(layer, pattern)
    return f".{pattern}." in f".{layer}."


def layer_name(tensor: str) -> str:
    """`blocks.0.qkv` for `blocks.0.qkv.weight`."""
    return tensor.removesuffix(".weight")


def check_pattern(pattern: str) -> None:
    """Refuse what cannot be a pattern.

    Raises:
        SpecError: empty, outer blanks, a line break, an escape that a URI cannot hold, or a bad regular expression.
    """
    if not pattern or pattern == REGEX or pattern != pattern.strip() or "\n" in pattern:
        raise SpecError(f"Layer pattern '{pattern}' is empty or holds outer blanks or a line break.")
    if not quotable(pattern):
        raise SpecError(f"Layer pattern '{pattern}' holds a backslash before a quote or at its end.")
    if pattern.startswith(REGEX):
        try:
            re.compile(pattern.removeprefix(REGEX))
        except re.error as err:
            raise SpecError(f"Layer pattern '{pattern}' is no regular expression: {err}.") from err


def parse_rule(text: str) -> Rule:
    """`pattern = target`. The first ` = ` between blanks separates, or else the first `=`.

    Raises:
        SpecError: not of that form.
    """
    pattern, equals, target = text.partition(" = ")
    if not equals:
        pattern, equals, target = text.partition("=")
    pattern, target = pattern.strip(), target.strip()
    if not equals or not pattern or not target:
        raise SpecError(f"Rule '{text.strip()}' is not of the form: pattern = format, URI or {KEEP}.")
    return Rule(pattern, target)


def parse_rules(text: str | list[dict[str, str]]) -> tuple[Rule, ...]:
    """Rules from text, one a line, or from JSON, as text or loaded.

    Raises:
        SpecError: a line is no rule or has a bad pattern; names the line.
    """
    if isinstance(text, list):
        return _from_json(text)
    if text.lstrip().startswith(("{", "[")):
        try:
            return _from_json(json.loads(text, object_pairs_hook=_without_repeats))
        except json.JSONDecodeError as err:
            # A glob may begin with a bracket, JSON has no line of the form `... = ...`.
            if not any(" = " in line for line in text.splitlines()):
                raise SpecError(f"The rules are neither lines nor JSON: {err}.") from err
    rules: list[Rule] = []
    for number, line in enumerate(text.splitlines(), 1):
        rule = _COMMENT.sub("", line).strip()
        if rule:
            try:
                rules.append(parse_rule(rule))
                check_pattern(rules[-1].pattern)
            except SpecError as err:
                raise SpecError(f"Line {number}: {err}") from err
    return tuple(rules)


def to_text(rules: Iterable[Rule]) -> str:
    """One a line; `parse_rules` gives equal rules."""
    return "\n".join(map(str, rules))


def to_json(rules: Iterable[Rule]) -> list[dict[str, str]]:
    """A list of objects, in order; `parse_rules` of its JSON text gives equal rules."""
    return [{"pattern": rule.pattern, "format": rule.target} for rule in rules]


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which no key stands for two things; `json` itself takes the last one silently."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if found.setdefault(key, value) != value:
            raise SpecError(
                f"Rules contradict each other: '{key}' stands twice in one JSON object, as "
                f"{json.dumps(found[key])} and as {json.dumps(value)}.\nKeep one of them."
            )
    return found


def _from_json(data: Any) -> tuple[Rule, ...]:
    if isinstance(data, dict):
        given = cast("dict[str, Any]", data)
        rows: list[Any] = [{"pattern": k, "format": v} for k, v in given.items()]
    else:
        rows = data
    for row in rows:
        fields: Mapping[str, Any] = cast("dict[str, Any]", row) if isinstance(row, dict) else {}
        if set(fields) != {"pattern", "format"} or not all(isinstance(v, str) for v in fields.values()):
            raise SpecError(f'Rule {json.dumps(row)} is not of the form {{"pattern": ..., "format": ...}}.')
    return tuple(Rule(row["pattern"].strip(), row["format"].strip()) for row in rows)


def resolve(
    rules: Sequence[Rule], exclude: Sequence[str], include: Sequence[str], layers: Sequence[str]
) -> dict[str, Hit]:
    """What the user asks for, layer by layer.

    `exclude` is a list of rules to keep; it narrows `include`, which takes layers off the built-in lists and leaves
    them the format of the spec.

    Args:
        layers: names of all linear layers.
    Returns:
        layer -> its hit, for the layers that a rule or `exclude` names.
    Raises:
        SpecError: a pattern matches no layer, or two contradict each other.
    """
    asked = [
        *((Hit(KEEP, f"exclude={p}"), named_layers(p, layers)) for p in exclude),
        *((Hit(rule.target, str(rule)), named_layers(rule.pattern, layers)) for rule in rules),
    ]
    included = {layer: f"include={p}" for p in include for layer in named_layers(p, layers)}
    found: dict[str, Hit] = {}
    for hit, named in asked:
        for layer in named:
            other = found.setdefault(layer, hit)
            if other.target != hit.target:
                raise _contradiction(layer, other.source, hit.source)
            if hit.target == KEEP and layer in included and not hit.source.startswith("exclude="):
                raise _contradiction(layer, included[layer], hit.source)
    return found


def named_layers(pattern: str, layers: Sequence[str]) -> list[str]:
    """The layers that a pattern names.

    Raises:
        SpecError: none, or the pattern is none.
    """
    check_pattern(pattern)
    named = [layer for layer in layers if matches(pattern, layer)]
    if not named:
        shown = f" (such as {', '.join(layers[:3])})" if layers else ""
        raise SpecError(f"Pattern '{pattern}' matches none of the {len(layers)} linear layers{shown}.")
    return named


def _contradiction(layer: str, first: str, second: str) -> SpecError:
    return SpecError(
        f"Rules contradict each other: '{first}' and '{second}' both match '{layer}'.\n"
        "Narrow one of the patterns, so that each layer gets one answer."
    )


@dataclass(frozen=True)
class RuleSet:
    """Rules without a format of their own: they join whatever format a node is set to."""

    rules: tuple[Rule, ...]
