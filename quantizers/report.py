"""QuantReport: what was done to each tensor and what it cost, as JSON and as a short text for a node."""

from __future__ import annotations

import importlib.metadata
import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

MIB = 1024 * 1024


@dataclass(frozen=True)
class Entry:
    """One tensor. `sqnr_db` and `max_error` are None where nothing was quantized.

    Attributes:
        action: `quantize`, `keep`, or `full precision` (it failed and the user allowed that).
        sqnr_db: signal-to-quantization-noise ratio, 10 log10(sum w^2 / sum (w - w')^2).
        max_error: largest |w - w'|.
        signal, noise: the two sums, so that totals can be formed.
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


@dataclass
class QuantReport:
    """Filled while a model is quantized or loaded.

    Attributes:
        title: what the entries belong to: a component of a model, or a file.
        format_id: the format.
        carrier: `quantwire` or `library`; empty for a file.
        uri: the spec as a URI.
        entries: one a tensor.
        warnings: everything that went otherwise than asked.
        seconds: wall time.
        versions: of the packages that took part.
    """

    title: str
    format_id: str
    carrier: str = "quantwire"
    uri: str = ""
    entries: list[Entry] = field(default_factory=lambda: list[Entry]())
    warnings: list[str] = field(default_factory=lambda: list[str]())
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=lambda: versions())

    @property
    def nbytes_in(self) -> int:
        return sum(e.nbytes_in for e in self.entries)

    @property
    def nbytes_out(self) -> int:
        return sum(e.nbytes_out for e in self.entries)

    @property
    def sqnr_db(self) -> float | None:
        """Over all quantized tensors together."""
        return _ratio_db(sum(e.signal for e in self.entries), sum(e.noise for e in self.entries))

    def to_dict(self) -> dict[str, Any]:
        totals = {"nbytes_in": self.nbytes_in, "nbytes_out": self.nbytes_out, "sqnr_db": self.sqnr_db}
        return {**asdict(self), "totals": totals}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        """A few lines for the node: totals, what was kept and why, warnings."""
        done = [e for e in self.entries if e.action == "quantize"]
        kept = Counter(e.reason.removeprefix("sensitive: ") for e in self.entries if _kept_linear(e))
        carrier = f" ({self.carrier} carrier)" if self.carrier else ""
        lines = [f"{self.title}: {len(done)} linear layers in {self.format_id}{carrier}"]
        if self.nbytes_in:
            share = 100 * self.nbytes_out / self.nbytes_in
            size = f"{self.nbytes_in / MIB:.2f} -> {self.nbytes_out / MIB:.2f} MiB ({share:.1f} %)"
            lines.append(f"weights {size}, {self.seconds:.2f} s")
        rated = [(e.sqnr_db, e.name) for e in done if e.sqnr_db is not None]
        if self.sqnr_db is not None and rated:
            worst, name = min(rated)
            lines.append(f"SQNR {self.sqnr_db:.1f} dB, worst {worst:.1f} dB in {name}")
        if kept:
            lines.append("kept at full precision: " + ", ".join(f"{n} {reason}" for reason, n in kept.items()))
        return "\n".join([*lines, *(f"WARNING: {w}" for w in self.warnings)])


def _kept_linear(entry: Entry) -> bool:
    return entry.action == "keep" and entry.reason != "not a linear weight"


def merge(reports: list[QuantReport]) -> QuantReport:
    """One report over several components of one model object; entry names get the component's name in front."""
    if len(reports) == 1:
        return reports[0]
    first = reports[0]
    merged = QuantReport(" + ".join(r.title for r in reports), first.format_id, first.carrier, first.uri)
    for r in reports:
        merged.entries += [replace(e, name=f"{r.title}.{e.name}") for e in r.entries]
        merged.warnings += [f"{r.title}: {w}" for w in r.warnings]
        merged.seconds += r.seconds
    return merged


def measure(name: str, reason: str, w: Tensor, restored: Tensor, nbytes_out: int) -> Entry:
    """Compare a weight with its dequantized form (both (N, K)); sums in float32 per row, then float64."""
    w32 = w.to(torch.float32)
    error = w32 - restored.to(torch.float32)
    signal = float(w32.square().sum(-1).double().sum())
    noise = float(error.square().sum(-1).double().sum())
    max_error = float(error.abs().max()) if error.numel() else 0.0
    nbytes_in = w.numel() * w.element_size()
    return Entry(name, "quantize", reason, nbytes_in, nbytes_out, _ratio_db(signal, noise), max_error, signal, noise)


def _ratio_db(signal: float, noise: float) -> float | None:
    """None where there is no finite ratio: an exact result, an all-zero weight, a sum beyond float32."""
    ratio = signal / noise if noise else 0.0
    return 10 * math.log10(ratio) if ratio and math.isfinite(ratio) else None


def versions() -> dict[str, str]:
    """Versions of this pack, torch and the quantization libraries that are installed."""
    found: dict[str, str] = {}
    for package in ("quantwire", "torch", "bitsandbytes", "optimum-quanto", "gguf", "diffusers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
