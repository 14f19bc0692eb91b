"""What a benchmark measured: data, JSON as in `docs/schemas/benchmark_results.schema.json`, and a short text.

Times are medians over repeats, with the fastest and slowest beside. What cannot be measured is None and never a guess:
the text shows a dash, and `Memory.method` says how the numbers beside it were taken.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import FileError
from .units import show_size

VERSION = 1  # of both files
RESULTS, CONFIG, PAGE = "benchmark_results.json", "quantization_config.json", "report.html"
FULL = "full precision"
WIDTH = 120  # columns of the text


@dataclass(frozen=True)
class Seconds:
    """Repeated times, in the order in which they were taken."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def to_dict(self) -> dict[str, Any]:
        low, high = min(self.samples), max(self.samples)
        return {"median": self.median, "min": low, "max": high, "samples": list(self.samples)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Seconds:
        return cls(tuple(data["samples"]))


@dataclass(frozen=True)
class Memory:
    """Bytes.

    Attributes:
        weights: component -> bytes of its weights as they are held; the parts of the graph that ran.
        peak_allocated: most that was allocated at once in a measured run.
        peak_reserved: most that the allocator held of the device; None where there is no such number.
        before: what the process held before the model was loaded, where `peak_allocated` counts the whole process.
        method: how the peaks were taken.
    """

    weights: Mapping[str, int]
    peak_allocated: int | None = None
    peak_reserved: int | None = None
    before: int | None = None
    method: str = ""

    @property
    def own_peak(self) -> int | None:
        """The peak without what the process held before the model, where that is counted in it."""
        if self.peak_allocated is None or self.before is None:
            return self.peak_allocated
        return max(0, self.peak_allocated - self.before)

    @property
    def weights_total(self) -> int | None:
        return sum(self.weights.values()) if self.weights else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "weights_nbytes": self.weights_total,
            "weights_by_component_nbytes": dict(self.weights),
            "peak_allocated_nbytes": self.peak_allocated,
            "peak_reserved_nbytes": self.peak_reserved,
            "before_nbytes": self.before,
            "method": self.method,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Memory:
        return cls(
            data["weights_by_component_nbytes"],
            data["peak_allocated_nbytes"],
            data["peak_reserved_nbytes"],
            data["before_nbytes"],
            data["method"],
        )


@dataclass(frozen=True)
class LayerError:
    """One quantized tensor; `sqnr_db` is None where it came out exact, `max_error` where nothing was compared."""

    name: str
    format_id: str
    sqnr_db: float | None
    max_error: float | None
    nbytes: int


@dataclass(frozen=True)
class Difference:
    """An output against that of the reference of the same seed.

    Attributes:
        relative_error: norm of the difference over the norm of the reference.
        psnr_db: of images in [0, 1]; None for other outputs, and for equal images.
        of: `image`, `latent` or `audio`.
    """

    relative_error: float
    psnr_db: float | None
    of: str

    @property
    def snr_db(self) -> float | None:
        """None where nothing differs."""
        return -20 * math.log10(self.relative_error) if self.relative_error else None


@dataclass(frozen=True)
class Variant:
    """One way to run the same generation.

    Attributes:
        name: unique in its results.
        uri: spec of the quantization, as QuantConfig takes it; empty where nothing is quantized here.
        generation: of one generation with everything loaded.
        step: one denoising step; None where no step was seen.
        load_s: from the files to the models, once.
        quantize_s: of the quantization, once.
        difference: from the reference; None for the reference, and where there is no output to compare.
        audio_s: length of the audio that a generation makes.
        sample: name of the file beside the results that holds an output of the first measured run.
        config: decisions by tensor, for `quantization_config.json`.
        error: why it did not run; everything else is then as far as it came.
    """

    name: str
    uri: str = ""
    generation: Seconds | None = None
    step: Seconds | None = None
    load_s: float | None = None
    quantize_s: float | None = None
    memory: Memory = field(default_factory=lambda: Memory({}))
    layers: tuple[LayerError, ...] = ()
    difference: Difference | None = None
    audio_s: float | None = None
    sample: str = ""
    config: Mapping[str, Any] = field(default_factory=lambda: dict[str, Any]())
    error: str = ""

    @property
    def real_time_factor(self) -> float | None:
        """Seconds of generation per second of audio: below 1 is faster than it plays."""
        return self.generation.median / self.audio_s if self.generation and self.audio_s else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "uri": self.uri,
            "generation_s": self.generation.to_dict() if self.generation else None,
            "step_s": self.step.to_dict() if self.step else None,
            "load_s": self.load_s,
            "quantize_s": self.quantize_s,
            "memory": self.memory.to_dict(),
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "difference": dataclasses.asdict(self.difference) if self.difference else None,
            "audio_s": self.audio_s,
            "real_time_factor": self.real_time_factor,
            "sample": self.sample,
            "error": self.error,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Variant:
        return cls(
            name=data["name"],
            uri=data["uri"],
            generation=Seconds.from_dict(data["generation_s"]) if data["generation_s"] else None,
            step=Seconds.from_dict(data["step_s"]) if data["step_s"] else None,
            load_s=data["load_s"],
            quantize_s=data["quantize_s"],
            memory=Memory.from_dict(data["memory"]),
            layers=tuple(LayerError(**layer) for layer in data["layers"]),
            difference=Difference(**data["difference"]) if data["difference"] else None,
            audio_s=data["audio_s"],
            sample=data["sample"],
            error=data["error"],
        )


@dataclass(frozen=True)
class BenchmarkResults:
    """A whole benchmark.

    Attributes:
        title: what was run.
        host: `standalone`, `comfyui`, or the address of a server.
        device: `kind`, `name` and `total_nbytes` of where the models computed; empty where the host does not tell.
        settings: repeats, warm-ups, order, and whatever decided the work of a generation.
        versions: of the packages that took part.
        started: date and time, ISO 8601 with zone.
        notes: what a reader of the numbers must know.
        reference: name of the variant that the others are compared with; empty for the first that ran.
    """

    title: str
    host: str
    device: Mapping[str, Any]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    started: str
    variants: tuple[Variant, ...]
    notes: tuple[str, ...] = ()
    reference: str = ""

    @property
    def base(self) -> Variant | None:
        """What the others are compared with; None where nothing ran."""
        done = self.done
        return next((v for v in done if v.name == self.reference), done[0] if done else None)

    @property
    def quantized_base(self) -> str:
        """Name of the reference where others are compared with it and it is quantized itself; else empty."""
        base = self.base
        if base is None or base.name == FULL or not any(v.difference for v in self.done):
            return ""
        return base.name

    @property
    def done(self) -> tuple[Variant, ...]:
        """The variants that ran."""
        return tuple(v for v in self.variants if v.generation is not None)

    def to_dict(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "title": self.title,
            "host": self.host,
            "device": dict(self.device),
            "settings": dict(self.settings),
            "versions": dict(self.versions),
            "started": self.started,
            "notes": list(self.notes),
            "reference": self.base.name if self.base else "",
            "variants": [v.to_dict() for v in self.variants],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BenchmarkResults:
        """Read what `to_dict` wrote.

        Raises:
            FileError: another version, or no benchmark results.
        """
        if data.get("version") != VERSION or "variants" not in data:
            raise FileError(f"No benchmark results of version {VERSION}: version is {data.get('version')!r}.")
        variants = tuple(Variant.from_dict(v) for v in data["variants"])
        head = {k: data[k] for k in ("title", "host", "device", "settings", "versions", "started")}
        return cls(**head, variants=variants, notes=tuple(data["notes"]), reference=data["reference"])

    def config_dict(self) -> dict[str, Any]:
        """`quantization_config.json`: how to quantize each variant again, and what became of each tensor."""
        made = [{"name": v.name, "uri": v.uri, **v.config} for v in self.variants if v.config]
        return {"version": VERSION, "title": self.title, "versions": dict(self.versions), "variants": made}

    def __str__(self) -> str:
        of = self.quantized_base
        heads = tuple(f"{head}*" if of and head in _COMPARED else head for head in _HEADS)
        rows = [heads, *(_row(v) for v in self.done)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADS))]
        used = [i for i in range(len(_HEADS)) if i == 0 or any(row[i] != "-" for row in rows[1:])]
        lines = _wrapped([verdict(self)])
        for row in rows:
            cells = [row[i].ljust(widths[i]) if i == 0 else row[i].rjust(widths[i]) for i in used]
            lines.append("  ".join(cells).rstrip())
        failed = [f"FAILED: {v.name}: {' '.join(v.error.split())}" for v in self.variants if v.error]
        star = [f"* {against_quantized(of)}"] if of else []
        return "\n".join([*lines, *_wrapped([*star, *failed, *peak_notes(self), *self.notes])])


