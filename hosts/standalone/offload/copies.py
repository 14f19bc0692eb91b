"""A copy of a module tree that offloading may take apart: modules and parameters of its own on the same memory.

Offloaders replace parameters (accelerate), write to `.data` (diffusers, `nn.Module.to`) and put a `forward` of its own
on each module. On a copy none of that shows in the other branches of a graph, and no weight takes memory twice.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ....quantizers.errors import WeightError
from ...modules import share_tree


def own_copy(module: nn.Module, tied: bool = True) -> nn.Module:
    """A copy whose tensors can be moved or replaced without a trace in the original.

    Layers of bitsandbytes get a state of their own too: they change it when they run, and accelerate empties it.
    Tensors that wrap others (quanto, torchao) stay the same objects.

    Args:
        tied: tensors on the same memory become one parameter; else each gets memory of its own.
    Raises:
        WeightError: a module has a `forward` of its own instance: it is bound to the original.
    """
    twin = share_tree(module)
    made: dict[Any, Tensor] = {}
    for owner in twin.modules():
        for tensors in (owner._parameters, owner._buffers):
            for name, t in tensors.items():
                if t is not None:
                    tensors[name] = _own(t, made, tied) if is_plain(t) else _own_of_library(t)
        _own_state(owner)
    for name, owner in twin.named_modules():
        _rebind(name, owner)
    return twin


def is_plain(t: Tensor) -> bool:
    """Whether nothing but values, dtype and shape make up the tensor."""
    return type(t) in (Tensor, nn.Parameter)


def own_tensors(module: nn.Module, recurse: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of every parameter and buffer, tied ones under each of their names."""
    yield from module.named_parameters(recurse=recurse, remove_duplicate=False)
    yield from module.named_buffers(recurse=recurse, remove_duplicate=False)


def _own(t: Tensor, made: dict[Any, Tensor], tied: bool) -> Tensor:
    key = (t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride(), t.dtype, isinstance(t, nn.Parameter))
    if tied and key in made:
        return made[key]
    alias = _alias(t)
    if not tied:
        alias = alias.clone() if key in made else alias.contiguous()
    made[key] = nn.Parameter(alias, requires_grad=False) if isinstance(t, nn.Parameter) else alias
    return made[key]


def _alias(t: Tensor) -> Tensor:
    """A new tensor on the same memory, not of inference mode: `.data` takes only tensors of the same kind, so all must
    be of one kind, and a caller may be outside of that mode."""
    if not t.is_inference():
        return t.detach()
    alias = torch.empty(0, dtype=t.dtype, device=t.device)
    return alias.set_(t.untyped_storage(), t.storage_offset(), t.size(), t.stride())


def _own_of_library(t: Tensor) -> Tensor:
    """The same kind of parameter on the same memory.

    Of torchao's tensors this is also what lets accelerate take those that were made in inference mode.
    """
    if hasattr(t, "__tensor_flatten__"):
        # The protocol of tensor subclasses (torch.utils._python_dispatch), which torch's own types do not declare.
        names, context = t.__tensor_flatten__()  # type: ignore[operator]
        parts = {n: _alias(p) if is_plain(p) else _own_of_library(p) for n in names for p in (getattr(t, n),)}
        own = type(t).__tensor_unflatten__(parts, context, t.size(), t.stride())  # type: ignore[attr-defined]
        return nn.Parameter(own, requires_grad=False) if isinstance(t, nn.Parameter) else own
    if is_wrapper(t):
        return t
    own = torch.Tensor._make_subclass(type(t), _alias(t.as_subclass(Tensor)), False)
    vars(own).update(vars(t))
    return own


def is_wrapper(t: Tensor) -> bool:
    """Whether the tensor has no values of its own, but others that it is made of."""
    return not is_plain(t) and (hasattr(t, "__tensor_flatten__") or (t.numel() > 0 and not t.data_ptr()))


def _own_state(layer: Any) -> None:
    """A state of its own for a layer of bitsandbytes, with its parameters made anew already."""
    weight = layer._parameters.get("weight")
    if type(weight).__name__ == "Int8Params":
        layer.state = copy.copy(layer.state)
    elif type(weight).__name__ == "Params4bit" and weight.quant_state is not None:
        weight.quant_state = copy.copy(weight.quant_state)
        if weight.quant_state.nested:
            weight.quant_state.state2 = copy.copy(weight.quant_state.state2)
        weight.module = layer
        if getattr(layer, "quant_state", None) is not None:
            layer.quant_state = weight.quant_state


def _rebind(name: str, module: nn.Module) -> None:
    """Give a copied module hooks of its own in place of those that call the original.

    Layerwise casting is the one kind that weights come with here: the storage of UNETLoader's `weight_dtype`.
    """
    registry: Any = vars(module).pop("_diffusers_hook", None)
    if "forward" not in vars(module):
        return
    hooks: dict[str, Any] = {} if registry is None else registry.hooks
    if list(hooks) != ["layerwise_casting"]:
        raise WeightError(
            f"'{name}': a hook replaced the forward of this {type(module).__name__}, so its weights cannot be placed.\n"
            "Set the offload mode on a model without such hooks (caching, other offloading)."
        )
    from diffusers.hooks.layerwise_casting import apply_layerwise_casting_hook

    del module.forward
    hook = hooks["layerwise_casting"]
    apply_layerwise_casting_hook(module, hook.storage_dtype, hook.compute_dtype, hook.non_blocking)
