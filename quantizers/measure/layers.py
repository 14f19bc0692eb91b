"""How far the weights of two models are apart, layer by layer: SQNR and largest error.

    SQNR = 10 log10(sum a^2 / sum (a - b)^2) dB      of each tensor, and of all tensors that differ together

The first model is the reference. Both may be files of any scheme, or modules with any carrier's layers; both are
dequantized a few rows at a time, so that memory holds neither model. Two files whose layouts differ (diffusers' names
against ComfyUI's, text encoders of llama.cpp against transformers') are put into ComfyUI's, which moves rows and
changes no value.
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import SpecError
from ..kernels.expand import BLOCK_NUMEL
from ..report import ratio_db
from .sides import Side, Weight, file_sides, module_side

Progress = Callable[[Sequence[Any], int], Iterable[Any]]
SHOWN = 12
PAD = 32  # the largest multiple that a format pads to
APART = 0.3  # noise over signal: 2 bits leave 0.1 at worst, weights trained apart give 2
FEW = 8  # biases and norms, of fewer nothing is concluded
_BLOCK = re.compile(r"^(?:.*?\.)?[^.]+\.\d+(?=\.)")


@dataclass(frozen=True)
class LayerDifference:
    """One tensor in both models.

    Attributes:
        was, now: what it is stored as in the reference and in the other model.
        sqnr_db: None where there is no finite ratio: not one value differs, or one is nan or inf.
        max_error: largest |a - b|; None where it is not finite.
        relative_max: that, as a share of the largest |a|.
        signal, noise: sum a^2, of finite values, and sum (a - b)^2; None where that is not finite.
        not_finite: values of the other model that are nan or inf.
        not_finite_reference: the same of the reference.
    """

    name: str
    shape: tuple[int, ...]
    was: str
    now: str
    sqnr_db: float | None
    max_error: float | None
    relative_max: float | None
    signal: float
    noise: float | None
    not_finite: int = 0
    not_finite_reference: int = 0

    @property
    def identical(self) -> bool:
        return self.noise == 0.0

    @property
    def broken(self) -> bool:
        """Whether a layer of zeros would be nearer to the reference, or values are nan or inf that are finite there."""
        if self.identical:
            return False
        if self.infected:
            return True
        return self.noise is not None and 0 < self.signal < self.noise

    @property
    def infected(self) -> bool:
        """Whether values are nan or inf that are finite in the reference."""
        return self.not_finite > self.not_finite_reference

    @property
    def rank(self) -> float:
        """Sorts the worst layers first."""
        if self.noise is None:
            return -math.inf
        return math.inf if self.sqnr_db is None else self.sqnr_db


@dataclass(frozen=True)
class LayersCompared:
    """Two models, tensor by tensor.

    Attributes:
        a, b: labels; `a` is the reference.
        layers: of both, the worst first.
        only_a, only_b: names without a partner.
        other_shapes: `name (shape against shape)` of partners that cannot be compared.
    """

    a: str
    b: str
    layers: tuple[LayerDifference, ...]
    only_a: tuple[str, ...] = ()
    only_b: tuple[str, ...] = ()
    other_shapes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def changed(self) -> tuple[LayerDifference, ...]:
        return tuple(layer for layer in self.layers if not layer.identical)

    @property
    def broken(self) -> tuple[LayerDifference, ...]:
        """Layers that are no version of the reference's; of models that are not related, those with nan or inf."""
        bad = tuple(layer for layer in self.layers if layer.broken)
        return tuple(layer for layer in bad if layer.infected) if self.unrelated else bad

    @property
    def unrelated(self) -> str:
        """Why both are not versions of one model; empty where they may be."""
        matrices = [layer for layer in self.layers if len(layer.shape) > 1]
        vectors = [layer for layer in self.layers if len(layer.shape) == 1]
        far = [sum(x.noise is not None and x.noise > x.signal * APART for x in part) for part in (matrices, vectors)]
        if sum(far) > len(self.layers) / 4:  # other input channels or fewer blocks alone make a version
            if self.other_shapes:
                return f"{len(self.other_shapes)} tensors have other shapes, first '{self.other_shapes[0]}'"
            both = _blocks(tuple(layer.name for layer in self.layers))
            for label, names in ((self.a, self.only_a), (self.b, self.only_b)):
                if alone := [block for block in _blocks(names) if block not in both]:
                    return f"only {label} has {_some(alone, 2)}"
        # Quantizing leaves biases and norms alone, rightly or wrongly done. Models trained apart share nothing.
        if len(vectors) >= FEW and far[0] > len(matrices) / 2 and far[1] > len(vectors) / 2:
            return f"{far[0]} of {len(matrices)} matrices and {far[1]} of {len(vectors)} biases and norms are others"
        return ""

    @property
    def sqnr_db(self) -> float | None:
        """Of all tensors that differ, together; None where none does, or a value is not finite."""
        changed = self.changed
        if any(layer.noise is None for layer in changed):
            return None
        return ratio_db(sum(x.signal for x in changed), sum(x.noise or 0.0 for x in changed))

    @property
    def verdict(self) -> str:
        """One line: identical, different by how much, or broken."""
        if self.broken:
            worst = self.broken[0]
            bad = sum(layer.infected for layer in self.broken)
            parts = [f"{bad} with nan or inf"] if bad else []
            parts += [f"{len(self.broken) - bad} farther off than zeros"] if len(self.broken) > bad else []
            return (
                f"broken: {len(self.broken)} of {len(self.layers)} tensors ({', '.join(parts)}), first '{worst.name}'"
            )
        if self.unrelated:
            return f"not versions of one model: {self.unrelated}"
        if not self.changed:
            return f"identical: all {len(self.layers)} tensors hold the same values"
        worst = self.layers[0]
        together = "" if self.sqnr_db is None else f": SQNR {self.sqnr_db:.1f} dB together"
        low = "" if worst.sqnr_db is None else f", worst {worst.sqnr_db:.1f} dB in '{worst.name}'"
        return f"{len(self.changed)} of {len(self.layers)} tensors differ{together}{low}"

    def to_dict(self) -> dict[str, Any]:
        head: dict[str, Any] = {"verdict": self.verdict, "sqnr_db": self.sqnr_db, "changed": len(self.changed)}
        head["unrelated"] = self.unrelated or None
        return {**head, "broken": [layer.name for layer in self.broken], **asdict(self)}

    def __str__(self) -> str:
        lines = [f"weights {self.verdict}", f"{self.b} against {self.a}, {self.seconds:.1f} s"]
        if self.changed:
            now = Counter(layer.now for layer in self.changed)
            lines.append("stored as " + ", ".join(f"{kind} ({count})" for kind, count in now.most_common(6)))
            lines.append(f"{'SQNR dB':>8} {'max error':>10} {'of largest':>10}  {'stored as':22} tensor, worst first")
            lines += [_line(layer) for layer in self.changed[:SHOWN]]
            if len(self.changed) > SHOWN:
                lines.append(f"... and {len(self.changed) - SHOWN} more")
        for names, where in ((self.only_a, self.a), (self.only_b, self.b)):
            if names:
                lines.append(f"only in {where}: {_some(names)}")
        if self.other_shapes:
            lines.append(f"not compared, other shapes: {_some(self.other_shapes)}")
        return "\n".join([*lines, *self.notes])


