"""What a layer is that holds quantized weights in plain tensors, told by its class, its attributes and its hooks.

Sources of the names: sdnq 0.2.8 and SD.Next, nncf 3.4.0, accelerate 1.15.0, diffusers 0.42.1, transformers 5.23.0,
hqq 0.2.8, compressed-tensors 0.20.0, AutoAWQ 0.2.9, gptqmodel, nunchaku, ComfyUI-GGUF at 03842fa,
ComfyUI-WanVideoWrapper at 3317577.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from .find_tensors import QUANTO, SDNQ, Kind, classes_of, defined_in, is_plain, quanto_id, sdnq_id
from .modes import Carrier

if TYPE_CHECKING:
    from torch import nn

_GPTQ = ("gptqmodel.nn_modules.qlinear.", "auto_gptq.nn_modules.qlinear.")
_AWQ = ("awq.modules.linear.",)
_AUTO_ROUND = ("auto_round.", "auto_round_extension.")
_COMPRESSED = ("compressed_tensors.",)
_NUNCHAKU = {"SVDQW4A4Linear": "svdq", "SVDQW4A8Linear": "svdq-w4a8", "AWQW4A16Linear": "awq"}
_HQQ = frozenset({"HQQLinear", "HQQLinearTorchWeightOnlynt4", "HQQLinearBitBlas", "MarlinLinear"})
# (class, top package) -> format; of transformers' own layers by the words of `quant_method` in a configuration.
_NAMED = {
    ("AutoBitLinear", "transformers"): "transformers-bitnet",
    ("BitLinear", "transformers"): "transformers-bitnet",
    ("CompressedTensorsFP8Linear", "transformers"): "compressed-tensors-float8",
    ("EetqLinear", "transformers"): "transformers-eetq-int8",
    ("FP8Experts", "transformers"): "transformers-finegrained-fp8",
    ("FP8Linear", "transformers"): "transformers-finegrained-fp8",
    ("FbgemmFp8Linear", "transformers"): "transformers-fbgemm-fp8",
    ("FbgemmFp8Llama4TextExperts", "transformers"): "transformers-fbgemm-fp8",
    ("HiggsLinear", "transformers"): "transformers-higgs",
    ("MetalLinear", "transformers"): "transformers-metal",
    ("Mxfp4GptOssExperts", "transformers"): "transformers-mxfp4",
    ("NVFP4Linear", "transformers"): "transformers-nvfp4",
    ("QuantizedEmbedding", "transformers"): "transformers-gemma",
    ("QuantizedLinear", "transformers"): "transformers-gemma",
    ("BFLFP8RLinear", "diffusers"): "bfl-fp8r",
    ("BFLNVFP4Linear", "diffusers"): "bfl-nvfp4",
    ("QuantizedLinear", "aqlm"): "aqlm",
    ("VQuantLinear", "vptq"): "vptq",
    ("QuantizedLinear", "spqr_quant"): "spqr",
    ("SINQLinear", "sinq"): "sinq",
    ("FPQuantLinear", "fp_quant"): "fp-quant",
    ("QParamsLinear", "quark"): "quark",
}
# Attributes that put a layer of any class among the quantized ones, or may.
_MARKS = frozenset(
    ("sdnq_dequantizer", "sdnq_decompressor", "quantization_scheme", "scale_weight", "_diffusers_hook", "_hf_hook")
)


class Layer(NamedTuple):
    """What is read of a layer: dictionaries only, because attributes may compute."""

    cls: type
    state: dict[str, Any]
    parameters: dict[str, Any]
    buffers: dict[str, Any]
    modules: dict[str, Any]

    @property
    def name(self) -> str:
        return self.cls.__name__


def layer_of(module: nn.Module) -> Layer:
    """The view of one layer."""
    return Layer(type(module), vars(module), *(_dict(module, n) for n in ("_parameters", "_buffers", "_modules")))


def _dict(module: nn.Module, name: str) -> dict[str, Any]:
    """Scripted and traced modules have mappings of their own, which have `items` and little else."""
    mapping: Any = getattr(module, name)
    return cast("dict[str, Any]", mapping) if isinstance(mapping, dict) else dict(mapping.items())


def identify_layer(layer: Layer) -> Kind | None:
    """What a layer holds none of whose own parameters and buffers tells it; None for layers in full precision."""
    for identify in _rules_of(layer.cls):
        if (kind := identify(layer)) is not None:
            return kind
    # A model has a thousand layers, nearly all of which end here.
    marked = not _MARKS.isdisjoint(layer.state) or "scale_weight" in layer.parameters or "scale_weight" in layer.buffers
    if not marked and _MARKS.isdisjoint(layer.modules):
        return None
    return next((kind for identify in _MARKED if (kind := identify(layer)) is not None), None)


@functools.lru_cache(maxsize=1024)
def _rules_of(cls: type) -> tuple[Callable[[Layer], Kind | None], ...]:
    """The rules that a class of layers, or a base of it, comes under."""
    classes = classes_of(cls)
    return tuple(
        rule
        for names, packages, rule in _RULES
        if any((not names or name in names) and defined_in(module, packages) for name, module in classes.items())
    )


def _kind(layer: Layer, format_id: str) -> Kind:
    return Kind(Carrier.LIBRARY, format_id, layer.name)


def _bits(value: object, word: str = "int") -> str:
    return f"{word}{value:g}" if isinstance(value, (int, float)) else "unknown"


def _bnb(layer: Layer) -> Kind | None:
    return _kind(layer, "bnb-int8")


def _unfrozen(layer: Layer) -> Kind | None:
    """A quanto layer before freeze(); those without weights, such as LayerNorm, do not count."""
    qtype = layer.state.get("weight_qtype")
    return None if qtype is None else Kind(Carrier.LIBRARY, quanto_id(qtype), layer.name, False)


def _sdnq(layer: Layer) -> Kind | None:
    """SDNQ's layers keep what dequantizes them in an attribute; SD.Next long put it on plain layers of torch."""
    places = (layer.state, layer.modules)
    names = ("sdnq_dequantizer", "sdnq_decompressor")
    dequantizer = next((p[n] for p in places for n in names if p.get(n) is not None), None)
    return None if dequantizer is None else _kind(layer, sdnq_id(dequantizer))