def against_quantized(name: str) -> str:
    """What to know of differences from something that is quantized itself."""
    return f"Against {name}, which is quantized itself: a larger number is nearer to it, and not better than it."


def peak_notes(results: BenchmarkResults) -> list[str]:
    """What a `+` in front of a peak says, where there is one."""
    before = [v.memory.before for v in results.done if v.memory.before is not None]
    if not before:
        return []
    return [f"Peaks with a + are over the {show_size(max(before))} that a process held before it loaded a model."]


def show_peak(memory: Memory) -> str:
    """The peak; over what the process held before the model where that is known."""
    if memory.own_peak is None:
        return ""
    return f"{'+' if memory.before is not None else ''}{show_size(memory.own_peak)}"


def _wrapped(texts: Iterable[str]) -> list[str]:
    return [line for text in texts for line in textwrap.wrap(text, WIDTH, break_long_words=False)]


_COMPARED = ("PSNR dB", "SNR dB")
_HEADS = ("format", "s", "s/step", "load s", "quantize s", "weights", "peak", "PSNR dB", "SNR dB", "x real time")


def _row(v: Variant) -> tuple[str, ...]:
    assert v.generation is not None
    psnr = v.difference.psnr_db if v.difference else None
    snr = v.difference.snr_db if v.difference else None
    return (
        v.name,
        show_number(v.generation.median),
        show_number(v.step.median) if v.step else "-",
        show_number(v.load_s),
        show_number(v.quantize_s),
        show_size(v.memory.weights_total) if v.memory.weights_total else "-",
        show_peak(v.memory) or "-",
        f"{psnr:.1f}" if psnr is not None else "-",
        f"{snr:.1f}" if snr is not None else "-",
        show_number(v.real_time_factor),
    )


