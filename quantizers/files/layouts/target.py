"""Tensors of one layout, each made of rows of another layout's tensors.

Layouts name the same weights differently, and some keep as one matrix what others keep as several (q, k and v), or in
another order of rows (scale and shift). All of that works on rows, that is on the first axis, so it works on quantized
weights as well (`rows`): no value is changed by a conversion, only moved. The one exception is `add`, for the norms of
gemma, which llama.cpp stores plus one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

from ...errors import FileError, WeightError
from ...meta import TensorMeta

if TYPE_CHECKING:  # a header can be looked at without torch
    import torch
    from torch import Tensor

    from ...weight import QuantizedWeight

    Value = Tensor | QuantizedWeight


@dataclass(frozen=True)
class Piece:
    """Rows of one source tensor.

    Attributes:
        source: its name, with the file's prefix.
        start, stop: rows [start, stop) of the first axis; None is from the first, to the last.
        swap: exchange the two halves of those rows.
        heads: reorder those rows for rotary embeddings over so many heads: positive from halves (x0, x1, ..., y0, y1,
            ...) to pairs (x0, y0, x1, y1, ...) in each head, as llama.cpp stores q and k; negative back.
        add: added to every value, in float32, which the target then has; for plain tensors only.
    """

    source: str
    start: int | None = None
    stop: int | None = None
    swap: bool = False
    heads: int = 0
    add: float = 0.0

    @property
    def whole(self) -> bool:
        """Whether it is the source as it is."""
        return self.start is None and self.stop is None and not self.swap and not self.heads and not self.add

    def rows(self, total: int) -> int:
        """How many rows it takes of a source that has `total`."""
        return len(range(total)[self.start : self.stop])


@dataclass(frozen=True)
class Target:
    """One tensor to make: its pieces, one after the other along the first axis.

    Attributes:
        name: in the new layout.
        shape: logical shape.
        dtype: of the values; pieces of other dtypes are cast.
        pieces: at least one.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]

    @property
    def meta(self) -> TensorMeta:
        return TensorMeta(self.name, self.shape, self.dtype)


def target(name: str, pieces: tuple[Piece, ...], metas: Mapping[str, TensorMeta]) -> Target:
    """A target with the shape and dtype that follow from its sources.

    Raises:
        FileError: a source is missing, has too few rows, or does not fit the others.
    """
    import torch

    shapes: list[tuple[int, ...]] = []
    dtype = None
    for piece in pieces:
        meta = metas.get(piece.source)
        if meta is None:
            raise FileError(f"'{piece.source}': missing, and '{name}' is made of it.\nThe file is not complete.")
        kind = torch.float32 if piece.add else meta.dtype
        dtype = kind if dtype is None else promoted(dtype, kind)
        shapes.append(_cut_shape(piece, meta.shape))
    if dtype is None:
        raise FileError(f"'{name}': made of nothing.")
    if len(shapes) == 1:
        return Target(name, shapes[0], dtype, pieces)
    if any(not s or s[1:] != shapes[0][1:] for s in shapes):
        shown = ", ".join(f"'{p.source}' {s}" for p, s in zip(pieces, shapes, strict=True))
        raise FileError(f"'{name}': its parts do not fit together: {shown}.")
    return Target(name, (sum(s[0] for s in shapes), *shapes[0][1:]), dtype, pieces)


