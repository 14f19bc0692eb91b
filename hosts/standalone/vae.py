"""VAE of the embedded host: TAESD-type decoders (TAEF1, the demo's own) on diffusers' AutoencoderTiny."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...quantizers.apply import check_finite
from ...quantizers.errors import FileError
from ...quantizers.files.checkpoint import read_checkpoint
from .guard import check_before
from .offload import running

if TYPE_CHECKING:
    from ...quantizers.compat.guard import Guard
    from ..offload import OffloadSettings

PREFIX = "taesd_decoder."
UPSCALE = 8


@dataclass(frozen=True)
class Vae:
    """A decoder and the file's map from raw latents to its input: (latent - shift) * scale."""

    decoder: nn.Module
    scale: float
    shift: float
    latent_channels: int
    source: str
    guard: Guard | None = field(default=None, compare=False)
    offload: OffloadSettings | None = None

    def decode(self, latent: Tensor) -> Tensor:
        """(B, C, H, W) raw latent -> (B, 8H, 8W, 3) float32 image in [0, 1].

        Raises:
            FileError: the latent has another number of channels.
            OffloadConflict: the guard on it found that it cannot run as it is now.
        """
        check_before(self)
        if latent.shape[1] != self.latent_channels:
            raise FileError(
                f"{self.source}: decodes {self.latent_channels}-channel latents, got {latent.shape[1]} channels."
            )
        dtype = next(self.decoder.parameters()).dtype
        x = (latent.to(torch.float32) - self.shift) * self.scale
        with running(self) as placed:
            # Channels last: on a CPU convolutions in bfloat16 then copy no inputs, which was a quarter of the peak at
            # 512 px (143 -> 111 MiB) and of the time (0.22 -> 0.16 s for 20 images of the demo).
            image: Tensor = placed.decoder(x.to(dtype, memory_format=torch.channels_last))  # in [-1, 1]
        return ((image.float() + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1).contiguous()


def load_vae(path: Path) -> Vae:
    """Open a TAESD-type file in ComfyUI's layout (`taesd_decoder.N....`); its encoder part is not needed.

    Raises:
        FileError: another kind of VAE, or a damaged file.
        WeightError: nan or inf in a tensor.
    """
    from diffusers import AutoencoderTiny

    tensors = read_checkpoint(path).tensors
    first = tensors.get(PREFIX + "1.weight")
    if not isinstance(first, Tensor) or first.ndim != 4:
        raise FileError(
            f"{path.name}: not a TAESD-type VAE (no '{PREFIX}1.weight').\n"
            "The embedded host decodes with these; use other VAEs in ComfyUI."
        )
    # ComfyUI's layer 0 is the clamp, which diffusers applies outside its layer list.
    state: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if name.startswith(PREFIX):
            check_finite(name, tensor)
            number, _, rest = name.removeprefix(PREFIX).partition(".")
            index = int(number) - 1 if number.isdecimal() else number
            state[f"layers.{index}.{rest}"] = tensor
    width, channels = first.shape[:2]
    sizes = (width,) * 4
    with torch.device("meta"):
        tiny: Any = AutoencoderTiny(
            latent_channels=channels, encoder_block_out_channels=sizes, decoder_block_out_channels=sizes
        )
    try:
        tiny.decoder.load_state_dict(state, assign=True)
    except RuntimeError as err:
        raise FileError(f"{path.name}: not TAESD's decoder: {' '.join(str(err).split()[:60])}") from err
    return Vae(
        tiny.decoder.requires_grad_(False).eval(),
        _number(tensors, "vae_scale", 1.0, path),
        _number(tensors, "vae_shift", 0.0, path),
        channels,
        path.name,
    )


def _number(tensors: Mapping[str, Any], name: str, default: float, path: Path) -> float:
    value = tensors.get(name)
    if value is None:
        return default
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise FileError(f"{path.name}: '{name}' is not a single number.")
    check_finite(name, value)
    return float(value)
