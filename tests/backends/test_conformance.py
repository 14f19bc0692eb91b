"""The one suite that every format passes: `cases/weight_checks.py` and `layer_checks.py` say what is asked,
`cases/<backend>.py` of which formats and how good they must be.

`pytest tests/backends/test_conformance.py -k gguf` runs one backend; a format that cannot run here is one skip.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BY_BACKEND, CASES, DTYPES, layer_checks, weight_checks
from cases.case import ROUNDING
from cases.subject import Subject
from quantwire.quantizers.registry import availability, format_ids, get_entry, is_format
from quantwire.quantizers.spec import QuantSpec

SUBJECTS = [Subject(case) for case in CASES]
every_subject = pytest.mark.parametrize("subject", SUBJECTS, ids=lambda s: s.case.uri)
# float16 takes the ways of bfloat16 through the code, so that its rows are slow tests.
SLOW_DTYPES = (torch.float16,)
every_dtype = pytest.mark.parametrize(
    "dtype",
    [pytest.param(d, id=n, marks=[pytest.mark.slow] * (d in SLOW_DTYPES)) for n, d in DTYPES.items()],
)


# The list


def test_every_writable_format_has_a_case() -> None:
    missing = set(format_ids()) - {s.format_id for s in SUBJECTS}
    assert not missing, f"no conformance case for {', '.join(sorted(missing))}"


@pytest.mark.parametrize("backend", BY_BACKEND)
def test_cases_name_registered_formats_of_their_backend(backend: str) -> None:
    for case in BY_BACKEND[backend]:
        format_id = QuantSpec.from_uri(case.uri).format_id
        assert is_format(format_id)
        assert get_entry(format_id).backend == backend
        said = case.native_why or case.native is ROUNDING  # whose reason stands where it is defined
        assert not case.native or not case.native_dtypes or said, f"{case.uri}: native_why is empty"


def test_cases_are_distinct() -> None:
    assert [uri for uri, count in Counter(case.uri for case in CASES).items() if count > 1] == []


@pytest.mark.says_why
@every_subject
def test_runs_here(subject: Subject) -> None:
    state = availability(subject.format_id)
    if not state.works:
        pytest.skip(f"{subject.format_id}: {state.reason} {state.remedy}")
    assert (state.reason, state.remedy) == ("", "")


# What it makes of a weight


@every_dtype
@every_subject
def test_bit_equal_to_the_library(subject: Subject, dtype: torch.dtype) -> None:
    weight_checks.check_library(subject, dtype)


@every_dtype
@every_subject
def test_predicted_bytes_quality_and_refusals_over_odd_shapes(subject: Subject, dtype: torch.dtype) -> None:
    weight_checks.check_sizes(subject, dtype)


@every_subject
def test_plan_from_a_header(subject: Subject) -> None:
    weight_checks.check_plan(subject)


@every_dtype
@every_subject
def test_plain_tensors_under_declared_names(subject: Subject, dtype: torch.dtype) -> None:
    weight_checks.check_plain(subject, dtype)


@every_dtype
@every_subject
def test_non_contiguous_input(subject: Subject, dtype: torch.dtype) -> None:
    weight_checks.check_contiguity(subject, dtype)


@every_dtype
@every_subject
def test_zeros_are_exact(subject: Subject, dtype: torch.dtype) -> None:
    weight_checks.check_zeros(subject, dtype)


@every_dtype
@every_subject
def test_nan_and_inf_are_refused_by_name(subject: Subject, dtype: torch.dtype) -> None:
    weight_checks.check_damaged(subject, dtype)


@every_subject
def test_values_beyond_the_range_of_the_format_are_refused(subject: Subject) -> None:
    weight_checks.check_overflow(subject)


@every_subject
def test_other_dtypes_are_refused(subject: Subject) -> None:
    weight_checks.check_other_dtypes(subject)


@every_dtype
@every_subject
def test_expands_by_blocks_to_the_same_weight(subject: Subject, dtype: torch.dtype) -> None:
    weight_checks.check_form(subject, dtype)


@every_subject
def test_shapes_that_are_not_linear_are_refused(subject: Subject) -> None:
    weight_checks.check_not_linear(subject)


@every_dtype
@every_subject
def test_same_bits_whatever_the_global_state(subject: Subject, dtype: torch.dtype) -> None:
    weight_checks.check_determinism(subject, dtype)


# The layer


@every_dtype
@every_subject
def test_save_and_load_without_pickle(subject: Subject, dtype: torch.dtype, tmp_path: Path) -> None:
    layer_checks.check_save_and_load(subject, dtype, tmp_path / "layer.safetensors")


@every_dtype
@every_subject
def test_casts_move_the_bias_only(subject: Subject, dtype: torch.dtype) -> None:
    layer_checks.check_casts(subject, dtype)


@every_dtype
@every_subject
def test_to_meta_and_back(subject: Subject, dtype: torch.dtype) -> None:
    layer_checks.check_moves(subject, dtype)


@every_dtype
@every_subject
def test_deepcopy_and_pickle(subject: Subject, dtype: torch.dtype) -> None:
    layer_checks.check_copies(subject, dtype)


@every_dtype
@every_subject
def test_product_in_the_dtype_of_the_activations(subject: Subject, dtype: torch.dtype) -> None:
    layer_checks.check_products(subject, dtype)


@every_dtype
@every_subject
def test_kernel_is_named_and_is_what_runs(subject: Subject, dtype: torch.dtype) -> None:
    layer_checks.check_kernels(subject, dtype)


def quick_or_slow() -> list[Any]:
    """The cases that compile; past the first of each backend they are slow, since each takes about a second."""
    found: list[Any] = []
    for cases in BY_BACKEND.values():
        for i, case in enumerate(case for case in cases if case.compiles):
            found.append(pytest.param(Subject(case), id=f"{case.uri}-bf16", marks=[pytest.mark.slow] if i else []))
    return found


@pytest.mark.parametrize("subject", quick_or_slow())
def test_compiled_layer_gives_the_eager_result(subject: Subject) -> None:
    layer_checks.check_compile(subject, torch.bfloat16)


@every_subject
def test_gradients_reach_the_activations(subject: Subject) -> None:
    layer_checks.check_gradients(subject, torch.bfloat16)


@every_dtype
@every_subject
def test_native_layer(subject: Subject, dtype: torch.dtype) -> None:
    layer_checks.check_native(subject, dtype)
