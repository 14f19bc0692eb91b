"""That the conformance suite notices: each line breaks a real quantizer in one way, and names the check that fails."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BY_BACKEND, CASES, layer_checks, weight_checks
from cases.absent import run_without
from cases.subject import Subject, values
from quantwire.quantizers import apply
from quantwire.quantizers.base import Kernel, Quantizer
from quantwire.quantizers.kernels.expand import Expansion
from quantwire.quantizers.registry import get_quantizer
from quantwire.quantizers.weight import QuantizedLinear, QuantizedWeight
from torch import Tensor, nn

BF16 = torch.bfloat16
Patch = pytest.MonkeyPatch
Break = Callable[[Patch, Quantizer], None]
Made = Callable[..., Any]


def result(method: str, change: Callable[..., Any]) -> Break:
    """`change(result, *arguments)` takes the place of what a method returns."""

    def patch(monkeypatch: Patch, quantizer: Quantizer) -> None:
        original = getattr(quantizer, method)
        monkeypatch.setattr(quantizer, method, lambda *args: change(original(*args), *args))

    return patch


def arguments(method: str, change: Callable[..., tuple[Any, ...]]) -> Break:
    """A method gets `change(*arguments)`."""

    def patch(monkeypatch: Patch, quantizer: Quantizer) -> None:
        original = getattr(quantizer, method)
        monkeypatch.setattr(quantizer, method, lambda *args: original(*change(*args)))

    return patch


def attribute(owner: Any, name: str, value: Any) -> Break:
    return lambda monkeypatch, _: monkeypatch.setattr(owner, name, value, raising=False)


def tensors(change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> Break:
    return result("quantize", lambda q, *_: q.with_tensors(change(dict(q.tensors))))


def field(**changes: Any) -> Break:
    return result("quantize", lambda q, *_: dataclasses.replace(q, **changes))


def weight(change: Callable[[Tensor], Tensor]) -> Break:
    return arguments("quantize", lambda w, spec: (change(w), spec))


def one_bit(t: dict[str, Tensor]) -> dict[str, Tensor]:
    qdata = t["qdata"].clone()
    qdata.view(-1)[-1] ^= 1
    return t | {"qdata": qdata}


def seeded(w: Tensor) -> Tensor:
    torch.manual_seed(0)
    return w


def in_default_dtype(w: Tensor) -> Tensor:
    return w.to(torch.get_default_dtype()).to(w.dtype)


def modified(w: Tensor) -> Tensor:
    return w.mul_(2)


def as_if_contiguous(w: Tensor) -> Tensor:
    return w.as_strided(w.shape, (w.shape[1], 1))


def stale(monkeypatch: Patch, quantizer: Quantizer) -> None:
    """A cache of what lies at an address, which `load_state_dict` overwrites in place."""
    original = quantizer.linear
    kept: dict[int, QuantizedWeight] = {}

    def linear(x: Tensor, q: QuantizedWeight, bias: Tensor | None) -> Tensor:
        copied = q.with_tensors({name: t.clone() for name, t in q.tensors.items()})
        return original(x, kept.setdefault(q.tensors["qdata"].data_ptr(), copied), bias)

    monkeypatch.setattr(quantizer, "linear", linear)


def only_some_tokens(y: Tensor, x: Tensor, *_: Any) -> Tensor:
    return y if x.numel() > x.shape[-1] else y * 1.1


def nothing_without_tokens(y: Tensor, x: Tensor, *_: Any) -> Tensor:
    return y if x.numel() else torch.zeros(y.shape[-1])


def wrong_when_compiled(y: Tensor, *_: Any) -> Tensor:
    return y * 2 if torch.compiler.is_compiling() else y


def other_run(kernel: Kernel, *_: Any) -> Kernel:
    return dataclasses.replace(kernel, run=lambda x, q, b: kernel.run(x, q, b) * 1.1)


def reading_values(kernel: Kernel, q: QuantizedWeight, *_: Any) -> Kernel:
    on_meta = q.tensors["qdata"].is_meta
    return dataclasses.replace(
        kernel, reason="nothing" if on_meta else f"the first is {q.tensors['qdata'].view(-1)[0]}"
    )


def sharing(layer: Any, q: QuantizedWeight, *_: Any) -> nn.Module:
    layer.register_buffer("again", q.tensors["qdata"])
    return layer


def without_guard(layer: nn.Module, *_: Any) -> nn.Module:
    layer._load_state_dict_pre_hooks.clear()
    return layer


def another_bias(layer: Any, *_: Any) -> nn.Module:
    if layer.bias is not None:
        layer.bias.data += 0.1
    return layer


def overflow_ignored(patch: pytest.MonkeyPatch, _: Quantizer) -> None:
    """Both nets away: the scales, and the difference to the original."""
    patch.setattr(apply, "finite", lambda _: True)
    measure = apply.measure
    patch.setattr(apply, "measure", lambda *a: dataclasses.replace(measure(*a), noise=0.0))


def other_expansion(form: Expansion, *_: Any) -> Expansion:
    def fill(out: Tensor, start: int, stop: int) -> None:
        form.fill(out, start, stop)
        out.mul_(1.1)

    return dataclasses.replace(form, fill=fill)


LINES: dict[str, tuple[Made, Break]] = {
    "one bit": (weight_checks.check_library, tensors(one_bit)),
    "one tensor more": (weight_checks.check_library, tensors(lambda t: t | {"more": t["qdata"]})),
    "another dtype": (weight_checks.check_library, tensors(lambda t: t | {"absmax": t["absmax"].double()})),
    "a last digit": (weight_checks.check_library, result("dequantize", lambda w, *_: w * (1 + 2**-22))),
    "everything is refused": (weight_checks.check_library, result("refuse", lambda *_: "K=64 K=256 K=192")),
    "one byte more predicted": (weight_checks.check_sizes, result("predict_nbytes", lambda n, *_: n + 1)),
    "the input modified": (weight_checks.check_sizes, weight(modified)),
    "a reason without a dimension": (
        weight_checks.check_sizes,
        result("refuse", lambda _, s, t: "no" if t.shape[1] < 40 else None),
    ),
    "its own shape refused": (weight_checks.check_sizes, result("refuse", lambda _, s, t: f"K={t.shape[1]}")),
    "noise": (weight_checks.check_sizes, weight(lambda w: w + values(*w.shape, seed=7, dtype=w.dtype) / 50)),
    "nan": (weight_checks.check_sizes, result("dequantize", lambda w, *_: w * float("nan"))),
    "another shape noted": (weight_checks.check_sizes, field(orig_shape=(256, 64))),
    "another dtype noted": (weight_checks.check_sizes, field(orig_dtype=torch.float64)),
    "a plan that is off": (weight_checks.check_plan, result("predict_nbytes", lambda n, *_: n + 1)),
    "a parameter": (
        weight_checks.check_plain,
        tensors(lambda t: t | {"qdata": nn.Parameter(t["qdata"], requires_grad=False)}),
    ),
    "an undeclared name": (weight_checks.check_plain, tensors(lambda t: t | {"more": t["qdata"]})),
    "the input's memory": (
        weight_checks.check_plain,
        result("quantize", lambda q, w, _: q.with_tensors(dict(q.tensors) | {"absmax": w})),
    ),
    "metadata that JSON changes": (weight_checks.check_plain, field(meta={"threshold": 6.0, "shape": (1, 2)})),
    "always float32": (weight_checks.check_plain, result("dequantize", lambda w, *_: w.float())),
    "strides ignored": (weight_checks.check_contiguity, weight(as_if_contiguous)),
    "zeros that are not": (weight_checks.check_zeros, result("dequantize", lambda w, *_: w + 1e-6)),
    "nan let through": (weight_checks.check_damaged, attribute(apply, "check_finite", lambda *_: None)),
    "overflow let through": (weight_checks.check_overflow, overflow_ignored),
    "an expansion that is off": (weight_checks.check_form, result("form", other_expansion)),
    "other dtypes let through": (
        weight_checks.check_other_dtypes,
        attribute(apply, "FLOAT_DTYPES", (*apply.FLOAT_DTYPES, torch.int8, torch.float8_e4m3fn, torch.float64)),
    ),
    "a convolution let through": (weight_checks.check_not_linear, result("refuse", lambda *_: "K=3")),
    "random values": (weight_checks.check_determinism, weight(lambda w: w + torch.randn(w.shape) / 10)),
    "the generator seeded": (weight_checks.check_determinism, weight(seeded)),
    "the default dtype used": (weight_checks.check_determinism, weight(in_default_dtype)),
    "a stale cache": (layer_checks.check_save_and_load, stale),
    "scales cast with the module": (layer_checks.check_casts, attribute(QuantizedLinear, "_apply", nn.Module._apply)),
    "a state dict ignored": (
        layer_checks.check_moves,
        attribute(QuantizedLinear, "load_state_dict", lambda self, _: [p.data.fill_(1) for p in self.parameters()]),
    ),
    "a copy that is none": (
        layer_checks.check_copies,
        attribute(QuantizedLinear, "__deepcopy__", lambda self, _: self),
    ),
    "a product in float32": (layer_checks.check_products, result("linear", lambda y, *_: y.float())),
    "a product that is off": (layer_checks.check_products, result("linear", lambda y, *_: y * 1.1)),
    "one token that is off": (layer_checks.check_products, result("linear", only_some_tokens)),
    "no tokens, wrong shape": (layer_checks.check_products, result("linear", nothing_without_tokens)),
    "activations modified": (layer_checks.check_products, arguments("linear", lambda x, q, b: (x.mul_(2), q, b))),
    "bias forgotten": (layer_checks.check_products, arguments("linear", lambda x, q, b: (x, q, None))),
    "no name": (layer_checks.check_kernels, result("kernel", lambda k, *_: dataclasses.replace(k, name=" "))),
    "no reason": (layer_checks.check_kernels, result("kernel", lambda k, *_: dataclasses.replace(k, reason=""))),
    "linear runs another": (layer_checks.check_kernels, result("linear", lambda y, *_: y + 1e-2)),
    "a kernel that is off": (layer_checks.check_kernels, result("kernel", other_run)),
    "a kernel that reads values": (layer_checks.check_kernels, result("kernel", reading_values)),
    "a product without derivative": (
        layer_checks.check_gradients,
        result("linear", lambda y, x, *_: y.detach() + 0 * x.sum()),
    ),
    "compiled code that is off": (layer_checks.check_compile, result("linear", wrong_when_compiled)),
    "a native layer that shares": (layer_checks.check_native, result("to_native", sharing)),
    "a native layer in training": (layer_checks.check_native, result("to_native", lambda layer, *_: layer.train())),
    "a native layer without guard": (layer_checks.check_native, result("to_native", without_guard)),
    "a native layer that is off": (layer_checks.check_native, result("to_native", another_bias)),
}


def subject() -> Subject:
    found = next(s for s in map(Subject, CASES) if s.format_id == "bnb-int8")
    if not found.works:
        pytest.skip("needs bnb-int8: a format with a native layer, several tensors and a range that can be exceeded")
    return found


def call(check: Made, tmp_path: Path) -> None:
    dtype = {weight_checks.check_determinism: torch.float32, weight_checks.check_contiguity: torch.float32}.get(
        check, BF16
    )
    extra: list[Any] = [tmp_path / "layer.safetensors"] if check is layer_checks.check_save_and_load else []
    short = (
        weight_checks.check_plan,
        weight_checks.check_overflow,
        weight_checks.check_other_dtypes,
        weight_checks.check_not_linear,
    )
    check(subject(), *(() if check in short else (dtype,)), *extra)


@pytest.mark.parametrize("line", LINES)
def test_a_broken_quantizer_is_found(line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check, broken = LINES[line]
    call(check, tmp_path)
    broken(monkeypatch, get_quantizer("bnb-int8"))
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        call(check, tmp_path)


def test_every_check_is_shown_to_fail() -> None:
    modules = (weight_checks, layer_checks)
    called = {getattr(m, name) for m in modules for name in dir(m) if name.startswith("check_")}
    helpers = {
        weight_checks.check_size,
        weight_checks.check_refusal,
        layer_checks.check_guarded,
        layer_checks.check_native_output,
    }
    assert called - helpers == {check for check, _ in LINES.values()}


@pytest.mark.slow
def test_a_format_that_cannot_run_is_one_skip_with_its_reason(tmp_path: Path) -> None:
    suite = Path(__file__).with_name("test_conformance.py")
    arguments = ["-q", "-p", "no:cacheprovider", "-k", "gguf", "--rootdir", str(suite.parents[2]), str(suite)]
    out = run_without(tmp_path, f"import pytest; raise SystemExit(pytest.main({arguments}))", "gguf", "libggml")
    cases = len(BY_BACKEND["gguf"])
    assert f"{cases} skipped" in out.splitlines()[-1]
    for format_id in {Subject(case).format_id for case in BY_BACKEND["gguf"]}:
        assert f"{format_id}: libggml-python is not installed. Run `pip install libggml-python`" in out
