"""Pictures of a half-done latent, by a linear map from its channels to red, green and blue.

A VAE's picture is, averaged over the 8 x 8 pixels that one latent place becomes, close to linear in that place's
channels. The map is fitted by least squares to the latents that this server has decoded, so it fits whatever VAE is in
use, and costs one small product per preview; a second, distilled decoder would be sharper but is one more file to have.
Before the first picture was decoded there is nothing to fit to: then brightness is the channel mix that varies most
over the latent, which shows shapes but no colours.
"""

from __future__ import annotations

import io
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

MAX_SIDE = 512
"""Pixels of the longer side: what the editor shows in a node."""
RIDGE = 1e-3
"""Share of the mean square of the channels: 4 x 4 places alone do not determine 17 x 3 numbers."""
MEMORY = 0.8
"""What an earlier picture still counts when a new one comes, so that a change of VAE is soon forgotten."""


class LatentColors:
    """The map for each number of channels. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: dict[int, tuple[Tensor, Tensor]] = {}
        self._maps: dict[int, Tensor] = {}

    def learn(self, latent: Tensor, images: Tensor) -> None:
        """Fit to one more decoded picture; what is no plain picture of the latent is passed over.

        Args:
            latent: (B, C, H, W).
            images: (B, n H, n W, 3) in [0, 1].
        """
        import torch

        if latent.ndim != 4 or images.ndim != 4 or images.shape[-1] != 3 or not latent.shape[0]:
            return
        height, width = latent.shape[2:]
        x = _places(latent[:1])
        pixels = images[:1].detach().to("cpu", torch.float32).movedim(-1, 1)
        y = torch.nn.functional.adaptive_avg_pool2d(pixels, (height, width))[0].flatten(1).T
        if not (x.isfinite().all() and y.isfinite().all()):
            return
        channels, count = latent.shape[1], x.shape[0]
        with self._lock:
            new = x.T @ x / count, x.T @ y / count
            old = self._sums.get(channels)
            sums = new if old is None else (old[0] * MEMORY + new[0], old[1] * MEMORY + new[1])
            ridge = RIDGE * float(sums[0].diagonal().mean()) * torch.eye(channels + 1)
            self._sums[channels] = sums
            self._maps[channels] = torch.linalg.solve(sums[0] + ridge, sums[1])

    def picture(self, latent: Tensor) -> Image | None:
        """The first latent of (B, C, H, W) as a picture, its longer side MAX_SIDE; None if it has no places."""
        import torch
        from PIL import Image

        if latent.ndim != 4 or 0 in latent.shape:
            return None
        height, width = latent.shape[2:]
        places = _places(latent[:1]).nan_to_num(0.0)
        with self._lock:
            found = self._maps.get(latent.shape[1])
        rgb = _grey(places[:, :-1]) if found is None else places @ found
        pixels = rgb.clamp(0, 1).mul(255).to(torch.uint8).reshape(height, width, -1).expand(height, width, 3)
        scale = MAX_SIDE / max(height, width)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        return Image.fromarray(pixels.contiguous().numpy()).resize(size, Image.Resampling.BILINEAR)


def jpeg(picture: Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, format="JPEG", quality=90)
    return out.getvalue()


def _places(latent: Any) -> Tensor:
    """(H W, C + 1) float32: the channels of each place, and a 1 for the constant part of the map."""
    import torch

    flat = latent.detach().to("cpu", torch.float32)[0].flatten(1).T
    return torch.cat([flat, torch.ones(flat.shape[0], 1)], dim=1)


def _grey(places: Tensor) -> Tensor:
    """(H W, 1) in [0, 1]: the first principal component, two standard deviations wide to either side."""
    import torch

    centred = places - places.mean(0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    along = centred @ vectors[:, -1:]
    spread = along.std(correction=0)
    return along / (4 * spread) + 0.5 if spread > 0 else torch.full_like(along, 0.5)
