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

from torch import Tensor, nn

from ...quantizers.errors import FileError
from ...quantizers.files.checkpoint import read_checkpoint
from ..modules import with_layers
from . import flux
from .models import DiffusionModel

_PAIR = re.compile(r"^(?P<layer>.+?)\.(lora_down|lora_A)(\.default)?\.weight$")


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
    """A new model object with the LoRA of a file beside its layers.

    Raises:
        FileError: no key of the file fits the model, or a pair does not fit its layer.
    """
    tensors = {n: t for n, t in read_checkpoint(path).tensors.items() if isinstance(t, Tensor)}
    rows = {r.target: r for r in flux.key_map(model.config)}
    layers: dict[str, nn.Module] = {}
    unknown: list[str] = []
    for name in tensors:
        if not (match := _PAIR.match(name)):
            continue
        targets = _targets(match["layer"], rows)
        if not targets:
            unknown.append(name)
        down, up, scale = _pair(tensors, name, match["layer"], path)
        for target in targets:
            row = rows[f"{target}.weight"]
            part = up if target == _canonical(match["layer"]) else flux.select_rows(up, row)
            layers[target] = _beside(model, target, layers, down, part, scale * strength, path)  # type: ignore[arg-type]
    if not layers:
        shown = ", ".join(unknown[:3] or list(tensors)[:3])
        raise FileError(f"{path.name}: no LoRA for this model in it (it has {shown}, ...).")
    if unknown:
        raise FileError(f"{path.name}: {len(unknown)} LoRA layers are not in this model, such as '{unknown[0]}'.")
    return model.with_transformer(with_layers(model.transformer, layers))


def _pair(tensors: Mapping[str, Tensor], name: str, layer: str, path: Path) -> tuple[Tensor, Tensor, float]:
    up_name = name.replace("lora_down", "lora_up").replace("lora_A", "lora_B")
    if up_name not in tensors:
        raise FileError(f"{path.name}: '{name}' has no partner '{up_name}'.")
    down, up = tensors[name], tensors[up_name]
    alpha = tensors.get(f"{layer}.alpha")
    return down, up, float(alpha) / down.shape[0] if alpha is not None else 1.0


def _canonical(layer: str) -> str:
    return re.sub(r"^(diffusion_model|transformer|base_model\.model)\.", "", layer)


def _targets(layer: str, rows: Mapping[str, flux.Row]) -> list[str]:
    """diffusers layer names that a key of ComfyUI's, kohya's or diffusers' naming belongs to."""
    name = _canonical(layer)
    if f"{name}.weight" in rows:
        return [name]
    kohya = layer.removeprefix("lora_unet_")
    return [
        t.removesuffix(".weight")
        for t, r in rows.items()
        if t.endswith(".weight") and (r.source == f"{name}.weight" or r.source.removesuffix(".weight").replace(".", "_") == kohya)
    ]  # fmt: skip


def _beside(
    model: DiffusionModel,
    target: str,
    done: Mapping[str, nn.Module],
    down: Tensor,
    up: Tensor,
    scale: float,
    path: Path,
) -> LoraLinear:
    layer: Any = done.get(target) or model.transformer.get_submodule(target)
    n, k = layer.out_features, layer.in_features
    if (n, k) != (up.shape[0], down.shape[1]):
        raise FileError(f"{path.name}: LoRA of shape {up.shape[0]}x{down.shape[1]} does not fit '{target}' ({n}x{k}).")
    dtype = flux.model_dtype(model.transformer)
    return LoraLinear(layer, down.to(dtype), up.to(dtype), scale)


