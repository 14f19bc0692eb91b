"""How far the pictures of two models are apart: PSNR, SSIM, FLIP, luminosity, and both side by side.

    PSNR = 10 log10(1 / mean (a - b)^2) dB, over all channels
    SSIM = mean of ((2 m_a m_b + C1)(2 s_ab + C2)) / ((m_a^2 + m_b^2 + C1)(s_a^2 + s_b^2 + C2)), each channel for itself
           in Gaussian windows of 11 x 11 (sigma 1.5) that lie inside the image, C1 = 0.01^2, C2 = 0.03^2
    luminosity = mean of 0.2126 R + 0.7152 G + 0.0722 B (BT.709)

FLIP is the distance that a viewer sees who flips between both pictures at 67 pixels a degree, 0 to 1. It has no
learned weights, so its package has all that it needs. LPIPS was not chosen, nor DISTS: their packages download the
weights of an AlexNet or VGG when they run first. scikit-image was not chosen for SSIM: 175 MB with scipy, for one
function; the tests hold this one to its values.

Sources: Wang et al., "Image quality assessment: from error visibility to structural similarity", 2004; Andersson et
al., "FLIP: A Difference Evaluator for Alternating Images", 2020.
"""

from __future__ import annotations

import importlib
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SpecError

WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2
LUMINANCE = (0.2126, 0.7152, 0.0722)
SHOWN = 10


@dataclass(frozen=True)
class PairDifference:
    """One image of each model.

    Attributes:
        psnr_db: None where not one value differs, or one is nan or inf.
        ssim: -1 to 1; None for images below 11 x 11 and where a value is nan or inf.
        flip: 0 to 1; None where `flip-evaluator` is not installed or a value is nan or inf.
        mean_error, max_error: of |a - b|; None where a value is nan or inf.
        luminosity_a, luminosity_b: means; None where a value is nan or inf.
        finite: no value is nan or inf.
    """

    psnr_db: float | None
    ssim: float | None
    flip: float | None
    mean_error: float | None
    max_error: float | None
    luminosity_a: float | None
    luminosity_b: float | None
    finite: bool = True

    @property
    def identical(self) -> bool:
        return self.max_error == 0.0


@dataclass(frozen=True)
class ImagesCompared:
    """Images of two models from the same seeds, pair by pair; `a` is the reference."""

    a: str
    b: str
    pairs: tuple[PairDifference, ...]
    notes: tuple[str, ...] = ()

    def median(self, name: str) -> float | None:
        """Of one number of the pairs (`psnr_db`, `ssim`, ...), over those that have it."""
        values = [v for pair in self.pairs if (v := getattr(pair, name)) is not None]
        return statistics.median(values) if values else None

    @property
    def psnr_db(self) -> float | None:
        """The median; None where all pairs are identical."""
        return self.median("psnr_db")

    @property
    def ssim(self) -> float | None:
        return self.median("ssim")

    @property
    def flip(self) -> float | None:
        return self.median("flip")

    @property
    def verdict(self) -> str:
        bad = sum(not pair.finite for pair in self.pairs)
        if bad:
            return f"broken: {bad} of {len(self.pairs)} pairs with nan or inf"
        same = sum(pair.identical for pair in self.pairs)
        if same == len(self.pairs):
            return f"identical: not one value of {same} image{'s' * (same != 1)} differs"
        told = [f"PSNR {self.psnr_db:.1f} dB" if self.psnr_db is not None else ""]
        told += [f"SSIM {self.ssim:.3f}" if self.ssim is not None else ""]
        told += [f"FLIP {self.flip:.3f}" if self.flip is not None else ""]
        median = f" (medians of {len(self.pairs)})" if len(self.pairs) > 1 else ""
        return ", ".join(filter(None, told)) + median

    def to_dict(self) -> dict[str, Any]:
        medians = {name: self.median(name) for name in ("psnr_db", "ssim", "flip", "luminosity_a", "luminosity_b")}
        return {"verdict": self.verdict, "medians": medians, **asdict(self)}

    def __str__(self) -> str:
        heads = ("PSNR dB", "SSIM", "FLIP", "mean err", "max err", "light A", "light B")
        lines = [f"pictures {self.verdict}", f"{self.b} against {self.a}"]
        lines.append("    " + "".join(f"{head:>10}" for head in heads))
        for number, pair in enumerate(self.pairs[:SHOWN]):
            psnr = "-" if pair.psnr_db is None else f"{pair.psnr_db:.1f}"
            rest = (pair.ssim, pair.flip, pair.mean_error, pair.max_error, pair.luminosity_a, pair.luminosity_b)
            cells = [psnr, *("-" if value is None else f"{value:.4f}" for value in rest)]
            lines.append(f"{number:>4}" + "".join(f"{cell:>10}" for cell in cells))
        if len(self.pairs) > SHOWN:
            lines.append(f"... and {len(self.pairs) - SHOWN} more")
        return "\n".join([*lines, *self.notes])


