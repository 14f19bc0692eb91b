"""Whether images are noise instead of pictures: what a broken quantization makes, without any error being raised.

Four verdicts, the first that fits:

    nan     a value is nan or inf. Such images are black in a file.
    flat    the luminosity's standard deviation is below FLAT: fewer than two of 255 grey steps, so nothing is shown
    noise   against a reference from the same seed (full precision, as a rule):
                roughness = mean |dy/dx| + mean |dy/dy|, over the standard deviation of the luminosity y
                contrast  = that standard deviation
                score     = roughness ratio / min(contrast ratio, 1)
                likeness  = correlation of the means of 8 x 8 squares with the reference's
                evidence  = ln(score) (1 - likeness)  >  NOISE_EVIDENCE
            Broken weights leave edges everywhere, or fade out, where nothing is left of the reference's composition.
            A blurred, sharpened or faded picture has the composition still; a good one of another composition has as
            many edges, if it shows the same subject.
    changed the evidence is there, or the score alone is above CHANGED_SCORE, and the picture may be a good one:
            images of at least 256 x 256 are noise only when structure is missing as well:
                structure = correlation of neighbours among the means of 16 x 16 squares  <  NOISE_STRUCTURE
            A denoiser that fails hands out its noisy latents. Their decoded texture is smooth within a latent's 8
            pixels, and white beyond: its power spectrum is flat below 1/16 cycles a pixel, where pictures have most of
            their power.
    not known   there is no reference, or the image is small and its reference unlike those that were measured.

`benchmarks/noise.py` measures it. The evidence is of grey digits of 64 to 128 pixels: the threshold stands half way (of
the logarithm) between the worst good and the best broken run of one set of runs, and is then held to another set, of
other formats, mistakes, prompts and seeds. So smaller images are judged beside references like those only. The
structure is of two photographs in pieces, and of noise decoded by one VAE: a broken model whose images have structure
is called changed, not noise.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .images import check_pairs, luminosity

FLAT = 2 / 255
NOISE_EVIDENCE = 0.07
CHANGED_SCORE = 1.2
NOISE_STRUCTURE = 0.5
# Of the digits, with a margin: at most 0.20 and 0.006, at least 0.28.
MEASURED_ROUGHNESS, MEASURED_COLOUR, MEASURED_CONTRAST = 0.25, 0.02, 0.2
SQUARE = 16  # pixels: twice the 8 of a latent, whose decoders blur into the next one
SQUARES = 16  # a side, at least: of fewer a correlation is known to no better than 0.1


class Kind(str, Enum):
    """What an image is."""

    PICTURE = "picture"
    NAN = "nan"
    FLAT = "flat"
    NOISE = "noise"
    CHANGED = "changed"
    UNKNOWN = "not known"


@dataclass(frozen=True)
class ImageVerdict:
    """One image.

    Attributes:
        score: against the reference; None without one, and where the image or the reference is nan or flat.
        roughness, contrast: ratios to the reference; None as `score`.
        structure: -1 to 1; None for small images, nan and flat.
        likeness: correlation of the means of 8 x 8 squares with the reference's, -1 to 1: low for another picture.
            None as `score`.
        evidence: of noise; None as `score`.
    """

    kind: Kind
    why: str
    score: float | None = None
    roughness: float | None = None
    contrast: float | None = None
    structure: float | None = None
    likeness: float | None = None
    evidence: float | None = None

    @property
    def broken(self) -> bool:
        return self.kind in (Kind.NAN, Kind.FLAT, Kind.NOISE)


@dataclass(frozen=True)
class NoiseVerdict:
    """Several images of one model."""

    images: tuple[ImageVerdict, ...]

    @property
    def broken(self) -> bool:
        return any(image.broken for image in self.images)

    @property
    def known(self) -> bool:
        """Whether each image could be judged."""
        return all(image.kind is not Kind.UNKNOWN for image in self.images)

    @property
    def verdict(self) -> str:
        count = Counter(image.kind for image in self.images)
        bad = sum(image.broken for image in self.images)
        if bad:
            first = next(image for image in self.images if image.broken)
            kinds = ", ".join(f"{n} {kind.value}" for kind, n in count.items() if kind not in _FINE)
            return f"broken: {bad} of {len(self.images)} images ({kinds}); {first.why}"
        if not self.known:
            first = next(image for image in self.images if image.kind is Kind.UNKNOWN)
            return f"not known for {count[Kind.UNKNOWN]} of {len(self.images)} images: {first.why}"
        if count[Kind.CHANGED]:
            first = next(image for image in self.images if image.kind is Kind.CHANGED)
            return f"no noise, {count[Kind.CHANGED]} of {len(self.images)} images changed much: {first.why}"
        return f"no noise: {self.images[0].why}" if len(self.images) == 1 else f"no noise in {len(self.images)} images"

    def to_dict(self) -> dict[str, Any]:
        return {"verdict": self.verdict, "broken": self.broken, "known": self.known, **asdict(self)}

    def __str__(self) -> str:
        return self.verdict


_FINE = (Kind.PICTURE, Kind.CHANGED, Kind.UNKNOWN)


def judge(images: Tensor, reference: Tensor | None = None) -> NoiseVerdict:
    """Tell broken images from pictures.

    Args:
        images: (B, H, W, 3) float in [0, 1], any device.
        reference: of the same shape, from the same prompts and seeds; without it only nan and flat images are known.
    Raises:
        SpecError: other shapes.
    """
    check_pairs(images if reference is None else reference, images, ("the reference", "the images"))
    found: list[ImageVerdict] = []
    for index in range(len(images)):
        found.append(_judge(images[index], None if reference is None else reference[index]))
    return NoiseVerdict(tuple(found))


def judge_values(values: Tensor) -> Kind:
    """Nan or flat, for tensors that are no images: latents, sounds. Anything else is `picture`."""
    values = values.detach().float()
    if not bool(values.isfinite().all()):
        return Kind.NAN
    return Kind.FLAT if values.numel() > 1 and float(values.std()) == 0 else Kind.PICTURE


def _judge(image: Tensor, reference: Tensor | None) -> ImageVerdict:
    image = image.detach().to("cpu").float()
    bad = int((~image.isfinite()).sum())
    if bad:
        return ImageVerdict(Kind.NAN, f"{bad} of {image.numel()} values are nan or inf")
    y = luminosity(image.clamp(0, 1))
    deviation = float(y.std(correction=0))
    if deviation < FLAT:
        return ImageVerdict(Kind.FLAT, f"flat: luminosity {float(y.mean()):.3f} with a deviation of {deviation:.4f}")
    if reference is None:
        return ImageVerdict(Kind.UNKNOWN, "noise is told beside a reference only", structure=_structure(y))
    other = reference.detach().to("cpu").float().clamp(0, 1)
    if not bool(other.isfinite().all()) or float(luminosity(other).std(correction=0)) < FLAT:
        return ImageVerdict(Kind.UNKNOWN, "the reference itself is nan or flat", structure=_structure(y))
    return _against(y, other)


def _against(y: Tensor, reference: Tensor) -> ImageVerdict:
    other = luminosity(reference)
    contrast = float(y.std(correction=0)) / float(other.std(correction=0))
    roughness = _roughness(y) / max(_roughness(other), 1e-6)
    score = roughness / min(contrast, 1.0)
    likeness = _correlation(_means(y, 8), _means(other, 8))
    evidence = math.log(max(score, 1e-6)) * (1 - likeness)
    structure = _structure(y)
    what = f"{roughness:.2f} times the edges at {contrast:.2f} times the contrast, likeness {likeness:.2f}"
    told = f"{what}: evidence {evidence:.2f}, noise is above {NOISE_EVIDENCE:g}"
    if evidence > NOISE_EVIDENCE and structure is None and not _measured(reference):
        kind, told = Kind.UNKNOWN, f"{what}; thresholds for less than 256 x 256 are known of smooth grey pictures only"
    elif evidence > NOISE_EVIDENCE and structure is not None and structure >= NOISE_STRUCTURE:
        kind, told = Kind.CHANGED, f"{what}; structure {structure:.2f}, noise is below {NOISE_STRUCTURE:g}"
    elif evidence > NOISE_EVIDENCE:
        kind = Kind.NOISE
    elif score > CHANGED_SCORE:
        kind, told = Kind.CHANGED, f"{'faded, ' if contrast < 1 / CHANGED_SCORE else ''}{what}"
    else:
        kind = Kind.PICTURE
    return ImageVerdict(kind, told, score, roughness, contrast, structure, likeness, evidence)


def _measured(reference: Tensor) -> bool:
    """Whether a small reference is like those that were measured: smooth, grey and full of contrast."""
    y = luminosity(reference)
    colour = float((reference.amax(-1) - reference.amin(-1)).mean())
    like = colour <= MEASURED_COLOUR and float(y.std(correction=0)) >= MEASURED_CONTRAST
    return like and _roughness(y) <= MEASURED_ROUGHNESS


def _roughness(y: Tensor) -> float:
    steps = float((y[1:] - y[:-1]).abs().mean()) + float((y[:, 1:] - y[:, :-1]).abs().mean())
    return steps / float(y.std(correction=0))


def _structure(y: Tensor) -> float | None:
    if min(y.shape) < SQUARE * SQUARES:
        return None
    means = _means(y, SQUARE)
    return (_correlation(means[1:], means[:-1]) + _correlation(means[:, 1:], means[:, :-1])) / 2


def _means(y: Tensor, square: int) -> Tensor:
    square = min(square, *y.shape)
    return F.avg_pool2d(y[None, None], square)[0, 0]


def _correlation(a: Tensor, b: Tensor) -> float:
    """0 where one of them is flat."""
    a, b = a - a.mean(), b - b.mean()
    size = math.sqrt(float(a.square().sum()) * float(b.square().sum()))
    return float((a * b).sum()) / size if size and math.isfinite(size) else 0.0