def show_number(value: float | None) -> str:
    """Three digits that count: `0.0123`, `1.23`, `123`."""
    if value is None:
        return "-"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:.{digits}f}" if abs(value) >= 0.1 or not value else f"{value:.3g}"


def verdict(results: BenchmarkResults) -> str:
    """The answer in a sentence: which variant is the fastest, and against what."""
    done, first = results.done, results.base
    if first is None:
        return "Nothing ran."
    assert first.generation is not None
    if len(done) == 1:
        step = f", {show_number(first.step.median)} s a step" if first.step else ""
        factor = first.real_time_factor
        audio = f", {show_number(factor)} times as long as the audio plays" if factor is not None else ""
        return f"{first.name}: {show_number(first.generation.median)} s a generation{step}{audio}."
    fastest = min(done, key=lambda v: v.generation.median if v.generation else math.inf)
    others = [_against(v, first) for v in done if v is not first]
    return f"Fastest: {fastest.name}. Against {first.name}: {'; '.join(others)}."


def _against(v: Variant, first: Variant) -> str:
    assert v.generation is not None
    assert first.generation is not None
    ratio = v.generation.median / first.generation.median
    said = f"{v.name} takes {ratio:.2f} x the time"
    mine, its = v.memory.weights_total, first.memory.weights_total
    return f"{said}, {100 * mine / its:.0f} % of the weights" if mine and its else said


def summarize(rows: Sequence[Mapping[str, Any]]) -> tuple[tuple[LayerError, ...], dict[str, Any]]:
    """Layer errors and configuration from quantization reports.

    Args:
        rows: `QuantReport.to_dict()` of each; the names of several get the title in front.
    """
    layers: list[LayerError] = []
    tensors: dict[str, Any] = {}
    for row in rows:
        front = f"{row['title']}." if len(rows) > 1 else ""
        for e in row["entries"]:
            name, made = front + e["name"], e["action"] == "quantize"
            format_id = (e["format_id"] or row["format_id"]) if made else ""
            tensors[name] = {"action": e["action"], "format": format_id, "reason": e["reason"]}
            if made:
                layers.append(LayerError(name, format_id, e["sqnr_db"], e["max_error"], e["nbytes_out"]))
    if not rows:
        return (), {}
    first = rows[0]
    head = {"format": first["format_id"], "carrier": first["carrier"], "family": first["family"]}
    return tuple(layers), {**head, "tensors": tensors}


def write(folder: Path, results: BenchmarkResults, page: str) -> Path:
    """Write the three files of a benchmark, each whole or not at all; the path of the page.

    Raises:
        FileError: the folder cannot be written in.
    """
    texts = {
        RESULTS: json.dumps(results.to_dict(), indent=2, allow_nan=False) + "\n",
        CONFIG: json.dumps(results.config_dict(), indent=2, allow_nan=False) + "\n",
        PAGE: page,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            temporary = folder / f"{name}.tmp"
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(folder / name)
    except OSError as err:
        raise FileError(f"The results cannot be written to {folder}: {err.strerror or err}.") from err
    return folder / PAGE
