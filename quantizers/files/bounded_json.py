"""JSON from files that nobody vouches for, in bounded memory and time.

`json.loads` makes up to 100 times as many bytes of objects as a text has (`[[],[],...`), takes time that grows with
the square of a number's digits in older Pythons, and keeps the last of two equal keys without a word. So the memory is
estimated before, from how often the signs of JSON's structure occur. Signs inside strings count too, which errs to the
safe side: texts that are mostly strings, as training metadata is, stay far below the limit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, cast

MAX_NBYTES = 192 << 20  # of objects and text; what is made of a header of this size stays below 256 MiB with them
MAX_DIGITS = 20  # 2**64 - 1 has 20
# Bytes that a sign stands for at most, as measured with CPython 3.10 to 3.13.
_COSTS = {b"{": 240, b"[": 72, b":": 60, b",": 24, b'"': 30}
_LONG_NUMBER = re.compile(rb"\d{%d}" % (MAX_DIGITS + 1))
_FOUR_BYTES = re.compile(rb"[\xf0-\xf4]")


class DuplicateKey(ValueError):
    """An object has a key twice."""


def estimate_nbytes(raw: bytes) -> int:
    """Memory that the objects of a JSON text and the text itself take at most."""
    width = 1 if raw.isascii() else 4 if _FOUR_BYTES.search(raw) else 2
    # A string that holds an escape is as wide as its widest character, and is joined from pieces.
    strings = 5 if b"\\u" in raw else width
    return len(raw) * (width + strings) + sum(raw.count(sign) * cost for sign, cost in _COSTS.items())


def loads(raw: bytes, limit: int = MAX_NBYTES, duplicate: Callable[[str], None] | None = None) -> object:
    """Parse JSON in UTF-8.

    Args:
        limit: bytes that the result may take.
        duplicate: called with a key that an object has twice, whose last value is kept; None raises.
    Raises:
        ValueError: no JSON, no UTF-8, too large, nested too deep, or DuplicateKey; the message says which.
    """
    if (nbytes := estimate_nbytes(raw)) > limit:
        raise ValueError(f"JSON of {len(raw)} bytes that would take {nbytes >> 20} MiB, expected at most {limit >> 20}")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            seen: set[str] = set()
            for key, _ in items:
                if key in seen:
                    if duplicate is None:
                        raise DuplicateKey(f"the key {key[:100]!r} stands twice")
                    duplicate(key)
                seen.add(key)
        return found

    # A function of ours called for every number doubles the time of a header; json's own is called from C.
    parse_int = _int if _LONG_NUMBER.search(raw) else None
    try:
        text = raw.decode()
        del raw
        return cast(object, json.loads(text, object_pairs_hook=pairs, parse_int=parse_int, parse_constant=_refuse))
    except UnicodeDecodeError as err:
        raise ValueError(f"not UTF-8 (byte {err.start})") from err
    except RecursionError as err:
        raise ValueError("nested too deep") from err
    except DuplicateKey:
        raise
    except ValueError as err:
        raise ValueError(f"not JSON ({err})") from err


def _int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
