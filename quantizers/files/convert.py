"""Convert a model file: full precision or GGUF in, GGUF or safetensors out, slab by slab.

Everything is decided from the headers: names, types, the place of every tensor in the new file. Then slabs of rows go
through a few threads, each of which reads, quantizes and writes its own, so that reading, computing and writing overlap
and memory holds a few slabs beside the maps of one or two source tensors. A row is quantized by itself in every GGUF
type, so slabs change nothing: the same input gives the same bytes, whatever the number of threads. That is why neither
a date nor versions stand in the file.

What a quantized tensor lost is measured on one row in `SAMPLED` unless all of it is asked for. Nan and inf are looked
for in every value.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..apply import WORST_NOISE, Progress, check_finite
from ..backends.gguf.ggml import Ggml, library
from ..errors import SpecError, WeightError
from ..ggml_types import TYPES, format_id
from ..registry import get_quantizer
from ..report import Entry, QuantReport, versions
from ..spec import QuantSpec
from ..weight import QuantizedWeight
from .convert_plan import DTYPES, Conversion, Request, source_nbytes
from .gguf_layout import Place
from .journal import Partial, partial
from .locate import locate
from .recipes import Choice
from .sources import Assembled, Source, Stored, decode

log = logging.getLogger(__name__)
SLAB_NUMEL = 1 << 20
SAMPLED = 16
SAFE_SQUARES = 1e9  # no value above 31,623, so neither a float16 nor a scale made of two of them overflows
TICKS = 1000
Advance = Callable[[int], object]


class Ticks:
    """Bytes of progress for what shows a bar by iterating, as hosts do."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._steps = iter(progress(range(TICKS), TICKS))
        self._total = max(total, 1)
        self._done = 0
        self._ticks = 0

    def __call__(self, nbytes: int) -> None:
        """May raise what the host raises to interrupt."""
        self._done += nbytes
        while self._ticks < TICKS and self._ticks * self._total <= self._done * TICKS:
            next(self._steps, None)
            self._ticks += 1

    def close(self) -> None:
        for _ in self._steps:
            pass


def run_conversion(conversion: Conversion, advance: Advance | None = None) -> QuantReport:
    """Write the file.

    Args:
        advance: called with the bytes of the new file that came to be since the last call; may raise to give up.
    Raises:
        FileError: it cannot be written, or the source changed; a target that was there is as it was.
        WeightError: nan or inf in a tensor, or values beyond a type's range.
    """
    request = conversion.request
    report = QuantReport(
        request.target.name, _main_format(conversion), carrier="", uri=conversion.recipe.name,
        notes=list(conversion.notes), warnings=list(conversion.warnings), family=conversion.found.architecture,
    )  # fmt: skip
    start = time.perf_counter()
    head, inputs = identity(conversion), input_files(request, conversion.source)
    resumable, overwrite, restart = conversion.resumable, request.overwrite, request.restart
    resume = request.resume
    with partial(request.target, conversion.total, head, resumable, overwrite, inputs, restart, resume) as file:
        if file.note:
            report.notes.append(file.note)
        if not file.done:
            file.write(conversion.head, 0)
            file.write(conversion.tail, conversion.total - len(conversion.tail))
        advance = advance or (lambda nbytes: None)
        advance(len(conversion.head) + len(conversion.tail))
        entries = _write(conversion, file, advance)
        conversion.source.check_unchanged()
    report.entries = [entries[c.target.name] for c in conversion.choices]
    if not request.measure and any(e.sqnr_db is not None for e in report.entries):
        report.notes.append(f"SQNR and errors are of one row in {SAMPLED}; nan and inf were looked for in all values")
    report.seconds = time.perf_counter() - start
    return report


def input_files(request: Request, source: Source) -> list[Path]:
    """What must not be overwritten while it is read; an index and a folder's JSON files are read, too."""
    files = [request.source, *source.files] if source.files else []
    if files:
        found = locate(request.source)
        files += [found.index] if found.index is not None else []
        files += sorted(found.folder.glob("*.json")) if found.folder is not None else []
    return [*files, *(f for f in (request.imatrix, request.scales) if f is not None)]


def _main_format(conversion: Conversion) -> str:
    base = conversion.recipe.base
    return format_id(base) if base in TYPES else base


def identity(conversion: Conversion) -> dict[str, Any]:
    """What a run that continues must have in common with the one that was interrupted."""
    request = conversion.request
    options = [conversion.imatrix is not None and _file_hash(cast(Path, request.imatrix)), request.measure]
    return {
        "source": conversion.source.identity(),
        "type": conversion.recipe.name,
        "options": options,
        "contents": hashlib.sha256(conversion.head).hexdigest(),
        "versions": versions(),
    }


