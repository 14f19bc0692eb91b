"""LoRA in the embedded host: added in floating point beside the layer, or merged into its weight.

    exact        y = layer(x) + strength * alpha / rank * up(down(x))
    requantize   W = Q(dequantize(Q(W)) + strength * alpha / rank * up @ down)

Exact is the default, because quantizing a sum eats a small update: `benchmarks/lora_effect.py` measures how much. With
requantize, which a layer is told when it is quantized, a LoRA costs nothing when the model runs. Several LoRAs are
always added to the weight that had none, so that their errors do not pile up. A LoRA that is on the model before it is
quantized is merged at full precision (`merge_loras`), so that the weight is rounded once.

Keys of ComfyUI's layout are split by rows as the weights are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...quantizers.apply import FLOAT_DTYPES, check_finite, quantize_tensor
from ...quantizers.errors import FileError
from ...quantizers.files.checkpoint import read_checkpoint
from ...quantizers.provenance import spec_of
from ...quantizers.registry import require_reader
from ...quantizers.weight import QuantizedLinear, QuantizedWeight
from ..modules import with_layers
from . import flux
from .models import DiffusionModel

_DOWN = re.compile(r"^(?P<layer>.+?)\.(lora_down|lora_A)(\.default)?\.weight$")
# LoRAs of text encoders travel in the same files; ComfyUI's model-only loader leaves them out too.
_TEXT_ENCODER = ("lora_te", "text_encoder", "text_model.", "clip_l.", "t5xxl.")


@dataclass(frozen=True)
class Factors:
    """One LoRA of one layer: `scale * up @ down` is what it adds to the weight; down (rank, K), up (N, rank)."""

    down: Tensor
    up: Tensor
    scale: float


@dataclass(frozen=True)
class Merge:
    """Marks a quantized layer into whose weight LoRAs are merged; an attribute `merge` of the layer.

    Attributes:
        base: the quantized weight without any LoRA; None while that is the layer's own.
        loras: those that the layer has taken in.
    """

    base: QuantizedWeight | None = None
    loras: tuple[Factors, ...] = ()


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
            lora = Factors(down.to(model.dtype), part.to(model.dtype), scale * strength)
            layers[target] = _with_lora(layer, target, lora, path)
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


def _with_lora(layer: Any, target: str, lora: Factors, path: Path) -> nn.Module:
    n, k = getattr(layer, "out_features", 0), getattr(layer, "in_features", 0)
    rows, columns = lora.up.shape[0], lora.down.shape[1]
    if (n, k) != (rows, columns):
        raise FileError(f"{path.name}: LoRA of shape {rows}x{columns} does not fit '{target}' ({n}x{k}).")
    if isinstance(getattr(layer, "merge", None), Merge):
        return _requantized(layer, target, lora)
    return LoraLinear(layer, lora.down, lora.up, lora.scale)


def mergeable(layer: nn.Module) -> nn.Module:
    """The quantized layer, marked so that `apply_lora` merges LoRAs into its weight."""
    layer.merge = Merge()  # type: ignore[assignment]
    return layer


def _requantized(layer: Any, target: str, lora: Factors) -> QuantizedLinear:
    """A new layer: base weight plus all LoRAs in float32, quantized with the format and options of the base.

    The sum goes back to the weight's own dtype before it is quantized, because libraries give scales that dtype.

    Raises:
        SpecError: the format can be loaded but not made.
        WeightError: the sum exceeds the range of the dtype or of the format.
    """
    base = layer.merge.base or layer.quantized_weight
    loras = (*layer.merge.loras, lora)
    full = _added(require_reader(base.format_id).dequantize(base, torch.float32), loras)
    weight, _ = quantize_tensor(f"{target}.weight", full.to(base.orig_dtype), spec_of(base.format_id, base.meta))
    merged = QuantizedLinear(weight, layer.bias).eval()
    merged.merge = Merge(base, loras)  # type: ignore[assignment]
    return merged


def _added(weight: Tensor, loras: Iterable[Factors]) -> Tensor:
    """A float32 weight with LoRAs added; the products are float32 too."""
    for f in loras:
        up, down = (t.to(weight.device, torch.float32) for t in (f.up, f.down))
        weight = torch.addmm(weight, up, down, alpha=f.scale)
    return weight


def merge_loras(model: DiffusionModel) -> DiffusionModel:
    """The model with the LoRAs that stand beside full-precision layers merged into their weights.

    LoRAs beside anything else stay where they are: quantized layers, and weights stored in an 8-bit float, whose layers
    are cast by hooks.
    """
    layers: dict[str, nn.Module] = {}
    for name, module in model.transformer.named_modules():
        # Stacked LoRAs are nested: the outermost, which comes first, takes them all.
        if isinstance(module, LoraLinear) and not any(name.startswith(f"{outer}.") for outer in layers):
            merged = _merged(module)
            layers |= {} if merged is None else {name: merged}
    return model.with_transformer(with_layers(model.transformer, layers)) if layers else model


def _merged(module: LoraLinear) -> nn.Linear | None:
    loras: list[Factors] = []
    layer: nn.Module = module
    while isinstance(layer, LoraLinear):
        loras.insert(0, Factors(layer.down.detach(), layer.up.detach(), layer.scale))
        layer = layer.layer
    if type(layer) is not nn.Linear or layer.weight.dtype not in FLOAT_DTYPES or "forward" in vars(layer):
        return None
    merged = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    weight = _added(layer.weight.detach().to(torch.float32), loras).to(layer.weight.dtype)
    merged.weight = nn.Parameter(weight, requires_grad=False)
    merged.bias = layer.bias
    return merged.eval()
