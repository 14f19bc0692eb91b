"""Rows of quantized weights: taken, rearranged and joined without being dequantized.

What belongs to a row is found in each format (`row_layouts`), moved, and put back into the format's own order. The
numbers stay exactly the same: dequantizing what comes out gives, bit for bit, the rows of the dequantized weight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import WeightError
from ..provenance import SPEC_KEY
from ..weight import QuantizedWeight
from .row_layouts import Parts, RowLayout, layout_of, refusal

# A weight with one scale for all of it -> the format that holds the same numbers with a scale for each row.
BY_ROW = {f"comfy-fp8-{kind}": f"quanto-qfloat8-{kind}" for kind in ("e4m3fn", "e5m2")}


def take_rows(weight: QuantizedWeight, rows: slice | Tensor) -> QuantizedWeight:
    """Some rows of a weight, in any order.

    Args:
        rows: a slice of step 1, whose tensors are views where the format allows it, or int64 indices (any number of
            them, 0 <= index < N) on any device.
    Raises:
        WeightError: the format does not keep the rows of this shape apart, with what to do.
    """
    n = _count(weight)
    if isinstance(rows, slice):
        start, stop, step = rows.indices(n)
        if step != 1:
            raise WeightError(f"{weight.format_id}: rows can be taken by a slice of step 1, got step {step}.")
        rows = slice(start, max(start, stop))
        if rows == slice(0, n):
            return weight
    elif rows.dim() != 1 or (rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= n)):
        raise WeightError(f"{weight.format_id}: row indices must be one list of numbers from 0 to {n - 1}.")
    layout = layout_of(weight)
    return layout.join(layout.split(weight, rows))


def cat_rows(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Weights below one another, in the format that they share.

    Where each of them has one scale for all of it, and not the same one, the result has a scale for each row: for
    `comfy-fp8-*` in the format `quanto-qfloat8-*`, whose numbers are the same.

    Args:
        weights: at least one.
    Raises:
        WeightError: of several formats, shapes or settings, or a format that cannot hold them as one weight.
    """
    first = weights[0]
    if len(weights) == 1:
        return first
    _refuse_mixture(weights)
    layout = layout_of(first)
    parts = [layout.split(w, slice(0, _count(w))) for w in weights]
    scalars = _scalars(layout, parts)
    tensors = {name: _cat(name, first, [p.rows[name] for p in parts]) for name in parts[0].rows}
    joined = dataclasses.replace(
        parts[0],
        rows=tensors,
        scalars=scalars,
        shared=_shared(layout, parts, tensors),
        n=sum(p.n for p in parts),
        orig_dtype=_widest([w.orig_dtype for w in weights]),
    )
    made = layout.join(joined)
    if joined.format_id in BY_ROW and "scale" in tensors:
        return QuantizedWeight(BY_ROW[first.format_id], made.tensors, made.orig_shape, made.orig_dtype)
    return made


def _count(weight: QuantizedWeight) -> int:
    if not weight.orig_shape:
        raise refusal(weight, "a single value has no rows")
    return weight.orig_shape[0]


def _refuse_mixture(weights: Sequence[QuantizedWeight]) -> None:
    first = weights[0]
    formats = sorted({w.format_id for w in weights})
    if len(formats) > 1:
        raise WeightError(
            f"Weights in several formats cannot be one weight: {', '.join(formats)}.\nUse one format for all of them."
        )
    if len({w.orig_shape[1:] for w in weights}) > 1:
        shown = ", ".join(str(w.orig_shape) for w in weights)
        raise WeightError(f"{first.format_id}: weights of different row lengths cannot be joined: {shown}.")
    settings = [_settings(w) for w in weights]
    other = next((s for s in settings if s != settings[0]), None)
    if other is not None:
        keys = sorted(k for k in {*settings[0], *other} if settings[0].get(k) != other.get(k))
        shown = ", ".join(f"{k} {settings[0].get(k)} and {other.get(k)}" for k in keys)
        raise refusal(first, f"the parts were quantized with different settings: {shown}", "joined")


def _settings(weight: QuantizedWeight) -> dict[str, object]:
    """The meta that weights must share to be one."""
    without = {SPEC_KEY, *layout_of(weight).follows_shape}
    return {key: value for key, value in weight.meta.items() if key not in without}


def _scalars(layout: RowLayout, parts: Sequence[Parts]) -> dict[str, Tensor]:
    """What stays one value for the whole weight; the rest becomes a value for each row, in the rows of `parts`."""
    first = parts[0]
    kept: dict[str, Tensor] = {}
    for name in sorted({name for p in parts for name in p.scalars}):
        values = [p.scalars.get(name) for p in parts]
        if all(v is not None and _same(v, values[0]) for v in values):
            kept[name] = first.scalars[name]
            continue
        if not layout.scalars_by_row:
            shown = ", ".join(f"{float(v):g}" for v in values if v is not None)
            raise refusal(
                first.weight,
                f"it has one {name} for the whole weight, and that of the parts differs: {shown}",
                "joined",
            )
        for p in parts:
            if name in p.scalars:
                value = p.scalars[name]
                p.rows[name] = value.reshape(1, 1).expand(p.n, 1)
    return kept


def _shared(layout: RowLayout, parts: Sequence[Parts], rows: dict[str, Tensor]) -> Mapping[str, Tensor]:
    """Tables that all rows use."""
    first = parts[0]
    different = [name for name, t in first.shared.items() if any(not _same(p.shared.get(name), t) for p in parts)]
    return layout.merge(parts, different, rows) if different else first.shared


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a.dtype != b.dtype or a.numel() != b.numel():
        return False
    return torch.equal(_bits(a).reshape(-1), _bits(b).reshape(-1))


def _bits(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.uint8) if t.dim() else t.reshape(1).view(torch.uint8)


def _cat(name: str, weight: QuantizedWeight, tensors: list[Tensor]) -> Tensor:
    dtypes = {t.dtype for t in tensors}
    shapes = {t.shape[1:] for t in tensors}
    if len(dtypes) > 1 or len(shapes) > 1:
        shown = ", ".join(f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in tensors)
        raise refusal(weight, f"'{name}' of the parts differ in dtype or groups: {shown}", "joined")
    if tensors[0].element_size() > 1:
        return torch.cat(tensors)
    return torch.cat([t.contiguous().view(torch.uint8) for t in tensors]).view(tensors[0].dtype)


def _widest(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    found = dtypes[0]
    for dtype in dtypes[1:]:
        found = torch.promote_types(found, dtype)
    return found