def _file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass
class _Work:
    """A tensor on its way.

    Attributes:
        left: slabs that are not written yet.
    """

    choice: Choice
    place: Place
    rows: Assembled
    importance: Tensor | None
    left: int = 0
    signal: float = 0.0
    noise: float = 0.0
    max_error: float = 0.0
    measured: bool = False


def _write(conversion: Conversion, file: Partial, advance: Advance) -> dict[str, Entry]:
    entries = {name: Entry(**entry) for name, entry in file.done.items()}
    threads = conversion.request.threads or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else [0])
    before = torch.get_num_threads()
    for kind in dict.fromkeys(c.kind for c in conversion.choices if c.kind in TYPES):
        encode(kind, torch.zeros(1, TYPES[kind].block), None, 0.0)  # ggml's tables are made here, by one thread
    pending: deque[tuple[_Work, int, Future[_Slab]]] = deque()

    def finish() -> None:
        work, nbytes, future = pending.popleft()
        slab = future.result()
        work.signal += slab.signal
        work.noise += slab.noise
        work.max_error = max(work.max_error, slab.max_error)
        work.measured |= slab.measured
        work.left -= 1
        advance(nbytes)
        if not work.left:
            name = work.choice.target.name
            entries[name] = _entry(conversion, work)
            file.finished(name, work.place.nbytes, dataclasses.asdict(entries[name]))

    # One thread for each of torch's operations: the slabs are what runs beside each other.
    pool = ThreadPoolExecutor(threads, "quantwire-convert", initializer=torch.set_num_threads, initargs=(1,))
    try:
        for choice, place in zip(conversion.choices, conversion.places, strict=True):
            if choice.target.name in entries:
                advance(place.nbytes)
                continue
            for work, start, stop in _slabs(conversion, choice, place):
                nbytes = place.nbytes * (stop - start) // max(work.rows.rows, 1)
                pending.append((work, nbytes, pool.submit(_run_slab, conversion, work, start, stop, file)))
                del work
                while len(pending) > 2 * threads:
                    finish()
        while pending:
            finish()
    except BaseException:
        for _, _, future in pending:
            future.cancel()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)  # the workers' setting is that of all threads to come
    return entries


