"""QuantSpec: what to do to the weights of a model, and its URI form.

The URI grammar is the one that dgenerate's users know: `backend;argument=value;argument=value`, for example
`bnb;bits=4;bits4-quant-type=nf4;bits4-use-double-quant=true`. The backend's own arguments choose the format; the
arguments `include` and `exclude` (comma-separated layer patterns) belong to every backend. A value with `;` stands in
quotes. A bare format id (`bnb-nf4`) is a URI too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import SpecError, near
from .formats import BACKENDS, Argument
from .registry import format_ids, get_entry, is_format

SPEC_VERSION = 1

ARGUMENTS: dict[str, Mapping[str, Argument]] = {b.name: b.arguments for b in BACKENDS}
SELECTORS: dict[str, tuple[str, ...]] = {b.name: b.selectors for b in BACKENDS}
# The arguments that choose each format.
FORMAT_ARGUMENTS: dict[str, Mapping[str, Any]] = {f: dict(v) for b in BACKENDS for f, v in b.chosen.items()}
COMMON = ("include", "exclude")


@dataclass(frozen=True)
class QuantSpec:
    """What to quantize, to what, with which options.

    Attributes:
        format_id: registry id.
        include: patterns of layers to quantize even though the default rules keep them.
        exclude: patterns of layers to keep at full precision.
        options: backend options as (name, value) pairs, checked, sorted, and without those at their default.
        version: of this structure, for files that hold it.
    """

    format_id: str
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    options: tuple[tuple[str, Any], ...] = field(default=())
    version: int = SPEC_VERSION

    def __post_init__(self) -> None:
        entry = get_entry(self.format_id)
        if not entry.writes:
            raise SpecError(f"{self.format_id} can be loaded but not made.\nFormats: {', '.join(format_ids())}.")
        backend = entry.backend
        kept: dict[str, Any] = {}
        for name, given in self.options:
            argument = _argument(backend, name)
            if name in SELECTORS[backend]:
                raise SpecError(f"{backend}: argument '{name}' is fixed by the format id '{self.format_id}'.")
            value = argument.parse(backend, name, _text(given))
            if value == argument.default:
                continue
            if argument.applies and self.format_id not in argument.applies:
                raise SpecError(
                    f"{backend}: argument '{name}' does not apply to {self.format_id}, only to "
                    f"{' and '.join(argument.applies)}."
                )
            kept[name] = value
        object.__setattr__(self, "options", tuple(sorted(kept.items())))
        for pattern in (*self.include, *self.exclude):
            if not pattern or pattern != pattern.strip() or any(c in pattern for c in ",'\""):
                raise SpecError(f"Layer pattern '{pattern}' is empty or holds a comma, a quote or outer blanks.")

    def option(self, name: str, default: Any) -> Any:
        """The value of an option, or `default` where it was left at the backend's default."""
        return dict(self.options).get(name, default)

    @classmethod
    def from_uri(cls, uri: str) -> QuantSpec:
        """Parse a URI or a bare format id.

        Raises:
            SpecError: unknown backend, argument or value, with the valid ones.
        """
        head, *parts = _split(uri, ";")
        backend = head.strip()
        given: dict[str, Any] = {}
        lists: dict[str, tuple[str, ...]] = {}
        bare = backend not in ARGUMENTS
        if bare:
            known = [*ARGUMENTS, *format_ids()]
            if not is_format(backend):  # those that can only be loaded are refused below, by name
                raise SpecError(
                    f"Unknown backend or format '{backend}' in '{uri}'.{near(backend, known)}\n"
                    f"Backends: {', '.join(ARGUMENTS)}. Formats: {', '.join(format_ids())}."
                )
            backend = get_entry(backend).backend
        for part in parts:
            name, equals, text = part.partition("=")
            name, text = name.strip(), _unquote(text)
            if not equals or not name:
                raise SpecError(f"{backend}: '{part.strip()}' in '{uri}' is not of the form argument=value.")
            if name in given or name in lists:
                raise SpecError(f"{backend}: argument '{name}' is given twice in '{uri}'.")
            if name in COMMON:
                lists[name] = tuple(item.strip() for item in text.split(",") if item.strip())
            elif bare and name in SELECTORS[backend]:
                raise SpecError(f"{backend}: argument '{name}' is fixed by the format id '{head.strip()}' in '{uri}'.")
            else:
                given[name] = _argument(backend, name).parse(backend, name, text)
        format_id = head.strip() if bare else _format_of(backend, given)
        options = tuple((k, v) for k, v in given.items() if k not in SELECTORS[backend])
        return cls(format_id, lists.get("include", ()), lists.get("exclude", ()), options)

    def to_uri(self) -> str:
        """The URI that `from_uri` turns into an equal spec."""
        backend = get_entry(self.format_id).backend
        parts = [backend, *(f"{k}={_text(v)}" for k, v in _selectors_of(self.format_id))]
        parts += [f"{k}={_text(v)}" for k, v in self.options]
        for name, patterns in (("include", self.include), ("exclude", self.exclude)):
            if patterns:
                text = ",".join(patterns)
                parts.append(f"{name}='{text}'" if ";" in text else f"{name}={text}")
        return ";".join(parts)


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


def _split(text: str, separator: str) -> list[str]:
    """Split at separators that stand outside quotes."""
    parts: list[str] = []
    quote = current = ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char == separator:
            parts.append(current)
            current = ""
            continue
        current += char
    if quote:
        raise SpecError(f"The quote {quote} in '{text}' is not closed.")
    return [*parts, current]


def _unquote(text: str) -> str:
    text = text.strip()
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    return text


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value).removesuffix(".0")
