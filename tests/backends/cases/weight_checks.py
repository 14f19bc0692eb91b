"""What every format must make of a weight: one function a property, raising AssertionError where a format falls short.

They are functions of a subject, apart from their parametrisation, so that the suite can also be shown to fail: on a
quantizer that was broken on purpose.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from quantwire.quantizers.apply import quantize_tensor
from quantwire.quantizers.errors import SpecError, WeightError
from quantwire.quantizers.formats import BACKENDS
from quantwire.quantizers.kernels.expand import dequantized
from quantwire.quantizers.plan import Action, Slot, make_plan
from quantwire.quantizers.report import measure
from quantwire.quantizers.spec import QuantSpec
from quantwire.quantizers.weight import TensorMeta
from torch import Tensor

from .case import DTYPES
from .subject import CPU, Subject, assert_same_tensors, relative, same, values

EQUAL_SHAPES = [(48, 64), (32, 256), (33, 192)]
ODD_SHAPES = [
    *((48, 96), (64, 256), (1, 256), (7, 160), (33, 64), (5, 34), (3, 33), (40, 24), (1, 34), (64, 33)),
    *((4096, 64), (320, 96), (0, 256), (64, 0)),
]
NOT_LINEAR = [(8, 4, 3, 3), (64,), (2, 64, 256)]
FEW = 2000  # values; below, a ratio scatters by some dB


def check_library(subject: Subject, dtype: torch.dtype) -> None:
    """The tensors and the dequantized weight are those of the library, bit for bit."""
    compared = 0
    for shape in EQUAL_SHAPES:
        if subject.refuse(shape, dtype):
            continue
        w = values(*shape, seed=3, dtype=dtype)
        tensors, restored = subject.case.library(w.clone())
        q = subject.quantize(w)
        assert_same_tensors(q.tensors, tensors, f"{shape}")
        got = subject.dequantize(q)
        assert (got.dtype, got.shape, restored.shape) == (torch.float32, shape, shape)
        assert torch.equal(got, restored.float()), (
            f"{shape}: dequantized, relative difference {relative(got, restored)}"
        )
        compared += 1
    assert compared, f"every one of {EQUAL_SHAPES} is refused"


def check_sizes(subject: Subject, dtype: torch.dtype) -> None:
    """Each odd shape works as predicted from the header, or is refused from it."""
    shapes = list(dict.fromkeys([*ODD_SHAPES, subject.case.shape, *(s for s in subject.case.refused if len(s) == 2)]))
    refused = {shape: reason for shape in shapes if (reason := subject.refuse(shape, dtype)) is not None}
    assert subject.case.shape not in refused, refused[subject.case.shape]
    for shape in shapes:
        if shape in refused:
            check_refusal(subject, shape, dtype, refused[shape])
        else:
            check_size(subject, shape, dtype)
    for shape, reason in subject.case.refused.items():
        got = subject.refuse(shape, dtype)
        assert got is None if not reason else (got or "").startswith(reason), f"{shape}: {got}"


def check_refusal(subject: Subject, shape: tuple[int, ...], dtype: torch.dtype, reason: str) -> None:
    """The reason names a dimension, and comes before any value is read: a meta tensor has none."""
    n, k = shape
    assert re.search(rf"\bN={n}\b|\bK={k}\b", reason), f"{shape}: names neither N={n} nor K={k}: {reason}"
    expected = re.escape(f"'w.weight': {subject.format_id}: {reason}.")
    with pytest.raises(SpecError, match=f"^{expected}"):
        quantize_tensor("w.weight", torch.empty(shape, dtype=dtype, device="meta"), subject.spec)


def check_size(subject: Subject, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    w = values(*shape, dtype=dtype)
    before = w.clone()
    q = subject.quantize(w)
    assert same(w, before), f"{shape}: the input was modified"
    predicted = subject.quantizer.predict_nbytes(subject.spec, TensorMeta("w.weight", shape, dtype))
    real = sum(t.numel() * t.element_size() for t in q.tensors.values())
    assert (real, q.nbytes) == (predicted, predicted), f"{shape}: {real} bytes, {predicted} predicted"
    assert (q.format_id, q.orig_shape, q.orig_dtype) == (subject.format_id, shape, dtype)
    restored = subject.dequantize(q)
    assert (restored.shape, restored.dtype) == (shape, torch.float32)
    entry = measure("w", "", w, restored, q.nbytes)
    least = subject.case.sqnr_db - (0 if w.numel() >= FEW else 3)
    if entry.sqnr_db is None:
        assert torch.equal(restored, w.float()), f"{shape}: no finite SQNR, and not exact"
    else:
        assert entry.sqnr_db >= least, f"{shape}: SQNR {entry.sqnr_db:.2f} dB, at least {least} expected"


def check_plan(subject: Subject) -> None:
    """The options of the URI survive it, and the plan predicts from a header what quantizing makes."""
    assert QuantSpec.from_uri(subject.spec.to_uri()) == subject.spec
    w = subject.weight(torch.bfloat16)
    slot = Slot(TensorMeta("blocks.0.w.weight", tuple(w.shape), w.dtype), linear=True)
    (decision,) = make_plan([slot], subject.spec, subject.quantizer).decisions
    q, entry = quantize_tensor("blocks.0.w.weight", w, subject.spec)
    assert (decision.action, decision.nbytes_out, entry.nbytes_out) == (Action.QUANTIZE, q.nbytes, q.nbytes)


def check_plain(subject: Subject, dtype: torch.dtype) -> None:
    """Plain tensors without gradients under declared names, and metadata that JSON holds."""
    w = subject.weight(dtype)
    q = subject.quantize(w)
    declared = next(b.tensors for b in BACKENDS if b.name == subject.backend)
    assert {"qdata"} <= set(q.tensors) <= {"qdata", *declared}
    for name, t in q.tensors.items():
        assert type(t) is Tensor, f"{name} is a {type(t).__name__}"
        assert not t.requires_grad, name
        assert t.device == CPU, name
        assert t.untyped_storage().data_ptr() != w.untyped_storage().data_ptr(), f"{name} is the input's own memory"
    assert json.loads(json.dumps(dict(q.meta))) == dict(q.meta)
    restored = subject.dequantize(q)
    for name, low in DTYPES.items():
        got = subject.dequantize(q, low)
        assert (got.dtype, got.shape) == (low, w.shape), name
        assert relative(got, restored) <= 0.005, f"dequantized to {name}"  # bfloat16 keeps 8 bits


def check_contiguity(subject: Subject, dtype: torch.dtype) -> None:
    """A transposed and a strided view give what their copies give."""
    n, k = subject.case.shape
    for w in (values(k, n, dtype=dtype).T, values(n, 2 * k, dtype=dtype)[:, ::2]):
        assert not w.is_contiguous()
        assert_same_tensors(subject.quantize(w).tensors, subject.quantize(w.contiguous()).tensors, "not contiguous")


def check_zeros(subject: Subject, dtype: torch.dtype) -> None:
    w = subject.weight(dtype)
    w[3] = 0
    restored = subject.dequantize(subject.quantize(w))
    empty = subject.dequantize(subject.quantize(torch.zeros_like(w)))
    assert torch.isfinite(restored).all()
    assert torch.isfinite(empty).all()
    if subject.case.zeros_exact:
        assert not restored[3].any(), "a row of zeros is not zeros"
        assert not empty.any(), "a weight of zeros is not zeros"


def check_damaged(subject: Subject, dtype: torch.dtype) -> None:
    for bad in (math.nan, math.inf, -math.inf):
        w = subject.weight(dtype)
        w[1, 5] = w[2, 6] = bad
        with pytest.raises(WeightError, match=rf"^'a\.b\.weight': 2 of {w.numel()} values are nan or inf\."):
            quantize_tensor("a.b.weight", w, subject.spec)


def check_other_dtypes(subject: Subject) -> None:
    for dtype in (torch.int8, torch.float8_e4m3fn, torch.float64):
        with pytest.raises(WeightError, match=rf"^'w': dtype is {dtype}, expected float32, float16 or bfloat16\."):
            quantize_tensor("w", torch.ones(subject.case.shape).to(dtype), subject.spec)


def check_overflow(subject: Subject) -> None:
    """A value of 1e8 is refused where the format has no room for it, and kept to within half where it has."""
    w = subject.weight(torch.float32)
    w[1, 5] = 1e8
    if subject.case.overflow:
        said = r" gives non-finite values; the weight exceeds its range\.|: values from .* exceed what"
        expected = rf"^'w': {subject.format_id}({said})"
        with pytest.raises(WeightError, match=expected):
            quantize_tensor("w", w, subject.spec)
        return
    q, _ = quantize_tensor("w", w, subject.spec)
    assert abs(float(subject.dequantize(q)[1, 5]) / 1e8 - 1) < 0.5


def check_not_linear(subject: Subject) -> None:
    for shape in NOT_LINEAR:
        if shape not in subject.case.refused:
            assert subject.refuse(shape, torch.bfloat16) == f"shape {shape} is not (N, K)"
            with pytest.raises(SpecError, match=rf"^'w': {subject.format_id}: shape {re.escape(str(shape))} is not"):
                quantize_tensor("w", torch.empty(shape, dtype=torch.bfloat16, device="meta"), subject.spec)


def check_form(subject: Subject, dtype: torch.dtype) -> None:
    """The expansion by blocks gives the weight that `dequantize` gives, at every shape that has one."""
    seen = 0
    for shape in ((48, 64), (64, 256), (33, 192), (16, 2048)):
        if subject.refuse(shape, dtype):
            continue
        q = subject.quantize(values(*shape, seed=5, dtype=dtype))
        form = subject.quantizer.form(q)
        if form is not None:
            seen += 1
            assert form.shape == shape
            # Libraries that compute in the dtype of the scales round there: bfloat16, or float16.
            assert relative(dequantized(form, torch.float32), subject.dequantize(q)) <= 0.006, shape
    if seen == 0:
        kernel = subject.quantizer.kernel(subject.quantized(dtype), CPU, dtype, 64)
        assert "expand" not in kernel.name


def check_determinism(subject: Subject, dtype: torch.dtype) -> None:
    """The same bits whatever the global generator and the default dtype are, and the generator untouched."""
    w = subject.weight(dtype)
    first = subject.quantize(w)
    restored = subject.dequantize(first)
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        q = subject.quantize(w)
        assert torch.equal(torch.random.get_rng_state(), before), "the global generator was used or seeded"
        assert_same_tensors(q.tensors, first.tensors, f"again, seed {seed}")
        assert dict(q.meta) == dict(first.meta)
    with default_dtype(torch.bfloat16):
        q = subject.quantize(w)
        again = subject.dequantize(first)
    assert_same_tensors(q.tensors, first.tensors, "default dtype bfloat16")
    assert same(again, restored), "dequantizing depends on the default dtype"


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
