"""Where the tensors of a layer are: those that a wrapper, or a state beside the weight, keeps are counted."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from quantwire.quantizers.compat.devices import devices_of
from torch import nn

CPU, META = torch.device("cpu"), torch.device("meta")


def test_parameters_and_buffers_of_the_layer_itself() -> None:
    layer = nn.Linear(2, 2)
    assert devices_of(layer) == {CPU}
    layer.bias = nn.Parameter(torch.ones(2, device="meta"))
    assert devices_of(layer) == {CPU, META}
    assert devices_of(nn.Sequential(layer)) == set()


def test_states_beside_a_weight_at_any_depth() -> None:
    layer = nn.Linear(2, 2, bias=False)
    nested = SimpleNamespace(absmax=torch.ones(2), state2=SimpleNamespace(absmax=torch.ones(2, device="meta")))
    layer.weight.quant_state = nested  # type: ignore[attr-defined]
    assert devices_of(layer) == {CPU, META}


def test_tensors_that_are_at_home_everywhere_are_not_counted() -> None:
    layer = nn.Linear(2, 2)
    layer.register_buffer("scalar", torch.tensor(1.0, device="meta"))
    layer.register_buffer("empty", torch.ones(0, device="meta"))
    layer.parent = nn.Linear(2, 2, device="meta")
    assert devices_of(layer) == {CPU}
