"""Sizes as users write them."""

from __future__ import annotations

import re

from ..errors import SpecError

GIB = 2**30
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([kmgt]?)(i?)b?\s*", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_size(text: str, default: str = "") -> int:
    """Bytes of `6.5GB` (10^9 each), `6.5GiB` (2^30 each), `700M`, `1024`.

    Args:
        default: the unit of a bare number, such as `GB`.
    Raises:
        SpecError: no size, or none above zero.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        below = " above zero" if text.lstrip().startswith("-") else ""
        raise SpecError(f"'{text}' is no size{below}.\nWrite a number and a unit: 6.5GB, 6.5GiB, 700MB.")
    number, prefix, binary = match.groups()
    if not prefix and not text.strip().lower().endswith("b") and default:
        return parse_size(f"{number}{default}")
    nbytes = round(float(number) * (1024 if binary else 1000) ** _POWERS[prefix.lower()])
    if not nbytes:
        raise SpecError(f"'{text}' is a size of zero bytes.\nWrite a number above zero and a unit: 6.5GB, 6.5GiB.")
    return nbytes


def parse_vram(text: str) -> int:
    """Bytes of a device's memory: `8`, `8GB` and `8GiB` are all 8 x 2^30, since that is what an 8 GB card has.

    Raises:
        SpecError: no size, or none above zero.
    """
    nbytes = parse_size(text, "GB")
    return nbytes if re.search(r"ib?\s*$", text, re.IGNORECASE) else round(nbytes / 1e9 * GIB)


def show_size(nbytes: float) -> str:
    """`7.52 GiB`, `31.0 MiB`, `512 B`."""
    for size, unit, digits in ((GIB, "GiB", 2), (2**20, "MiB", 1), (1024, "KiB", 1)):
        if abs(nbytes) >= size:
            return f"{nbytes / size:.{digits}f} {unit}"
    return f"{nbytes:.0f} B"
