"""ggml's C library behind our binding: no abort, the same bytes with any number of threads, products, refusals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from quantwire.quantizers.backends.gguf import choose, eager
from quantwire.quantizers.backends.gguf.ggml import LARGEST, library
from quantwire.quantizers.backends.gguf.products import Products
from quantwire.quantizers.backends.gguf.types import BY_NUMBER, PLAIN_TYPES, TYPES, format_id, type_name
from quantwire.quantizers.errors import SpecError, WeightError
from quantwire.quantizers.formats import BACKENDS
from quantwire.quantizers.registry import get_entry, get_quantizer
from quantwire.quantizers.spec import QuantSpec

pytest.importorskip("libggml", reason="libggml-python is not installed")
CPU = torch.device("cpu")
# The library makes the tables of these in seconds; the rest of the suite covers them.
QUICK = [name for name in TYPES if not name.startswith(("IQ1", "IQ2"))]


def weight(rows: int = 40, k: int = 512, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(seed))


def quantized(name: str, w: torch.Tensor) -> Any:
    return get_quantizer(format_id(name)).quantize(w, QuantSpec(format_id(name)))


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
from quantwire.quantizers.backends.gguf.types import TYPES

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
from quantwire.quantizers.backends.gguf.types import TYPES
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
