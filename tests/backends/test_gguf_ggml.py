"""ggml's C library behind our binding: no abort, the same bytes with any number of threads, products, refusals."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from quantwire.quantizers.apply import quantize_tensor
from quantwire.quantizers.backends.gguf import choose, eager
from quantwire.quantizers.backends.gguf.ggml import LARGEST, address, in_threads, library
from quantwire.quantizers.backends.gguf.products import Products
from quantwire.quantizers.errors import SpecError, WeightError
from quantwire.quantizers.formats import BACKENDS
from quantwire.quantizers.ggml_types import BY_NUMBER, PLAIN_TYPES, TYPES, format_id, type_name
from quantwire.quantizers.registry import get_entry, get_quantizer
from quantwire.quantizers.spec import QuantSpec
from quantwire.quantizers.weight import QuantizedLinear, QuantizedWeight
from torch.autograd import forward_ad

pytest.importorskip("libggml", reason="libggml-python is not installed")
CPU = torch.device("cpu")
# The library makes the tables of these in seconds; the rest of the suite covers them.
QUICK = [name for name in TYPES if not name.startswith(("IQ1", "IQ2"))]


def weight(rows: int = 40, k: int = 512, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(seed))


def quantized(name: str, w: torch.Tensor) -> Any:
    return get_quantizer(format_id(name)).quantize(w, QuantSpec(format_id(name)))


def layer_of(name: str, rows: int = 40) -> QuantizedLinear:
    return QuantizedLinear(quantized(name, weight(rows)), weight(1, rows)[0])


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def run_alone(script: str, *args: str, env: dict[str, str] | None = None) -> str:
    """In a process of its own, which a wrong address would end."""
    command = [sys.executable, "-c", script, *args]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **(env or {})}
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    return done.stdout


def test_the_table_of_types_is_that_of_the_gguf_package() -> None:
    gguf = pytest.importorskip("gguf")
    known = {
        t.name: (int(t), *gguf.GGML_QUANT_SIZES[t]) for t in gguf.GGMLQuantizationType if t in gguf.GGML_QUANT_SIZES
    }
    ours = {t.name: (t.number, t.block, t.nbytes) for t in (*TYPES.values(), *PLAIN_TYPES.values())}
    assert ours.items() <= known.items()
    # Those of activations, and one that gguf can name but neither read nor write.
    assert known.keys() - ours.keys() <= {"Q8_1", "Q8_K", "Q1_0"}
    assert {t.name for t in BY_NUMBER.values()} == ours.keys()


def test_formats_and_types_are_the_same_set() -> None:
    backend = next(b for b in BACKENDS if b.name == "gguf")
    assert {type_name(e.format_id) for e in backend.entries} == set(TYPES)
    for name, kind in TYPES.items():
        assert get_entry(format_id(name)).bits == pytest.approx(kind.bits)


def test_the_library_is_what_computes_here() -> None:
    ggml, reason = choose.library_or_reason(CPU)
    assert ggml is not None, reason


EXTREMES = """
import torch
from quantwire.quantizers.backends.gguf.ggml import LARGEST, LARGEST_OF, library
from quantwire.quantizers.ggml_types import TYPES

g = torch.randn(3, 512, generator=torch.Generator().manual_seed(0))
one = torch.nn.functional.one_hot(torch.arange(3), 512).float()
values = {
    "zeros": 0 * g, "constant": 0 * g + 0.3, "negative": -g.abs(), "one": one, "one of the largest": one * LARGEST,
    "largest": g.clamp(-1, 1) * LARGEST, "outlier": g + one * 1e6, "small": g * 1e-20, "subnormal": g * 1e-40,
    "alternating": torch.tensor([1.0, -1.0]).repeat(3, 256), "tiny and large": torch.where(g > 0, 1e-38, LARGEST),
}
r = torch.rand(512, generator=torch.Generator().manual_seed(1))
matrices = {
    "none": None, "random": r, "zeros": 0 * r, "half zeros": (r > 0.5).float(), "one": one[0], "small": r * 1e-30,
    "subnormal": r * 1e-40, "large": r * 3e38, "wide": torch.where(r > 0.5, 1e-30, 1e30),
}
count = 0
for kind in TYPES.values():
    largest = LARGEST_OF.get(kind.name, LARGEST)
    for v in values.values():
        for m in matrices.values():
            library().quantize(kind, v.clamp(-largest, largest).contiguous(), m)
            count += 1