def compare_files(a: Path, b: Path, progress: Progress | None = None) -> LayersCompared:
    """Compare the weights of two files, of any schemes and layouts; no model is built.

    Args:
        a: the reference: a file, the index of several, or the folder of a component.
        progress: wraps the work list.
    Raises:
        FileError: a file cannot be read, they hold different models, or nothing in them has the same name.
        BackendUnavailable: a library that reading needs is missing.
    """
    sides = file_sides(a, b)
    return compare_sides(sides.a, sides.b, sides.notes, progress)


def compare_models(
    a: Mapping[str, nn.Module],
    b: Mapping[str, nn.Module],
    labels: tuple[str, str] = ("A", "B"),
    progress: Progress | None = None,
) -> LayersCompared:
    """Compare the weights of two model objects, as `Host.components` gives their modules; neither is changed.

    Names are those of the modules, which are the same where the same host loaded both. LoRAs that are not merged into
    weights are no part of the comparison.

    Raises:
        WeightError: layers of a library that cannot be dequantized here.
        SpecError: nothing in them has the same name.
    """
    return compare_sides(module_side(a, labels[0]), module_side(b, labels[1]), (), progress)


def compare_sides(a: Side, b: Side, notes: Sequence[str] = (), progress: Progress | None = None) -> LayersCompared:
    """Compare what two sides have in common by name.

    Args:
        a: the reference.
        progress: wraps the work list.
    Raises:
        SpecError: that is nothing.
    """
    start = time.perf_counter()
    names = [name for name in a.weights if name in b.weights]
    fits = [name for name in names if _fits(a.weights[name], b.weights[name])]
    if not fits:
        raise SpecError(
            f"{a.label} and {b.label} have no tensor of the same name and shape, so there is nothing to compare "
            f"({_some(tuple(a.weights), 1)} against {_some(tuple(b.weights), 1)}).\nGive two versions of one model."
        )
    work = progress(fits, len(fits)) if progress else fits
    layers = [_compare(name, a.weights[name], b.weights[name]) for name in work]
    shapes = tuple(
        f"{name} ({a.weights[name].shape} against {b.weights[name].shape})" for name in names if name not in set(fits)
    )
    notes = list(notes)
    if a.skipped or b.skipped:
        notes.append(f"{max(a.skipped, b.skipped)} tensors without floating-point values were left out")
    return LayersCompared(
        a.label, b.label, tuple(sorted(layers, key=lambda layer: layer.rank)),
        tuple(n for n in a.weights if n not in b.weights), tuple(n for n in b.weights if n not in a.weights),
        shapes, tuple(notes), time.perf_counter() - start,
    )  # fmt: skip