def compare_images(a: Tensor, b: Tensor, labels: tuple[str, str] = ("A", "B")) -> ImagesCompared:
    """Compare images pair by pair.

    Args:
        a, b: (B, H, W, 3) float in [0, 1], of the same shape; `a` is the reference. Values outside are clamped, since
            no file could hold them.
    Raises:
        SpecError: no images, or others than the same number in the same size.
    """
    check_pairs(a, b, labels)
    flip = _flip()
    notes = () if flip else ("FLIP is left out: flip-evaluator is not installed (`pip install flip-evaluator`)",)
    return ImagesCompared(*labels, tuple(_pair(x, y, flip) for x, y in zip(_each(a), _each(b), strict=True)), notes)


def check_pairs(a: Tensor, b: Tensor, labels: tuple[str, str] = ("A", "B")) -> None:
    """Raises:
    SpecError: as `compare_images`.
    """
    for label, images in zip(labels, (a, b), strict=True):
        if images.dim() != 4 or images.shape[-1] != 3 or not images.numel():
            raise SpecError(
                f"{label}: images of shape {tuple(images.shape)}, expected (number, height, width, 3) with none of "
                "them 0.\nLink an IMAGE output, such as VAEDecode's."
            )
    if a.shape != b.shape:
        raise SpecError(
            f"{labels[0]} has {_shape(a)}, {labels[1]} has {_shape(b)}.\nMake both with the same seeds, batch and size."
        )


def psnr_db(a: Tensor, b: Tensor) -> float | None:
    """Of two tensors of values in [0, 1]; None where they are equal or not finite."""
    error = float((a.double() - b.double()).square().mean())
    return -10 * math.log10(error) if error and math.isfinite(error) else None


def ssim(a: Tensor, b: Tensor) -> float:
    """Args:
        a, b: (H, W, 3) float in [0, 1], at least 11 x 11.
    Returns:
        as scikit-image's `structural_similarity(gaussian_weights=True, use_sample_covariance=False, sigma=1.5)`.
    """
    position = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    weights = torch.exp(-position.square() / (2 * SIGMA**2))
    weights = weights / weights.sum()

    def blurred(x: Tensor) -> Tensor:
        rows = F.conv2d(x[None, None], weights.view(1, 1, 1, -1))
        return F.conv2d(rows, weights.view(1, 1, -1, 1))[0, 0]

    total = 0.0
    for channel in range(a.shape[-1]):  # one at a time: the maps of a 4K image take 64 MB each
        x, y = a[..., channel].double(), b[..., channel].double()
        mean_x, mean_y = blurred(x), blurred(y)
        var_x, var_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
        both = blurred(x * y) - mean_x * mean_y
        top = (2 * mean_x * mean_y + C1) * (2 * both + C2)
        total += float((top / ((mean_x**2 + mean_y**2 + C1) * (var_x + var_y + C2))).mean())
    return total / a.shape[-1]


def luminosity(images: Tensor) -> Tensor:
    """(..., 3) -> (...), BT.709."""
    return images.float() @ torch.tensor(LUMINANCE, device=images.device)


def side_by_side(a: Tensor, b: Tensor, gain: float = 4.0) -> Tensor:
    """Reference, other, and their difference, from left to right.

    Args:
        a, b: (B, H, W, 3) float in [0, 1]; nan and inf become magenta.
        gain: |a - b| is shown so many times as bright.
    Returns:
        (B, H, 3 W + 2 gaps, 3) float32 in [0, 1], on the CPU.
    Raises:
        SpecError: shapes that differ.
    """
    check_pairs(a, b)
    first, second = a.detach().to("cpu", torch.float32), b.detach().to("cpu", torch.float32)
    difference = ((first.clamp(0, 1) - second.clamp(0, 1)).abs() * gain).clamp(0, 1)
    gap = torch.ones(first.shape[0], first.shape[1], max(2, first.shape[2] // 64), 3)
    return torch.cat([_shown(first), gap, _shown(second), gap, _shown(difference)], 2)


def _shown(images: Tensor) -> Tensor:
    bad = ~images.isfinite().all(-1, keepdim=True)
    magenta = torch.tensor([1.0, 0.0, 1.0])
    return torch.where(bad, magenta, torch.nan_to_num(images).clamp(0, 1))


def _pair(a: Tensor, b: Tensor, flip: Any) -> PairDifference:
    if not (bool(a.isfinite().all()) and bool(b.isfinite().all())):
        return PairDifference(None, None, None, None, None, None, None, finite=False)
    a, b = a.clamp(0, 1), b.clamp(0, 1)
    error = (a - b).abs()
    return PairDifference(
        psnr_db(a, b),
        ssim(a, b) if min(a.shape[:2]) >= WINDOW else None,
        # The package's compiled part wants arrays that lie in one piece.
        float(flip(a.contiguous().numpy(), b.contiguous().numpy(), "LDR", applyMagma=False)[1]) if flip else None,
        float(error.mean()), float(error.max()),
        float(luminosity(a).mean()), float(luminosity(b).mean()),
    )  # fmt: skip


def _flip() -> Any:
    """The package's function, or None where it is not installed."""
    try:
        return importlib.import_module("flip_evaluator").evaluate
    except ImportError:
        return None


def _each(images: Tensor) -> Sequence[Tensor]:
    return cast("Sequence[Tensor]", images.detach().to("cpu", torch.float32).unbind(0))


def _shape(images: Tensor) -> str:
    count, height, width, _ = images.shape
    return f"{count} image{'s' * (count != 1)} of {width} x {height}"
