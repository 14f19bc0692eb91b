"""What a parameter or buffer is, told by its class and nothing imported.

Sources of the class names: bitsandbytes 0.50.2, optimum-quanto 0.2.7 and its older package `quanto`, torchao 0.9 to
0.18, diffusers 0.42.1, comfy-kitchen 0.2.40, ComfyUI 0.33.0, sdnq 0.2.8; ComfyUI-GGUF at 03842fa, whose classes other
packs copy, so that those are known by name wherever they are defined.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

from .modes import Carrier

QUANTO = ("optimum.quanto.", "quanto.")
SDNQ = ("sdnq.", "modules.sdnq.")  # the package, and where SD.Next keeps it
_COMFY = ("comfy_kitchen.", "comfy.")
# ComfyUI-GGUF wraps full-precision tensors in the same class.
_GGML_PLAIN = ("gguf-f32", "gguf-f16", "gguf-none")
# Layouts of comfy-kitchen whose name alone tells the format; see `_comfy_id` for the others.
_LAYOUTS = {
    "TensorCoreFP8E4M3Layout": "comfy-fp8-e4m3fn",
    "TensorCoreFP8E5M2Layout": "comfy-fp8-e5m2",
    "TensorCoreNVFP4Layout": "comfy-nvfp4",
    "TensorCoreMXFP8Layout": "comfy-mxfp8",
    "TensorCoreConvRotW4A4Layout": "comfy-w4a4-convrot",
    "AsymW4A8Int8Layout": "comfy-w4a8",
}


GGUF_COPY = "GGUFParameter (not diffusers')"


class Kind(NamedTuple):
    """A quantized weight: who holds it, in which format, and the class that does."""

    carrier: Carrier
    format_id: str
    kind: str
    frozen: bool = True


def identify_tensor(tensor: object) -> Kind | None:
    """What a parameter or buffer holds; None for plain tensors, torch's own classes and the host's plain wrappers."""
    cls = type(tensor)
    if tensor is None or _is_torch(cls):
        return None
    classes = classes_of(cls)
    for name, packages, format_id in _RULES:
        if name in classes and defined_in(classes[name], packages):
            return _kind(cls, format_id(tensor))
    if "GGUFParameter" in classes:  # packs have copies of diffusers' class, in layers of their own
        return Kind(Carrier.LIBRARY, gguf_id(getattr(tensor, "quant_type", None)), GGUF_COPY)
    if "QuantizedTensor" in classes and defined_in(classes["QuantizedTensor"], _COMFY):
        ours = getattr(getattr(tensor, "_params", None), "format_id", None)
        if isinstance(ours, str):
            return Kind(Carrier.QUANTWIRE, ours, cls.__name__)
        return Kind(Carrier.HOST, _comfy_id(tensor), cls.__name__)
    if "GGMLTensor" in classes:
        format_id = gguf_id(getattr(tensor, "tensor_type", None))
        # By the name of the base: what offload does to a subclass is what it does to that.
        return None if format_id in _GGML_PLAIN else Kind(Carrier.LIBRARY, format_id, "GGMLTensor")
    if any(defined_in(module, ("torchao.",)) for module in classes.values()):
        return _kind(cls, _torchao_id(tensor))
    if defined_in(cls.__module__, _COMFY) or not _holds_more(tensor):
        return None
    return _kind(cls, f"unknown-{cls.__name__}")


def is_plain(tensor: object) -> bool:
    """Whether the class of a tensor is torch's own: Parameter, Buffer, FakeTensor, DTensor, ..."""
    return _is_torch(type(tensor))


@functools.lru_cache(maxsize=1024)
def _is_torch(cls: type) -> bool:
    return defined_in(cls.__module__, ("torch.",))


@functools.lru_cache(maxsize=1024)
def classes_of(cls: type) -> Mapping[str, str]:
    """Class name -> defining module, for a class and its bases; of two with one name, the module of the base."""
    return {base.__name__: base.__module__ for base in cls.__mro__}


def defined_in(module: str, packages: tuple[str, ...]) -> bool:
    """Whether a module is one of the packages or inside one; an empty tuple is any."""
    return not packages or f"{module}.".startswith(packages)


def quanto_id(qtype: object) -> str:
    """`quanto-qfloat8-e4m3fn` for the qtype named `qfloat8_e4m3fn`."""
    return f"quanto-{getattr(qtype, 'name', 'unknown')}".replace("_", "-")


def gguf_id(quant_type: object) -> str:
    """`gguf-q4-k` for `GGMLQuantizationType.Q4_K`; a bare number keeps its number."""
    return f"gguf-{getattr(quant_type, 'name', quant_type)}".lower().replace("_", "-")


def sdnq_id(dequantizer: object) -> str:
    """`sdnq-float8-e4m3fn` for the `weights_dtype` of SDNQ's dequantizer; older decompressors do not tell."""
    return f"sdnq-{getattr(dequantizer, 'weights_dtype', 'unknown')}".replace("_", "-")


