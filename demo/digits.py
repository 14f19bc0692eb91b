"""Handwritten digits: data, classifier, prompts and fixed demo pairs.

The data are scikit-learn's 1,797 digits of 8x8 pixels (a copy of the UCI "Optical Recognition of Handwritten Digits"
test set), which come with the package, so nothing is downloaded. A generated image is 64x64; a classifier reads it
after 8x8 area averaging, and it is trained on digits that went up to 64x64 and back the same way, so that training
and reading see the same blur. A support vector machine and not a network: it fits in a fraction of a second, needs no
weights in the repository, and is deterministic.
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# {} takes the word ("seven") or the numeral ("7"); the text encoder lower-cases.
TEMPLATES = (
    "a handwritten {}",
    "handwritten digit {}",
    "a handwritten digit {}",
    "the number {}",
    "the digit {}",
    "a photo of the digit {}",
    "a photo of a handwritten {}",
    "an image of the number {}",
    "a drawing of the number {}",
    "a white {} on black",
    "draw a {}",
    "the number {}, written by hand",
    "a scan of a handwritten digit: {}.",
    "{}",
)


def load_split() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Load the digits, split 70/30 and stratified, always the same way.

    Returns:
        x_train (1257, 8, 8) float32 in [0, 1], y_train (1257,) int64, x_test (540, 8, 8), y_test (540,).
    """
    data = load_digits()
    images = data.images.astype(np.float32) / 16
    x_train, x_test, y_train, y_test = train_test_split(
        images, data.target, test_size=0.3, random_state=0, stratify=data.target
    )
    return x_train, y_train, x_test, y_test


def upsample(images: torch.Tensor) -> torch.Tensor:
    """Enlarge (B, 8, 8) digits in [0, 1] to (B, 64, 64), bicubic, clamped to [0, 1]."""
    big = torch.nn.functional.interpolate(images[:, None], size=(64, 64), mode="bicubic", align_corners=False)
    return big[:, 0].clamp(0, 1)


def area_average(images: np.ndarray) -> np.ndarray:
    """Reduce (B, 64, 64) or (B, 64, 64, 3) images to (B, 64) means of 8x8 squares, channels averaged."""
    grey = images.mean(-1) if images.ndim == 4 else images
    return grey.reshape(len(grey), 8, 8, 8, 8).mean((2, 4)).reshape(len(grey), 64)


def train_classifier() -> tuple[SVC, float]:
    """Fit the classifier on the training split, in under a second.

    Returns:
        The classifier, and its accuracy on the held-out split (0 to 1).
    """
    x_train, y_train, x_test, y_test = load_split()
    train, test = (area_average(upsample(torch.from_numpy(x)).numpy()) for x in (x_train, x_test))
    clf = SVC(gamma="scale", C=10).fit(train, y_train)
    return clf, float(clf.score(test, y_test))


def read_digits(images: np.ndarray, clf: SVC) -> np.ndarray:
    """Read the digit in each image.

    Args:
        images: (B, 64, 64, 3) float in [0, 1], white digit on black; values outside are clamped.
        clf: from `train_classifier`.
    Returns:
        (B,) int64.
    """
    return clf.predict(area_average(np.clip(np.asarray(images, dtype=np.float32), 0, 1)))


def demo_pairs(n: int = 200) -> list[tuple[str, int, int]]:
    """List n fixed (prompt, seed, digit) triples, digits 0 to 9 in turn.

    Four rounds of five say "a handwritten seven", the fifth goes through the other templates and numerals. Pair k
    starts from `torch.manual_seed(seed); torch.randn(1, 16, 8, 8)`.
    """
    pairs: list[tuple[str, int, int]] = []
    for k in range(n):
        lap, digit = divmod(k, 10)
        if lap % 5 < 4:
            prompt = f"a handwritten {WORDS[digit]}"
        else:
            name = str(digit) if (lap // 5 + digit) % 2 else WORDS[digit]
            prompt = TEMPLATES[1 + (lap // 5 + digit) % (len(TEMPLATES) - 1)].format(name)
        pairs.append((prompt, 1000 + k, digit))
    return pairs
