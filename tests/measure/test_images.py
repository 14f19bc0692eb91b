"""PSNR, SSIM, FLIP and the pictures of a comparison."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from quantwire.quantizers.errors import SpecError
from quantwire.quantizers.measure.compare import task_accuracy
from quantwire.quantizers.measure.images import compare_images, psnr_db, side_by_side, ssim
from torch import Tensor

# scikit-image 0.26.0, a and b of `pair` as float64: structural_similarity(a, b, channel_axis=-1, data_range=1.0,
# gaussian_weights=True, use_sample_covariance=False, sigma=1.5), and peak_signal_noise_ratio(a, b, data_range=1.0).
SKIMAGE = {
    (64, 64): (0.9292328447697954, 23.520900681524463),
    (11, 11): (0.9556026733977087, 22.327683346935167),
    (48, 80): (0.9323175164735918, 23.23876707778576),
    (33, 47): (0.928570981210358, 23.58694570788002),
}


def pair(h: int, w: int) -> tuple[Tensor, Tensor]:
    y, x = np.mgrid[0:h, 0:w].astype(np.float32)
    a = np.stack([(np.sin(x / 5) + 1) / 2, (np.cos(y / 7) + 1) / 2, ((x + y) % 17) / 16], -1).astype(np.float32)
    waves = np.stack([np.cos(x * y / 31), np.sin(x - y), np.cos(x + 2 * y)], -1).astype(np.float32)
    b = np.clip(a * np.float32(0.9) + np.float32(0.04) * waves, 0, 1)
    return torch.from_numpy(a), torch.from_numpy(b)


@pytest.mark.parametrize("size", SKIMAGE, ids=str)
def test_values_of_scikit_image(size: tuple[int, int]) -> None:
    a, b = pair(*size)
    expected_ssim, expected_psnr = SKIMAGE[size]
    assert ssim(a, b) == pytest.approx(expected_ssim, abs=1e-9)
    assert psnr_db(a, b) == pytest.approx(expected_psnr, abs=1e-6)
    assert ssim(a, a) == pytest.approx(1.0)
    assert psnr_db(a, a) is None


def test_flip_is_the_packages() -> None:
    flip = pytest.importorskip("flip_evaluator", reason="flip-evaluator is not installed")
    a, b = pair(48, 80)
    found = compare_images(a[None], b[None]).pairs[0]
    assert found.flip == pytest.approx(flip.evaluate(a.numpy(), b.numpy(), "LDR")[1])
    assert 0 < found.flip < 1


def test_pairs_one_by_one() -> None:
    a, b = pair(32, 32)
    bad = b.clone()
    bad[0, 0, 0] = float("nan")
    found = compare_images(torch.stack([a, a, a]), torch.stack([a, b, bad]), ("full", "nf4"))
    same, other, broken = found.pairs
    assert same.identical
    assert (same.psnr_db, same.ssim, same.max_error) == (None, pytest.approx(1.0), 0.0)
    assert other.mean_error == pytest.approx(float((a - b).abs().mean()), abs=1e-6)
    light = torch.tensor([0.2126, 0.7152, 0.0722])
    assert other.luminosity_b == pytest.approx(float((b @ light).mean()), abs=1e-5)
    assert not broken.finite
    assert broken.ssim is None
    assert found.psnr_db == other.psnr_db
    assert found.verdict.startswith("broken: 1 of 3")
    assert compare_images(a[None], a[None]).verdict.startswith("identical")
    assert all(len(line) <= 120 for line in str(found).splitlines())
    small = compare_images(a[None, :8], b[None, :8]).pairs[0]
    assert small.ssim is None
    assert small.psnr_db is not None


def test_side_by_side() -> None:
    a = torch.full((2, 64, 64, 3), 0.5)
    b = a.clone()
    b[:, :, :32] = 0.6
    b[1, 0, 0] = float("inf")
    made = side_by_side(a, b, gain=4)
    assert made.shape == (2, 64, 64 * 3 + 2 * 2, 3)
    assert made.dtype is torch.float32
    assert made.min() >= 0
    assert made.max() <= 1
    assert made[0, 5, 132 + 5].tolist() == pytest.approx([0.4] * 3, abs=1e-5)
    assert made[0, 5, 132 + 50].tolist() == [0.0] * 3
    assert made[1, 0, 66].tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        ((1, 8, 8, 3), (1, 8, 9, 3), "same seeds"),
        ((2, 8, 8, 3), (1, 8, 8, 3), "2 images of 8 x 8"),
        ((1, 8, 8, 4), (1, 8, 8, 4), "expected"),
        ((8, 8, 3), (8, 8, 3), "expected"),
        ((0, 8, 8, 3), (0, 8, 8, 3), "expected"),
    ],
)
def test_shapes_that_cannot_be_compared(a: tuple[int, ...], b: tuple[int, ...], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        compare_images(torch.zeros(a), torch.zeros(b))


def test_task_accuracy() -> None:
    images = torch.tensor([0.1, 0.9, 0.1, 0.9]).view(4, 1, 1, 1).expand(4, 8, 8, 3)

    def bright(x: np.ndarray) -> list[bool]:
        return [bool(image.mean() > 0.5) for image in x]

    found = task_accuracy(bright, images, images.flip(0), [False, True, False, True])
    assert (found.a, found.b, found.count) == (1.0, 0.0, 4)
    with pytest.raises(SpecError, match="3 are expected"):
        task_accuracy(bright, images, images, [True] * 3)
