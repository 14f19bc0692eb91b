"""QuantReport: what was done to each tensor and what it cost, as JSON and as a short text for a node."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from .formats import BACKENDS
from .kernels.compare import compare
from .kernels.expand import Expansion

MIB = 1024 * 1024


@dataclass(frozen=True)
class Entry:
    """One tensor. `sqnr_db` and `max_error` are None where nothing was quantized.

    Attributes:
        action: `quantize`, `keep`, `full precision` (it failed and the user allowed that), or `dequantize` (quantized
            in the file, which the model cannot use there).
        sqnr_db: signal-to-quantization-noise ratio, 10 log10(sum w^2 / sum (w - w')^2).
        max_error: largest |w - w'|.
        signal, noise: the two sums, so that totals can be formed.
        format_id: of a quantized tensor.
        kernel: what multiplies with it where it was quantized, at 1,024 tokens, and why: `name: reason`.
    """

    name: str
    action: str
    reason: str
    nbytes_in: int
    nbytes_out: int
    sqnr_db: float | None = None
    max_error: float | None = None
    signal: float = 0.0
    noise: float = 0.0
    format_id: str = ""
    kernel: str = ""


@dataclass
class QuantReport:
    """Filled while a model is quantized or loaded.

    Attributes:
        title: what the entries belong to: a component of a model, or a file.
        format_id: the format, of all layers that no rule gives another.
        carrier: `quantwire` or `library`; empty for a file.
        uri: the spec as a URI.
        entries: one a tensor.
        warnings: everything that went otherwise than asked.
        seconds: wall time.
        versions: of the packages that took part.
        family: of the model, as far as it is known.
        notes: what was decided for the user, and why, and where the result came from.
    """

    title: str
    format_id: str
    carrier: str = "quantwire"
    uri: str = ""
    entries: list[Entry] = field(default_factory=lambda: list[Entry]())
    warnings: list[str] = field(default_factory=lambda: list[str]())
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=lambda: versions())
    family: str = ""
    notes: list[str] = field(default_factory=lambda: list[str]())

    @property
    def nbytes_in(self) -> int:
        return sum(e.nbytes_in for e in self.entries)

    @property
    def nbytes_out(self) -> int:
        return sum(e.nbytes_out for e in self.entries)

    @property
    def sqnr_db(self) -> float | None:
        """Over all quantized tensors together."""
        return ratio_db(sum(e.signal for e in self.entries), sum(e.noise for e in self.entries))

    def to_dict(self) -> dict[str, Any]:
        totals = {"nbytes_in": self.nbytes_in, "nbytes_out": self.nbytes_out, "sqnr_db": self.sqnr_db}
        return {**asdict(self), "totals": totals}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        """A few lines for the node: totals, what was kept and why, warnings."""
        done = [e for e in self.entries if e.action == "quantize"]
        kept = Counter(_bare(e.reason, self.family) for e in self.entries if _kept_linear(e))
        carrier = f" ({self.carrier} carrier)" if self.carrier else ""
        formats = Counter(e.format_id or self.format_id for e in done)
        if len(formats) > 1:
            what = "linear layers: " + ", ".join(f"{n} in {format_id}" for format_id, n in formats.most_common())
        else:
            what = f"linear layers in {next(iter(formats), self.format_id)}"
        lines = [f"{self.title}: {len(done)} {what}{carrier}"]
        if not done and not carrier:  # a file of plain values: nothing is quantized, so nothing is kept from it
            lines, kept = [f"{self.title}: {len(self.entries)} tensors, {self.format_id}"], Counter[str]()
        if self.nbytes_in:
            share = 100 * self.nbytes_out / self.nbytes_in
            size = f"{self.nbytes_in / MIB:.2f} -> {self.nbytes_out / MIB:.2f} MiB ({share:.1f} %)"
            lines.append(f"weights {size}, {self.seconds:.2f} s")
        rated = [(e.sqnr_db, e.name) for e in done if e.sqnr_db is not None]
        if self.sqnr_db is not None and rated:
            worst, name = min(rated)
            lines.append(f"SQNR {self.sqnr_db:.1f} dB, worst {worst:.1f} dB in {name}")
        if kept:
            by_family = f" ({self.family})" if self.family else ""
            lines.append(
                f"kept at full precision{by_family}: " + ", ".join(f"{n} {reason}" for reason, n in kept.items())
            )
        return "\n".join([*lines, *self.notes, *(f"WARNING: {w}" for w in self.warnings)])


def _bare(reason: str, families: str) -> str:
    """A reason without the name of the list that it comes from."""
    source, colon, rest = reason.partition(": ")
    return rest if colon and source in ("sensitive", *families.split(", ")) else reason


def _kept_linear(entry: Entry) -> bool:
    rounded = " rounded to " in entry.reason  # of a conversion: kept out of blocks, not as it was
    return entry.action == "keep" and not entry.reason.startswith("not a linear weight") and not rounded


def merge(reports: list[QuantReport]) -> QuantReport:
    """One report over several components of one model object; entry names get the component's name in front."""
    if len(reports) == 1:
        return reports[0]
    first = reports[0]
    merged = QuantReport(" + ".join(r.title for r in reports), first.format_id, first.carrier, first.uri)
    merged.family = ", ".join(dict.fromkeys(r.family for r in reports if r.family))
    for r in reports:
        merged.entries += [replace(e, name=f"{r.title}.{e.name}") for e in r.entries]
        merged.warnings += [f"{r.title}: {w}" for w in r.warnings]
        merged.notes += [f"{r.title}: {n}" for n in r.notes]
        merged.seconds += r.seconds
    return merged


def measure(name: str, reason: str, w: Tensor, restored: Expansion | Tensor, nbytes_out: int, every: int = 1) -> Entry:
    """Compare a weight (N, K) with its quantized form; `noise` is not finite where the form is not.

    Args:
        every: look at one row in so many.
    """
    d = compare(w, restored, every)
    nbytes_in = w.numel() * w.element_size()
    ratio = ratio_db(d.signal, d.noise)
    return Entry(name, "quantize", reason, nbytes_in, nbytes_out, ratio, d.max_error, d.signal, d.noise)


def ratio_db(signal: float, noise: float) -> float | None:
    """None where there is no finite ratio: an exact result, an all-zero weight, a sum beyond float32."""
    ratio = signal / noise if noise else 0.0
    return 10 * math.log10(ratio) if ratio and math.isfinite(ratio) else None


def versions() -> dict[str, str]:
    """Versions of this pack, torch and the quantization libraries that are installed."""
    packages = ("quantwire", "torch", "diffusers", *(b.package for b in BACKENDS if b.package))
    return {package: version for package in packages if (version := version_of(package))}


@functools.cache
def version_of(package: str) -> str:
    """The installed version, or an empty string; looked up once, because it takes milliseconds."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
