"""The noise verdict, on photographs, decoded noise and broken values. `benchmarks/noise.py` measures its thresholds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from quantwire.hosts.standalone.vae import load_vae
from quantwire.quantizers.errors import SpecError
from quantwire.quantizers.measure.noise import Kind, judge, judge_values
from sklearn.datasets import load_sample_images
from torch import Tensor


@pytest.fixture(scope="module")
def photos() -> Tensor:
    """Six pieces of each of scikit-learn's two photographs, (12, 256, 256, 3)."""
    whole = [torch.from_numpy(image.copy()).float() / 255 for image in load_sample_images().images]
    return torch.stack([image[y : y + 256, x : x + 256] for image in whole for x in (0, 180, 384) for y in (0, 171)])


@pytest.fixture(scope="module")
def noise(demo_models: Path) -> Tensor:
    """What a VAE makes of latents that no denoiser has touched, (4, 256, 256, 3)."""
    vae = load_vae(demo_models / "vae" / "digits_tae.safetensors")
    latents = torch.randn(4, vae.latent_channels, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return vae.decode(latents)


def blurred(images: Tensor) -> Tensor:
    """Binomial 3 x 3."""
    kernel = (torch.outer(*[torch.tensor([1.0, 2.0, 1.0])] * 2) / 16).expand(3, 1, 3, 3)
    padded = F.pad(images.permute(0, 3, 1, 2), (1, 1, 1, 1), mode="replicate")
    return F.conv2d(padded, kernel, groups=3).permute(0, 2, 3, 1)


def kinds(images: Tensor, reference: Tensor | None = None) -> set[Kind]:
    return {image.kind for image in judge(images, reference).images}


def test_without_a_reference_nothing_is_guessed(photos: Tensor, noise: Tensor) -> None:
    for images in (photos, noise, torch.rand(2, 256, 256, 3)):
        found = judge(images)
        assert {image.kind for image in found.images} == {Kind.UNKNOWN}
        assert not found.known
        assert not found.broken
    assert min(image.structure for image in judge(photos).images) > 0.6
    assert max(image.structure for image in judge(noise).images) < 0.4


def test_noise(photos: Tensor, noise: Tensor) -> None:
    assert kinds(noise, photos[:4]) == {Kind.NOISE}
    white = torch.rand(photos.shape, generator=torch.Generator().manual_seed(1))
    found = judge(white, photos)
    assert found.verdict.startswith("broken: 12 of 12 images (12 noise)")


def test_good_pictures_are_no_noise(photos: Tensor) -> None:
    """Each piece of two photographs beside each other one, and beside itself changed as formats change pictures."""
    assert kinds(photos, photos) == {Kind.PICTURE}
    assert kinds((photos * 1.05 + 0.02).clamp(0, 1), photos) == {Kind.PICTURE}
    others = [image for k in range(1, len(photos)) for image in judge(photos.roll(k, 0), photos).images]
    assert not any(image.broken for image in others)
    assert any(image.kind is Kind.CHANGED and image.score > 1.5 for image in others)  # what the score alone would tell
    assert kinds(blurred(photos), photos) == {Kind.PICTURE}
    sharper = judge(photos, blurred(photos))
    assert Kind.CHANGED in {image.kind for image in sharper.images}
    assert not sharper.broken
    grain = torch.randn(photos.shape, generator=torch.Generator().manual_seed(2))
    assert kinds((photos + 0.2 * grain).clamp(0, 1), photos) <= {Kind.PICTURE, Kind.CHANGED}


def test_faded(photos: Tensor) -> None:
    for share in (0.8, 0.3):
        found = judge(0.5 + share * (photos - 0.5), photos)
        assert {image.kind for image in found.images} == {Kind.CHANGED}
        assert all("faded" in image.why for image in found.images)
        assert "12 of 12 images changed much" in found.verdict


def test_small_photographs_have_no_measured_basis(photos: Tensor) -> None:
    """Evidence is known of grey digits at these sizes: no photograph is called noise, whatever it stands beside."""
    small = torch.cat([photos[:, :64, :64], photos[:, 96:160, 96:160], photos[:, ::4, ::4]])
    found = [image for k in range(1, len(small), 5) for image in judge(small.roll(k, 0), small).images]
    assert Kind.NOISE not in {image.kind for image in found}  # pieces of sky are flat
    assert any(image.kind is Kind.UNKNOWN for image in found)


def test_nan_and_flat() -> None:
    images = torch.rand(3, 64, 64, 3, generator=torch.Generator().manual_seed(3))
    images = images.mean(-1, keepdim=True).expand(-1, -1, -1, 3)
    broken = images.clone()
    broken[0, 3, 3, 0] = float("nan")
    broken[1] = 0.5
    found = judge(broken, images)
    assert [image.kind for image in found.images] == [Kind.NAN, Kind.FLAT, Kind.PICTURE]
    assert "(1 nan, 1 flat)" in found.verdict
    assert found.to_dict()["images"][0]["kind"] == "nan"
    # A reference that shows nothing is none.
    assert judge(images, torch.zeros_like(images)).images[0].kind is Kind.UNKNOWN


def test_other_values() -> None:
    assert judge_values(torch.randn(1, 4, 8, 8)) is Kind.PICTURE
    assert judge_values(torch.zeros(1, 4, 8, 8)) is Kind.FLAT
    assert judge_values(torch.tensor([1.0, float("inf")])) is Kind.NAN


def test_refuses_other_shapes() -> None:
    with pytest.raises(SpecError, match="same seeds"):
        judge(torch.rand(1, 64, 64, 3), torch.rand(1, 64, 32, 3))
