"""Which quantized weights a module holds, whoever put them there.

Weights are recognised by the class names of tensors and layers, and by the packages that define them. No library is
imported: a model can hold quanto layers only if quanto is loaded already, and the check must not cost the seconds that
importing the others takes. A tensor subclass that nothing here knows is found too, under the name of its class: what
offload does to it is then said to be unknown, which is better than silence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from .find_layers import Layer, identify_layer, layer_of
from .find_tensors import GGUF_COPY, Kind, classes_of, identify_tensor, is_plain
from .modes import Carrier

if TYPE_CHECKING:
    from torch import nn

# NNCF keeps the decompressor of the parameter `x.y.weight` under this name, with the parameter's as `x:y:weight__0`.
_NNCF_HOOKS = "__nncf_hooks.post_hooks."
# Classes of ComfyUI-GGUF, which offload treats otherwise than the parameters of diffusers in the same formats.
_COMFYUI_GGUF = ("GGMLTensor", "GGMLLayer")
# Classes of packs that move their own layers, whatever the format: what a host's offload does to them is not known.
_OWN_WAYS = ("CustomLinear", GGUF_COPY)


@dataclass(frozen=True)
class Found:
    """Quantized layers of one kind inside a module.

    Attributes:
        name: dotted name of the first one; empty when it is the module itself.
        format_id: of the registry where it has the format, else named alike (`nunchaku-svdq-int4`); `unknown-` and the
            class where only the class can be told.
        layers: how many there are.
        kind: class that holds the weight, such as `Params4bit`.
        frozen: False for quanto layers whose weights are still in full precision; `format_id` is what they will be.
    """

    name: str
    carrier: Carrier
    format_id: str
    layers: int
    kind: str = ""
    frozen: bool = True

    @property
    def key(self) -> str:
        """How the table names it: the format id, or a state that behaves otherwise."""
        if not self.frozen:
            return "quanto-unfrozen"
        if self.kind in _OWN_WAYS:
            return f"other-{self.format_id}"
        return f"comfyui-{self.format_id}" if self.kind in _COMFYUI_GGUF else self.format_id


def find_carriers(module: nn.Module) -> list[Found]:
    """The quantized layers inside `module`, grouped by carrier, format and kind, in order of first appearance."""
    groups: dict[Kind, list[str]] = {}
    for name, layer in cast("Iterator[tuple[str, nn.Module]]", module.named_modules()):
        # A layer counts once for each kind that it holds, however many of its parameters are of that kind.
        for kind in dict.fromkeys(_identify(layer)):
            groups.setdefault(kind, []).append(_owner(name))
    return [Found(names[0], k.carrier, k.format_id, len(names), k.kind, k.frozen) for k, names in groups.items()]


def _owner(name: str) -> str:
    """The layer that a found module belongs to; itself but for NNCF's decompressors."""
    before, hooks, after = name.partition(_NNCF_HOOKS)
    return before + after.rpartition("__")[0].replace(":", ".").removesuffix(".weight") if hooks else name


def _identify(module: nn.Module) -> Iterator[Kind]:
    """Each quantized weight that the layer itself owns, as a parameter or as a buffer.

    Reads the dictionaries of parameters and buffers, never attributes: `QuantizedLinear.weight` dequantizes when
    touched.
    """
    layer = layer_of(module)
    format_id = layer.state.get("format_id")
    if isinstance(format_id, str) and "QuantizedLinear" in classes_of(layer.cls):
        yield Kind(Carrier.QUANTWIRE, format_id, "QuantizedLinear")
        return
    tensors = (*layer.parameters.items(), *layer.buffers.items())
    held = [kind for name, tensor in tensors if (kind := identify_tensor(_kept(layer, name, tensor))) is not None]
    yield from held
    if not held and (kind := identify_layer(layer)) is not None:
        yield kind


def _kept(layer: Layer, name: str, tensor: Any) -> object:
    """A parameter or buffer, or the tensor that accelerate's hook keeps in memory for one that is on `meta`.

    Libraries' classes mostly survive on `meta`; where a plain tensor stands for a weight, only the hook has its class.
    """
    hook = layer.state.get("_hf_hook")
    if hook is None or tensor is None or not is_plain(tensor) or not tensor.is_meta:
        return tensor
    for one in getattr(hook, "hooks", (hook,)):
        weights: Any = getattr(one, "weights_map", None)
        key = getattr(weights, "prefix", "") + name
        weights = getattr(weights, "dataset", weights)  # PrefixedDataset
        weights = getattr(weights, "state_dict", weights)  # OffloadedWeightsLoader: those that are not on disk
        if isinstance(weights, dict) and key in weights:
            return cast("dict[str, object]", weights)[key]
    return tensor
