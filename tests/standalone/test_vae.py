"""TAESD-type VAE files: the decoder against diffusers' own, and files of another kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny
from quantwire.hosts.standalone.vae import load_vae
from quantwire.quantizers.errors import FileError
from safetensors.torch import load_file, save_file
from torch import Tensor


def random_decoder() -> Any:
    torch.manual_seed(0)
    widths = (32,) * 4
    return AutoencoderTiny(
        latent_channels=16, encoder_block_out_channels=widths, decoder_block_out_channels=widths
    ).decoder.eval()


def comfy_layout(decoder: Any) -> dict[str, Tensor]:
    """ComfyUI counts from the clamp that diffusers applies outside its list."""
    out = {}
    for name, tensor in decoder.state_dict().items():
        _, number, rest = name.split(".", 2)
        out[f"taesd_decoder.{int(number) + 1}.{rest}"] = tensor.contiguous()
    return out


@pytest.fixture
def vae_file(tmp_path: Path) -> Path:
    save_file(comfy_layout(random_decoder()), tmp_path / "tae.safetensors")
    return tmp_path / "tae.safetensors"


def latent(channels: int = 16) -> Tensor:
    return torch.randn(2, channels, 4, 6, generator=torch.Generator().manual_seed(1))


def test_decodes_as_diffusers_does(vae_file: Path) -> None:
    with torch.inference_mode():
        image = load_vae(vae_file).decode(latent())
        want = random_decoder()(latent().to(memory_format=torch.channels_last))
        contiguous = random_decoder()(latent())
    assert image.shape == (2, 32, 48, 3)
    assert torch.equal(image, ((want + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1))
    torch.testing.assert_close(want, contiguous)  # the order of the sums, and nothing else
    assert 0 <= float(image.min()) <= float(image.max()) <= 1


def test_scale_and_shift_of_the_file(vae_file: Path) -> None:
    scaled = {**load_file(vae_file), "vae_scale": torch.tensor(0.3611), "vae_shift": torch.tensor([0.1159])}
    save_file(scaled, vae_file)
    with torch.inference_mode():
        image = load_vae(vae_file).decode(latent())
        want = random_decoder()((latent() - 0.1159) * 0.3611)
    torch.testing.assert_close(image, ((want + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1))


def test_half_precision_file(vae_file: Path) -> None:
    save_file({n: t.bfloat16() for n, t in load_file(vae_file).items()}, vae_file)
    with torch.inference_mode():
        image = load_vae(vae_file).decode(latent())
    assert image.dtype is torch.float32
    assert torch.isfinite(image).all()


def test_demo_vae(demo_models: Path) -> None:
    vae = load_vae(demo_models / "vae" / "digits_tae.safetensors")
    with torch.inference_mode():
        assert vae.decode(torch.zeros(1, 16, 8, 8)).shape == (1, 64, 64, 3)
    assert vae.scale == pytest.approx(0.3611)
    assert vae.shift == pytest.approx(0.1159)


def test_wrong_number_of_channels(vae_file: Path) -> None:
    with pytest.raises(FileError, match=r"tae\.safetensors: decodes 16-channel latents, got 4"):
        load_vae(vae_file).decode(latent(4))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("taesd_decoder.1.weight"), "not a TAESD-type VAE"),
        (lambda t: t.update({"taesd_decoder.1.weight": torch.zeros(3)}), "not a TAESD-type VAE"),
        (lambda t: t.pop("taesd_decoder.19.bias"), "19.bias"),
        (lambda t: t.update({"taesd_decoder.19.bias": torch.zeros(7)}), "size mismatch"),
        (lambda t: t.update({"taesd_decoder.x": torch.zeros(7)}), "layers.x"),
        (lambda t: t.update(vae_scale=torch.zeros(2)), "'vae_scale' is not a single number"),
    ],
    ids=["kind", "flat", "missing", "shape", "stray", "scale"],
)
def test_damaged_files(vae_file: Path, change: Any, said: str) -> None:
    tensors = load_file(vae_file)
    change(tensors)
    save_file(tensors, vae_file)
    with pytest.raises(FileError) as caught:
        load_vae(vae_file)
    first = str(caught.value).splitlines()[0]
    assert first.startswith("tae.safetensors:")
    assert said.replace("19", "18") in first or said in first
