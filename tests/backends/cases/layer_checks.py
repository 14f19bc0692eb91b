"""What every layer on a quantized weight must do, ours and the library's: one function a property."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from quantwire.quantizers.errors import SpecError, WeightError
from quantwire.quantizers.weight import FullPrecisionGuard, QuantizedLinear, QuantizedWeight
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .case import DTYPES
from .subject import CPU, Subject, assert_same_tensors, relative, same, state

TOKENS = (1, 16, 1024)


def check_save_and_load(subject: Subject, dtype: torch.dtype, path: Path) -> None:
    """Through a safetensors file into a layer of another weight."""
    source, target = subject.layer(dtype), subject.layer(dtype, seed=5)
    x = subject.x(dtype, 3)
    assert not same(target(x), source(x))
    save_file(source.state_dict(), path)
    target.load_state_dict(load_file(path))
    assert_same_tensors(target.state_dict(), source.state_dict(), "loaded")
    assert same(target(x), source(x))


def check_casts(subject: Subject, dtype: torch.dtype) -> None:
    """A cast of the module touches the bias only; this bias is exact in every dtype, so outputs stay equal."""
    bias = torch.arange(subject.case.shape[0], dtype=torch.float32).remainder(8).to(dtype)
    layer = QuantizedLinear(subject.quantized(dtype), bias).eval()
    before, x = state(layer), subject.x(dtype, 3)
    expected = layer(x)
    for cast in (torch.float16, torch.bfloat16, torch.float64, torch.float32):
        for made in (copy.deepcopy(layer).to(cast), copy.deepcopy(layer).to("cpu", cast)):
            after = state(made)
            assert after["bias"].dtype == cast
            assert_same_tensors(_without_bias(after), _without_bias(before), f"to {cast}")
            assert same(made(x), expected), f"to {cast}: another output"
    after = state(copy.deepcopy(layer).half())
    assert after["bias"].dtype == torch.float16
    assert_same_tensors(_without_bias(after), _without_bias(before), "half")


def _without_bias(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t for n, t in tensors.items() if n != "bias"}


def check_moves(subject: Subject, dtype: torch.dtype) -> None:
    """`.to("cpu")` changes nothing; over the meta device and back the values come from the state dict."""
    layer = subject.layer(dtype)
    before, x = state(layer), subject.x(dtype, 3)
    expected = layer(x)
    assert_same_tensors(layer.to("cpu").state_dict(), before, "to cpu")
    assert same(layer(x), expected)
    layer.to("meta")
    for name, t in layer.state_dict().items():
        assert (t.device.type, t.dtype, t.shape) == ("meta", before[name].dtype, before[name].shape), name
    layer.to_empty(device="cpu")
    layer.load_state_dict(before)
    assert_same_tensors(layer.state_dict(), before, "back from meta")
    assert same(layer(x), expected)


def check_copies(subject: Subject, dtype: torch.dtype) -> None:
    """deepcopy and pickle give equal layers that share no memory. (torch.save, since plain pickle knows no float8.)"""
    layer = subject.layer(dtype)
    before, x = state(layer), subject.x(dtype, 3)
    expected = layer(x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for made in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert_same_tensors(made.state_dict(), before, "copied")
        assert same(made(x), expected)
        for p in made.parameters():
            p.data.zero_()
        assert_same_tensors(layer.state_dict(), before, "after a change of the copy")


def check_products(subject: Subject, dtype: torch.dtype) -> None:
    """In the dtype of the activations, for every rank and number of tokens, with and without bias."""
    q, b = subject.quantized(dtype), subject.bias(dtype)
    restored, n = subject.dequantize(q), subject.case.shape[0]
    for bias in (None, b):
        layer = QuantizedLinear(q, bias).eval()
        for x_dtype in DTYPES.values():
            for rows in ((7,), (2, 5), (1,), (2, 3, 4)):
                x = subject.x(x_dtype, *rows)
                _check_product(subject, layer, x, F.linear(x.float(), restored, None if bias is None else bias.float()))
            for rows in ((0,), (2, 0)):
                got = layer(subject.x(x_dtype, *rows))
                assert (got.shape, got.dtype) == ((*rows, n), x_dtype), f"no tokens: {rows}"


def _check_product(subject: Subject, layer: QuantizedLinear, x: Tensor, expected: Tensor) -> None:
    where = f"x {tuple(x.shape)} {x.dtype}, bias {layer.bias is not None}"
    before = x.clone()
    got = layer(x)
    assert same(x, before), f"{where}: the activations were modified"
    assert (got.shape, got.dtype) == (expected.shape, x.dtype), where
    error = relative(got, expected)
    assert error <= subject.case.product, f"{where}: relative error {error:.5f} > {subject.case.product}"


def check_kernels(subject: Subject, dtype: torch.dtype) -> None:
    """The kernel is named with its reason from shapes alone, and it is what `linear` runs."""
    q, bias = subject.quantized(dtype), subject.bias(dtype)
    restored = subject.dequantize(q)
    shapes_only = q.with_tensors({name: t.to("meta") for name, t in q.tensors.items()})
    for tokens in TOKENS:
        x = subject.x(dtype, tokens)
        kernel = subject.quantizer.kernel(q, CPU, dtype, tokens)
        assert kernel.name.strip(), f"{tokens} tokens: no name"
        assert kernel.reason.strip(), f"{tokens} tokens: no reason"
        asked = subject.quantizer.kernel(shapes_only, CPU, dtype, tokens)
        assert (asked.name, asked.reason) == (kernel.name, kernel.reason), f"{tokens} tokens: reads values"
        got = subject.quantizer.linear(x, q, bias)
        assert same(kernel.run(x, q, bias), got), f"{tokens} tokens: `{kernel.name}` is not what linear runs"
        error = relative(got, F.linear(x.float(), restored, bias.float()))
        assert error <= subject.case.product, f"{tokens} tokens, `{kernel.name}`: relative error {error:.5f}"


def check_gradients(subject: Subject, dtype: torch.dtype) -> None:
    """The gradient of the activations is that of the dequantized weight, at few tokens and at many."""
    q = subject.quantized(dtype)
    layer, w = QuantizedLinear(q, None), subject.dequantize(q)
    for tokens in (3, 64):
        x = subject.x(torch.float32, tokens).requires_grad_()
        (layer(x) * 2).sum().backward()
        assert x.grad is not None
        assert relative(x.grad, 2 * w.sum(0).expand(tokens, -1)) <= 0.006


def check_compile(subject: Subject, dtype: torch.dtype) -> None:
    """torch.compile gives the eager result; aot_eager traces all that inductor would, and costs no C++ compiler."""
    layer, x = subject.layer(dtype), subject.x(dtype, 5)
    torch._dynamo.reset()
    try:
        with torch.inference_mode():
            expected = layer(x)
            got = torch.compile(layer, backend="aot_eager", fullgraph=False)(x)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"], "nothing was compiled"
    finally:
        torch._dynamo.reset()
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    assert relative(got, expected) <= subject.case.product


# The library's own layer


def check_native(subject: Subject, dtype: torch.dtype) -> None:
    """It is ready, shares no memory with our tensors, refuses full-precision values, and gives our output."""
    q, b = subject.quantized(dtype), subject.bias(dtype)
    if subject.case.native is None:
        with pytest.raises(SpecError, match=rf"^{subject.format_id}: "):
            subject.native(q, b)
        return
    native = subject.case.native
    most = native if isinstance(native, float) else native[dtype]
    for bias in (None, b):
        layer = subject.native(q, bias)
        check_guarded(layer, q, bias)
        if dtype in subject.case.native_dtypes:
            check_native_output(layer, q, bias, subject.x(dtype, 2, 5), most)


def check_guarded(layer: nn.Module, q: QuantizedWeight, bias: Tensor | None) -> None:
    ours = {t.untyped_storage().data_ptr() for t in (*q.tensors.values(), bias) if t is not None}
    for name, p in (*layer.named_parameters(), *layer.named_buffers()):
        for part in _parts(p.data):
            assert part.untyped_storage().data_ptr() not in ours, f"{name} shares memory with the weight"
    assert not layer.training
    hooks = [getattr(wrapped, "hook", wrapped) for wrapped in layer._load_state_dict_pre_hooks.values()]
    assert any(isinstance(hook, FullPrecisionGuard) and hook.format_id == q.format_id for hook in hooks)
    with pytest.raises(WeightError, match=r"^'weight': full-precision values"):
        layer.load_state_dict({"weight": torch.ones(q.orig_shape)}, strict=False)


def check_native_output(layer: nn.Module, q: QuantizedWeight, bias: Tensor | None, x: Tensor, most: float) -> None:
    ours = [t for t in (*q.tensors.values(), bias) if t is not None]
    before = [t.clone() for t in ours]
    with torch.inference_mode():
        expected, got = QuantizedLinear(q, bias).eval()(x), layer(x)
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    difference = relative(got, expected)
    assert difference <= most, f"relative difference {difference:.5f} > {most}"
    assert all(same(t, was) for t, was in zip(ours, before, strict=True)), "the native layer changed our tensors"


def _parts(t: Tensor) -> list[Tensor]:
    """The plain tensors inside a tensor subclass, or the tensor itself."""
    flatten = getattr(t, "__tensor_flatten__", None)
    if flatten is None:
        return [t]
    return [part for name in flatten()[0] for part in _parts(getattr(t, name))]