print(count)
"""


@pytest.mark.slow
def test_no_value_and_no_matrix_ends_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", EXTREMES], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) == len(TYPES) * 11 * 9


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "Q6_K", "IQ4_XS", "IQ3_S"])
def test_the_bytes_do_not_depend_on_the_threads(name: str) -> None:
    w = weight(rows=37)
    ggml, kind = library(), TYPES[name]
    one = ggml.quantize(kind, w, threads=1)
    assert torch.equal(one, ggml.quantize(kind, w, threads=3))
    outs = [ggml.dequantize(kind, one, torch.empty(37, 512, dtype=torch.bfloat16), threads=n) for n in (1, 3)]
    assert torch.equal(*outs)


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_from_the_middle_are_those_of_the_whole(name: str, dtype: torch.dtype) -> None:
    q = quantized(name, weight())
    whole = eager.dequantize(name, q.tensors["qdata"], (40, 512), torch.float32)
    part = library().dequantize(TYPES[name], q.tensors["qdata"], torch.empty(7, 512, dtype=dtype), start=11)
    assert torch.equal(part, whole[11:18].to(dtype))


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("tokens", [1, 5])
def test_products_of_few_tokens(name: str, tokens: int) -> None:
    q, x = quantized(name, weight(rows=130)), weight(tokens, seed=3)
    restored = get_quantizer(q.format_id).dequantize(q, torch.float32)
    expected = x @ restored.T
    got = Products(library()).multiply(TYPES[name], x, q.tensors["qdata"], threads=2)
    assert got.shape == (tokens, 130)
    assert float((got - expected).norm() / expected.norm()) < 0.01


def test_a_product_without_tokens_or_rows_is_empty() -> None:
    q = quantized("Q8_0", weight())
    products = Products(library())
    assert products.multiply(TYPES["Q8_0"], torch.empty(0, 512), q.tensors["qdata"]).shape == (0, 40)
    assert products.multiply(TYPES["Q8_0"], torch.ones(2, 512), q.tensors["qdata"][:0]).shape == (2, 0)


def test_the_importance_matrix_moves_the_error_to_where_it_counts() -> None:
    w, importance = weight(), torch.rand(512, generator=torch.Generator().manual_seed(2)) ** 4 * 100
    quantizer = get_quantizer("gguf-q2-k")
    errors = []
    for q in (
        quantizer.quantize(w, QuantSpec("gguf-q2-k")),
        quantizer.quantize_weighted(w, QuantSpec("gguf-q2-k"), importance),
    ):
        error = (quantizer.dequantize(q, torch.float32) - w).square()
        errors.append(float((error * importance).sum()))
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize(
    ("importance", "said"),
    [
        (torch.ones(511), r"shape \(511,\), expected \(512,\)"),
        (torch.full((512,), -1.0), "expected 0 and more"),
        (torch.full((512,), float("nan")), "expected 0 and more"),
        (torch.full((512,), float("inf")), "expected 0 and more"),
    ],
)
def test_a_wrong_importance_matrix_is_refused(importance: torch.Tensor, said: str) -> None:
    with pytest.raises(WeightError, match=said):
        library().quantize(TYPES["Q4_K"], weight(), importance)


def test_other_backends_refuse_an_importance_matrix() -> None:
    with pytest.raises(SpecError, match="takes no importance matrix"):
        get_quantizer("layerwise-fp8-e4m3fn").quantize_weighted(
            weight(), QuantSpec("layerwise-fp8-e4m3fn"), weight(1)[0]
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2 * LARGEST])
def test_values_that_ggml_cannot_take_never_reach_it(value: float) -> None:
    w = weight()
    w[3, 7] = value
    with pytest.raises(WeightError, match="exceed what IQ3_S can hold"):
        library().quantize(TYPES["IQ3_S"], w)


def test_wrong_places_are_refused_before_the_call() -> None:
    ggml, kind = library(), TYPES["Q4_K"]
    q = ggml.quantize(kind, weight())
    with pytest.raises(WeightError, match="not a multiple"):
        ggml.quantize(kind, weight(k=300))
    for qdata, rows, start in ((q, 41, 0), (q, 2, 39), (q, 2, -1), (q[:, :-1], 2, 0), (q[:, ::2], 2, 0)):
        with pytest.raises(WeightError, match="do not lie in"):
            ggml.dequantize(kind, qdata, torch.empty(rows, 512), start)
    with pytest.raises(WeightError, match="do not lie in"):
        Products(ggml).multiply(kind, torch.ones(1, 256), q)


def test_without_the_library_formats_are_read_and_say_what_is_missing(tmp_path: Path) -> None:
    """A process that has no libggml-python: K types are read and multiplied, and making one names the package."""
    script = """
