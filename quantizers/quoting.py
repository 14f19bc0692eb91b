r"""Quotes in URIs and rules, as dgenerate's users know them.

    text = item (separator item)*
    item = 'quoted' | "quoted" | plain

A separator inside quotes does not split. A quoted item ends its quotes only at the separator; `\'` and `\"` are quotes
that end nothing, inside and outside. A quoted value may hold quotes of the other kind, which count when the value is
read in its turn (sub-quoting): `rules="*.attn.* = sdnq;type='uint4'"` is one argument of a URI, its value one rule, and
the target of that rule a URI again.

Every other backslash stays as it is: layer patterns may be regular expressions, in which `\b` is no control character.
"""

from __future__ import annotations

from collections.abc import Iterator

from .errors import SpecError

QUOTES = "'\""


def split(text: str, separator: str) -> list[str]:
    """The parts between separators that stand outside quotes, with their quotes and escapes.

    Raises:
        SpecError: a quote is not closed.
    """
    parts = [""]
    quote = ""
    for unit in _units(text):
        if unit == quote:
            quote = ""
        elif not quote and unit in QUOTES:
            quote = unit
        elif not quote and unit == separator:
            parts.append("")
            continue
        parts[-1] += unit
    if quote:
        raise SpecError(f"The quote {quote} in '{text}' is not closed.")
    return parts


def unquote(item: str) -> str:
    """The value of one item: outer blanks, the quotes around it and the backslashes before quotes are gone.

    Raises:
        SpecError: quotes in the middle of the item, or not closed.
    """
    item = item.strip()
    units = list(_units(item))
    if not units or units[0] not in QUOTES:
        if any(unit in QUOTES for unit in units):
            raise SpecError(f"A quote stands in the middle of '{item}'.\nPut the whole value in quotes.")
        return "".join(map(_plain, units))
    quote = units[0]
    end = next((i for i, unit in enumerate(units) if i and unit == quote), None)
    if end is None:
        raise SpecError(f"The quote {quote} in '{item}' is not closed.")
    if end != len(units) - 1:
        raise SpecError(f"Text follows the quoted part of '{item}'.\nPut the whole value in one pair of quotes.")
    return "".join(map(_plain, units[1:-1]))


def items(text: str, separator: str = ",") -> list[str]:
    """The values of a list; empty ones are left out."""
    return [value for part in split(text, separator) if (value := unquote(part).strip())]


def quote(value: str, special: str) -> str:
    """`value` as one item: as it is, or in quotes where it holds quotes, outer blanks or one of `special`."""
    if value and value == value.strip() and not any(c in value for c in (*special, *QUOTES)):
        return value
    mark = next((q for q in QUOTES if q not in value), "'")
    return mark + value.replace(mark, f"\\{mark}") + mark


def quotable(value: str) -> bool:
    r"""Whether `quote` can write the value: a backslash before a quote, or one at the end, would be read as `\'`."""
    units = list(_units(value))
    return not any(len(u) == 2 and u[1] in QUOTES for u in units) and (not units or units[-1] != "\\")


def _units(text: str) -> Iterator[str]:
    """Characters, and pairs of a backslash and the character after it."""
    rest = iter(text)
    for char in rest:
        yield char + next(rest, "") if char == "\\" else char


def _plain(unit: str) -> str:
    return unit[1] if len(unit) == 2 and unit[1] in QUOTES else unit
