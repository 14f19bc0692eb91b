"""Quantize a weight a few rows at a time where that gives the same bits, since libraries take several times its size.

    bnb-*, torchao-*, nncf-*         no more than a block or a byte goes over into the next row, and none out of a slab;
                                     nf4 and fp4 without double quantization
    quanto-*                         8 bit as these; 4 and 2 bit pack group row i with i + G/2 (i + G/4, ...), so a slab
                                     takes rows from all planes
    sdnq-*                           without low-rank factors, the dynamic search and the quantized product
    comfy-*-convrot                  a rotation stays within a row

Formats with one scale for all rows, and those that pad rows, cut weights up themselves (`backends/`). A codebook of the
whole weight (`comfy-w4a8`) needs all of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..registry import get_entry, require
from ..spec import QuantSpec
from ..weight import QuantizedWeight
from .row_layouts import SdnqLayout
from .stream import trim

SLAB_NUMEL = 1 << 20
TRIM_NUMEL = 1 << 23
ROWS = 128  # a slab has a multiple of so many, which every packing and every rotation divides
BACKENDS = ("torchao", "nncf", "quanto", "sdnq")
FORMATS = ("bnb-int8", "bnb-nf4", "bnb-fp4", "comfy-int8-convrot", "comfy-w4a4-convrot")
PLANES = {"quanto-qint4": 2, "quanto-qint2": 4}
LARGEST_BLOCK = 4096  # of bitsandbytes, whose blocks run on over rows
WHOLE = ("use-svd", "dynamic", "quantized-matmul", "bits4-use-double-quant")  # options that look at more than a row


def quantize_slabs(w: Tensor, spec: QuantSpec) -> QuantizedWeight:
    """What the format's `quantize` makes of a weight (N, K), bit for bit."""
    quantizer = require(spec.format_id)
    step = slab_rows(spec, tuple(w.shape))
    if not step or w.device.type != "cpu":
        return quantizer.quantize(w, spec)
    if spec.format_id in PLANES:
        return _planes(w, spec, step)
    return _below((quantizer.quantize(w[start : start + step], spec) for start in range(0, len(w), step)), w)


def slab_rows(spec: QuantSpec, shape: tuple[int, ...]) -> int:
    """Rows at a time; 0 where the weight has to be quantized at once, or is small."""
    n, k = shape
    apart = spec.format_id in FORMATS or get_entry(spec.format_id).backend in BACKENDS
    if not apart or any(spec.option(name, False) for name in WHOLE) or n * k <= SLAB_NUMEL:
        return 0
    planes = PLANES.get(spec.format_id, 1)
    step = max(1, SLAB_NUMEL // (k * planes * ROWS)) * ROWS
    fits = n % (planes * ROWS) == 0 and (ROWS * k) % LARGEST_BLOCK == 0
    return step if fits and step * planes < n else 0


def _below(slabs: Iterator[QuantizedWeight], w: Tensor) -> QuantizedWeight:
    """Slabs whose tensors are parts of the whole ones along the first axis, put where they belong at once."""
    tensors: dict[str, Tensor] = {}
    at = 0
    first: QuantizedWeight | None = None
    for slab in slabs:
        rows = slab.orig_shape[0]
        for name, t in slab.tensors.items():
            if first is None:
                tensors[name] = t.new_empty((t.shape[0] * len(w) // rows, *t.shape[1:]))
            start = at * len(tensors[name]) // len(w)
            tensors[name][start : start + len(t)] = t
        first = first or slab
        at += rows
        _trim(at * w.shape[1], rows * w.shape[1])
    assert first is not None
    meta = _whole_meta(first, len(w))
    return QuantizedWeight(first.format_id, tensors, tuple(w.shape), w.dtype, meta)


def _whole_meta(slab: QuantizedWeight, n: int) -> dict[str, Any]:
    """The meta of the whole weight, whose shapes sdnq notes there."""
    meta = dict(slab.meta)
    for key in SdnqLayout().follows_shape:
        if isinstance(meta.get(key), list):
            meta[key] = [meta[key][0] * n // slab.orig_shape[0], *meta[key][1:]]
    return meta


def _trim(done: int, slab: int) -> None:
    """Libraries take and free several blocks for each slab, which glibc keeps for itself."""
    if done // TRIM_NUMEL > (done - slab) // TRIM_NUMEL:
        trim()


def _planes(w: Tensor, spec: QuantSpec, step: int) -> QuantizedWeight:
    """Rows [i, i + step) of every plane are packed together: their bytes are beside one another."""
    quantizer, planes, n = require(spec.format_id), PLANES[spec.format_id], len(w)
    plane = n // planes
    made: dict[str, Tensor] = {}
    meta: Mapping[str, Any] = {}
    for start in range(0, plane, step):
        stop = min(start + step, plane)
        slab = quantizer.quantize(torch.cat([w[i * plane + start : i * plane + stop] for i in range(planes)]), spec)
        meta = slab.meta
        for name, t in slab.tensors.items():
            if name not in made:
                made[name] = t.new_empty((len(t) * plane // (stop - start), *t.shape[1:]))
            if name == "qdata":
                at = start * len(made[name]) // plane
                made[name][at : at + len(t)] = t
            else:  # one scale for each group, plane after plane
                whole, part = made[name].view(planes, -1, 1), t.view(planes, -1, 1)
                at = start * whole.shape[1] // plane
                whole[:, at : at + part.shape[1]] = part
        _trim(stop * planes * w.shape[1], (stop - start) * planes * w.shape[1])
    return QuantizedWeight(spec.format_id, made, tuple(w.shape), w.dtype, meta)
