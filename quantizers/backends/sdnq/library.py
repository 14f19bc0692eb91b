"""The door to the sdnq package: imported here only, with compiling off, and spoken to in plain tensors."""

# pyright: reportMissingTypeStubs=false
# sdnq ships neither annotations that pyright can follow nor stubs.

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from ...weight import QuantizedWeight

COMPILE_SWITCH = "SDNQ_USE_TORCH_COMPILE"
# Our name of a tensor -> the library's.
NAMES = {
    "qdata": "weight",
    "scale": "scale",
    "zero_point": "zero_point",
    "svd_up": "svd_up",
    "svd_down": "svd_down",
}
# Constructor arguments of the library's dequantizer that differ from weight to weight and are JSON as they are.
PLAIN = (
    "weights_dtype",
    "quantized_matmul_dtype",
    "group_size",
    "hadamard_group_size",
    "svd_rank",
    "svd_steps",
    "use_quantized_matmul",
    "re_quantize_for_matmul",
    "use_hadamard",
)
SHAPES = ("result_shape", "quantized_weight_shape", "quantized_scale_shape", "quantized_zero_point_shape")


def library() -> Any:
    """The sdnq package, untyped: it ships no type information.

    Raises:
        ImportError: it is not installed.
    """
    if "sdnq" not in sys.modules:
        _first_import()
    import sdnq

    return cast(Any, sdnq)


def _first_import() -> None:
    ours = COMPILE_SWITCH not in os.environ
    os.environ.setdefault(COMPILE_SWITCH, "0")
    try:
        importlib.import_module("sdnq")
    finally:
        if ours:  # it is read at import only, and processes started from here decide for themselves
            os.environ.pop(COMPILE_SWITCH, None)


def to_meta(dequantizer: Any) -> dict[str, Any]:
    """What a dequantizer knows of its weight, as JSON values."""
    meta: dict[str, Any] = {name: getattr(dequantizer, name) for name in PLAIN}
    shapes = {name: getattr(dequantizer, name) for name in SHAPES}
    return meta | {name: None if shape is None else list(shape) for name, shape in shapes.items()}


def dequantizer_of(q: QuantizedWeight) -> Any:
    """The library's dequantizer of a weight, rebuilt from its meta."""
    n, k = q.orig_shape
    shapes = {name: None if q.meta[name] is None else torch.Size(q.meta[name]) for name in SHAPES}
    return library().quantizer.SDNQDequantizer(
        result_dtype=q.orig_dtype,
        original_shape=torch.Size((n, k)),
        original_stride=(k, 1),
        layer_class_name="Linear",
        **{name: q.meta[name] for name in PLAIN},
        **shapes,
    )


def to_ours(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """The library's tensors that are there, under our names."""
    given = {name: tensors.get(theirs) for name, theirs in NAMES.items()}
    return {name: t for name, t in given.items() if t is not None}


def to_theirs(q: QuantizedWeight) -> dict[str, Tensor]:
    """Our tensors under the library's names."""
    return {NAMES[name]: t for name, t in q.tensors.items()}


def layer_like(q: QuantizedWeight, bias: Tensor | None) -> SimpleNamespace:
    """What the library's forward functions read of a layer: its tensors, absent ones None, and its dequantizer."""
    absent = dict.fromkeys(library().quantizer.sdnq_keys)
    return SimpleNamespace(**(absent | to_theirs(q)), bias=bias, sdnq_dequantizer=dequantizer_of(q))
