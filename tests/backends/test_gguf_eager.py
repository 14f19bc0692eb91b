"""GGUF blocks dequantized with torch operations, held to gguf's numpy bit by bit, in every type."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from quantwire.quantizers.backends.gguf import eager
from quantwire.quantizers.errors import FileError, SpecError
from quantwire.quantizers.ggml_types import TYPES
from quantwire.quantizers.kernels.expand import expand, linear
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

gguf: Any = pytest.importorskip("gguf")

# Where the float16 scales of a block lie. IQ1_M has one in four pieces; MXFP4 and NVFP4 have other numbers.
FLOAT16_AT = {
    **{name: [0] for name in TYPES if name not in ("IQ1_M", "MXFP4", "NVFP4")},
    **{name: [0, 2] for name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K")},
    **{"Q2_K": [80, 82], "Q3_K": [108], "Q6_K": [208], "TQ1_0": [52], "TQ2_0": [64]},
}
# The least and the largest of either sign, both zeros, and what real weights have.
SCALES = np.array([0.0, -0.0, 6e-8, -6e-8, 65504.0, -65504.0, 0.0123, -0.0123, 1.0, -3.7], np.float16).view(np.uint8)
NAMES = list(TYPES)


def random_blocks(name: str, n: int, seed: int = 0) -> Tensor:
    """(n, bytes a block) uint8: random bytes, all zeros and all ones in between, and finite scales of every kind."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (n, TYPES[name].nbytes), dtype=np.uint8)
    blocks[3::7] = 0
    blocks[5::7] = 255
    scales = SCALES.reshape(-1, 2)
    for at in FLOAT16_AT.get(name, []):
        blocks[:, at : at + 2] = scales[rng.integers(0, len(scales), n)]
    if name == "IQ1_M":
        pieces = scales[rng.integers(0, len(scales), n)].view(np.uint16)[:, 0]
        for i in range(4):
            nibble = (pieces >> (4 * i) & 15).astype(np.uint8)
            blocks[:, 49 + 2 * i] = blocks[:, 49 + 2 * i] & 15 | nibble << 4
    return torch.from_numpy(blocks)


def reference(name: str, blocks: Tensor) -> Tensor:
    with np.errstate(all="ignore"):
        return torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[name]))


def same_bits(got: Tensor, expected: Tensor) -> bool:
    """Signs of zeros included; one nan is as good as another."""
    assert got.dtype is expected.dtype
    assert got.shape == expected.shape
    bits = torch.int32 if got.dtype is torch.float32 else torch.int16
    return bool(((got.view(bits) == expected.view(bits)) | (got.isnan() & expected.isnan())).all())


def test_every_block_type_is_here() -> None:
    assert set(eager.BLOCKS) == set(TYPES)
    assert set(FLOAT16_AT) == set(TYPES) - {"IQ1_M", "MXFP4", "NVFP4"}


@pytest.mark.parametrize("n", [1, 3, 701])
@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_bit_equal(name: str, n: int) -> None:
    blocks = random_blocks(name, n, seed=n)
    before = blocks.clone()
    expected = reference(name, blocks)
    assert same_bits(eager.BLOCKS[name](blocks), expected)
    assert torch.equal(blocks, before)
    if name not in ("MXFP4", "NVFP4"):
        assert expected.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_the_comparison_can_fail(name: str) -> None:
    """Every byte counts: another value in it changes blocks, in the same way as for gguf."""
    t = TYPES[name]
    blocks = random_blocks(name, 24)[8:]
    whole = reference(name, blocks)
    for at in range(t.nbytes):
        changed = blocks.clone()
        changed[:, at] ^= 0x55
        got = eager.BLOCKS[name](changed)
        assert same_bits(got, reference(name, changed))
        assert not same_bits(got, whole), f"byte {at} changes nothing"
    assert not same_bits(eager.BLOCKS[name](blocks.roll(1, 0)), whole)