import sys, torch
sys.modules["libggml"] = None  # as if it were not installed
from quantwire.quantizers.backends.gguf import choose
from quantwire.quantizers.ggml_types import TYPES
from quantwire.quantizers.registry import availability, get_quantizer, require_reader
from quantwire.quantizers.spec import QuantSpec
from quantwire.quantizers.weight import QuantizedWeight
q4_k, q8_0 = get_quantizer("gguf-q4-k"), get_quantizer("gguf-q8-0")
assert availability("gguf-q8-0").works and require_reader("gguf-q4-k") is q4_k
made = q8_0.quantize(torch.ones(4, 512), QuantSpec("gguf-q8-0"))
assert q8_0.dequantize(made, torch.float32).sub(1).abs().max() < 0.01
zeros = QuantizedWeight("gguf-q4-k", {"qdata": torch.zeros(4, 288, dtype=torch.uint8)}, (4, 512), torch.float32)
assert q4_k.linear(torch.ones(2, 512), zeros, None).shape == (2, 4)
print(availability("gguf-q4-k").reason)
print(q4_k.kernel(zeros, torch.device("cpu"), torch.float32, 1).reason)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    refusal, reason = done.stdout.splitlines()
    assert refusal == "libggml-python is not installed."
    assert "torch operations" in reason


META = """
import torch
from quantwire.quantizers.registry import get_quantizer
from quantwire.quantizers.spec import QuantSpec
w = torch.randn(70, 512, generator=torch.Generator().manual_seed(0))
matrices = w[0].square(), 0 * w[0]

def all_of_it():
    out = []
    for name in ("gguf-q8-0", "gguf-q4-k", "gguf-nvfp4"):
        z, spec = get_quantizer(name), QuantSpec(name)
        for q in (z.quantize(w, spec), *(z.quantize_weighted(w, spec, m) for m in matrices)):
            out += [q.tensors["qdata"], z.linear(w[:3], q, None), z.linear(w, q, w[:, 0])]
            out += [z.dequantize(q, d) for d in (torch.float32, torch.bfloat16, torch.float64)]
    return out

torch.set_num_threads(2)
with torch.device("meta"):
    got = all_of_it()
assert all(torch.equal(a, b) for a, b in zip(got, all_of_it(), strict=True))
"""


def test_the_default_device_is_not_where_ggml_writes() -> None:
    run_alone(META)


FAKE = """
import copy
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from quantwire.quantizers.backends.gguf.ggml import library
from quantwire.quantizers.ggml_types import TYPES
from quantwire.quantizers.errors import WeightError
from quantwire.quantizers.registry import get_quantizer
from quantwire.quantizers.spec import QuantSpec
from quantwire.quantizers.weight import QuantizedLinear
w = torch.randn(40, 512, generator=torch.Generator().manual_seed(0))
for name in ("gguf-q4-k", "gguf-iq3-s", "gguf-mxfp4"):
    layer = QuantizedLinear(get_quantizer(name).quantize(w, QuantSpec(name)), w[:, 0])
    mode = FakeTensorMode()
    fake = copy.deepcopy(layer)
    for n, p in layer.named_parameters():
        setattr(fake, n, torch.nn.Parameter(mode.from_tensor(p.data), requires_grad=False))
    for tokens in (2, 64):
        x = mode.from_tensor(w[:1].repeat(tokens, 1))
        with mode:
            assert fake(x).shape == (tokens, 40) and fake.weight.shape == (40, 512)
            assert fake(x.bfloat16()).dtype is torch.bfloat16
        assert fake(x).shape == (tokens, 40)
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert layer(torch.empty(tokens, 512)).shape == (tokens, 40)
    for dtype in (torch.float32, torch.bfloat16):  # nothing fake was kept
        for tokens in (2, 64):
            assert type(layer(w[:1].repeat(tokens, 1).to(dtype))) is torch.Tensor
    with torch.no_grad():
        traced = torch.fx.experimental.proxy_tensor.make_fx(layer)(w[:2])
    assert ((traced(w[:2]) - layer(w[:2])).norm() / layer(w[:2]).norm()) < 0.02
for t in (mode.from_tensor(w), torch.empty(40, 512, device="meta")):
    try:
        library().quantize(TYPES["Q8_0"], t)
    except WeightError:
        continue
    raise AssertionError(t)
"""


