"""QuantSpec: what to do to the weights of a model, and its URI form.

The URI grammar is the one that dgenerate's users know: `backend;argument=value;argument=value`, for example
`bnb;bits=4;bits4-quant-type=nf4;bits4-use-double-quant=true`. The backend's own arguments choose the format; the
arguments `include` and `exclude` (comma-separated layer patterns) belong to every backend. A value with `;` stands in
quotes. A bare format id (`bnb-nf4`) is a URI too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .errors import SpecError, near
from .registry import format_ids, get_entry

SPEC_VERSION = 1

BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
FLOAT_DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Argument:
    """One URI argument of a backend.

    Attributes:
        default: value when absent; arguments at their default are left out of `to_uri`.
        choices: allowed words, or empty.
        kind: `word`, `bool`, `int` or `float`.
        low, high: inclusive bounds of a number; both or none.
        applies: format ids that use it; empty means all of the backend.
        effect: one sentence for help pages.
    """

    default: Any
    choices: tuple[str, ...] = ()
    kind: str = "word"
    low: float | None = None
    high: float | None = None
    applies: tuple[str, ...] = ()
    effect: str = ""

    def parse(self, backend: str, name: str, text: str) -> Any:
        """Turn the text of a URI into a value.

        Raises:
            SpecError: names the argument, what was given and what is valid.
        """
        where = f"{backend}: argument '{name}'"
        if self.kind == "bool":
            if text.lower() not in BOOLEANS:
                raise SpecError(f"{where} must be true or false, got '{text}'.")
            return BOOLEANS[text.lower()]
        if self.kind in ("int", "float"):
            try:
                number = int(text) if self.kind == "int" else float(text)
            except ValueError:
                number_kind = "a whole number" if self.kind == "int" else "a number"
                raise SpecError(f"{where} must be {number_kind}, got '{text}'.") from None
            if self.choices and str(number) not in self.choices:
                raise SpecError(f"{where} must be {' or '.join(self.choices)}, got {number}.")
            # Written so that nan is refused too.
            if self.low is not None and self.high is not None and not self.low <= number <= self.high:
                raise SpecError(f"{where} must be between {self.low:g} and {self.high:g}, got {number:g}.")
            return number
        if text not in self.choices:
            valid = ", ".join(self.choices)
            raise SpecError(f"{where} must be one of {valid}, got '{text}'.{near(text, self.choices)}")
        return text


_FOUR_BIT = ("bnb-nf4", "bnb-fp4")

_COMFY = ("fp8-e4m3fn", "fp8-e5m2", "nvfp4", "mxfp8", "int8", "int8-convrot", "w4a4-convrot", "w4a8")

ARGUMENTS: dict[str, dict[str, Argument]] = {
    "bnb": {
        "bits": Argument(8, ("4", "8"), "int", effect="8 is LLM.int8, 4 is nf4 or fp4."),
        "bits4-quant-type": Argument("fp4", ("fp4", "nf4"), applies=_FOUR_BIT, effect="The 4-bit codebook."),
        "bits4-compute-dtype": Argument(None, FLOAT_DTYPES, applies=_FOUR_BIT, effect="dtype of the product."),
        "bits4-use-double-quant": Argument(
            False, (), "bool", applies=_FOUR_BIT, effect="Quantize the block maxima too: 0.37 bits a weight less."
        ),
        "int8-threshold": Argument(
            6.0,
            (),
            "float",
            0,
            10,
            ("bnb-int8",),
            "Activation columns above it are multiplied in 16 bits; 0 is off, and activations above 65504 then "
            "overflow float16.",
        ),
    },
    "quanto": {"weights": Argument("qint8", ("qint8", "qint4", "qfloat8-e4m3fn"), effect="Weight type.")},
    "gguf": {"type": Argument("q8_0", ("q8_0", "q4_0"), effect="GGUF tensor type.")},
    "comfy": {"type": Argument("int8", _COMFY, effect="ComfyUI's native format.")},
}
# The arguments that choose each format.
FORMAT_ARGUMENTS: dict[str, dict[str, Any]] = {
    "bnb-int8": {"bits": 8},
    **{f"bnb-{t}": {"bits": 4, "bits4-quant-type": t} for t in ARGUMENTS["bnb"]["bits4-quant-type"].choices},
    **{f"quanto-{w}": {"weights": w} for w in ARGUMENTS["quanto"]["weights"].choices},
    **{f"gguf-{t.replace('_', '-')}": {"type": t} for t in ARGUMENTS["gguf"]["type"].choices},
    **{f"comfy-{t}": {"type": t} for t in ARGUMENTS["comfy"]["type"].choices},
}
SELECTORS = {"bnb": ("bits", "bits4-quant-type"), "quanto": ("weights",), "gguf": ("type",), "comfy": ("type",)}
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
            if backend not in format_ids(writable=False):  # those that can only be loaded are refused below, by name
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
