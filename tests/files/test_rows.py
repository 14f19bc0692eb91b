"""Taking and joining rows of quantized weights: the same numbers, bit for bit, in every format."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from quantwire.quantizers.errors import WeightError
from quantwire.quantizers.files.rows import cat_rows, take_rows
from quantwire.quantizers.registry import format_ids, get_quantizer, require, require_reader
from quantwire.quantizers.spec import QuantSpec
from quantwire.quantizers.weight import QuantizedWeight, TensorMeta
from torch import Tensor

N, K = 48, 512
WITH_OPTIONS = [
    "bnb-nf4;bits4-use-double-quant=true",
    "bnb-fp4;bits4-use-double-quant=true;bits4-quant-storage=float32",
    "bnb-nf4;bits4-block-size=128;bits4-quant-storage=bfloat16",
    "comfy;type=int8;scale=tensor",
    "sdnq-int8;group-size=64",
    "sdnq-int8;quantized-matmul=true",
    "sdnq-uint8;quantized-matmul=true",
    "sdnq-float8-e4m3fn;quantized-matmul=true",
    "sdnq-int6;quantized-matmul=true",
    "sdnq-uint4;use-hadamard=true",
    "sdnq;type=uint7",
    "sdnq;type=int12",
    "torchao-int8wo;group-size=128",
    "torchao-float8wo;group-size=128",
    "nncf-int4-asym;group-size=-1",
    "quanto-qint4;group-size=32",
]
SVD = ["sdnq-int8;use-svd=true;svd-rank=8", "sdnq-uint4;use-svd=true;svd-rank=8;quantized-matmul=true"]
# Format -> why three weights with different scales cannot become one; a new refusal must be written down here.
NOT_JOINED = {"comfy-nvfp4": "one scale for the whole weight"}
JOINED_AS = {
    "comfy-fp8-e4m3fn": "quanto-qfloat8-e4m3fn",
    "comfy-fp8-e5m2": "quanto-qfloat8-e5m2",
}


def weight(seed: int, n: int = N, k: int = K) -> Tensor:
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    return w * (1 + seed)  # another scale for each


def made(uri: str, seed: int = 0, n: int = N, k: int = K) -> QuantizedWeight:
    spec = QuantSpec.from_uri(uri)
    if uri.startswith("gguf-iq"):  # ggml takes seconds to make its tables for these; any small bytes are valid blocks
        nbytes = require_reader(uri).predict_nbytes(spec, TensorMeta("", (n, k), torch.float32))
        blocks = torch.randint(0, 100, (n, nbytes // n), generator=torch.Generator().manual_seed(seed))
        return QuantizedWeight(uri, {"qdata": blocks.to(torch.uint8)}, (n, k), torch.float32)
    return require(spec.format_id).quantize(weight(seed, n, k), spec)


def values(q: QuantizedWeight) -> Tensor:
    return get_quantizer(q.format_id).dequantize(q, torch.float32)


def product(q: QuantizedWeight) -> Tensor:
    x = torch.randn(3, q.orig_shape[1], generator=torch.Generator().manual_seed(9))
    return get_quantizer(q.format_id).linear(x, q, None)


def orders(n: int) -> Iterator[slice | Tensor]:
    yield slice(5, 18)
    yield slice(16, 48)
    yield torch.randperm(n, generator=torch.Generator().manual_seed(1))
    yield torch.tensor([7, 7, 0, n - 1])


@pytest.mark.parametrize("uri", format_ids(writable=False) + WITH_OPTIONS)
def test_taken_rows_hold_the_same_numbers(uri: str) -> None:
    q = made(uri)
    whole, odd_zero_points = values(q), uri == "nncf-int4-asym;group-size=-1"
    for rows in orders(N):
        if odd_zero_points and isinstance(rows, slice) and (rows.stop - rows.start) % 2:
            with pytest.raises(WeightError, match="13 rows have an odd number of zero points"):
                take_rows(q, rows)
            continue
        taken = take_rows(q, rows)
        assert taken.format_id == q.format_id
        assert taken.orig_shape == (len(whole[rows]), K)
        assert torch.equal(values(taken), whole[rows]), rows
        assert torch.isfinite(product(taken)).all()
    assert take_rows(q, slice(None)) is q


@pytest.mark.parametrize("uri", format_ids(writable=False) + WITH_OPTIONS)
def test_joined_weights_hold_the_same_numbers(uri: str) -> None:
    parts = [made(uri, seed) for seed in range(3)]
    reason = NOT_JOINED.get(uri)
    if reason is not None:
        with pytest.raises(WeightError, match=reason):
            cat_rows(parts)
        parts = [take_rows(parts[0], slice(a, b)) for a, b in ((0, 10), (20, 33), (40, 48))]
    joined = cat_rows(parts)
    assert joined.format_id == (JOINED_AS.get(uri) or parts[0].format_id)
    assert joined.orig_shape == (sum(p.orig_shape[0] for p in parts), K)
    assert torch.equal(values(joined), torch.cat([values(p) for p in parts]))
    assert joined.nbytes < joined.numel * 4 * 0.8
    # What was joined can be cut apart again.
    assert torch.equal(values(take_rows(joined, slice(0, 10))), values(parts[0])[:10])


@pytest.mark.parametrize("uri", SVD)
def test_low_rank_factors_move_with_their_rows(uri: str) -> None:
    """Sums of another length may be rounded in another order, so the last bits are let off."""
    parts = [made(uri, seed) for seed in range(3)]
    whole = values(parts[0])
    for rows in orders(N):
        torch.testing.assert_close(values(take_rows(parts[0], rows)), whole[rows], rtol=1e-5, atol=1e-5)
    joined = cat_rows(parts)
    torch.testing.assert_close(values(joined), torch.cat([values(p) for p in parts]), rtol=1e-5, atol=1e-5)


ODD = [  # (uri, N, K, rows that must work)
    ("comfy-nvfp4", 5, 40, slice(1, 4)),
    ("comfy-nvfp4", 200, 72, slice(120, 200)),  # across tiles of 128 rows
    ("comfy-mxfp8", 130, 33, slice(100, 129)),
    ("comfy-mxfp8", 1, 64, slice(0, 1)),
    ("quanto-qint4", 5, 96, slice(1, 4)),
    ("quanto-qint2", 7, 160, slice(3, 4)),
    ("bnb-int8", 5, 33, slice(1, 4)),
    ("bnb-nf4;bits4-quant-storage=float32", 4, 64, slice(1, 2)),
    ("sdnq;type=uint3", 48, 36, slice(16, 48)),  # words of 8 values run across the rows
    ("sdnq-float4-e2m1fn", 6, 35, slice(2, 6)),
    ("sdnq-int8;quantized-matmul=true", 64, 64, slice(0, 13)),  # too few rows for sdnq's product: stored as usual
    ("sdnq-int8;quantized-matmul=true", 64, 64, slice(0, 48)),
]


@pytest.mark.parametrize(("uri", "n", "k", "rows"), ODD, ids=[f"{u}-{n}x{k}" for u, n, k, _ in ODD])
def test_odd_shapes(uri: str, n: int, k: int, rows: slice) -> None:
    q = made(uri, n=n, k=k)
    whole = values(q)
    assert torch.equal(values(take_rows(q, rows)), whole[rows])
    turned = torch.arange(n - 1, -1, -1)
    assert torch.equal(values(take_rows(q, turned)), whole[turned])
    assert torch.equal(values(cat_rows([q, take_rows(q, turned)])), torch.cat([whole, whole[turned]]))


def test_a_prepared_sdnq_weight_stays_prepared_where_its_product_allows_it() -> None:
    q = made("sdnq-int8;quantized-matmul=true", n=64, k=64)
    kept, plain = take_rows(q, slice(0, 48)), take_rows(q, slice(0, 13))
    assert kept.meta["use_quantized_matmul"]
    assert tuple(kept.tensors["qdata"].shape) == (64, 48)
    assert kept.tensors["qdata"].is_contiguous() == q.tensors["qdata"].is_contiguous()
    assert not plain.meta["use_quantized_matmul"]
    assert tuple(plain.tensors["qdata"].shape) == (13, 64)
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(9))
    theirs = get_quantizer(q.format_id).linear(x, q, None)[:, :48]
    assert torch.equal(get_quantizer(q.format_id).linear(x, kept, None), theirs)


REFUSED = [
    ("bnb-nf4", 4, 96, slice(1, 2), "K=96 is not a multiple of its block of 64, so blocks run across rows"),
    ("sdnq;type=uint3", 48, 36, slice(0, 13), "13 rows of 36 values are no multiple of the 8"),
    ("sdnq-uint4", 4, 33, slice(0, 1), "1 rows of 33 values are no multiple of the 2"),
]


@pytest.mark.parametrize(("uri", "n", "k", "rows", "reason"), REFUSED, ids=[c[0] for c in REFUSED])
def test_rows_that_are_not_apart_are_refused(uri: str, n: int, k: int, rows: slice, reason: str) -> None:
    with pytest.raises(WeightError, match=f"cannot be cut or joined by rows: {reason}.*\\.\nUse a file"):
        take_rows(made(uri, n=n, k=k), rows)


def test_blocks_across_rows_are_refused() -> None:
    q = QuantizedWeight("gguf-q8-0", {"qdata": torch.zeros(2, 17, dtype=torch.uint8)}, (2, 16), torch.float32)
    with pytest.raises(WeightError, match="blocks of 32 values run across its rows"):
        take_rows(q, slice(0, 1))


@pytest.mark.parametrize("rows", [torch.tensor([-1]), torch.tensor([N]), torch.tensor([[0]])])
def test_indices_outside_are_refused(rows: Tensor) -> None:
    with pytest.raises(WeightError, match=f"numbers from 0 to {N - 1}"):
        take_rows(made("quanto-qint8"), rows)


def test_what_is_not_one_weight_is_refused() -> None:
    with pytest.raises(WeightError, match="several formats cannot be one weight: bnb-int8, quanto-qint8"):
        cat_rows([made("quanto-qint8"), made("bnb-int8")])
    with pytest.raises(WeightError, match=r"different row lengths .*\(48, 512\), \(48, 256\)"):
        cat_rows([made("quanto-qint8"), made("quanto-qint8", k=256)])
    with pytest.raises(WeightError, match="different settings: block_size None and 128"):
        cat_rows([made("bnb-nf4"), made("bnb-nf4;bits4-block-size=128")])
    half = made("quanto-qint8")
    half = half.with_tensors({**half.tensors, "scale": half.tensors["scale"].half()})
    with pytest.raises(WeightError, match="'scale' of the parts differ in dtype or groups: float32"):
        cat_rows([made("quanto-qint8"), half])
    other = made("comfy-w4a8")
    tables = {**other.tensors, "codebook": other.tensors["codebook"] * 2}
    with pytest.raises(WeightError, match="the codebook of the parts differs"):
        cat_rows([other, other.with_tensors(tables)])


def test_slices_of_plain_layouts_share_memory() -> None:
    q = made("quanto-qint8")
    assert take_rows(q, slice(8, 16)).tensors["qdata"].data_ptr() == q.tensors["qdata"][8:].data_ptr()


def test_equal_scales_of_whole_weights_stay_one() -> None:
    q = made("comfy-fp8-e4m3fn")
    joined = cat_rows([take_rows(q, slice(0, 20)), take_rows(q, slice(20, N))])
    assert joined.format_id == "comfy-fp8-e4m3fn"
    assert joined.tensors["scale"].numel() == 1
    assert torch.equal(joined.tensors["qdata"].view(torch.uint8), q.tensors["qdata"].view(torch.uint8))
