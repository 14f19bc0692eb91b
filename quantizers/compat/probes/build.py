"""The real layers of every carrier and format.

Widths: 256, which every block size in use divides. quanto holds grouped weights of this width in a class made for its
fast kernel and narrower ones in another, whose errors differ, so those formats are probed in both.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...apply import make_layer
from ...formats import BACKENDS
from ...registry import availability, get_entry, get_quantizer
from ...spec import QuantSpec
from ...weight import QuantizedLinear, QuantizedWeight
from ..modes import Carrier
from .net import DTYPE, Net, full_precision, inputs, linears
from .optional import Unavailable, load

WIDTH, NARROW = 256, 128
GROUPED = ("quanto-qint4", "quanto-qint2")
UNFROZEN = "quanto-unfrozen"
# Modules whose layers a library brings, and the packages that these come in.
PACKAGES = {
    "bnb": ("bitsandbytes", "bitsandbytes"),
    "quanto": ("optimum.quanto", "optimum-quanto"),
    "gguf": ("gguf", "gguf"),
    "sdnq": ("sdnq", "sdnq"),
    "torchao": ("torchao", "torchao"),
    "nncf": ("nncf", "nncf"),
    "layerwise": ("diffusers", "diffusers"),
    "comfy": ("comfy_kitchen", "comfy-kitchen"),
}
TORCHAO_CONFIGS = {
    "torchao-int8wo": "Int8WeightOnlyConfig",
    "torchao-int8dyn": "Int8DynamicActivationInt8WeightConfig",
    "torchao-float8wo": "Float8WeightOnlyConfig",
}


def quiet() -> None:
    """Before any library is imported: no telemetry, and no compiling of kernels that probes do not use."""
    os.environ.setdefault("NNCF_CI", "1")
    os.environ.setdefault("SDNQ_USE_TORCH_COMPILE", "0")


def widths(carrier: Carrier | None, format_id: str) -> tuple[int, ...]:
    return (NARROW, WIDTH) if carrier is Carrier.LIBRARY and format_id in GROUPED else (WIDTH,)


def libraries(carrier: Carrier, format_id: str) -> tuple[str, ...]:
    """PyPI packages whose code the layers run; none where torch is enough."""
    if carrier is Carrier.QUANTWIRE:
        backend = get_entry(format_id).backend
        package = next(b.package for b in BACKENDS if b.name == backend)
        return (package,) if package else ()
    backend = format_id.partition("-")[0]
    package = PACKAGES[backend][1]
    return (package, "diffusers") if backend == "gguf" else (package,)


def build(carrier: Carrier | None, format_id: str, width: int) -> nn.Module:
    """A module of the carrier's layers in the format, on the CPU; None builds it in full precision.

    Raises:
        Unavailable: its library is not installed, or cannot make the format on this machine.
    """
    net = full_precision(width)
    if carrier is None:
        return net
    backend = format_id.partition("-")[0]
    if carrier is Carrier.QUANTWIRE:
        _replace(net, format_id, lambda weight, layer: QuantizedLinear(weight, layer.bias))
    elif carrier is Carrier.HOST:
        _replace(net, format_id, lambda weight, layer: make_layer(weight, layer.bias, Carrier.HOST))
    else:
        load(*PACKAGES[backend])
        net = LIBRARY[backend](net, format_id)
    return net.eval()


@functools.cache
def _quantized(format_id: str, width: int) -> dict[str, QuantizedWeight]:
    """By layer; kept for the process, since some types of GGUF take seconds to make."""
    state = availability(format_id)
    if not state.works:
        raise Unavailable(state.reason.rstrip("."))
    quantizer, spec = get_quantizer(format_id), QuantSpec(format_id)
    layers = linears(full_precision(width))
    return {name: quantizer.quantize(layer.weight.data, spec) for name, layer in layers.items()}


def _replace(net: Net, format_id: str, make: Callable[[QuantizedWeight, nn.Linear], nn.Module]) -> None:
    weights = _quantized(format_id, net.width)
    for name, layer in linears(net).items():
        weight = weights[name]
        copied = weight.with_tensors({key: t.clone() for key, t in weight.tensors.items()})
        net.set_submodule(name, make(copied, layer))


def _bnb(net: Net, format_id: str) -> nn.Module:
    bnb = importlib.import_module("bitsandbytes")
    for name, linear in linears(net).items():
        n, k = linear.weight.shape
        if format_id == "bnb-int8":
            layer = bnb.nn.Linear8bitLt(k, n, has_fp16_weights=False)
        else:
            layer = bnb.nn.Linear4bit(k, n, compute_dtype=DTYPE, quant_type=format_id.removeprefix("bnb-"))
            # Some CPUs would repack the weight at its first product, which no GPU does: then what groups keep on disk
            # no longer fits the quantization state, and the output is noise.
            layer.support_avx512bf16_for_cpu = False
        layer.load_state_dict(linear.state_dict())
        net.set_submodule(name, layer.to("cpu"))  # the move is what quantizes
    return net


def _gguf(net: Net, format_id: str) -> nn.Module:
    kinds = importlib.import_module("gguf").GGMLQuantizationType
    utils = load("diffusers.quantizers.gguf.utils", "diffusers")
    kind = kinds[format_id.removeprefix("gguf-").upper().replace("-", "_")]
    if kind not in utils.SUPPORTED_GGUF_QUANT_TYPES:
        raise Unavailable(f"the installed diffusers has no layer for {kind.name}")

    def make(weight: QuantizedWeight, linear: nn.Linear) -> nn.Module:
        layer = utils.GGUFLinear(linear.in_features, linear.out_features, bias=True, compute_dtype=DTYPE)
        layer.weight = utils.GGUFParameter(weight.tensors["qdata"], quant_type=kind)
        layer.bias = nn.Parameter(linear.bias.data.clone(), requires_grad=False)
        return layer

    _replace(net, format_id, make)
    return net


def _quanto(net: Net, format_id: str) -> nn.Module:
    quanto = importlib.import_module("optimum.quanto")
    qtype = "qint8" if format_id == UNFROZEN else format_id.removeprefix("quanto-").replace("-", "_")
    quanto.quantize(net, weights=quanto.qtypes[qtype])
    if format_id != UNFROZEN:
        quanto.freeze(net)
    return net


def _sdnq(net: Net, format_id: str) -> nn.Module:
    sdnq = importlib.import_module("sdnq")
    dtype = format_id.removeprefix("sdnq-").replace("-", "_")
    return sdnq.sdnq_post_load_quant(net, weights_dtype=dtype, torch_dtype=DTYPE)


def _torchao(net: Net, format_id: str) -> nn.Module:
    quantization = importlib.import_module("torchao.quantization")
    if format_id in TORCHAO_CONFIGS:
        quantization.quantize_(net, getattr(quantization, TORCHAO_CONFIGS[format_id])())
    else:  # its `quantize_` has none for a CPU, but its layer for one exists
        _replace(net, format_id, lambda weight, layer: make_layer(weight, layer.bias, Carrier.LIBRARY))
    return net


def _nncf(net: Net, format_id: str) -> nn.Module:
    nncf = importlib.import_module("nncf")
    mode = nncf.CompressWeightsMode[format_id.removeprefix("nncf-").replace("-", "_").upper()]
    options: dict[str, Any] = {} if "int8" in format_id else {"group_size": 64, "ratio": 1.0, "all_layers": True}
    return nncf.compress_weights(net, mode=mode, dataset=nncf.Dataset([inputs(net.width)]), **options)


def _layerwise(net: Net, format_id: str) -> nn.Module:
    hooks = importlib.import_module("diffusers.hooks")
    storage = getattr(torch, f"float8_{format_id.removeprefix('layerwise-fp8-')}")
    hooks.apply_layerwise_casting(net, storage, DTYPE, skip_modules_pattern=())
    return net


LIBRARY: dict[str, Callable[[Net, str], nn.Module]] = {
    "bnb": _bnb,
    "quanto": _quanto,
    "gguf": _gguf,
    "sdnq": _sdnq,
    "torchao": _torchao,
    "nncf": _nncf,
    "layerwise": _layerwise,
}