def _slabs(conversion: Conversion, choice: Choice, place: Place) -> Iterator[tuple[_Work, int, int]]:
    """The tensor cut into slabs of rows; mapped when the first one is asked for."""
    found = conversion.imatrix.find(choice.target.name) if conversion.imatrix is not None else None
    work = _Work(choice, place, Assembled(choice.target, conversion.source.open), found)
    step = max(1, SLAB_NUMEL // max(work.rows.columns, 1))
    starts = range(0, max(work.rows.rows, 1), step)
    work.left = len(starts)
    for start in starts:
        yield work, start, min(start + step, work.rows.rows)


@dataclass(frozen=True)
class _Slab:
    signal: float = 0.0
    noise: float = 0.0
    max_error: float = 0.0
    measured: bool = False


def _run_slab(conversion: Conversion, work: _Work, start: int, stop: int, file: Partial) -> _Slab:
    """Read, quantize and write rows [start, stop)."""
    kind, rows = work.choice.kind, work.rows
    if stop <= start:
        return _Slab()
    at = work.place.start + work.place.nbytes * start // rows.rows
    if rows.kind == kind:
        raw = rows.raw(start, stop).contiguous()
        _refuse_non_finite(conversion, work, raw)
        file.write(_bytes(raw), at)
        return _Slab()
    parts = rows.values(start, stop)
    values = _float32(parts, stop - start, rows.columns)
    flat = values.view(-1)
    squares = float(torch.dot(flat, flat))
    if not math.isfinite(squares) and not bool(torch.isfinite(flat).all()):
        _raise_non_finite(work)
    if kind in DTYPES:
        cast_ = parts[0] if len(parts) == 1 and parts[0].dtype is DTYPES[kind] else values.to(DTYPES[kind])
        if kind == "F16" and not squares < SAFE_SQUARES:
            _refuse_overflow(work, cast_)
        file.write(_bytes(cast_.contiguous()), at)
        return _Slab()
    try:
        packed = encode(kind, values, work.importance, math.sqrt(squares))
    except WeightError as err:
        raise WeightError(f"'{work.choice.target.name}': {format_id(kind)}: {err}") from err
    file.write(_bytes(packed), at)
    every = 1 if conversion.request.measure or not squares < SAFE_SQUARES else SAMPLED
    return _measured(work, values, packed, start, every)


def encode(kind: str, values: Tensor, importance: Tensor | None, largest: float) -> Tensor:
    """(R, bytes a row) uint8 blocks of finite (R, K) float32 values, made in this thread.

    Args:
        largest: no value is larger.
    """
    ggml = _ggml()
    if ggml is not None:
        return ggml.quantize(TYPES[kind], values, importance, threads=1, largest=largest)
    chosen = format_id(kind)  # by gguf's numpy, for the types that it has
    return get_quantizer(chosen).quantize(values, QuantSpec(chosen)).tensors["qdata"]


@functools.cache
def _ggml() -> Ggml | None:
    try:
        return library()
    except (ImportError, SpecError):
        return None


_local = threading.local()


def _float32(parts: list[Tensor], rows: int, columns: int) -> Tensor:
    """The rows as one float32 matrix: the source itself, or this thread's buffer."""
    first = parts[0]
    if len(parts) == 1 and first.dtype is torch.float32 and first.is_contiguous():
        return first
    buffer: Tensor | None = getattr(_local, "buffer", None)
    if buffer is None or buffer.numel() < rows * columns:
        buffer = _local.buffer = torch.empty(max(rows * columns, SLAB_NUMEL))
    values = buffer[: rows * columns].view(rows, columns)
    at = 0
    for part in parts:
        values[at : at + part.shape[0]].copy_(part)
        at += part.shape[0]
    return values


def _bytes(t: Tensor) -> Any:
    return cast(Any, t.view(-1).view(torch.uint8).numpy())


def _measured(work: _Work, values: Tensor, packed: Tensor, start: int, every: int) -> _Slab:
    """What quantizing cost, on every n-th row of the tensor."""
    first = -start % every
    if first >= len(values):
        return _Slab()
    original, rows = values[first::every], packed[first::every].contiguous()
    kind = format_id(work.choice.kind)
    restored = decode(Stored(rows, work.choice.kind, values.shape[1]), rows)
    error = (original - restored).view(-1)
    signal, noise = float(original.square().sum()), float(torch.dot(error, error))
    if not math.isfinite(noise):
        raise WeightError(f"'{work.choice.target.name}': {kind} gives non-finite values; the weight exceeds its range.")
    return _Slab(signal, noise, float(error.abs().max()), measured=True)


def _raise_non_finite(work: _Work) -> None:
    """Raises:
    WeightError: with the number of such values in the whole tensor.
    """
    values = torch.cat([v.reshape(-1) for v in work.rows.values(0, work.rows.rows)])
    check_finite(work.choice.target.name, values)
    raise WeightError(f"'{work.choice.target.name}': holds nan or inf.")


def _refuse_non_finite(conversion: Conversion, work: _Work, raw: Tensor) -> None:
    """Blocks that are copied as they are."""
    kind = format_id(work.choice.kind)
    shape = (len(raw), work.rows.columns)
    bad = get_quantizer(kind).non_finite(QuantizedWeight(kind, {"qdata": raw}, shape, torch.float32))
    if bad:
        raise WeightError(
            f"'{work.choice.target.name}': {conversion.source.label} has nan or inf in its {kind} blocks."
        )


def _refuse_overflow(work: _Work, t: Tensor) -> None:
    if not bool(torch.isfinite(t).all()):
        name = work.choice.target.name
        raise WeightError(
            f"'{name}': has values beyond float16 (65504).\nKeep it in another type with the rule `{name} = F32`."
        )


def _entry(conversion: Conversion, work: _Work) -> Entry:
    c = work.choice
    nbytes_in = source_nbytes(conversion.source, c.target)
    if c.kind not in TYPES:
        blocks = any(p.source in conversion.source.kinds for p in c.target.pieces)
        reason = c.reason if not c.change else f"{c.change}: {c.reason}"
        return Entry(c.target.name, "dequantize" if blocks else "keep", reason, nbytes_in, work.place.nbytes)
    if work.noise > WORST_NOISE * work.signal:
        raise WeightError(
            f"'{c.target.name}': {format_id(c.kind)} gives a result that is worse than a layer of zeros.\n"
            "Add a rule for it with another type, or `keep`."
        )
    ratio = 10 * math.log10(work.signal / work.noise) if work.noise and work.signal else None
    reason = c.reason if c.change not in ("upgrade", "fallback") else f"{c.change}: {c.reason}"
    measured = (ratio, work.max_error, work.signal, work.noise) if work.measured else (None, None, 0.0, 0.0)
    return Entry(c.target.name, "quantize", reason, nbytes_in, work.place.nbytes, *measured, format_id(c.kind))
