"""Copies of module trees that share every parameter, so that one branch of a graph can get other layers."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import nn

# Attributes of nn.Module that are containers: a copy of the tree needs its own, or a change would show in the original.
_CONTAINERS = (
    "_modules",
    "_parameters",
    "_buffers",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
)


def share_tree(module: nn.Module, memo: dict[int, nn.Module] | None = None) -> nn.Module:
    """A copy of the module tree with new module objects and the same parameter tensors.

    Modules reached twice stay one module in the copy.
    """
    memo = {} if memo is None else memo
    if id(module) in memo:
        return memo[id(module)]
    twin = copy.copy(module)
    memo[id(module)] = twin
    for name in _CONTAINERS:
        object.__setattr__(twin, name, getattr(module, name).copy())
    for name, child in module._modules.items():  # named_children() would skip a child registered twice
        twin._modules[name] = None if child is None else share_tree(child, memo)
    return twin


def with_layers(module: nn.Module, layers: Mapping[str, nn.Module]) -> nn.Module:
    """`share_tree(module)` with the named submodules replaced."""
    twin = share_tree(module)
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        owner = twin.get_submodule(parent)
        if leaf not in owner._modules:
            raise KeyError(name)
        owner._modules[leaf] = layer
    return twin