@pytest.mark.slow
def test_fake_tensors_give_shapes() -> None:
    run_alone(FAKE)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "IQ4_XS"])
@pytest.mark.parametrize("tokens", [3, 64])
def test_torch_func_and_forward_derivatives_are_those_of_the_dequantized_weight(name: str, tokens: int) -> None:
    layer, x = layer_of(name), weight(tokens, seed=3)
    w, t = layer.weight, weight(tokens, seed=4)
    expected = F.linear(x, w, layer.bias)
    assert relative(torch.func.vmap(layer)(x), expected) < 1e-6
    out, tangent = torch.func.jvp(layer, (x,), (t,))
    assert relative(out, expected) < 1e-6
    assert relative(tangent, t @ w.T) < 1e-6
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, t))).tangent
    assert relative(tangent, t @ w.T) < 1e-6
    gradient = torch.func.grad(lambda v: torch.func.vmap(layer)(v).sum())(x)
    assert relative(gradient, w.sum(0).expand(tokens, -1)) < 1e-6
    assert relative(torch.func.functionalize(layer)(x), expected) < 1e-6


def test_a_subclass_of_tensor_keeps_its_meaning() -> None:
    class Doubled(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            plain = [a.as_subclass(torch.Tensor) if isinstance(a, Doubled) else a for a in args]
            out = func(*plain, **(kwargs or {}))
            return 2 * out if func is F.linear else out

    layer, x = layer_of("Q8_0"), weight(3, seed=3)
    assert relative(layer(x.as_subclass(Doubled)), 2 * F.linear(x, layer.weight, layer.bias)) < 1e-6


@pytest.mark.parametrize("tokens", [3, 64])
def test_negative_views_are_read_as_negative(tokens: int) -> None:
    w, x = weight(), weight(tokens, seed=3)
    quantizer = get_quantizer("gguf-q4-k")
    q = quantizer.quantize(torch._neg_view(w), QuantSpec("gguf-q4-k"))
    assert torch.equal(q.tensors["qdata"], quantizer.quantize(-w, QuantSpec("gguf-q4-k")).tensors["qdata"])
    assert torch.equal(library().quantize(TYPES["Q4_K"], torch._neg_view(w)), q.tensors["qdata"])
    importance = torch._neg_view(-w[0].square())
    assert torch.equal(
        library().quantize(TYPES["Q4_K"], w, importance), library().quantize(TYPES["Q4_K"], w, w[0].square())
    )
    assert torch.equal(quantizer.linear(torch._neg_view(x), q, None), quantizer.linear(-x, q, None))


def test_only_plain_memory_has_an_address() -> None:
    w = weight()
    assert address(w) == w.data_ptr()
    for t in (w.T, torch._neg_view(w), w.to("meta"), torch.empty(0), w.as_subclass(type("Own", (torch.Tensor,), {}))):
        with pytest.raises(WeightError, match="plain, contiguous tensors on the CPU"):
            address(t)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_dtypes_that_ggml_does_not_write(dtype: torch.dtype) -> None:
    layer = layer_of("Q4_K", rows=3000)
    restored = layer.quantized_weight
    got = get_quantizer("gguf-q4-k").dequantize(restored, dtype)
    assert torch.equal(got.float(), layer.weight.to(dtype).float())
    with pytest.raises(WeightError, match=r"cannot be torch\.int32"):
        library().dequantize(TYPES["Q4_K"], restored.tensors["qdata"], torch.empty(3000, 512, dtype=torch.int32))


def test_a_layer_computes_in_float64() -> None:
    layer, x = layer_of("Q4_K"), weight(64, seed=3).double()
    assert relative(layer(x), F.linear(x, layer.weight.double(), layer.bias.double())) < 1e-12
    assert layer(x[:2]).dtype is torch.float64


# One whose x is rounded as Q8_0, one as Q8_1, two as Q8_K; the numbers in `products` are those asked for here.
@pytest.mark.parametrize(("name", "normal", "outliers"), [("Q8_0", 0.0055, 0.014), ("Q4_1", 0.0055, 0.014)] + [
    (name, 0.0075, 0.03) for name in ("Q4_K", "IQ4_XS")
])  # fmt: skip
def test_products_of_tiny_huge_and_uneven_rows(name: str, normal: float, outliers: float) -> None:
    q, x = quantized(name, weight(rows=130, k=1024)), weight(8, k=1024, seed=3)
    restored = get_quantizer(q.format_id).dequantize(q, torch.float64)
    uneven = x.clone()
    uneven[:, ::64] *= 100
    products = Products(library())
    for at_most, rows in (
        *((normal, x * scale) for scale in (1.0, 1e-5, 1e-6, 1e-30, 1e7, 1e30)),
        (normal, x * torch.logspace(-30, 30, 8)[:, None]),
        (outliers, uneven),
    ):
        got = products.multiply(TYPES[name], rows, q.tensors["qdata"])
        for i, expected in enumerate(rows.double() @ restored.T):
            assert relative(got[i], expected) < 1.15 * at_most, f"row {i} of largest {float(rows.abs().max()):.0e}"


@pytest.mark.parametrize("name", ["Q8_0", "Q4_1", "Q4_K"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_stay_so_and_alone(name: str, bad: float) -> None:
    q, x = quantized(name, weight(rows=130)), weight(4, seed=3)
    x[2] = 0
    expected = Products(library()).multiply(TYPES[name], x, q.tensors["qdata"])
    x[1, 77] = bad
    got = Products(library()).multiply(TYPES[name], x, q.tensors["qdata"])
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2, 3]], expected[[0, 2, 3]])
    assert not got[2].any()


