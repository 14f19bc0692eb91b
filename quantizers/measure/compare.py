"""What two versions of a model differ in, all that was measured of it in one result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from ..errors import SpecError
from .images import ImagesCompared, compare_images
from .layers import LayersCompared
from .noise import NoiseVerdict, judge

# (B, H, W, 3) float32 numpy array in [0, 1] -> what is seen in each image, to be compared with what was asked for.
Reader = Callable[[Any], Sequence[Any]]


@dataclass(frozen=True)
class TaskAccuracy:
    """How often a reader finds in the images what was asked for; `a`, `b` are shares of `count` images, 0 to 1."""

    a: float
    b: float
    count: int

    def __str__(self) -> str:
        return f"task accuracy {100 * self.b:.1f} % against {100 * self.a:.1f} % of {self.count} images"


@dataclass(frozen=True)
class Comparison:
    """Two versions of a model; None is what was not given. `a` is the reference.

    Attributes:
        layers: of the weights.
        images: of images from the same seeds, pair by pair.
        noise: whether images of `b` are pictures at all.
        task: what a reader of the images made of them.
    """

    a: str
    b: str
    layers: LayersCompared | None = None
    images: ImagesCompared | None = None
    noise: NoiseVerdict | None = None
    task: TaskAccuracy | None = None

    @property
    def broken(self) -> bool:
        return bool((self.layers and self.layers.broken) or (self.noise and self.noise.broken))

    @property
    def verdict(self) -> str:
        """One line; what is broken comes before what only differs."""
        if self.noise is not None and self.noise.broken:
            return f"images {self.noise.verdict}"
        if self.layers is not None and self.layers.broken:
            return f"weights {self.layers.verdict}"
        parts = [str(self.task)] if self.task is not None else []
        parts += [f"images: {self.images.verdict}"] if self.images is not None else []
        if self.layers is not None and not parts:
            parts.append(f"weights: {self.layers.verdict}")
        return "; ".join(parts) or "nothing was compared"

    def to_dict(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict, "broken": self.broken, "a": self.a, "b": self.b,
            "layers": None if self.layers is None else self.layers.to_dict(),
            "images": None if self.images is None else self.images.to_dict(),
            "noise": None if self.noise is None else self.noise.to_dict(),
            "task": None if self.task is None else asdict(self.task),
        }  # fmt: skip

    def __str__(self) -> str:
        lines = [_short(self.verdict)]
        if self.noise is not None:
            lines.append(_short(f"noise verdict: {self.noise}"))
        return "\n\n".join(["\n".join(lines), *(str(part) for part in (self.images, self.layers) if part is not None)])


def compare_pictures(a: Tensor, b: Tensor, labels: tuple[str, str]) -> tuple[ImagesCompared, NoiseVerdict]:
    """Args:
        a, b: (B, H, W, 3) float in [0, 1] from the same seeds; `a` is the reference.
    Raises:
        SpecError: shapes that differ, or are none of images.
    """
    return compare_images(a, b, labels), judge(b, a)


def task_accuracy(read: Reader, a: Tensor, b: Tensor, expected: Sequence[Any]) -> TaskAccuracy:
    """Let a reader look at the images of both models.

    Args:
        a, b: (B, H, W, 3) float in [0, 1]; nan is shown as black, as files have it.
        expected: what each image was to show.
    Raises:
        SpecError: there are not as many of one as of the other.
    """
    shares: list[float] = []
    for images in (a, b):
        seen = list(read(images.detach().cpu().float().nan_to_num().clamp(0, 1).numpy()))
        if not len(seen) == len(images) == len(expected):
            raise SpecError(
                f"The task reads {len(seen)} answers from {len(images)} images, and {len(expected)} are expected.\n"
                "`read` returns one answer an image, `cases` names one for each run."
            )
        shares.append(sum(bool(x == y) for x, y in zip(seen, expected, strict=True)) / len(expected))
    return TaskAccuracy(shares[0], shares[1], len(expected))


def _short(line: str, most: int = 118) -> str:
    return line if len(line) <= most else f"{line[: most - 3]}..."