def _fits(a: Weight, b: Weight) -> bool:
    if a.shape == b.shape:
        return True
    if len(a.shape) != 2 or len(b.shape) != 2:
        return False
    small, large = (a, b) if b.padded else (b, a)
    return large.padded and all(0 <= y - x < PAD for x, y in zip(small.shape, large.shape, strict=True))


def _compare(name: str, a: Weight, b: Weight) -> LayerDifference:
    shape = tuple(min(x, y) for x, y in zip(a.shape, b.shape, strict=True))  # without what is padded
    n, k = (shape[0] if shape else 1), math.prod(shape[1:])
    read_a, read_b = a.open(), b.open()
    signal = noise = largest = error = 0.0
    bad_a = bad_b = 0
    step = max(1, BLOCK_NUMEL // max(k, 1))
    for start in range(0, n, step):
        stop = min(start + step, n)
        rows_a, rows_b = read_a(start, stop)[:, :k], read_b(start, stop)[:, :k]
        if not rows_a.numel():
            continue
        exact = rows_a.nan_to_num(0.0, 0.0, 0.0).double()
        signal += float(exact.square().sum())  # squares of float32's largest, as masks have it, need float64
        largest = max(largest, float(exact.abs().max()))
        bad_a += int((~rows_a.isfinite()).sum())
        bad_b += int((~rows_b.isfinite()).sum())
        if torch.equal(rows_a, rows_b):
            continue
        same = (rows_a == rows_b) | (rows_a.isnan() & rows_b.isnan())  # inf - inf is nan
        difference = (rows_a.double() - rows_b).masked_fill_(same, 0.0)
        noise += float(difference.square().sum())
        error = max(error, float(difference.abs().max()))
    finite = math.isfinite(noise)
    return LayerDifference(
        name, shape, a.stored, b.stored, ratio_db(signal, noise) if finite else None,
        error if finite else None, error / largest if finite and largest else None,
        signal, noise if finite else None, bad_b, bad_a,
    )  # fmt: skip


def _blocks(names: Sequence[str]) -> tuple[str, ...]:
    """`double_blocks.3` and the like, that names begin with, in their order."""
    return tuple(dict.fromkeys(match[0] for name in names if (match := _BLOCK.match(name))))


def _line(layer: LayerDifference) -> str:
    sqnr = "nan/inf" if layer.noise is None else "-" if layer.sqnr_db is None else f"{layer.sqnr_db:.1f}"
    error = "-" if layer.max_error is None else f"{layer.max_error:.4g}"
    share = "-" if layer.relative_max is None else f"{100 * layer.relative_max:.1f} %"
    name = layer.name if len(layer.name) <= 62 else f"...{layer.name[-59:]}"
    return f"{sqnr:>8} {error:>10} {share:>10}  {layer.now:22.22} {name}"


def _some(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    shown = ", ".join(names[:most])
    return f"{shown if len(shown) <= 90 else shown[:87] + '...'}{more}"
