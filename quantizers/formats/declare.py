"""The types in which a backend declares itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import SpecError, near

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
        why: why other words are refused, as a sentence for that error; empty where the list of choices says enough.
    """

    default: Any
    choices: tuple[str, ...] = ()
    kind: str = "word"
    low: float | None = None
    high: float | None = None
    applies: tuple[str, ...] = ()
    effect: str = ""
    why: str = ""

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
            why = f"\n{self.why}" if self.why else ""
            raise SpecError(f"{where} must be one of {valid}, got '{text}'.{near(text, self.choices)}{why}")
        return text


@dataclass(frozen=True)
class FormatEntry:
    """One line of the registry.

    Attributes:
        format_id: permanent kebab-case id; files and shared workflows hold it.
        backend: name of the folder under `backends/`, and the first word of a URI.
        factory: function in that package which takes the format id and returns the `Quantizer`.
        bits: nominal bits a weight.
        summary: a few words for lists.
        writes: False for formats that can be loaded but not made here.
        listed: False for ids that a URI can name but that lists and menus leave out.
    """

    format_id: str
    backend: str
    factory: str
    bits: float
    summary: str
    writes: bool = True
    listed: bool = True


@dataclass(frozen=True)
class Backend:
    """A quantization library and what is offered of it.

    Attributes:
        name: first word of a URI.
        package: PyPI name of the library; empty where only torch is needed.
        licence: SPDX id of that package.
        about: one or two sentences for `quantwire help`.
        entries: its formats.
        arguments: of its URI.
        selectors: those arguments that choose the format.
        chosen: format id -> the values of the selectors that choose it.
        tensors: names of the plain tensors beside `qdata` that its weights may have.
        also: further PyPI packages that it uses where they are installed, and their licences.
    """

    name: str
    package: str
    licence: str
    about: str
    entries: tuple[FormatEntry, ...]
    arguments: Mapping[str, Argument]
    selectors: tuple[str, ...]
    chosen: Mapping[str, Mapping[str, Any]]
    tensors: tuple[str, ...] = field(default=())
    also: Mapping[str, str] = field(default_factory=lambda: dict[str, str]())
