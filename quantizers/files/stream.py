"""Quantize a full-precision safetensors file tensor by tensor, so that the whole model is never in memory.

Each tensor is a map of its own, dropped when the next one comes: its pages leave the process with it. The plan is made
from the header. What is held at the peak is one tensor, its quantized form, its restored form in float32 (for the
report's SQNR) and whatever the format's library needs on the way.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import logging
import mmap
import os
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..apply import FLOAT_DTYPES, Progress, check_finite, quantize_tensor
from ..choices import OnFailure
from ..errors import FileError, QuantwireError, SpecError, WeightError
from ..plan import Action, Decision, QuantPlan, Slot, make_plan
from ..registry import require
from ..report import Entry, QuantReport
from ..spec import QuantSpec
from ..weight import TensorMeta
from .file_state import check_unchanged, file_state
from .quantized_file import DTYPES, Value, tensor_in
from .safetensors_header import read_safetensors_header

log = logging.getLogger(__name__)
TRIM_NBYTES = 1 << 18
# What quantized files of other tools hold beside the weights (suffixes of names).
QUANTIZED_SIGNS = (
    *(".comfy_quant", ".weight_scale", ".scale_weight", "scaled_fp8", ".absmax", ".quant_state.bitsandbytes__nf4"),
    *(".quant_state.bitsandbytes__fp4", ".SCB", ".weight_format", ".weight._data", ".weight._scale", "._weight_qdata"),
)


class TensorFile:
    """A safetensors file, opened by its header only.

    Attributes:
        path: the file.
        shapes: name -> tensor on the meta device, for code that asks for shapes and dtypes.
        state: of `file_state`, from before the header was read.

    Raises:
        FileError: missing, truncated, corrupt, with dtypes that torch does not have, or already quantized.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = file_state(path)
        self._header = read_safetensors_header(path)
        self.metadata: dict[str, str] = self._header.pop("__metadata__", {})
        self.shapes = {name: _on_meta(path, name, entry) for name, entry in self._header.items()}
        sign = next((n for n in self.shapes if n.endswith(QUANTIZED_SIGNS)), None)
        if sign is not None or "quantwire" in self.metadata:
            shown = f"it has '{sign}'" if sign else "by this pack"
            raise FileError(f"{path.name}: already quantized ({shown}).\nGive the full-precision file.")
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
        self._base = 8 + int(length)

    def check_unchanged(self) -> None:
        """Raises:
        FileError: the file is another one than when its header was read.
        """
        check_unchanged(self.path, self.state)

    def read(self, name: str) -> Tensor:
        """One tensor on a copy-on-write map of its own, which goes when the tensor does."""
        entry = self._header[name]
        start, end = (self._base + at for at in entry["data_offsets"])
        page = start - start % mmap.ALLOCATIONGRANULARITY
        try:
            with open(self.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if end > size:
                    raise FileError(f"{self.path.name}: changed while it was read: {size} bytes, expected {end}.")
                data = mmap.mmap(file.fileno(), max(1, end - page), access=mmap.ACCESS_COPY, offset=page)
        except (OSError, ValueError) as err:
            raise FileError(f"{self.path}: cannot be read: {err}.") from err
        return tensor_in(self.path, name, entry, data, self._base - page)


def _on_meta(path: Path, name: str, entry: dict[str, Any]) -> Tensor:
    if entry["dtype"] not in DTYPES:
        raise FileError(f"{path.name}: {name!r} has dtype {entry['dtype']}, which torch cannot hold.")
    return torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]], device="meta")


