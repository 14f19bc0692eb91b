"""Dequantized weights that are kept: only within the budget, only as long as they are those of the layer."""

from __future__ import annotations

import copy
import gc
import pickle
import threading

import pytest
import torch
from quantwire.hosts.modules import share_tree
from quantwire.quantizers.apply import quantize_tensor
from quantwire.quantizers.errors import SpecError
from quantwire.quantizers.kernels import kept as kept_module
from quantwire.quantizers.kernels.kept import MIB, KeptWeights
from quantwire.quantizers.spec import QuantSpec
from quantwire.quantizers.weight import QuantizedLinear

pytest.importorskip("gguf", reason="gguf is not installed")
N, K = 512, 1024  # 1 MiB in bfloat16


def layers(count: int) -> list[QuantizedLinear]:
    torch.manual_seed(0)
    made = []
    for i in range(count):
        weight, _ = quantize_tensor(f"{i}.weight", torch.randn(N, K), QuantSpec("gguf-q8-0"))
        made.append(QuantizedLinear(weight, torch.randn(N)))
    return made


def x(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(64, K, generator=torch.Generator().manual_seed(1)).to(dtype)


def test_nothing_is_kept_unless_asked_for() -> None:
    (layer,) = layers(1)
    layer(x())
    assert layer.kept is None


def test_layers_are_kept_up_to_the_budget_and_the_result_is_the_same() -> None:
    found = layers(3)
    expected = [layer(x()) for layer in found]
    kept = KeptWeights(2)
    for layer in found:
        layer.kept = kept
    for _ in range(2):
        got = [layer(x()) for layer in found]
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert (len(kept), kept.nbytes) == (2, 2 * MIB)
    assert str(kept) == "2 weights kept dequantized, 2 of at most 2 MiB"
    kept.clear()
    assert kept.nbytes == 0


def test_a_kept_weight_is_used_and_not_made_again() -> None:
    (layer,) = layers(1)
    layer.kept = kept = KeptWeights(1)
    layer(x())
    held = [getattr(layer, name) for name in layer.tensor_names]
    weight = kept.get(layer, layer.quantized_weight, torch.bfloat16, lambda: pytest.fail("made again"), held)
    assert weight is not None
    weight.zero_()  # what is used shows
    assert layer.bias is not None
    assert torch.equal(layer(x()), layer.bias.to(torch.bfloat16).expand(64, N))


def test_other_dtypes_and_changed_tensors_are_dequantized_anew() -> None:
    (layer,) = layers(1)
    layer.kept = KeptWeights(8)
    half = layer(x())
    assert layer(x(torch.float32)).dtype is torch.float32
    assert len(layer.kept) == 1
    layer.qdata.data = layer.qdata.data.clone()
    assert torch.equal(layer(x()), half)
    with torch.no_grad():
        layer.qdata.zero_()
        assert layer.bias is not None
        assert torch.equal(layer(x()), layer.bias.to(torch.bfloat16).expand(64, N))


def test_a_weight_at_the_address_of_one_that_is_gone() -> None:
    """An allocator gives an address out again as soon as it is free: here always, by tensors on one buffer."""
    first, second = layers(2)
    first.kept = KeptWeights(8)
    states = [{n: t.clone() for n, t in layer.state_dict().items()} for layer in (first, second)]
    expected = [layer(x()) for layer in (first, second)]
    shape, buffer = first.qdata.shape, bytearray(first.qdata.numel())
    addresses = set()
    for i in range(6):
        buffer[:] = states[i % 2]["qdata"].numpy().tobytes()
        del first.qdata
        qdata = torch.frombuffer(buffer, dtype=torch.uint8).view(shape)
        first.register_parameter("qdata", torch.nn.Parameter(qdata, requires_grad=False))
        first.bias = torch.nn.Parameter(states[i % 2]["bias"], requires_grad=False)
        addresses.add(first.qdata.data_ptr())
        assert torch.equal(first(x()), expected[i % 2]), i
        assert len(first.kept) == 1
    assert len(addresses) == 1


@pytest.mark.parametrize("inference", [False, True])
def test_load_state_dict_brings_other_weights(inference: bool) -> None:
    """Tensors that were made in inference mode, as hosts make them, do not tell of writes."""
    with torch.inference_mode(inference):
        first, second = layers(2)
        first.kept = KeptWeights(8)
        assert first.qdata.is_inference() is inference
        first(x())
        first.load_state_dict(second.state_dict())
        assert torch.equal(first(x()), second(x()))


def test_copies_that_share_tensors_share_what_is_kept() -> None:
    (layer,) = layers(1)
    layer.kept = kept = KeptWeights(1)  # room for one
    twin = share_tree(layer)
    expected = layer(x())
    assert torch.equal(twin(x()), expected)
    assert (len(kept), kept.nbytes) == (1, MIB)
    q, held = layer.quantized_weight, [getattr(layer, n) for n in layer.tensor_names]
    assert kept.get(twin, q, torch.bfloat16, lambda: pytest.fail("made again"), held) is not None
    del layer
    gc.collect()
    assert len(kept) == 1
    del twin, held
    gc.collect()
    assert len(kept) == 0


def test_what_a_copy_loads_is_seen_by_both() -> None:
    with torch.inference_mode():
        layer, other = layers(2)
        layer.kept = KeptWeights(8)
        twin = share_tree(layer)
        for module in (layer, twin):
            module(x())
        twin.load_state_dict(other.state_dict())
        assert torch.equal(layer(x()), other(x()))


def test_layers_that_move_give_the_memory_back() -> None:
    found = layers(2)
    kept = KeptWeights(8)
    for layer in found:
        layer.kept = kept
        layer(x())
    found[0].to("meta")
    assert kept.nbytes == 0


def test_nothing_is_kept_while_torch_compile_traces() -> None:
    (layer,) = layers(1)
    expected = layer(x())
    layer.kept = KeptWeights(8)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(layer, backend="eager")(x()), expected)
    assert len(layer.kept) == 0


