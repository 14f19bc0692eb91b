"""Copies of module trees that share every parameter, so that one branch of a graph can get other layers."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import nn

from ..quantizers.errors import WeightError

# Every container that nn.Module itself keeps (children, parameters, hooks and their flags, ...), read off an instance
# because the list grows from torch release to release: a copy of the tree needs its own of each, or a change to one
# tree would show in the other.
_CONTAINERS = tuple(name for name, value in vars(nn.Module()).items() if isinstance(value, (dict, set)))


def share_tree(module: nn.Module, memo: dict[int, nn.Module] | None = None) -> nn.Module:
    """A copy of the module tree with new module objects and the same parameter tensors.

    Args:
        memo: id of a module -> what stands for it in the copy. Modules reached twice stay one module.
    """
    memo = {} if memo is None else memo
    if id(module) in memo:
        return memo[id(module)]
    twin = copy.copy(module)
    memo[id(module)] = twin
    for name in _CONTAINERS:
        if name in vars(module):
            object.__setattr__(twin, name, vars(module)[name].copy())
    for name, child in module._modules.items():  # named_children() would skip a child registered twice
        twin._modules[name] = None if child is None else share_tree(child, memo)
    return twin


def with_layers(module: nn.Module, layers: Mapping[str, nn.Module]) -> nn.Module:
    """`share_tree(module)` with the named submodules replaced, at every place where they stand.

    Raises:
        WeightError: a module around a named one has a `forward` of its own instance, as diffusers and accelerate hooks
            make: it is bound to the original and would go on calling the original's layers.
    """
    for name in layers:
        owner = module
        for part in (*name.split(".")[:-1], ""):
            if "forward" in vars(owner):
                raise WeightError(
                    f"'{name}': a hook replaced the forward of the {type(owner).__name__} around it, so a new layer "
                    "would not be called.\nQuantize the model before hooks (offloading, caching) are installed on it."
                )
            owner = owner.get_submodule(part)
    return share_tree(module, {id(module.get_submodule(name)): layer for name, layer in layers.items()})