@dataclass(frozen=True)
class Part:
    """One tensor of the host's layout.

    Attributes:
        name: in that layout.
        source: tensor of the file that it comes from.
        shape: after the cut.
        dtype: in which it is quantized or kept.
        linear: whether it is the weight of a linear layer.
        rows: [start, stop) of the source's first axis; None is no bound.
        swap: exchange the two halves of the rows.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    linear: bool
    rows: tuple[int | None, int | None] = (None, None)
    swap: bool = False

    def cut(self, t: Tensor) -> Tensor:
        t = t[self.rows[0] : self.rows[1]] if self.rows != (None, None) else t
        t = torch.cat(t.chunk(2)[::-1]) if self.swap else t
        return t.to(self.dtype)


def plan_parts(
    parts: Sequence[Part], spec: QuantSpec, title: str, on_failure: OnFailure = OnFailure.ERROR
) -> QuantPlan:
    """Decide for every part, before anything is read.

    Raises:
        BackendUnavailable: the format cannot run here.
        SpecError: a pattern without a layer, no layer left, or with ERROR a layer that the format cannot hold.
        WeightError: a linear weight that is not float32, float16 or bfloat16.
    """
    odd = next((p for p in parts if p.linear and p.dtype not in FLOAT_DTYPES), None)
    if odd is not None:
        raise WeightError(
            f"'{odd.name}': dtype is {odd.dtype}, expected float32, float16 or bfloat16.\n"
            "The file is already quantized; give the full-precision one."
        )
    slots = [Slot(TensorMeta(p.name, p.shape, p.dtype), p.linear) for p in parts]
    plan = make_plan(slots, spec, require(spec.format_id))
    for format_id in plan.format_ids:
        require(format_id)
    if on_failure is OnFailure.ERROR:
        plan.raise_on_refusal()
    if not plan.to_quantize and not plan.refused:
        raise SpecError(f"{title}: no linear layer is left to quantize with these patterns.")
    return plan


def quantize_parts(
    file: TensorFile,
    parts: Sequence[Part],
    plan: QuantPlan,
    report: QuantReport,
    *,
    on_failure: OnFailure = OnFailure.ERROR,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[str, Value]]:
    """(name, value) for every part, made when it is asked for; the report grows on the way.

    Args:
        plan: of `plan_parts` for these parts.
        device: where to quantize; the result is on the CPU.
    Raises:
        WeightError: nan or inf in a tensor, in both modes.
        QuantwireError: a layer that cannot be quantized, with ERROR.
    """
    work = list(zip(parts, plan.decisions, strict=True))
    shown: Iterable[tuple[Part, Decision]] = progress(work, len(work)) if progress else work
    for part, decision in shown:
        t = part.cut(file.read(part.source))
        check_finite(part.name, t)
        value = _value(part, decision, t, decision.spec or plan.spec, report, on_failure, device)
        del t
        yield part.name, value
        nbytes = value.nbytes
        del value
        if nbytes > TRIM_NBYTES:
            trim()


@functools.cache
def _malloc_trim() -> Callable[[int], object] | None:
    try:
        return ctypes.CDLL(None).malloc_trim if sys.platform == "linux" else None
    except (OSError, AttributeError):  # another libc than glibc
        return None


def trim() -> None:
    """Hand freed memory back to the system.

    glibc keeps blocks below 32 MiB for itself, and odd sizes between them let it grow: 300 MiB more than was in use,
    measured over a file of 650 MB.
    """
    call = _malloc_trim()
    if call is not None:
        call(0)


def _value(
    part: Part,
    decision: Decision,
    t: Tensor,
    spec: QuantSpec,
    report: QuantReport,
    on_failure: OnFailure,
    device: torch.device | None,
) -> Value:
    reason = decision.reason
    if decision.action is Action.KEEP:
        report.entries.append(Entry(part.name, "keep", reason, t.nbytes, t.nbytes))
        return t
    if decision.action is Action.QUANTIZE:
        try:
            weight, entry = quantize_tensor(part.name, t.to(device) if device else t, spec)
            report.entries.append(dataclasses.replace(entry, reason=reason))
            return weight.with_tensors({name: tensor.cpu() for name, tensor in weight.tensors.items()})
        except QuantwireError as err:
            if on_failure is OnFailure.ERROR:
                raise
            reason = str(err).splitlines()[0]
    report.entries.append(Entry(part.name, "full precision", reason, t.nbytes, t.nbytes))
    report.warnings.append(f"{part.name} stays at full precision: {reason}")
    log.warning("%s: %s stays at full precision: %s", report.title, part.name, reason)
    return t