def promoted(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """The dtype that holds the values of two. 8-bit floats, which torch does not promote, fit into all others."""
    import torch

    if a == b:
        return a
    wide = [t for t in (a, b) if not t.is_floating_point or t.itemsize > 1]
    if len(wide) == 1 and wide[0].is_floating_point:
        return wide[0]
    return torch.promote_types(*wide) if len(wide) == 2 else torch.bfloat16


def _cut_shape(piece: Piece, shape: tuple[int, ...]) -> tuple[int, ...]:
    if piece.whole:
        return shape
    if not shape:
        raise FileError(f"'{piece.source}': a single value, where rows were expected.")
    end = shape[0] if piece.stop is None else piece.stop
    rows = piece.rows(shape[0])
    if end > shape[0] or rows != end - (piece.start or 0):
        raise FileError(f"'{piece.source}': {shape[0]} rows, expected at least {end}.")
    if piece.swap and rows % 2:
        raise FileError(f"'{piece.source}': {rows} rows cannot be halved.")
    if piece.heads and rows % (2 * abs(piece.heads)):
        raise FileError(f"'{piece.source}': {rows} rows are not {abs(piece.heads)} heads of an even width.")
    return (rows, *shape[1:])


@overload
def apply(piece: Piece, value: Tensor) -> Tensor: ...
@overload
def apply(piece: Piece, value: QuantizedWeight) -> QuantizedWeight: ...
def apply(piece: Piece, value: Value) -> Value:
    """The rows that a piece takes of its source; a view where that is possible.

    Args:
        value: the source.
    Raises:
        FileError: the rows are not there.
        WeightError: a quantized weight whose rows cannot be moved.
    """
    from torch import Tensor

    if piece.whole:
        return value
    if isinstance(value, Tensor):
        _cut_shape(piece, tuple(value.shape))
        return _moved(piece, value)
    if piece.add:
        raise WeightError(f"'{piece.source}': {value.format_id} cannot be added to.\nKeep this tensor plain.")
    _cut_shape(piece, value.orig_shape)
    from ..rows import take_rows

    try:
        return take_rows(value, _order(piece, value.orig_shape[0]))
    except WeightError as err:
        raise WeightError(f"'{piece.source}': {err}") from err


def assemble(target: Target, read: Callable[[str], Value]) -> Value:
    """Make a target.

    Args:
        read: source name -> tensor or quantized weight.
    Returns:
        a tensor (`target.shape`, `target.dtype`), possibly a view of the one source, or a quantized weight.
    Raises:
        FileError: a source is not as the target expects it.
        WeightError: quantized sources of several formats, or whose rows cannot be moved.
    """
    import torch
    from torch import Tensor

    parts = [apply(piece, read(piece.source)) for piece in target.pieces]
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if len(tensors) == len(parts):
        made: Value = tensors[0] if len(parts) == 1 else torch.cat([t.to(target.dtype) for t in tensors])
        made = made.to(target.dtype)
        shape = tuple(made.shape)
    else:
        made = _joined(target, parts)
        shape = made.orig_shape
    if shape != target.shape:
        raise FileError(f"'{target.name}': shape {shape}, expected {target.shape}.")
    return made


def _joined(target: Target, parts: list[Value]) -> QuantizedWeight:
    """Quantized parts below one another, in one format."""
    from ...weight import QuantizedWeight
    from ..rows import cat_rows

    quantized = [part for part in parts if isinstance(part, QuantizedWeight)]
    first = quantized[0]
    if len(parts) == 1:
        return first
    kinds = [part.format_id if isinstance(part, QuantizedWeight) else str(part.dtype) for part in parts]
    if len(set(kinds)) > 1:
        shown = ", ".join(f"'{p.source}' {kind}" for p, kind in zip(target.pieces, kinds, strict=True))
        raise WeightError(
            f"'{target.name}': its parts are in several formats, which cannot be one weight: {shown}.\n"
            "Convert the file with one format for them."
        )
    try:
        return cat_rows(quantized)
    except WeightError as err:
        raise WeightError(f"'{target.name}': {err}") from err


def _order(piece: Piece, total: int) -> slice | Tensor:
    """Which rows a piece takes, in their order."""
    import torch

    if piece.swap or piece.heads:
        return _moved(piece, torch.arange(total, device="cpu"))
    return slice(piece.start, piece.stop)


def _moved(piece: Piece, tensor: Tensor) -> Tensor:
    import torch

    part = tensor[piece.start : piece.stop]
    rows = part.shape[0]
    if piece.swap:
        part = torch.cat([part[rows // 2 :], part[: rows // 2]])
    if piece.heads:
        heads = abs(piece.heads)
        half = rows // heads // 2
        grouped = (heads, 2, half) if piece.heads > 0 else (heads, half, 2)
        part = part.reshape(*grouped, *part.shape[1:]).transpose(1, 2).reshape(part.shape)
    return part.float() + piece.add if piece.add else part
