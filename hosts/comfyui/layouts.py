"""Our formats as layouts of ComfyUI's QuantizedTensor, one for each backend.

A layout's parameters are the plain tensors of a `QuantizedWeight` beside `qdata`, so the host's own code moves, pins,
gathers and saves them: it walks the dataclass fields and knows nothing of the format. Layouts are registered when the
first weight of a backend needs one, never at import.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, cast

import torch
from torch import Tensor

from ...quantizers.backends.comfy import FORMATS, Comfy
from ...quantizers.errors import SpecError
from ...quantizers.formats import BACKENDS
from ...quantizers.provenance import remember, spec_of
from ...quantizers.registry import get_entry, require, require_reader
from ...quantizers.weight import QuantizedWeight

BACKEND_TENSORS = {backend.name: backend.tensors for backend in BACKENDS}
PREFIX = "quantwire_"
NATIVE = "comfy"  # the backend whose layouts are the host's own


@functools.cache
def layout_name(backend: str) -> str:
    """Register the layout of a backend with the host, once, and return its name there.

    Raises:
        SpecError: the host is too old to have layouts.
    """
    try:
        from comfy.quant_ops import QUANT_ALGOS
        from comfy_kitchen.tensor import QuantizedLayout, register_layout_class, register_layout_op
        from comfy_kitchen.tensor.base import BaseLayoutParams
    except ImportError as err:
        raise SpecError(
            "This ComfyUI has no quantized tensors (comfy_kitchen layouts); 0.33 or newer is needed.\nUpdate ComfyUI."
        ) from err
    names = BACKEND_TENSORS[backend]
    # `scale` is a field of the host's base class, which every layout has; formats without one keep it empty.
    fields = [(n, Any, dataclasses.field(default=None)) for n in names if n != "scale"]
    fields += [("format_id", str, dataclasses.field(default="")), ("meta", Any, dataclasses.field(default=()))]

    def tensor_fields(self: Any) -> list[str]:
        return [n for n in ("scale", *names) if getattr(self, n) is not None]

    params = dataclasses.make_dataclass(
        f"Quantwire{backend.title()}Params",
        fields,
        bases=(BaseLayoutParams,),
        frozen=True,
        namespace={"_tensor_fields": tensor_fields},
    )
    layout = type(f"Quantwire{backend.title()}Layout", (_LayoutMethods, QuantizedLayout), {"Params": params})
    name = layout.__name__
    register_layout_class(name, layout)
    register_layout_op(torch.ops.aten.linear.default, layout)(_linear)
    QUANT_ALGOS[PREFIX + backend] = {
        "storage_t": torch.uint8,
        "parameters": {f"weight_{n}" for n in names},
        "comfy_tensor_layout": name,
        "quantize_input": False,
    }
    return name


class _LayoutMethods:
    """The host's QuantizedLayout interface, in terms of the quantizers."""

    Params: Any

    @classmethod
    def quantize(cls, tensor: Tensor, format_id: str = "", meta: Any = (), **_: Any) -> tuple[Tensor, Any]:
        """Quantize again, for the host's merge of a LoRA into a saved file.

        `scale` and `stochastic_rounding`, which the host passes to every layout, have no meaning here: the libraries
        choose scales and round to nearest.
        """
        spec = spec_of(format_id, dict(meta))
        weight = remember(require(format_id).quantize(tensor, spec), spec)
        return weight.tensors["qdata"], params_of(cls.Params, weight)

    @classmethod
    def dequantize(cls, qdata: Tensor, params: Any) -> Tensor:
        weight = weight_of(qdata, params)
        return require_reader(weight.format_id).dequantize(weight, params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor: Any) -> tuple[Tensor, ...]:
        return tuple(weight_of(qtensor._qdata, qtensor._params).tensors.values())

    @classmethod
    def state_dict_tensors(cls, qdata: Tensor, params: Any) -> dict[str, Tensor]:
        tensors = weight_of(qdata, params).tensors
        return {"" if name == "qdata" else f"_{name}": tensor for name, tensor in tensors.items()}

    @classmethod
    def requantize_kwargs(cls, qtensor: Any) -> dict[str, Any]:
        return {"format_id": qtensor._params.format_id, "meta": qtensor._params.meta}

    @classmethod
    def supports_fast_matmul(cls) -> bool:
        return False


def params_of(params_class: Any, weight: QuantizedWeight) -> Any:
    """The layout's parameters for a weight; meta as a tuple of pairs, so that it stays hashable and comparable."""
    extra = {n: t for n, t in weight.tensors.items() if n not in ("qdata", "scale")}
    qdata = weight.tensors["qdata"]
    return params_class(
        scale=weight.tensors.get("scale", torch.empty(0, device=qdata.device)),
        orig_dtype=weight.orig_dtype,
        orig_shape=tuple(weight.orig_shape),
        format_id=weight.format_id,
        meta=tuple(sorted((name, _frozen(value)) for name, value in weight.meta.items())),
        **extra,
    )


def weight_of(qdata: Tensor, params: Any) -> QuantizedWeight:
    """The `QuantizedWeight` that a layout's parameters came from."""
    tensors = {"qdata": qdata}
    for name in params._tensor_fields():
        value = getattr(params, name)
        if name != "scale" or value.numel():
            tensors[name] = value
    meta = {name: _thawed(value) for name, value in params.meta}
    return QuantizedWeight(params.format_id, tensors, params.orig_shape, params.orig_dtype, meta)


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


def _thawed(value: Any) -> Any:
    return list(map(_thawed, value)) if isinstance(value, tuple) else value


def algorithm_of(weight: QuantizedWeight) -> str:
    """The host's name for the format (a key of its QUANT_ALGOS): its own for native formats, else one of ours."""
    backend = get_entry(weight.format_id).backend
    if backend == NATIVE:
        return FORMATS[weight.format_id].algo
    layout_name(backend)
    return PREFIX + backend


def to_quantized_tensor(weight: QuantizedWeight) -> Any:
    """The host's QuantizedTensor on the same plain tensors."""
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
    from comfy_kitchen.tensor import get_layout_class

    algorithm = algorithm_of(weight)
    if algorithm not in QUANT_ALGOS:
        raise SpecError(f"{weight.format_id}: this ComfyUI does not know {algorithm}.\nUpdate ComfyUI.")
    name = QUANT_ALGOS[algorithm]["comfy_tensor_layout"]
    params_class = get_layout_class(name).Params
    if algorithm.startswith(PREFIX):
        params = params_of(params_class, weight)
    else:
        params = cast(Comfy, require(weight.format_id)).params(weight, weight.orig_dtype, params_class)
    return QuantizedTensor(weight.tensors["qdata"], name, params)


def from_quantized_tensor(tensor: Any) -> QuantizedWeight | None:
    """Our weight inside a host tensor; None for other layouts."""
    params = getattr(tensor, "_params", None)
    return weight_of(tensor._qdata, params) if hasattr(params, "format_id") else None


def _linear(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """aten.linear on a quantized weight: the format's own product."""
    x, tensor = args[0], args[1]
    bias = args[2] if len(args) > 2 else kwargs.get("bias")
    weight = from_quantized_tensor(tensor)
    if weight is None or type(x) is not Tensor:
        from comfy_kitchen.tensor.base import dequantize_args

        return torch.nn.functional.linear(*dequantize_args((x, tensor, bias)))
    return require_reader(weight.format_id).linear(x, weight, bias)
