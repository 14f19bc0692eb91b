"""What is wrong in the values of tensors: nan and inf, and the same content under two names.

Small tensors are always read, larger ones only when asked for. Each is read in pieces, so memory stays small.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

from .faults import Fault
from .model_file import Entry, ModelFile
from .schemes.scan import Scan

if TYPE_CHECKING:
    from torch import Tensor

SMALL_NBYTES = 1 << 20
PIECE = 1 << 22  # values
# Shorter ones are alike by chance.
MIN_DUPLICATE_NBYTES = 256
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0")


def not_finite(file: ModelFile, scan: Scan, deep: bool) -> Iterator[Fault]:
    """nan and inf in scales, plain tensors and fp8 weights."""
    scales = {n for layer in scan.layers.values() for role, n in layer.tensors.items() if role != "qdata"}
    for entry in _looked_at(file, deep):
        if entry.dtype not in FLOATS:
            continue
        bad, first = _count(file.read(entry.name))
        if bad:
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
    for entry in looked:
        if counts[entry.dtype, entry.shape] < 2:
            continue
        digest = _digest(file, entry)
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


def _count(tensor: Tensor) -> tuple[int, int]:
    """(how many values are nan or inf, index of the first)."""
    import torch

    bad, first = 0, -1
    for at in range(0, tensor.numel(), PIECE):
        piece = tensor.reshape(-1)[at : at + PIECE]
        wrong = ~cast("Tensor", cast(Any, torch).isfinite(piece if piece.element_size() > 1 else piece.float()))
        found = int(wrong.sum())
        if found and first < 0:
            first = at + int(wrong.int().argmax())
        bad += found
    return bad, first


def _digest(file: ModelFile, entry: Entry) -> bytes | None:
    """Of its bytes; None where all values are the same."""
    import torch

    raw = file.read(entry.name).reshape(-1).view(torch.uint8)
    width = max(1, entry.nbytes // max(entry.numel, 1))
    hashed, same = hashlib.blake2b(digest_size=16), True
    for at in range(0, raw.numel(), PIECE):
        piece = raw[at : at + PIECE]
        same = same and torch.equal(piece[width:], piece[:-width])
        hashed.update(cast(Any, piece.numpy()))
    return None if same else hashed.digest()