def test_reasons_and_the_report_say_that_x_is_rounded() -> None:
    _, entry = quantize_tensor("a.weight", weight(), QuantSpec("gguf-q4-k"))
    assert "up to 12 tokens ggml's product, which rounds x to 8 bits" in entry.kernel
    kernel = get_quantizer("gguf-q4-k").kernel(quantized("Q4_K", weight()), CPU, torch.float32, 1)
    assert "x is rounded to 8 bits (QUANTWIRE_GGML_PRODUCTS=0 turns it off)" in kernel.reason


def test_products_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_of("Q4_K"), weight(1, seed=3)
    expected = F.linear(x, layer.weight, layer.bias)
    assert relative(layer(x), expected) > 1e-3
    monkeypatch.setenv("QUANTWIRE_GGML_PRODUCTS", "0")
    assert relative(layer(x), expected) < 1e-6
    kernel = get_quantizer("gguf-q4-k").kernel(layer.quantized_weight, CPU, torch.float32, 1)
    assert kernel.reason.endswith("QUANTWIRE_GGML_PRODUCTS is 0")
    monkeypatch.setenv("QUANTWIRE_GGML_PRODUCTS", "no")
    with pytest.raises(SpecError, match="is 'no', expected 1"):
        layer(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_gives_the_dtype_of_nn_linear(dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    layer, plain = layer_of("Q8_0"), torch.nn.Linear(512, 40)
    for tokens in (3, 64):
        x = weight(tokens, seed=3).to(x_dtype)
        with torch.autocast("cpu", dtype):
            got = layer(x)
            expected = F.linear(x, layer.weight.to(x_dtype), layer.bias.to(x_dtype))
            if x_dtype is not torch.float64:  # nn.Linear would refuse it beside its float32 weight
                assert got.dtype is plain(x).dtype
        assert got.dtype is expected.dtype
        assert relative(got, expected) < 0.01


def test_threads_are_waited_for_before_an_error_is_raised() -> None:
    done: list[int] = []

    def run(start: int, stop: int) -> None:
        if start == 1:
            raise ValueError("the second of four")
        time.sleep(0.2 if start else 0)
        done.append(start)

    with pytest.raises(ValueError, match="the second of four"):
        in_threads(run, 4, 4)
    assert sorted(done) == [0, 2, 3]


FORK = """
import os, signal, time
from quantwire.quantizers.backends.gguf.ggml import in_threads
in_threads(lambda a, b: None, 2, 2)
time.sleep(0.2)  # until the pool's one thread waits: the child's copy believes that it still does
child = os.fork()
if not child:
    signal.alarm(30)
    in_threads(lambda a, b: None, 2, 2)
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_has_threads_of_its_own() -> None:
    assert run_alone(FORK).strip() == "7"


FOREIGN = """
import ctypes, sys, torch
ctypes.CDLL(sys.argv[1], mode=int(sys.argv[2]))
from quantwire.quantizers.backends.gguf.ggml import library
from quantwire.quantizers.registry import availability, get_quantizer
from quantwire.quantizers.spec import QuantSpec
assert library().cpu_library is None and availability("gguf-q4-k").works
z = get_quantizer("gguf-q4-k")
q = z.quantize(torch.ones(4, 256), QuantSpec("gguf-q4-k"))
assert z.dequantize(q, torch.bfloat16).sub(1).abs().max() < 0.02
print(z.kernel(q, torch.device("cpu"), torch.float32, 1).reason)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other loaders find libraries by other rules")
@pytest.mark.parametrize("mode", [os.RTLD_LOCAL, os.RTLD_GLOBAL], ids=["local", "global"])
def test_another_ggml_in_the_process_is_not_mixed_with_ours(tmp_path: Path, mode: int) -> None:
    if library().cpu_library is None:
        pytest.skip(library().cpu_reason)
    ours = Path(library().base_library._name)
    other = shutil.copy(ours.resolve(), tmp_path / "libggml-base.so.0")
    assert "another copy of libggml-base" in run_alone(FOREIGN, str(other), str(mode))


WITHOUT = """
import sys, torch
sys.modules["libggml"] = None  # as if it were not installed
from quantwire.quantizers.apply import quantize_tensor
from quantwire.quantizers.errors import SpecError, WeightError
from quantwire.quantizers.spec import QuantSpec
w = torch.ones(4, 512)
for name, importance, tensor in (("q8-0", w[0], w), ("q4-0", None, 2e9 * w), ("mxfp4", None, 2e9 * w)):
    try:
        quantize_tensor("a.weight", tensor, QuantSpec("gguf-" + name), importance)
    except (SpecError, WeightError) as err:
        print(str(err).replace(chr(10), " "))
"""


def test_without_the_library_importance_and_range_are_refused() -> None:
    pytest.importorskip("gguf")
    first, *others = run_alone(WITHOUT).splitlines()
    assert "an importance matrix needs libggml-python" in first
    assert "pip install libggml-python" in first
    assert len(others) == 2
    assert all("exceed what" in other for other in others)


def test_on_other_devices_the_reason_is_why_triton_is_not_used() -> None:
    def reason(device: str, name: str) -> str:
        q = QuantizedWeight(format_id(name), {"qdata": torch.empty(4, TYPES[name].nbytes)}, (4, 256), torch.float32)
        return get_quantizer(q.format_id).kernel(q, torch.device(device), torch.float32, 1).reason

    assert reason("cuda", "IQ3_S").startswith("torch operations: there is no Triton kernel for IQ3_S, only for")
    assert reason("mps", "Q4_K") == "torch operations: the Triton kernels run on CUDA devices, not on mps"


@pytest.mark.parametrize("shape", [(0, 256), (4, 0), (0, 0)])
@pytest.mark.parametrize("tokens", [2, 64])
def test_empty_weights(shape: tuple[int, int], tokens: int) -> None:
    quantizer = get_quantizer("gguf-q4-k")
    q = quantizer.quantize(torch.ones(shape), QuantSpec("gguf-q4-k"))
    form = quantizer.form(q)
    assert form is not None
    assert form.shape == shape
    assert quantizer.dequantize(q, torch.float32).shape == shape
    bias = torch.ones(shape[0])
    assert torch.equal(quantizer.linear(torch.ones(tokens, shape[1]), q, bias), torch.ones(tokens, shape[0]))
