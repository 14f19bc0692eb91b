"""What each format costs in quality, from stored measurements.

`formats.json` is written by a full run of `benchmarks/formats.py`: every format on a trained image model (6.28 M
parameters, FLUX layout; PSNR of its pictures against those of full precision from the same seeds) and on a trained
text encoder (22.7 M parameters; cosines of sentence pairs). Both are small, so the numbers rank formats; they do not
foretell the PSNR of another model. `benchmarks/rounded.py` adds what native products cost that round activations.

A score is in dB, 6 dB being half the error. It is the mean of what was seen at the model's output and what the SQNR of
the weights lets expect there, by the line through all formats: either alone is off by the `spread_db` of that line.
Formats whose scores differ by less than the spread are not told apart.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .parts import Role

DATA = Path(__file__).with_name("formats.json")


@dataclass(frozen=True)
class Quality:
    """What was measured of one format; None where it was not, or where nothing differed.

    Attributes:
        sqnr_db: of all quantized weights of the image model.
        psnr_db: of its pictures.
        accuracy: share of its pictures in which a classifier reads what was asked for.
        cosine_error, cosine_error_max: of the sentence pairs, mean and largest.
        text_left: layers of the text encoder that stayed at full precision, whose cosine errors are thus too small.
        sampling_ratio: sampling time by that of bfloat16, on the CPU that measured.
        rounded: PSNR with activations rounded to `int8`, `int4`, `fp8`, ... as native products do that were not
            measured otherwise.
        library: with its version.
    """

    format_id: str
    sqnr_db: float | None = None
    psnr_db: float | None = None
    accuracy: float | None = None
    cosine_error: float | None = None
    cosine_error_max: float | None = None
    text_left: int = 0
    sampling_ratio: float | None = None
    library: str = ""
    rounded: Mapping[str, float] = field(default_factory=lambda: dict[str, float]())

    @property
    def measured(self) -> bool:
        return self.sqnr_db is not None or self.psnr_db is not None or self.cosine_error is not None

    def output_db(self, role: Role) -> float | None:
        """What was seen at the output of a model of this role; None where nothing, or not with all layers."""
        if role is not Role.TEXT:
            return self.psnr_db
        if self.cosine_error is None or self.text_left:
            return None
        return -20 * math.log10(max(self.cosine_error, 1e-9))

    def rounding_db(self, activations: str) -> float:
        """What a product costs that rounds activations so, in dB; 0 where nothing is rounded, or `score_db` has it."""
        seen = self.rounded.get(activations)
        return 0.0 if seen is None or self.psnr_db is None else max(0.0, self.psnr_db - seen)

    def score_db(self, role: Role = Role.DIFFUSION, activations: str = "") -> float | None:
        """Expected quality, higher is better; None for formats that were never measured.

        Args:
            activations: to what the product rounds them, as in `Running`; the cost was measured on the image model.
        """
        seen, line = self.output_db(role), _lines()[role is Role.TEXT]
        expected = None if self.sqnr_db is None else line.intercept + line.slope * self.sqnr_db
        known = [value for value in (seen, expected) if value is not None]
        return statistics.fmean(known) - self.rounding_db(activations) if known else None

    def loss(self, role: Role = Role.DIFFUSION, activations: str = "") -> float | None:
        """The score as a relative error; None for formats that were never measured."""
        score = self.score_db(role, activations)
        return None if score is None else 10 ** (-score / 20)

    def __str__(self) -> str:
        if not self.measured:
            return "never measured"
        said = [f"SQNR {self.sqnr_db:.1f} dB"] if self.sqnr_db is not None else []
        said += [f"PSNR {self.psnr_db:.1f} dB"] if self.psnr_db is not None else []
        if self.cosine_error is not None:
            left = f" with {self.text_left} layers at full precision" if self.text_left else ""
            said.append(f"cosine error {self.cosine_error:.4f}{left}")
        return ", ".join(said)

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        scores = {"score_db": self.score_db(), "text_score_db": self.score_db(Role.TEXT)}
        return {**asdict(self), "rounded": dict(self.rounded), "measured": self.measured} | scores


@dataclass(frozen=True)
class Line:
    """Output dB by SQNR in dB, through all formats.

    Attributes:
        spread_db: standard deviation of the formats about it.
    """

    slope: float
    intercept: float
    spread_db: float


@functools.cache
def all_measured() -> Mapping[str, Quality]:
    """By format id."""
    data: dict[str, Any] = json.loads(DATA.read_text(encoding="utf-8"))
    return {name: Quality(name, **row) for name, row in data["formats"].items()}


def quality(format_id: str) -> Quality:
    """What is known of a format; one that was never measured has no numbers."""
    return all_measured().get(format_id) or Quality(format_id)


def spread_db(role: Role = Role.DIFFUSION) -> float:
    """How far scores must differ for formats to be told apart."""
    return _lines()[role is Role.TEXT].spread_db


def ranked(format_ids: Iterable[str], role: Role = Role.DIFFUSION) -> list[str]:
    """Best first by score; those never measured last, in the given order."""
    return sorted(format_ids, key=lambda f: -_number(quality(f).score_db(role)))


def how_measured() -> str:
    """What the numbers come from, for reports."""
    data: dict[str, Any] = json.loads(DATA.read_text(encoding="utf-8"))
    return f"{data['command']}, {data['pictures']} pictures a format, torch {data['torch']}, {data['system']}"


def add_rounded(format_id: str, activations: str, psnr_db: float) -> None:
    """Keep a measurement of `benchmarks/rounded.py` in `formats.json`."""
    data: dict[str, Any] = json.loads(DATA.read_text(encoding="utf-8"))
    data["formats"][format_id].setdefault("rounded", {})[activations] = round(psnr_db, 4)
    DATA.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    all_measured.cache_clear()


def trimmed(result: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `formats.json` from what `benchmarks/formats.py` writes, but for `rounded`."""
    formats: dict[str, Any] = {}
    for row in result["rows"]:
        digits, text = row.get("digits"), row.get("sentences")
        if digits is None and text is None:
            continue
        found: dict[str, Any] = {"library": row["library"]}
        if digits is not None:
            found |= {name: _rounded(digits[name]) for name in ("sqnr_db", "psnr_db", "accuracy", "sampling_ratio")}
        if text is not None:
            found |= {"cosine_error": _rounded(text["cosine_error_mean"], 6)}
            found |= {"cosine_error_max": _rounded(text["cosine_error_max"], 6), "text_left": text["layers_left"]}
        formats[row["format"]] = found
    machine = result["machine"]
    return {
        "command": result["command"],
        "pictures": result["prompts"] * result["images_a_prompt"],
        "torch": machine["torch"],
        "system": f"{machine['system']}, {machine['cores']} cores, {', '.join(machine['instruction_sets'])}",
        "formats": formats,
    }


@functools.cache
def _lines() -> tuple[Line, Line]:
    """For image models and for text encoders."""
    return _line(Role.DIFFUSION), _line(Role.TEXT)


def _line(role: Role) -> Line:
    """Least squares through the formats of which both sides were measured."""
    pairs = [
        (found.sqnr_db, seen)
        for found in all_measured().values()
        if found.sqnr_db is not None and (seen := found.output_db(role)) is not None
    ]
    slope, intercept = statistics.linear_regression([x for x, _ in pairs], [y for _, y in pairs])
    return Line(slope, intercept, statistics.pstdev(y - intercept - slope * x for x, y in pairs))


def _number(score: float | None) -> float:
    return -math.inf if score is None else score


def _rounded(value: float | None, digits: int = 4) -> float | None:
    return None if value is None else round(value, digits)