@pytest.mark.parametrize("name", NAMES)
def test_no_rows(name: str) -> None:
    t = TYPES[name]
    assert eager.BLOCKS[name](torch.empty(0, t.nbytes, dtype=torch.uint8)).shape == (0, t.block)
    whole = eager.dequantize(name, torch.empty(0, t.nbytes, dtype=torch.uint8), (0, t.block), torch.bfloat16)
    assert whole.shape == (0, t.block)


@pytest.mark.parametrize("name", NAMES)
def test_scales_that_are_not_finite(name: str) -> None:
    """Random bytes, so inf and nan among the scales: as gguf has them, which the layers above then find."""
    blocks = torch.randint(0, 256, (500, TYPES[name].nbytes), dtype=torch.uint8)
    assert same_bits(eager.BLOCKS[name](blocks), reference(name, blocks))


@pytest.mark.parametrize("name", ["MXFP4", "NVFP4"])
def test_every_byte_as_a_float_scale(name: str) -> None:
    blocks = random_blocks(name, 256)
    for at in range(4 if name == "NVFP4" else 1):
        blocks[:, at] = torch.arange(256).roll(at).to(torch.uint8)
    got = eager.BLOCKS[name](blocks)
    assert same_bits(got, reference(name, blocks))
    assert int(got.isinf().any(dim=1).sum()) == (0 if name == "NVFP4" else 2)  # 12 * 2**126 and 12 * 2**127