def _nncf(layer: Layer) -> Kind | None:
    """`nncf-int8-asym` for `INT8AsymmetricWeightsDecompressor`; others by their class."""
    short = layer.name.removesuffix("WeightsDecompressor").lower()
    for end, word in (("asymmetric", "-asym"), ("symmetric", "-sym")):
        if short.endswith(end):
            return _kind(layer, f"nncf-{short.removesuffix(end)}{word}")
    return _kind(layer, f"nncf-{short}")


def _nunchaku(layer: Layer) -> Kind | None:
    """Diffusers and packs have copies of these layers, so they are known by name wherever they are defined."""
    name = next(n for n in _NUNCHAKU if n in classes_of(layer.cls))
    precision = layer.state.get("precision", "int4")
    return _kind(layer, f"nunchaku-{_NUNCHAKU[name]}-{precision}") if "qweight" in layer.parameters else None


def _nunchaku_blocks(layer: Layer) -> Kind | None:
    """Blocks in compiled code, whose weights torch does not see, and so moves nowhere; and the layers of its T5."""
    if layer.name == "W4Linear":
        return _kind(layer, "nunchaku-awq-int4")
    return _kind(layer, "nunchaku-svdq") if layer.name.endswith("Blocks") and "m" in layer.state else None


def _hqq(layer: Layer) -> Kind | None:
    own = {**layer.state, **layer.parameters}
    if "W_q" in own and own["W_q"] is None:
        return None  # made, and not quantized yet
    meta: Any = own.get("meta") or {}
    return _kind(layer, f"hqq-{_bits(meta.get('nbits', own.get('nbits')))}")


def _gptq(layer: Layer) -> Kind | None:
    """GPTQ and AWQ as transformers loads them: packed integers, one class for each kernel."""
    packages = classes_of(layer.cls).values()
    if not {"qweight", "B"} & {*layer.buffers, *layer.parameters}:
        return None
    word = "awq" if "awq" in layer.name.lower() or any(defined_in(m, _AWQ) for m in packages) else "gptq"
    word = "auto-round" if any(defined_in(m, _AUTO_ROUND) for m in packages) else word
    return _kind(layer, f"{word}-{_bits(layer.state.get('bits', layer.state.get('w_bit')))}")


def _compressed_tensors(layer: Layer) -> Kind | None:
    """Its scheme is an attribute of the layer, which may be of any class; layers without weights in it do not count."""
    scheme: Any = layer.state.get("quantization_scheme")
    known = scheme is not None and defined_in(type(scheme).__module__, _COMPRESSED)
    weights: Any = getattr(scheme, "weights", None) if known else None
    stored = [
        t for n in ("weight", "weight_packed") if (t := layer.parameters.get(n, layer.buffers.get(n))) is not None
    ]
    if weights is None or not any(t.dtype.itemsize == 1 or not t.dtype.is_floating_point for t in stored):
        return None  # or its weights are still in full precision
    word: Any = getattr(weights, "type", "unknown")
    bits = _bits(getattr(weights, "num_bits", None), str(getattr(word, "value", word)))
    return _kind(layer, f"compressed-tensors-{bits}")


