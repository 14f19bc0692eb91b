"""QuantSpec: what to do to the weights of a model, and its URI form.

The URI grammar is the one that dgenerate's users know: `backend;argument=value;argument=value`, for example
`bnb;bits=4;bits4-quant-type=nf4;bits4-use-double-quant=true`. The backend's own arguments choose the format; the
arguments `include`, `exclude` (lists of layer patterns) and `rules` (a list of `pattern = format`) belong to every
backend. A list is separated by commas; a value or a list's item with `;`, `,` or quotes in it stands in quotes (see
`quoting.py`). A bare format id (`bnb-nf4`) is a URI too, and a library's package name is another name of its backend.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from . import quoting
from .errors import SpecError, near
from .formats import BACKENDS, Argument
from .registry import format_ids, get_entry, is_format
from .rules import KEEP, Rule, check_pattern, parse_rule, parse_rules, to_json

SPEC_VERSION = 1

ARGUMENTS: dict[str, Mapping[str, Argument]] = {b.name: b.arguments for b in BACKENDS}
SELECTORS: dict[str, tuple[str, ...]] = {b.name: b.selectors for b in BACKENDS}
# The arguments that choose each format.
FORMAT_ARGUMENTS: dict[str, Mapping[str, Any]] = {f: dict(v) for b in BACKENDS for f, v in b.chosen.items()}
# `bitsandbytes;bits=4` for `bnb;bits=4`.
PACKAGES = {b.package: b.name for b in BACKENDS if b.package}
COMMON = ("include", "exclude", "rules")
_SPECIAL = ",;"


@dataclass(frozen=True)
class QuantSpec:
    """What to quantize, to what, with which options.

    Attributes:
        format_id: registry id.
        include: patterns of layers to quantize even though the default rules keep them.
        exclude: patterns of layers to keep at full precision.
        options: backend options as (name, value) pairs, checked, sorted, and without those at their default.
        version: of this structure, for files that hold it.
        rules: formats of single layers, in order; targets in canonical form.
    """

    format_id: str
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    options: tuple[tuple[str, Any], ...] = field(default=())
    version: int = SPEC_VERSION
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        entry = get_entry(self.format_id)
        if not entry.writes:
            raise SpecError(f"{self.format_id} can be loaded but not made.\nFormats: {', '.join(format_ids())}.")
        object.__setattr__(self, "options", _checked(self.format_id, entry.backend, self.options))
        for pattern in (*self.include, *self.exclude):
            check_pattern(pattern)
        object.__setattr__(self, "rules", tuple(map(canonical, self.rules)))

    def option(self, name: str, default: Any) -> Any:
        """The value of an option, or `default` where it was left at the backend's default."""
        return dict(self.options).get(name, default)

    @classmethod
    def from_uri(cls, uri: str) -> QuantSpec:
        """Parse a URI or a bare format id.

        Raises:
            SpecError: unknown backend, argument or value, with the valid ones.
        """
        head, *parts = quoting.split(uri, ";")
        head = head.strip()
        bare = head not in ARGUMENTS and head not in PACKAGES
        backend = _backend_of_format(head, uri) if bare else PACKAGES.get(head, head)
        given: dict[str, Any] = {}
        lists: dict[str, list[str]] = {}
        for position, part in enumerate(parts):
            name, equals, text = part.partition("=")
            name = name.strip()
            if name == "rules":
                _refuse_open_target(backend, text, parts[position + 1 :])
            if not equals or not name:
                raise SpecError(f"{backend}: '{part.strip()}' in '{uri}' is not of the form argument=value.")
            if name in given or name in lists:
                raise SpecError(f"{backend}: argument '{name}' is given twice in '{uri}'.")
            if name not in COMMON and bare and name in SELECTORS[backend]:
                raise SpecError(f"{backend}: argument '{name}' is fixed by the format id '{head}' in '{uri}'.")
            argument = None if name in COMMON else _argument(backend, name)
            try:
                if argument is None:
                    lists[name] = quoting.items(text)
                else:
                    given[name] = argument.parse(backend, name, quoting.unquote(text))
            except SpecError as err:
                if str(err).startswith(f"{backend}: argument"):
                    raise
                raise SpecError(f"{backend}: argument '{name}': {err}") from err
        format_id = head if bare else _format_of(backend, given)
        options = tuple((k, v) for k, v in given.items() if k not in SELECTORS[backend])
        include, exclude = (tuple(lists.get(name, ())) for name in ("include", "exclude"))
        try:
            rules = tuple(map(parse_rule, lists.get("rules", ())))
        except SpecError as err:
            raise SpecError(f"{backend}: argument 'rules': {err}") from err
        return cls(format_id, include, exclude, options, rules=rules)

    def to_uri(self) -> str:
        """The URI that `from_uri` turns into an equal spec."""
        backend = get_entry(self.format_id).backend
        parts = [backend, *(f"{k}={_text(v)}" for k, v in _selectors_of(self.format_id))]
        parts += [f"{k}={_text(v)}" for k, v in self.options]
        lists = {"include": self.include, "exclude": self.exclude, "rules": tuple(map(str, self.rules))}
        for name, values in lists.items():
            if values:
                parts.append(f"{name}=" + ",".join(quoting.quote(value, _SPECIAL) for value in values))
        return ";".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `from_dict` gives an equal spec."""
        return {
            "version": self.version,
            "format": self.format_id,
            "options": dict(self.options),
            "include": list(self.include),
            "exclude": list(self.exclude),
            "rules": to_json(self.rules),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantSpec:
        """Read what `to_dict` wrote; everything but `format` may be absent.

        Raises:
            SpecError: no format, unknown keys, a newer version, or anything that a spec refuses.
        """
        valid = ("version", "format", "options", "include", "exclude", "rules")
        strange = [key for key in data if key not in valid]
        if strange or not isinstance(data.get("format"), str):
            what = f"has the unknown key '{strange[0]}'" if strange else "names no format"
            raise SpecError(f"The spec {what}.\nKeys: {', '.join(valid)}.")
        version = data.get("version", SPEC_VERSION)
        if version != SPEC_VERSION:
            raise SpecError(f"The spec has version {version}, expected {SPEC_VERSION}.\nUpdate quantwire.")
        rows = cast("list[dict[str, str]]", data.get("rules", []))
        rules = parse_rules(rows) if rows else ()
        options = tuple(cast("dict[str, Any]", data.get("options", {})).items())
        include, exclude = (tuple(data.get(name, ())) for name in ("include", "exclude"))
        return cls(data["format"], include, exclude, options, rules=rules)


def _refuse_open_target(backend: str, text: str, following: list[str]) -> None:
    """Refuse `rules=b=bnb;bits=4`, in which `bits=4` reads as part of the rule's URI but belongs to the whole.

    Args:
        text: the value of `rules`, with its quotes.
        following: the arguments after it.
    Raises:
        SpecError: the last rule's target is a backend's bare name without quotes, and its arguments may follow.
    """
    last = quoting.split(text, ",")[-1].strip()
    if not following or not last or last[0] in quoting.QUOTES:
        return
    target = last.rpartition("=")[2].strip()
    argument = following[0].strip()
    if (target in ARGUMENTS or target in PACKAGES) and argument.partition("=")[0].strip() not in COMMON:
        raise SpecError(
            f"{backend}: argument 'rules': '{last}' ends at the ;, so '{argument}' is no part of that rule.\n"
            f'Write rules="{last};{argument}" if it is to be, or else write the rules last.'
        )


def canonical(rule: Rule) -> Rule:
    """The rule with its target as `keep`, a bare format id, or a URI where options are set.

    Raises:
        SpecError: a bad pattern or target; names the rule.
    """
    check_pattern(rule.pattern)
    if parse_rule(str(rule)).pattern != rule.pattern:
        raise SpecError(f"Rule '{rule}': a pattern cannot hold an = between blanks.\nWrite ? for the blank.")
    if rule.target.lower() == KEEP:
        return Rule(rule.pattern, KEEP)
    try:
        spec = QuantSpec.from_uri(rule.target)
    except SpecError as err:
        raise SpecError(f"Rule '{rule}': {err}") from err
    if spec.include or spec.exclude or spec.rules:
        raise SpecError(f"Rule '{rule}': its format has layer patterns of its own.\nWrite them as rules beside it.")
    return Rule(rule.pattern, spec.to_uri() if spec.options else spec.format_id)


def _checked(format_id: str, backend: str, options: tuple[tuple[str, Any], ...]) -> tuple[tuple[str, Any], ...]:
    """Options parsed, sorted, and without those at their default."""
    kept: dict[str, Any] = {}
    for name, given in options:
        argument = _argument(backend, name)
        if name in SELECTORS[backend]:
            raise SpecError(f"{backend}: argument '{name}' is fixed by the format id '{format_id}'.")
        value = argument.parse(backend, name, _text(given))
        # The default too: it is what other formats do when nothing is said, not what this one does.
        if argument.applies and format_id not in argument.applies:
            raise SpecError(f"{backend}: argument '{name}' does not apply to {format_id}, {_only(argument.applies)}.")
        if value != argument.default:
            kept[name] = value
    return tuple(sorted(kept.items()))


def _only(format_ids: tuple[str, ...]) -> str:
    if len(format_ids) > 6:  # sdnq has over a hundred
        return f"only to {', '.join(format_ids[:5])} and {len(format_ids) - 5} more"
    return f"only to {' and '.join(format_ids)}"


def _backend_of_format(head: str, uri: str) -> str:
    if not is_format(head):  # those that can only be loaded are refused by the spec, by name
        known = [*ARGUMENTS, *format_ids()]
        raise SpecError(
            f"Unknown backend or format '{head}' in '{uri}'.{near(head, known)}\n"
            f"Backends: {', '.join(ARGUMENTS)}. Formats: {', '.join(format_ids())}."
        )
    return get_entry(head).backend


def _argument(backend: str, name: str) -> Argument:
    arguments = ARGUMENTS[backend]
    if name not in arguments:
        valid = [*arguments, *COMMON]
        raise SpecError(
            f"{backend}: unknown argument '{name}'.{near(name, valid)}\nValid arguments: {', '.join(valid)}."
        )
    return arguments[name]


def _format_of(backend: str, given: dict[str, Any]) -> str:
    value = {name: given.get(name, ARGUMENTS[backend][name].default) for name in SELECTORS[backend]}
    if backend == "bnb" and value["bits"] == 8 and "bits4-quant-type" in given:
        raise SpecError("bnb: argument 'bits4-quant-type' needs bits=4, got bits=8.")
    for format_id, chosen in FORMAT_ARGUMENTS.items():
        if get_entry(format_id).backend == backend and chosen.items() <= value.items():
            return format_id
    shown = ", ".join(f"{name}={_text(v)}" for name, v in value.items())
    raise SpecError(f"{backend}: no format has {shown}.")


def _selectors_of(format_id: str) -> list[tuple[str, Any]]:
    if format_id not in FORMAT_ARGUMENTS:
        raise SpecError(f"{format_id}: no arguments of a URI choose this format.")
    return list(FORMAT_ARGUMENTS[format_id].items())


def _text(value: Any) -> str:
    if isinstance(value, float):
        return str(value).removesuffix(".0")
    return str(value).lower() if isinstance(value, bool) else str(value)