@pytest.mark.parametrize("name", NAMES)
def test_bytes_at_an_odd_place_in_memory(name: str) -> None:
    blocks = random_blocks(name, 5)
    buffer = torch.zeros(blocks.numel() + 1, dtype=torch.uint8)
    shifted = buffer[1:].view(blocks.shape).copy_(blocks)
    assert shifted.storage_offset() == 1
    assert same_bits(eager.BLOCKS[name](shifted), reference(name, blocks))
    # One block alone is contiguous wherever it is cut, and must not be reinterpreted in place.
    assert same_bits(eager.BLOCKS[name](shifted[1:2]), reference(name, blocks[1:2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_weights_of_five_axes_rounded_once(name: str, dtype: torch.dtype) -> None:
    shape = (3, 1, 2, 5, 3 * TYPES[name].block)
    blocks = random_blocks(name, 90, seed=1)
    got = eager.dequantize(name, blocks.view(30, -1), shape, dtype)
    assert same_bits(got, reference(name, blocks).view(shape).to(dtype))


@pytest.mark.parametrize("device_type", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("name", NAMES)
def test_what_each_device_runs(name: str, device_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operations of other devices, run on the CPU, in parts of 7 blocks: order, conversions and cuts are theirs."""
    monkeypatch.setattr(eager, "PART_NUMEL", 7 * TYPES[name].block)
    blocks = random_blocks(name, 30)
    for dtype in (torch.float32, torch.bfloat16):
        if device_type == "cpu" and dtype is not torch.float32:
            continue
        out = torch.full((30, TYPES[name].block), torch.nan, dtype=dtype)
        eager.fill(eager.PARTS[name], blocks, out, device_type)
        assert same_bits(out, reference(name, blocks).to(dtype))


class _Seen(TorchDispatchMode):
    """The operators that run, with the dtypes and the largest size of their operands and results."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, torch.dtype]] = set()
        self.largest: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in (*args, *(kwargs or {}).values(), out):
            for t in x if isinstance(x, list | tuple) else (x,):
                if isinstance(t, Tensor):
                    self.seen.add((func.overloadpacket.__name__, t.dtype))
                    self.largest[t.dtype] = max(self.largest.get(t.dtype, 0), t.numel())
        return out


PORTABLE = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.float16, torch.float32, torch.bool}


@pytest.mark.parametrize("name", NAMES)
def test_only_what_cuda_and_mps_can_do(name: str) -> None:
    blocks, out = random_blocks(name, 9), torch.empty(9, TYPES[name].block)
    eager.BLOCKS[name](blocks)  # tables are made on the CPU, before
    with _Seen() as mode:
        for device_type in ("cpu", "cuda", "mps"):
            eager.fill(eager.PARTS[name], blocks, out, device_type)
    wide = {op for op, dtype in mode.seen if dtype is torch.int64}
    assert wide <= {"index_select", "view"}, "eight int8 are looked up as one int64, and nothing is computed in it"
    assert {dtype for _, dtype in mode.seen} <= PORTABLE | {torch.int64}
    assert not {op for op, _ in mode.seen} & {"_local_scalar_dense", "item", "nonzero", "lift_fresh", "_to_cpu"}


@pytest.mark.parametrize("name", NAMES)
def test_memory_on_cuda(name: str) -> None:
    """Beside the result at most scales in float32, codes of one byte (TQ1_0: two), and four bytes for an index."""
    n = 65536  # more than any table
    blocks, out = random_blocks(name, n // TYPES[name].block), torch.empty(n, dtype=torch.bfloat16)
    eager.BLOCKS[name](blocks)
    with _Seen() as mode:
        eager.fill(eager.PARTS[name], blocks, out.view(len(blocks), -1), "cuda")
    assert same_bits(out, reference(name, blocks).view(n).bfloat16())
    allowed = {torch.float32: n // 16, torch.int16: n if name == "TQ1_0" else n // 2, torch.int32: n // 2}
    allowed[torch.int64] = n // 8
    for dtype, numel in allowed.items():
        assert mode.largest.get(dtype, 0) <= numel, dtype


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "IQ3_S", "Q5_0"])
def test_rows_of_a_weight(name: str) -> None:
    k = 2 * TYPES[name].block
    blocks = random_blocks(name, 26)
    source = eager.expansion(name, blocks.view(13, -1), (13, k))
    whole = reference(name, blocks).view(13, k)
    assert same_bits(expand(source, torch.empty(4, k), 5), whole[5:9])


def test_product() -> None:
    blocks = random_blocks("Q4_K", 22)
    blocks[:, :4] = torch.tensor([0x12, 0x2A, 0x34, 0x2B], dtype=torch.uint8)
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(0))
    got = linear(x, eager.expansion("Q4_K", blocks.view(11, -1), (11, 512)), None)
    assert torch.equal(got, torch.nn.functional.linear(x, reference("Q4_K", blocks).view(11, 512)))


# 6-bit scales, and grids with signs: together every helper that the compiler must trace or treat as an operator.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["Q4_K", "IQ2_XXS"])
def test_compiled(name: str) -> None:
    k = 2 * TYPES[name].block
    torch._dynamo.reset()

    def two_layers(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return (
            eager.dequantize(name, a, (a.shape[0], k), torch.float32),
            eager.dequantize(name, b, (b.shape[0], k), torch.float32),
        )

    weights = [random_blocks(name, 2 * n, seed=n).view(n, -1) for n in (5, 6)]
    got = torch.compile(two_layers, fullgraph=True)(*weights)
    for result, bits in zip(got, weights, strict=True):
        assert same_bits(result, reference(name, bits.view(-1, TYPES[name].nbytes)).view(-1, k))


def test_refusals() -> None:
    bits = torch.zeros(2, 144, dtype=torch.uint8)
    with pytest.raises(SpecError, match=r"'Q4_KK' is not a block type of GGUF. Did you mean Q4_K"):
        eager.dequantize("Q4_KK", bits, (2, 256), torch.float32)
    with pytest.raises(SpecError, match="Q4_K: K=128 is not a multiple of block size 256"):
        eager.dequantize("Q4_K", bits, (4, 128), torch.float32)
    with pytest.raises(FileError, match=r"a weight of shape \(3, 256\) has 432 bytes, got 288 values of torch.uint8"):
        eager.dequantize("Q4_K", bits, (3, 256), torch.float32)