def test_a_device_without_room_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    free = False

    def has_room(device: torch.device, nbytes: int) -> bool:
        asked.append(nbytes)
        return free

    monkeypatch.setattr(kept_module, "_has_room", has_room)
    found = layers(3)
    kept = KeptWeights(8)
    for layer in found:
        layer.kept = kept
    for _ in range(3):
        for layer in found:
            layer(x())
    assert asked == [MIB]
    free = True
    found[0](x())
    assert len(kept) == 0
    kept.clear()
    for layer in found:
        layer(x())
    assert len(kept) == 3


@pytest.mark.slow
def test_counting_while_layers_come_and_go() -> None:
    """The sizes may be asked for from another thread, as a report does."""
    found = layers(4)
    kept = KeptWeights(8)
    stop, problems = threading.Event(), list[Exception]()

    def count() -> None:
        try:
            while not stop.is_set():
                assert str(kept).startswith(tuple("01234"))
        except Exception as err:
            problems.append(err)

    thread = threading.Thread(target=count)
    thread.start()
    for i in range(400):
        layer = found[i % 4]
        layer.kept = kept
        layer(x()[:1])
        if i % 3 == 0:
            kept.drop(layer)
    stop.set()
    thread.join()
    assert not problems


def test_a_layer_that_goes_gives_its_memory_back() -> None:
    found = layers(2)
    kept = KeptWeights(8)
    for layer in found:
        layer.kept = kept
        layer(x())
    assert len(kept) == 2
    del layer, found[0]
    assert len(kept) == 1


def test_no_room_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_module, "RESERVE_NBYTES", 1 << 60)  # more than any machine has
    (layer,) = layers(1)
    layer.kept = KeptWeights(8)
    layer(x())
    assert len(layer.kept) == 0


def test_copies_start_empty() -> None:
    (layer,) = layers(1)
    layer.kept = KeptWeights(8)
    layer(x())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.kept is not layer.kept
        assert (len(other.kept), other.kept.limit_mib) == (0, 8)


def test_gradients_reach_the_activations() -> None:
    (layer,) = layers(1)
    layer.kept = KeptWeights(8)
    given = x(torch.float32).requires_grad_()
    layer(given).sum().backward()
    assert given.grad is not None
    assert torch.allclose(given.grad, layer.weight.sum(0).expand_as(given), atol=1e-3)


@pytest.mark.parametrize("mib", [0, -1])
def test_a_budget_of_nothing_is_refused(mib: int) -> None:
    with pytest.raises(SpecError, match="cache_mib must be more than 0"):
        KeptWeights(mib)
