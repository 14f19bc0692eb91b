"""What is wrong in the values of tensors: nan and inf, and the same content under two names.

Small tensors are always read, larger ones only when asked for. Each is read in pieces, so memory stays small.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

from .faults import Fault
from .model_file import Entry, ModelFile
from .pieces import Pieces
from .schemes.scan import Scan

if TYPE_CHECKING:
    from torch import Tensor

SMALL_NBYTES = 1 << 20
# Shorter ones are alike by chance.
MIN_DUPLICATE_NBYTES = 256
# Buffers that are added to attention's scores: -inf hides a place.
_MASK = re.compile(r"mask|causal")
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0")


def not_finite(file: ModelFile, scan: Scan, deep: bool) -> Iterator[Fault]:
    """nan and inf in scales, plain tensors and fp8 weights."""
    scales = {n for layer in scan.layers.values() for role, n in layer.tensors.items() if role != "qdata"}
    with Pieces() as pieces:
        for entry in _looked_at(file, deep):
            if entry.dtype not in FLOATS:
                continue
            bad, first = _count(pieces, entry)
            if not bad:
                continue
            kind = "a scale" if entry.name in scales else "a tensor"
            text = (
                f"'{entry.name}', {kind} of {entry.numel} values, has {bad} that are nan or inf, the first at {first}."
            )
            yield Fault("not-finite", entry.name, text, "Every image is black or noise: nan spreads through the model.")


def duplicates(file: ModelFile, deep: bool) -> Iterator[Fault]:
    """Tensors with the same content under several names. Those that hold one value all over do not count."""
    seen: dict[tuple[str, tuple[int, ...], bytes], str] = {}
    counts: dict[tuple[str, tuple[int, ...]], int] = {}
    looked = [e for e in _looked_at(file, deep) if e.nbytes >= MIN_DUPLICATE_NBYTES]
    for entry in looked:
        counts[entry.dtype, entry.shape] = counts.get((entry.dtype, entry.shape), 0) + 1
    with Pieces() as pieces:
        for entry in looked:
            if counts[entry.dtype, entry.shape] < 2:
                continue
            digest = _digest(pieces, entry)
            if digest is None:
                continue
            other = seen.setdefault((entry.dtype, entry.shape, digest), entry.name)
            if other != entry.name:
                text = f"'{entry.name}' has the same content as '{other}'."
                effect = "Loads; takes the place twice. Right where a model ties its weights."
                yield Fault("duplicate-tensor", entry.name, text, effect, fatal=False)


def _looked_at(file: ModelFile, deep: bool) -> Iterator[Entry]:
    for entry in file.entries.values():
        if entry.nbytes and (deep or entry.nbytes <= SMALL_NBYTES):
            yield entry


def _count(pieces: Pieces, entry: Entry) -> tuple[int, int]:
    """(how many values are nan or inf, index of the first); a mask may hold -inf."""
    import torch

    bad, first, at = 0, -1, 0
    mask = _MASK.search(entry.name.rpartition(".")[2]) is not None
    for piece in pieces.flat(entry):
        wide = piece if piece.element_size() > 1 else piece.float()
        wrong = ~cast("Tensor", cast(Any, torch).isfinite(wide))
        if mask:
            wrong &= wide != float("-inf")
        found = int(wrong.sum())
        if found and first < 0:
            first = at + int(wrong.int().argmax())
        bad, at = bad + found, at + piece.numel()
    return bad, first


def _digest(pieces: Pieces, entry: Entry) -> bytes | None:
    """Of its bytes; None where all values are the same."""
    width = max(1, entry.nbytes // max(entry.numel, 1))
    hashed, same, value = hashlib.blake2b(digest_size=16), True, b""
    for data in pieces.bytes_of(entry):
        value = value or bytes(data[:width])
        same = same and data[width:] == data[:-width] and bytes(data[:width]) == value
        hashed.update(data)
    return None if same else hashed.digest()
