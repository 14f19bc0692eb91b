"""The demo's task for `quantwire compare --task`: ten prompts for digits, and a classifier that reads the images."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from digits import WORDS, read_digits, train_classifier

IMAGES = 4  # a prompt


def cases() -> list[tuple[list[str], int]]:
    """(changes to a shipped workflow, digit) of ten runs."""
    sets = f"Latent.batch_size={IMAGES}", "Sampler.steps=4"
    return [([f"Prompt.text=a handwritten {w}", f"Sampler.seed={1000 + d}", *sets], d) for d, w in enumerate(WORDS)]


def read(images: np.ndarray) -> list[int]:
    """(B, 64, 64, 3) float32 in [0, 1] -> the digit in each."""
    return [int(digit) for digit in read_digits(images, _classifier())]


@functools.cache
def _classifier() -> Any:
    return train_classifier()[0]