def _by_name(layer: Layer) -> Kind | None:
    """Layers whose class says it all."""
    names = classes_of(layer.cls)
    return next((_kind(layer, _NAMED[k]) for n, m in names.items() if (k := (n, m.partition(".")[0])) in _NAMED), None)


def _ggml_layer(layer: Layer) -> Kind | None:
    """A layer of ComfyUI-GGUF whose tensor lost the class that tells its type, so that its bytes are left."""
    dtype: Any = getattr(layer.parameters.get("weight"), "dtype", None)
    if dtype is None or dtype.is_floating_point:
        return None
    return Kind(Carrier.LIBRARY, "gguf-unknown", "GGMLLayer")


def _wan_linear(layer: Layer) -> Kind | None:
    """ComfyUI-WanVideoWrapper makes its layers when it loads a model, and fills them when it samples."""
    return _kind(layer, "gguf-unknown") if layer.state.get("is_gguf") is True else None


def _torch_quantized(layer: Layer) -> Kind | None:
    """PyTorch's own quantized layers, whose packed weights only its CPU kernels read."""
    packed = layer.modules.get("_packed_params")
    return (
        None if packed is None else _kind(layer, f"torch-{getattr(packed, 'dtype', 'unknown')}".replace("torch.", ""))
    )


def _cast(layer: Layer) -> Kind | None:
    """Where layerwise casting, of diffusers or of accelerate, keeps the weight in 8 bits."""
    hook = layer.state.get("_hf_hook")
    kinds = {type(one).__name__ for one in getattr(hook, "hooks", (hook,))}
    names = getattr(layer.state.get("_diffusers_hook"), "hooks", ())
    if "layerwise_casting" not in names and "LayerwiseCastingHook" not in kinds:
        return None
    storage = _float8(layer)
    return Kind(Carrier.LIBRARY, f"layerwise-fp8-{storage}", "LayerwiseCastingHook") if storage else None


def _scaled_fp8(layer: Layer) -> Kind | None:
    """An 8-bit float weight with its scale under the name that ComfyUI's older files and packs give it."""
    places = (layer.parameters, layer.buffers, layer.state)
    storage = _float8(layer) if any(p.get("scale_weight") is not None for p in places) else None
    if storage is None:
        return None
    if defined_in(layer.cls.__module__, ("comfy.",)):
        return Kind(Carrier.HOST, f"comfy-fp8-{storage}", layer.name)
    return _kind(layer, f"scaled-fp8-{storage}")


def _float8(layer: Layer) -> str | None:
    """`e4m3fn` or `e5m2` where the weight is stored in that; None elsewhere."""
    weight: Any = layer.parameters.get("weight")
    name = str(weight.dtype) if weight is not None and is_plain(weight) else ""
    return name.removeprefix("torch.float8_") if name.startswith("torch.float8_") else None


# Names of the class or of a base (empty is any), packages that may define it (empty is any), and what tells the format.
_RULES: tuple[tuple[frozenset[str], tuple[str, ...], Callable[[Layer], Kind | None]], ...] = (
    (frozenset({"Linear8bitLt"}), ("bitsandbytes.",), _bnb),
    (frozenset({"QModuleMixin"}), QUANTO, _unfrozen),
    (frozenset({"SDNQLayer"}), SDNQ, _sdnq),
    (frozenset({"BaseWeightsDecompressor"}), ("nncf.",), _nncf),
    (frozenset(_NUNCHAKU), (), _nunchaku),
    (frozenset(), ("nunchaku.",), _nunchaku_blocks),
    (_HQQ, ("hqq.",), _hqq),
    (frozenset(), (*_GPTQ, *_AWQ, *_AUTO_ROUND), _gptq),
    (frozenset(name for name, _ in _NAMED), (), _by_name),
    (frozenset(), ("torch.ao.nn.quantized.",), _torch_quantized),
    (frozenset({"GGMLLayer"}), (), _ggml_layer),
    (frozenset({"CustomLinear"}), (), _wan_linear),
)
# For layers of any class that bear one of `_MARKS`.
_MARKED = (_sdnq, _compressed_tensors, _cast, _scaled_fp8)
