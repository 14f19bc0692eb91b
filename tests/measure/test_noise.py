"""The noise verdict, on photographs, decoded noise and broken values. `benchmarks/noise.py` measures its thresholds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from quantwire.hosts.standalone.vae import load_vae
from quantwire.quantizers.errors import SpecError
from quantwire.quantizers.measure.noise import Kind, judge, judge_values
from sklearn.datasets import load_sample_images
from torch import Tensor


@pytest.fixture(scope="module")
def photos() -> Tensor:
    """Five pieces of each of scikit-learn's two photographs, (10, 256, 256, 3)."""
    whole = [torch.from_numpy(image.copy()).float() / 255 for image in load_sample_images().images]
    return torch.stack([image[y : y + 256, x : x + 256] for image in whole for x in (0, 180, 384) for y in (0, 171)])


@pytest.fixture(scope="module")
def noise(demo_models: Path) -> Tensor:
    """What a VAE makes of latents that no denoiser has touched, (4, 256, 256, 3)."""
    vae = load_vae(demo_models / "vae" / "digits_tae.safetensors")
    latents = torch.randn(4, vae.latent_channels, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return vae.decode(latents)


def test_without_a_reference(photos: Tensor, noise: Tensor) -> None:
    pictures = judge(photos)
    assert [image.kind for image in pictures.images] == [Kind.PICTURE] * len(photos)
    assert min(image.structure for image in pictures.images) > 0.6
    found = judge(noise)
    assert [image.kind for image in found.images] == [Kind.NOISE] * 4
    assert max(image.structure for image in found.images) < 0.4
    white = judge(torch.rand(2, 256, 256, 3, generator=torch.Generator().manual_seed(1)))
    assert white.verdict.startswith("broken: 2 of 2 images (2 noise)")


def test_against_a_reference(photos: Tensor, noise: Tensor) -> None:
    assert judge(noise, photos[:4]).broken
    assert not judge(photos, photos).broken
    brighter = (photos * 1.05 + 0.02).clamp(0, 1)
    assert not judge(brighter, photos).broken
    faded = judge(photos * 0.3, photos)
    assert all(image.kind is Kind.NOISE and image.contrast < 0.4 for image in faded.images)
    grain = torch.randn(photos.shape, generator=torch.Generator().manual_seed(2))
    assert judge((photos + 0.5 * grain).clamp(0, 1), photos).broken
    other = judge(photos.flip(2), photos)  # another picture of the same kind
    assert not other.broken
    assert min(image.likeness for image in other.images) < 0.5


def test_nan_and_flat() -> None:
    images = torch.rand(3, 64, 64, 3, generator=torch.Generator().manual_seed(3))
    broken = images.clone()
    broken[0, 3, 3, 0] = float("nan")
    broken[1] = 0.5
    found = judge(broken, images)
    assert [image.kind for image in found.images] == [Kind.NAN, Kind.FLAT, Kind.PICTURE]
    assert "(1 nan, 1 flat)" in found.verdict
    assert found.to_dict()["images"][0]["kind"] == "nan"
    # A reference that shows nothing is none.
    assert judge(images, torch.zeros_like(images)).images[0].kind is Kind.UNKNOWN


def test_small_images_are_not_judged_alone() -> None:
    found = judge(torch.rand(1, 64, 64, 3))
    assert not found.known
    assert "64 x 64 is too small" in found.verdict


def test_other_values() -> None:
    assert judge_values(torch.randn(1, 4, 8, 8)) is Kind.PICTURE
    assert judge_values(torch.zeros(1, 4, 8, 8)) is Kind.FLAT
    assert judge_values(torch.tensor([1.0, float("inf")])) is Kind.NAN


def test_refuses_other_shapes() -> None:
    with pytest.raises(SpecError, match="same seeds"):
        judge(torch.rand(1, 64, 64, 3), torch.rand(1, 64, 32, 3))
