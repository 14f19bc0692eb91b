"""A full-precision file as a quantized checkpoint: out of the cache, or made tensor by tensor and put there."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, cast

import torch

from ..apply import REPORTED_TOKENS, Progress
from ..choices import OnFailure
from ..compat.modes import Carrier
from ..errors import FileError
from ..formats import BACKENDS
from ..plan import QuantPlan
from ..registry import get_entry, get_quantizer, require
from ..report import Entry, QuantReport, version_of
from ..rules import KEEP
from ..spec import QuantSpec
from ..weight import QuantizedWeight
from .cache import Cache, CacheUnwritable, cache_key
from .checkpoint import Checkpoint
from .quantized_file import VERSION, Value, file_metadata, write_quantized
from .stream import Part, TensorFile, plan_parts, quantize_parts

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Request:
    """What to make of a file.

    Attributes:
        file: the source.
        layout: names the host's layout and whatever else the parts depend on beside the file and the spec.
        parts: makes the list of the tensors of that layout; not called for what is in the cache. May raise, before
            anything is quantized.
        spec: what they become.
        carrier: for the report; the checkpoint holds plain tensors.
        on_failure: see `quantize_linears`.
        device: where to quantize; None is the CPU.
    """

    file: TensorFile
    layout: str
    parts: Callable[[], Sequence[Part]]
    spec: QuantSpec
    carrier: Carrier = Carrier.QUANTWIRE
    on_failure: OnFailure = OnFailure.ERROR
    device: torch.device | None = None


def quantize_file(
    request: Request,
    cache: Cache | None,
    *,
    progress: Progress | None = None,
    poll: Callable[[], object] | None = None,
) -> tuple[Checkpoint, QuantReport]:
    """Names of the host's layout -> plain tensors and quantized weights.

    With a cache the result is a memory map of its file. Without one, or where it cannot be written (which is a warning
    in the log and in the report), the quantized weights are in memory.

    Args:
        progress: wraps the work list.
        poll: called now and then while there is something to wait for; may raise to stop.
    Raises:
        BackendUnavailable, FileError, SpecError, WeightError: as `plan_parts` and `quantize_parts`.
    """
    start = time.perf_counter()
    require(request.spec.format_id)
    job = _Job(request, progress)
    try:
        if cache is None:
            checkpoint = job.in_memory()
            job.report.notes.append("Made now; not kept, since the cache is off.")
        else:
            checkpoint = job.through(cache, poll)
    except CacheUnwritable as err:
        log.warning("%s: quantized in memory, not cached: %s", request.file.path.name, err)
        job = _Job(request, progress)
        checkpoint = job.in_memory()
        job.report.warnings.append(f"Not cached, so the next load quantizes again: {err}")
    report = job.report
    name_kernels(report, checkpoint, request)
    report.seconds = time.perf_counter() - start
    return checkpoint, report


def name_kernels(report: QuantReport, checkpoint: Checkpoint, request: Request) -> None:
    """What multiplies with each weight on this machine, which need not be the one that made the file."""
    device = request.device or torch.device("cpu")
    names: dict[tuple[Any, ...], str] = {}  # layers of one shape have one kernel
    for i, entry in enumerate(report.entries):
        weight = checkpoint.tensors.get(entry.name)
        if not isinstance(weight, QuantizedWeight):
            continue
        alike = (weight.format_id, weight.orig_shape, weight.orig_dtype, *weight.tensors, repr(dict(weight.meta)))
        if request.carrier is not Carrier.QUANTWIRE:
            names[alike] = "the library's own layer"
        elif alike not in names:
            kernel = get_quantizer(weight.format_id).kernel(weight, device, weight.orig_dtype, REPORTED_TOKENS)
            names[alike] = f"{kernel.name}: {kernel.reason}"
        if entry.kernel != names[alike]:
            report.entries[i] = dataclasses.replace(entry, kernel=names[alike])


class _Job:
    def __init__(self, request: Request, progress: Progress | None) -> None:
        self.request, self.progress = request, progress
        spec = request.spec
        self.report = QuantReport(request.file.path.name, spec.format_id, request.carrier.value, spec.to_uri())

    @functools.cached_property
    def parts(self) -> Sequence[Part]:
        return self.request.parts()

    @functools.cached_property
    def plan(self) -> QuantPlan:
        r = self.request
        plan = plan_parts(self.parts, r.spec, r.file.path.name, r.on_failure)
        self.report.family, self.report.notes = plan.family, list(plan.notes)
        return plan

    def values(self) -> Iterator[tuple[str, Value]]:
        r, plan = self.request, self.plan
        yield from quantize_parts(
            r.file, self.parts, plan, self.report, on_failure=r.on_failure, device=r.device, progress=self.progress
        )
        r.file.check_unchanged()

    def in_memory(self) -> Checkpoint:
        return Checkpoint(self.request.file.path, dict(self.values()), {})

    def through(self, cache: Cache, poll: Callable[[], object] | None) -> Checkpoint:
        file = self.request.file
        # The header, the hash and the data must be of one file, or its entry would be found by another's content.
        source = cache.source_hash(file.path, poll, file.state)
        key = cache_key(self._content(source))
        found = cache.get(key, self._report_from, poll)
        if found is None:
            nbytes = self.plan.nbytes_out
            start = time.perf_counter()
            found, made = cache.get_or_make(
                key, lambda path: self._write(path, source), nbytes, poll, self._report_from
            )
            if made:
                seconds = time.perf_counter() - start
                self.report.notes.append(f"Made now in {seconds:.2f} s and kept in the cache.")
        return found

    def _content(self, source: str) -> dict[str, Any]:
        """Everything that the result depends on."""
        r = self.request
        return {
            "version": VERSION,
            "source": source,
            "spec": r.spec.to_uri(),
            "spec_version": r.spec.version,
            "layout": r.layout,
            "device": r.device.type if r.device else "cpu",
            "on_failure": r.on_failure.value,
            "versions": _versions(r.spec),
            "code": _own_code(),
        }

    def _write(self, path: Path, source: str) -> None:
        metadata: dict[str, Any] = {}

        def values() -> Iterator[tuple[str, Value]]:
            start = time.perf_counter()
            yield from self.values()
            metadata.update(self._facts(source, time.perf_counter() - start))

        write_quantized(path, values(), metadata, expected=2 * len(self.parts))

    def _facts(self, source: str, seconds: float) -> dict[str, Any]:
        """What stands in the file beside the weights."""
        r, fields = self.request, [field.name for field in dataclasses.fields(Entry)]
        return {
            "source": {"name": r.file.path.name, "sha256": source},
            "layout": r.layout,
            "spec": r.spec.to_uri(),
            "spec_version": r.spec.version,
            "versions": _versions(r.spec),
            "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(seconds, 2),
            "family": self.report.family,
            "notes": list(self.report.notes),
            "warnings": list(self.report.warnings),
            "fields": fields,
            "entries": [[getattr(entry, name) for name in fields] for entry in self.report.entries],
        }

    def _report_from(self, checkpoint: Checkpoint) -> None:
        """Take over the report of the run that made the file, which has every layer's error.

        Raises:
            FileError: it is not there or not whole; nothing is taken over then.
        """
        made, report = file_metadata(checkpoint), self.report
        try:
            entries = [_entry(made["fields"], row) for row in made["entries"]]
            family, warnings, notes = str(made["family"]), _texts(made["warnings"]), _texts(made["notes"])
            came = f"From the cache, where it took {made['seconds']:.2f} s to make ({made['made']})."
        except (KeyError, TypeError, ValueError) as err:
            raise FileError(f"{checkpoint.path.name}: corrupt report: {type(err).__name__}: {err}.") from err
        report.entries, report.family, report.warnings, report.notes = entries, family, warnings, [*notes, came]


def _entry(fields: list[str], row: list[Any]) -> Entry:
    entry = cast(Any, Entry(**dict(zip(fields, row, strict=True))))
    texts = (entry.name, entry.action, entry.reason, entry.format_id, entry.kernel)
    numbers = (entry.nbytes_in, entry.nbytes_out, entry.signal, entry.noise, entry.sqnr_db or 0, entry.max_error or 0)
    if not all(isinstance(text, str) for text in texts) or not all(isinstance(n, (int, float)) for n in numbers):
        raise TypeError(f"fields of another type in {row}")
    return entry


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r} is not a list")
    return [str(text) for text in cast("list[Any]", value)]


def _versions(spec: QuantSpec) -> dict[str, str]:
    """Of this pack, torch and the formats' libraries: other versions may give other bytes."""
    targets = dict.fromkeys(rule.target for rule in spec.rules if rule.target != KEEP)
    formats = [spec.format_id, *(QuantSpec.from_uri(target).format_id for target in targets)]
    backends = {get_entry(format_id).backend for format_id in formats}
    packages = ["quantwire", "torch", *(b.package for b in BACKENDS if b.name in backends and b.package)]
    return {package: version_of(package) for package in packages}


@functools.cache
def _own_code() -> str:
    """Hash of the pack's own modules: they decide what becomes of a tensor, and may change within a version."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for folder in ("quantizers", "hosts"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