def _kind(cls: type, format_id: str) -> Kind:
    return Kind(Carrier.LIBRARY, format_id, cls.__name__)


def _of(attribute: str, name: Callable[[object], str]) -> Callable[[object], str]:
    return lambda tensor: name(getattr(tensor, attribute, None))


# Name of a class or of its base, packages that may define it, and the format of such a tensor. First match wins.
_RULES: tuple[tuple[str, tuple[str, ...], Callable[[object], str]], ...] = (
    ("Params4bit", ("bitsandbytes.",), lambda p: f"bnb-{getattr(p, 'quant_type', 'unknown')}"),
    ("Int8Params", ("bitsandbytes.",), lambda p: "bnb-int8"),
    ("QTensor", QUANTO, _of("qtype", quanto_id)),
    ("GGUFParameter", ("diffusers.",), _of("quant_type", gguf_id)),
    ("SDNQTensor", SDNQ, _of("sdnq_dequantizer", sdnq_id)),
    ("BFLQuantizedParameter", ("diffusers.",), lambda p: f"bfl-{getattr(p, 'quant_type', 'unknown')}".lower()),
)


def _comfy_id(tensor: object) -> str:
    """The registry's format of ComfyUI's own tensor, or `comfy-` and the layout's name where it has none there."""
    layout: Any = getattr(tensor, "_layout_cls", None) or getattr(tensor, "_layout_type", "unknown")
    name = layout if isinstance(layout, str) else str(getattr(layout, "__name__", layout))
    if name == "TensorWiseINT8Layout":
        rotated = getattr(getattr(tensor, "_params", None), "convrot", False)
        return "comfy-int8-convrot" if rotated else "comfy-int8"
    if name == "TensorCoreFP8Layout":  # of either kind, which the stored values tell
        stored = str(getattr(getattr(tensor, "_qdata", None), "dtype", "unknown"))
        return f"comfy-fp8-{stored.removeprefix('torch.float8_')}"
    return _LAYOUTS.get(name, f"comfy-{name.removesuffix('Layout').lower()}")


def _torchao_id(tensor: object) -> str:
    """`torchao-int8wo` for an Int8Tensor, `torchao-int8dyn` when it quantizes activations too; else by its class.

    Int4 has a class for each packing (Int4OpaqueTensor on CPUs); they hold the same values. Before 0.13 one class held
    every type: `torchao-affine-int8`, or `torchao-affine-int8dyn` inside a LinearActivationQuantizedTensor.
    """
    kind = type(tensor).__name__.removesuffix("Tensor").lower()
    if kind == "linearactivationquantized":
        return f"{_torchao_id(getattr(tensor, 'original_weight_tensor', None))}dyn"
    if kind == "affinequantized":
        return f"torchao-affine-{_affine_type(tensor)}"
    kind = "int4" if kind.startswith("int4") else kind
    if kind not in ("int8", "int4", "float8"):
        return f"torchao-{kind}"
    return f"torchao-{kind}{'wo' if getattr(tensor, 'act_quant_kwargs', None) is None else 'dyn'}"


def _affine_type(tensor: object) -> str:
    """`float8-e4m3fn` by the dtype of what is stored, or `int4` for the levels -8 to 7, which other integers hold."""
    stored: Any = vars(tensor).get("tensor_impl")
    names = ("float8_data", "int_data", "packed_weight")
    dtype: Any = getattr(next((v for n in names if (v := getattr(stored, n, None)) is not None), None), "dtype", None)
    low, high = (getattr(tensor, name, None) for name in ("quant_min", "quant_max"))
    if isinstance(low, int) and isinstance(high, int) and (dtype is None or not dtype.is_floating_point):
        return f"int{(high - low).bit_length()}"
    return str(dtype or "unknown").removeprefix("torch.").replace("_", "-")


def _holds_more(tensor: object) -> bool:
    """Whether a tensor subclass keeps something that its values alone do not tell.

    Subclasses that only mark a parameter (`weight_loader` of a serving library, say) are moved and copied as well as
    any parameter, so they are no carriers.
    """
    own = [vars(cls) for cls in type(tensor).__mro__ if not _is_torch(cls)]
    if any(n in space for space in own for n in ("__tensor_flatten__", "__torch_dispatch__", "__torch_function__")):
        return True
    state = vars(tensor)
    if any(_has_tensors(value) for value in state.values()):
        return True
    dtype: Any = cast(Any, tensor).dtype
    return bool(state) and (dtype.itemsize == 1 or not (dtype.is_floating_point or dtype.is_complex))


def _has_tensors(value: object) -> bool:
    """Whether a value is a tensor, or holds one directly."""
    if hasattr(type(value), "__torch_function__"):
        return True
    if isinstance(value, dict):
        inside = list(cast("dict[object, object]", value).values())
    elif isinstance(value, (list, tuple)):
        inside = list(cast("list[object]", value))
    else:
        inside = list(getattr(value, "__dict__", {}).values())
    return any(hasattr(cast(type, type(one)), "__torch_function__") for one in inside)
