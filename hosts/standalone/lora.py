"""LoRA in the embedded host: added in floating point beside the layer, quantized or not.

    y = layer(x) + strength * alpha / rank * up(down(x))

Merging into quantized bytes was not chosen: requantizing eats a small update (ComfyUI's own merge keeps a cosine of
0.54 to 0.82 of a LoRA's effect at 4 bits). Keys of ComfyUI's layout are split by rows as the weights are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...quantizers.apply import check_finite
from ...quantizers.errors import FileError
from ...quantizers.files.checkpoint import read_checkpoint
from ..modules import with_layers
from . import flux
from .models import DiffusionModel

_DOWN = re.compile(r"^(?P<layer>.+?)\.(lora_down|lora_A)(\.default)?\.weight$")
# LoRAs of text encoders travel in the same files; ComfyUI's model-only loader leaves them out too.
_TEXT_ENCODER = ("lora_te", "text_encoder", "text_model.", "clip_l.", "t5xxl.")


class LoraLinear(nn.Module):
    """A layer and one LoRA beside it; LoRAs stack by nesting."""

    def __init__(self, layer: nn.Module, down: Tensor, up: Tensor, scale: float) -> None:
        super().__init__()
        self.layer = layer
        self.out_features, self.in_features = up.shape[0], down.shape[1]
        self.down = nn.Parameter(down, requires_grad=False)
        self.up = nn.Parameter(up, requires_grad=False)
        self.scale = scale

    @property
    def weight(self) -> Tensor:
        return self.layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.layer.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        return self.layer(x) + self.scale * nn.functional.linear(nn.functional.linear(x, down), up)


def apply_lora(model: DiffusionModel, path: Path, strength: float) -> DiffusionModel:
    """A new model object with the LoRA of a file beside its layers; parts for text encoders are left out.

    Raises:
        FileError: a key that fits no layer or is of another kind (DoRA, LoKr, ...), or a pair that does not fit.
        WeightError: nan or inf in a tensor.
    """
    file = read_checkpoint(path).tensors.items()
    tensors = {n: t for n, t in file if isinstance(t, Tensor) and not n.startswith(_TEXT_ENCODER)}
    rows = {r.target: r for r in flux.key_map(model.config)}
    layers: dict[str, nn.Module] = {}
    used: set[str] = set()
    for name in tensors:
        if not (match := _DOWN.match(name)):
            continue
        up_name = name.replace(".lora_down", ".lora_up").replace(".lora_A", ".lora_B")
        if up_name not in tensors:
            raise FileError(f"{path.name}: '{name}' has no partner '{up_name}'.")
        targets = _targets(match["layer"], rows)
        alpha_name = f"{match['layer']}.alpha"
        used |= {name, up_name, alpha_name} if targets else set()
        down, up = tensors[name], tensors[up_name]
        check_finite(name, down)
        check_finite(up_name, up)
        if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
            shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
            raise FileError(f"{path.name}: '{name}' and its partner have the shapes {shapes}, which do not multiply.")
        scale = float(tensors[alpha_name]) / down.shape[0] if alpha_name in tensors else 1.0
        for target, row in targets.items():
            part: Any = up if row is None else flux.select_rows(up, row)
            layer = layers.get(target) or model.transformer.get_submodule(target)
            layers[target] = _beside(layer, target, down, part, scale * strength, model.dtype, path)
    strangers = [n for n in tensors if n not in used]
    if not layers:
        shown = ", ".join(strangers[:3]) or "no tensors"
        raise FileError(f"{path.name}: no LoRA for this model in it (it has {shown}, ...).")
    if strangers:
        raise FileError(
            f"{path.name}: {len(strangers)} of its tensors are no LoRA of a layer in this model, "
            f"such as '{strangers[0]}'.\n"
            "The embedded host adds plain LoRAs (down, up, alpha); use others in ComfyUI."
        )
    return model.with_transformer(with_layers(model.transformer, layers))


def _targets(layer: str, rows: Mapping[str, flux.Row]) -> dict[str, flux.Row | None]:
    """diffusers layers that a key belongs to, each with the rows of `up` that are its own; None is all of them.

    Keys name layers of ComfyUI's layout or of diffusers', with dots, or with underscores as kohya's do.
    """
    name = re.sub(r"^(diffusion_model|transformer|base_model\.model)\.", "", layer)
    kohya = re.sub(r"^lora_(unet|transformer)_", "", layer)
    found: dict[str, flux.Row | None] = {}
    for target, row in rows.items():
        if not target.endswith(".weight"):
            continue
        own, source = target.removesuffix(".weight"), row.source.removesuffix(".weight")
        if own == name or own.replace(".", "_") == kohya:
            return {own: None}
        if source == name or source.replace(".", "_") == kohya:
            found[own] = row
    return found


def _beside(
    layer: Any, target: str, down: Tensor, up: Tensor, scale: float, dtype: torch.dtype, path: Path
) -> LoraLinear:
    n, k = getattr(layer, "out_features", 0), getattr(layer, "in_features", 0)
    if (n, k) != (up.shape[0], down.shape[1]):
        raise FileError(f"{path.name}: LoRA of shape {up.shape[0]}x{down.shape[1]} does not fit '{target}' ({n}x{k}).")
    return LoraLinear(layer, down.to(dtype), up.to(dtype), scale)
