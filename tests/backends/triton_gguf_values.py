"""The Triton kernels in Triton's interpreter against gguf's numpy. Run by `test_triton_gguf.py`, in its own process.

TRITON_INTERPRET=1 must be set before Triton is imported, and no other test may see Triton so.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from quantwire.quantizers.errors import WeightError
from quantwire.quantizers.kernels.triton_gguf import BLOCKS, dequantize, kernel_for, launch, ops, refusal, run
from quantwire.quantizers.kernels.triton_gguf.tiles import FEW, FUSED, FUSED_WIDE, Tile
from quantwire.quantizers.weight import QuantizedWeight
from torch import Tensor
from triton_gguf_blocks import edge_blocks, random_blocks, reference, weight

TYPES = list(BLOCKS)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def name(value: Any) -> str:
    return str(value).removeprefix("torch.")


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and np.array_equal(a.numpy().view(np.uint32), b.numpy().view(np.uint32))


def error(y: Tensor, x: Tensor, w: Tensor, bias: Tensor | None) -> float:
    """Largest error over what rounding explains: half a unit of y's dtype, and 2e-6 of the sum of absolute products.

    A whole unit in bfloat16, see `rounded`.

    Sums of up to 1,280 float32 products in any order stay within 2e-6 of that sum unless all roundings agree in sign.
    """
    exact = x.double() @ w.double().T + (0.0 if bias is None else bias.double())
    unit = torch.finfo(y.dtype).eps / (1 if y.dtype is torch.bfloat16 else 2)
    room = unit * exact.abs() * 1.01 + 2e-6 * (x.double().abs() @ w.double().abs().T) + 1e-30
    return float(((y.double() - exact).abs() / room).max())


def rounded(w: Tensor, dtype: torch.dtype) -> Tensor:
    """As the interpreter does it, which cuts bfloat16 off. On a GPU it rounds to nearest: `triton_gguf_compile.py`."""
    return (w.view(torch.int32) & -65536).view(torch.float32).bfloat16() if dtype is torch.bfloat16 else w.to(dtype)


def seen(w: Tensor, dtype: torch.dtype, tokens: int) -> Tensor:
    """The weights that the product multiplies: float32, except on tensor cores and from a buffer."""
    return w if ops.way(CPU, dtype, tokens) is ops.FEW else rounded(w, dtype)


@pytest.mark.parametrize("shape", [(5, 256), (3, 768), (1, 1280), (2, 3, 256), (3, 2560)], ids=str)
@pytest.mark.parametrize("type_name", TYPES)
def test_values_are_the_reference_bit_by_bit(type_name: str, shape: tuple[int, ...]) -> None:
    rows = int(np.prod(shape[:-1]))
    qdata, w = weight(type_name, rows, shape[-1])
    assert same_bits(dequantize(qdata, type_name, shape, torch.float32), w.view(shape))
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(dequantize(qdata, type_name, shape, dtype), rounded(w, dtype).view(shape))


@pytest.mark.parametrize("type_name", TYPES)
def test_edge_blocks_are_the_reference_bit_by_bit(type_name: str) -> None:
    qdata, k = edge_blocks(type_name)
    assert same_bits(dequantize(qdata, type_name, (5, k), torch.float32), reference(qdata, type_name))


@pytest.mark.parametrize("type_name", TYPES)
def test_every_byte_of_a_block_counts(type_name: str) -> None:
    """Also the proof that the comparison above can fail. In the block of this seed no sub-scale is 0."""
    b = BLOCKS[type_name]
    qdata = random_blocks(type_name, 1, b.size, seed=5).repeat(b.nbytes, 1)
    before = dequantize(qdata, type_name, (b.nbytes, b.size), torch.float32)
    qdata.diagonal().bitwise_xor_(0x24)
    after = dequantize(qdata, type_name, (b.nbytes, b.size), torch.float32)
    assert bool((before != after).any(dim=1).all())
    assert same_bits(after, reference(qdata, type_name))


def test_nothing_is_written_past_the_end() -> None:
    for type_name in TYPES:
        k = BLOCKS[type_name].size
        room = torch.full((4 * k,), 7.0)
        launch.dequantize(random_blocks(type_name, 3, k), type_name, room[: 3 * k])
        assert torch.equal(room[3 * k :], torch.full((k,), 7.0))


@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("tokens", [1, 5, 33, 130])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("type_name", TYPES)
def test_products_are_those_of_the_reference(type_name: str, dtype: torch.dtype, tokens: int, with_bias: bool) -> None:
    for n, k in ((5, 256), (3, 768) if tokens <= 8 else (67, 256)):
        qdata, w = weight(type_name, n, k)
        x = torch.randn(tokens, k).to(dtype)
        bias = torch.randn(n).to(dtype) if with_bias else None
        y = run(x, qdata, type_name, n, k, bias)
        assert y.shape == (tokens, n)
        assert y.dtype is dtype
        assert error(y, x, seen(w, dtype, tokens), bias) <= 1.0


@pytest.mark.parametrize("tile", FEW, ids=str)
@pytest.mark.parametrize("type_name", TYPES)
def test_every_tile_for_few_tokens(type_name: str, tile: Tile) -> None:
    n, k = 3, 1280
    qdata, w = weight(type_name, n, k)
    for tokens in (1, 7):
        x = torch.randn(tokens, k)
        assert error(launch.few_tokens(x, qdata, type_name, None, tile), x, w, None) <= 1.0


@pytest.mark.parametrize("tile", sorted({*FUSED, *FUSED_WIDE}, key=str), ids=str)
@pytest.mark.parametrize("type_name", TYPES)
def test_every_tile_for_the_tensor_cores(type_name: str, tile: Tile) -> None:
    n, k = 70, 512
    qdata, w = weight(type_name, n, k)
    for tokens in (9, 129):
        x = torch.randn(tokens, k).half()
        assert error(launch.fused(x, qdata, type_name, None, tile), x, w.half(), None) <= 1.0


@pytest.mark.parametrize("tokens", [2, 20])
@pytest.mark.parametrize("k", [32, 96, 352])
@pytest.mark.parametrize("type_name", ["Q8_0", "Q4_0"])
def test_rows_that_end_inside_a_tile(type_name: str, k: int, tokens: int) -> None:
    qdata, w = weight(type_name, 3, k)
    x = torch.randn(tokens, k).half()
    for tile in FEW if tokens <= 8 else FUSED:
        launched = launch.few_tokens if tokens <= 8 else launch.fused
        y = launched(x, qdata, type_name, None, tile)
        assert error(y, x, seen(w, torch.float16, tokens), None) <= 1.0


@pytest.mark.parametrize("tokens", [1, 33])
@pytest.mark.parametrize("type_name", TYPES)
def test_the_tolerance_notices_one_wrong_byte(type_name: str, tokens: int) -> None:
    n, k = 5, 256
    qdata, w = weight(type_name, n, k)
    wrong = qdata.clone()
    wrong[2, BLOCKS[type_name].nbytes // 2] ^= 0xFF
    dtype = torch.float32 if tokens == 1 else torch.float16
    x = torch.randn(tokens, k).to(dtype)
    assert error(run(x, qdata, type_name, n, k, None), x, seen(w, dtype, tokens), None) <= 1.0
    assert error(run(x, wrong, type_name, n, k, None), x, seen(w, dtype, tokens), None) > 1.0


def test_leading_axes_odd_addresses_and_no_tokens() -> None:
    n, k = 5, 256
    qdata, w = weight("Q6_K", n, k)
    odd = torch.empty(qdata.numel() + 2, dtype=torch.uint8)
    odd = odd[1 + odd.data_ptr() % 2 :][: qdata.numel()].view(n, -1)
    odd.copy_(qdata)
    assert odd.data_ptr() % 2
    x = torch.randn(2, 3, k).transpose(0, 1)
    y = run(x, odd, "Q6_K", n, k, None)
    assert y.shape == (3, 2, n)
    assert error(y.reshape(-1, n), x.reshape(-1, k), w, None) <= 1.0
    assert run(torch.empty(0, k), qdata, "Q6_K", n, k, None).shape == (0, n)


def test_what_does_not_fit_is_refused() -> None:
    n, k = 4, 256
    qdata, _ = weight("Q4_K", n, k)
    x = torch.randn(1, k)
    for bad in (qdata[:, :100], qdata.view(torch.int8), qdata.t().contiguous().t(), qdata[:3]):
        with pytest.raises(WeightError, match=r"Q4_K: a weight of \(4, 256\) is 576 contiguous bytes, got"):
            run(x, bad, "Q4_K", n, k, None)
    with pytest.raises(WeightError, match="the last axis of x must be K"):
        run(x[:, :128], qdata, "Q4_K", n, k, None)
    with pytest.raises(WeightError, match="has no rows of blocks of 256"):
        run(torch.randn(1, 128), qdata, "Q4_K", n, 128, None)
    assert "Q2_K" in refusal(CPU, torch.float16, "Q2_K", (1, 256))


def test_kernel_for_multiplies() -> None:
    n, k = 5, 512
    qdata, w = weight("Q4_K", n, k)
    q = QuantizedWeight("gguf-q4-k", {"qdata": qdata}, (n, k), torch.bfloat16)
    for tokens, expected in ((1, ops.FEW), (8, ops.FEW), (9, ops.FUSED), (128, ops.FUSED), (129, ops.BUFFER)):
        kernel = kernel_for("Q4_K", CPU, torch.bfloat16, tokens)
        assert kernel is not None
        assert kernel.name == expected
        x = torch.randn(tokens, k).bfloat16()
        assert error(kernel.run(x, q, None), x, seen(w, torch.bfloat16, tokens), None) <= 1.0
    assert kernel_for("Q3_K", CPU, torch.bfloat16, 1) is None


def test_the_operators_tell_their_shapes_and_compile() -> None:
    n, k = 5, 256
    qdata, _ = weight("Q5_K", n, k)
    x = torch.randn(2, 3, k)
    utilities = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.quantwire.gguf_linear, (x, qdata, "Q5_K", torch.randn(n)), test_utils=utilities)
    torch.library.opcheck(torch.ops.quantwire.gguf_dequantize, (qdata, "Q5_K", torch.bfloat16), test_utils=utilities)

    def layer(x: Tensor) -> Tensor:
        return run(x, qdata, "Q5_K", n, k, None) + dequantize(qdata, "Q5_K", (n, k), x.dtype).sum(dim=1)

    compiled: Any = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
