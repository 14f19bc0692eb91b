"""The shared products: right values at every block and part boundary, in every mode in which torch may call them."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from quantwire.quantizers.kernels import choose, expand, forms, int8, scratch
from quantwire.quantizers.kernels.expand import Expansion
from torch import Tensor

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole(low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def int8_rows() -> tuple[Expansion, Tensor]:
    q, scale = whole(-128, 128, (37, 64), torch.int8), rand(37, 1).abs()
    return forms.integers(q, scale), q * scale


def uint8_groups_with_shift() -> tuple[Expansion, Tensor]:
    q, scale, shift = whole(0, 256, (37, 64), torch.uint8), rand(37, 4).abs(), rand(37, 4, seed=2)
    expected = q.view(37, 4, 16) * scale[..., None] + shift[..., None]
    return forms.integers(q, scale, shift), expected.view(37, 64)


def int8_tensor_scale() -> tuple[Expansion, Tensor]:
    q = whole(-128, 128, (37, 64), torch.int8)
    return forms.integers(q, torch.tensor(0.37)), q * torch.tensor(0.37)


def float8(dtype: torch.dtype, padded: bool = False) -> tuple[Expansion, Tensor]:
    # Every finite value of the type, subnormals and both zeros included.
    every = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(dtype)
    every = every[torch.isfinite(every.float())]
    q = every.repeat(20)[: 37 * 64].view(37, 64)
    stored = F.pad(q.view(torch.uint8), (0, 16, 0, 3)).view(dtype) if padded else q
    scale = rand(37, 2).abs() / 64  # products of the largest values fit float16
    expected = (q.float().view(37, 2, 32) * scale[..., None]).view(37, 64)
    return forms.float8(stored, scale, (37, 64)), expected


def four_bit(order: forms.Order) -> tuple[Expansion, Tensor]:
    packed, values = whole(0, 256, (37, 32), torch.uint8), rand(16)
    scale = rand(37, 4).abs()
    low, high = values[(packed & 15).long()], values[(packed >> 4).long()]
    pair = (low, high) if order == "low first" else (high, low)
    expected = (torch.stack(pair, 2).view(37, 4, 16) * scale[..., None]).view(37, 64)
    return forms.nibbles(packed, forms.pairs(values, order), scale), expected


def halves(bits: int, n: int) -> tuple[Expansion, Tensor]:
    group, per_row, parts = 16, 3, 8 // bits
    groups = n * per_row
    indices = whole(0, 1 << bits, (groups, group), torch.uint8)
    rows = -(-groups // parts)
    filled = F.pad(indices, (0, 0, 0, rows * parts - groups)).view(parts, rows, group)
    packed = sum((filled[i] << (i * bits) for i in range(1, parts)), filled[0])
    scale, shift = rand(groups, 1).abs(), rand(groups, 1, seed=2)
    expected = (indices * scale + shift).view(n, per_row * group)
    return forms.halves(packed, bits, (n, per_row * group), scale, shift), expected


FORMS: dict[str, Callable[[], tuple[Expansion, Tensor]]] = {
    "int8 rows": int8_rows,
    "int8 tensor scale": int8_tensor_scale,
    "uint8 groups with shift": uint8_groups_with_shift,
    "e4m3": lambda: float8(torch.float8_e4m3fn),
    "e5m2": lambda: float8(torch.float8_e5m2),
    "e4m3 padded": lambda: float8(torch.float8_e4m3fn, padded=True),
    "nibbles low first": lambda: four_bit("low first"),
    "nibbles high first": lambda: four_bit("high first"),
    "halves of 4 bits": lambda: halves(4, 37),
    "halves of 4 bits, odd groups": lambda: halves(4, 5),
    "quarters of 2 bits": lambda: halves(2, 37),
}
every_form = pytest.mark.parametrize("make", FORMS.values(), ids=FORMS.keys())


@pytest.fixture(autouse=True)
def _fresh_buffers() -> None:
    scratch.release()


@pytest.mark.parametrize("block", [64, 200, 1_000, 1_500_000], ids=lambda b: f"blocks-of-{b}")
@every_form
def test_values_at_every_block_boundary(
    make: Callable[[], tuple[Expansion, Tensor]], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expand, "BLOCK_NUMEL", block)
    source, expected = make()
    assert torch.equal(expand.dequantized(source, torch.float32), expected)
    assert torch.equal(expand.dequantized(source, torch.bfloat16), expected.to(torch.bfloat16))


@pytest.mark.parametrize("cap", [1_000, 3_000, 1 << 26], ids=lambda c: f"cap-{c}")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@every_form
def test_products_equal_those_of_the_expanded_weight(
    make: Callable[[], tuple[Expansion, Tensor]], dtype: torch.dtype, cap: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expand, "CAP_NBYTES", cap)
    source, expected = make()
    n, k = source.shape
    x, bias = rand(2, 5, k, seed=3).to(dtype), rand(n, seed=4)
    got = expand.linear(x, source, bias)
    whole_product = F.linear(x, expected.to(dtype), bias.to(dtype))
    assert (got.shape, got.dtype) == (whole_product.shape, dtype)
    # A part of the rows may be summed in another order.
    assert (got.float() - whole_product.float()).norm() <= 2e-3 * whole_product.float().norm()
    assert torch.equal(expand.linear(x[:0], source, bias), whole_product[:0])


def test_a_second_product_does_not_change_the_first() -> None:
    (first, w1), (second, w2) = int8_rows(), float8(torch.float8_e4m3fn)
    x = rand(3, 64)
    a, b = expand.linear(x, first, None), expand.linear(x, second, None)
    assert torch.allclose(a, F.linear(x, w1), rtol=1e-5)
    assert torch.allclose(b, F.linear(x, w2), rtol=1e-5)


def test_buffers_made_under_another_default_device_hold_values() -> None:
    source, expected = int8_rows()
    x = rand(3, 64).to(torch.bfloat16)
    with torch.device("meta"):
        expand.linear(x, source, None)
    assert torch.equal(expand.linear(x, source, None), F.linear(x, expected.to(torch.bfloat16)))


def test_scales_below_float16_do_not_vanish() -> None:
    from quantwire.quantizers.registry import get_quantizer
    from quantwire.quantizers.weight import QuantizedWeight

    q, scale = whole(-127, 128, (8, 64), torch.int8), torch.full((8, 1), 5e-8)
    weight = QuantizedWeight("comfy-int8", {"qdata": q, "scale": scale}, (8, 64), torch.float16, {})
    got = get_quantizer("comfy-int8").linear((rand(3, 64) * 100).to(torch.float16), weight, None)
    expected = F.linear((rand(3, 64) * 100).to(torch.float16).float(), q * scale)
    assert (got.float() - expected).norm() < 0.05 * expected.norm()  # float16 itself has few digits there


def test_buffers_made_in_inference_mode_serve_outside() -> None:
    source, expected = int8_rows()
    x = rand(3, 64)
    with torch.inference_mode():
        expand.linear(x.to(torch.bfloat16), source, None)
    with torch.no_grad():
        got = expand.linear(x.to(torch.bfloat16), source, None)
    assert torch.equal(got, F.linear(x.to(torch.bfloat16), expected.to(torch.bfloat16)))


def test_threads_have_buffers_of_their_own() -> None:
    cases = [make() for make in (int8_rows, lambda: float8(torch.float8_e5m2))]
    x = rand(3, 64)
    wrong: list[str] = []

    def work(source: Expansion, expected: Tensor) -> None:
        reference = F.linear(x, expected)
        for _ in range(200):
            if not torch.allclose(expand.linear(x, source, None), reference, rtol=1e-4, atol=1e-4):
                wrong.append("a product of another thread's weight")

    threads = [threading.Thread(target=work, args=case) for case in cases for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_buffers_stay_below_their_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "CAP_NBYTES", 5_000)
    scratch.scratch("small", (10, 100), torch.float32, CPU)
    scratch.scratch("large", (100, 100), torch.float32, CPU)
    assert scratch.kept_nbytes() == 4_000
    scratch.scratch("small", (5, 100), torch.float32, CPU)
    assert scratch.kept_nbytes() == 4_000  # used again
    scratch.release()
    assert scratch.kept_nbytes() == 0


def test_compiled_products_equal_eager_ones() -> None:
    source, _ = int8_rows()
    x = rand(3, 64)
    compiled = torch.compile(lambda t: expand.linear(t, source, None), backend="aot_eager")
    assert torch.allclose(compiled(x), expand.linear(x, source, None), rtol=1e-5)


# int8


@pytest.mark.parametrize("part", [1, 300, 1_500_000])
@pytest.mark.parametrize("tokens", [1, 5, 33])
def test_int8_products_are_exact_sums(tokens: int, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "PART_NUMEL", part)
    x8, w8 = whole(-127, 128, (tokens, 96), torch.int8), whole(-127, 128, (300, 96), torch.int8, seed=2)
    xs, ws, bias = rand(tokens, 1).abs(), rand(300).abs(), rand(300, seed=5)
    exact = (x8.double() @ w8.double().T).float() * xs * ws + bias
    assert torch.equal(int8.scaled_mm(x8, xs, w8, ws, bias, torch.float32), exact)
    assert torch.equal(int8.scaled_mm(x8, xs, w8, ws, None, torch.bfloat16), (exact - bias).to(torch.bfloat16)) or (
        (int8.scaled_mm(x8, xs, w8, ws, None, torch.float32) - (exact - bias)).abs().max() < 1e-3
    )


def test_int8_products_of_nothing() -> None:
    w8, ws = whole(-127, 128, (8, 16), torch.int8), rand(8).abs()
    bias = rand(8)
    empty = int8.scaled_mm(torch.empty(0, 16, dtype=torch.int8), torch.empty(0, 1), w8, ws, bias, torch.float32)
    assert empty.shape == (0, 8)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_rows_are_rounded_to_int8(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "PART_NUMEL", 100)
    x, factor = rand(7, 40).to(dtype), rand(7, 1, seed=6).abs() * 100
    expected = (x.float() * factor).round().clamp(-127, 127)
    assert torch.equal(int8.round_rows(x, factor, -127).float(), expected)
    assert int8.round_rows(-x.abs() - 1, factor + 200).min() == -128


@pytest.mark.parametrize("k", [32, 96, 33, 40])
@pytest.mark.parametrize("n", [1, 7, 33, 64])
def test_few_tokens_are_right_or_go_another_way(n: int, k: int) -> None:
    """torch's own product ends in a segmentation fault for K = 33 and is 25 % off for K = 40."""
    q, scale = whole(-127, 128, (n, k), torch.int8), rand(n, 1).abs()
    from quantwire.quantizers.weight import QuantizedWeight

    weight = QuantizedWeight("quanto-qint8", {"qdata": q, "scale": scale}, (n, k), torch.bfloat16)
    kernel = choose.int8_rows(
        lambda w: (w.tensors["qdata"], w.tensors["scale"]),
        lambda w: forms.integers(w.tensors["qdata"], w.tensors["scale"]),
        (n, k),
        CPU,
        torch.bfloat16,
        3,
    )
    assert (kernel.name == choose.FEW) == (k % 32 == 0)
    assert f"K={k}" in kernel.reason or k % 32 == 0
    x = rand(3, k).to(torch.bfloat16)
    expected = F.linear(x.float(), q * scale)
    assert (kernel.run(x, weight, None).float() - expected).norm() < (0.006 if n > 1 else 0.02) * expected.norm()


@pytest.mark.parametrize("offset", [8, 1, 24])
def test_few_tokens_of_a_weight_that_begins_anywhere(offset: int) -> None:
    """torch's own product ends in a segmentation fault unless the weight begins at a multiple of 16, and tensors mapped
    from a safetensors file begin at multiples of 8."""
    room = torch.zeros(64 * 64 + 128, dtype=torch.int8)
    start = -room.data_ptr() % 64 + offset
    q = room[start : start + 64 * 64].view(64, 64)
    q.copy_(whole(-127, 128, (64, 64), torch.int8))
    x, scale = rand(3, 64).to(torch.bfloat16), rand(64).abs()
    assert torch.equal(int8.few_tokens(x, q, scale, None), int8.few_tokens(x, q.clone(), scale, None))
