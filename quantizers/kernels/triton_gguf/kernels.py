# Triton has no type information, and what stands in a kernel is its own language: a subset of Python over tensors.
# pyright: basic, reportMissingImports=false
"""Triton kernels on the bytes of a GGUF file: dequantize, product with few tokens, product with many.

A weight is (N, bytes a row) uint8, row after row of blocks (`blocks.py`). A tile of (rows, groups, width) bytes is
loaded as it lies, becomes float32 in registers by the arithmetic of ggml in its order, and for tensor cores is rounded
once to the dtype of x. They are launched with `enable_fp_fusion=False`: one fused multiply-add in `d * q - m` would
give other values than ggml and gguf. Sums use `tl.fma` and `tl.dot`, which say so themselves.

Blocks of 34, 18 and 210 bytes lie on even addresses only, so scales are read as 2 bytes each and the compiler loads
bytes in pairs there; in blocks of 144, 176 and 136 bytes it loads 8 to 16 at a time.

Rows and tokens past the end read the last one again and are not stored, which is cheaper than a mask on every load.
Annotations are not postponed here: Triton reads them.
"""

import struct

import triton
import triton.language as tl

# The 16 int8 values of IQ4_NL and IQ4_XS, value i in byte i: -127 -104 -83 -65 -49 -35 -22 -10 and 1 13 25 38 53 69 89
# 113. Triton has no constant arrays, and a table in memory would be one more load for each value.
IQ4_LOW = tl.constexpr(struct.unpack("<q", struct.pack("8b", -127, -104, -83, -65, -49, -35, -22, -10))[0])
IQ4_HIGH = tl.constexpr(struct.unpack("<q", struct.pack("8b", 1, 13, 25, 38, 53, 69, 89, 113))[0])


def even(arguments):
    """Whether every step of a product has all its groups, so that nothing needs a mask along K."""
    return arguments["k"] // (arguments["W"] * arguments["PARTS"]) % arguments["G"] == 0


@triton.jit
def half_at(address):
    """float32 of the float16 at an even address."""
    return tl.load(address.to(tl.pointer_type(tl.float16))).to(tl.float32)


@triton.jit
def signed(byte):
    """float32 of a byte that holds an int8."""
    return byte.to(tl.int8, bitcast=True).to(tl.float32)


@triton.jit
def six_bit_scales(block, c):
    """Scales and minima of chunk c (of 4) of a Q4_K or Q5_K block: uint16, low half's in the low byte.

    12 bytes hold 8 scales and 8 minima of 6 bits: byte i % 4 of three words of 4. The first four of each have their
    bits in the first and second word, the others 4 in the third and 2 on top of the first and second.
    """
    words = (block + 4 + c % 2 * 2).to(tl.pointer_type(tl.uint16))
    first, second, third = tl.load(words), tl.load(words + 2), tl.load(words + 4)
    scales = tl.where(c < 2, first & 0x3F3F, (third & 0x0F0F) | ((first >> 2) & 0x3030))
    minima = tl.where(c < 2, second & 0x3F3F, ((third >> 4) & 0x0F0F) | ((second >> 2) & 0x3030))
    return scales, minima


@triton.jit
def iq4(index):
    """float32 value of an index 0 .. 15 into the IQ4 codebook."""
    words = tl.where(index < 8, IQ4_LOW, IQ4_HIGH)
    return signed(((words >> ((index & 7) * 8).to(tl.int64)) & 255).to(tl.uint8))


@triton.jit
def decode(base, g, j, TYPE: tl.constexpr, NBYTES: tl.constexpr):
    """float32 values of both parts of groups g; where a type has one part, the second is the first.

    Args:
        base: pointers to rows (R, 1, 1); here and below with any number of leading axes of size 1.
        g: groups from the start of a row (1, G, 1).
        j: 0 .. width - 1 (1, 1, W).
    Returns:
        two (R, G, W).
    """
    if TYPE == "Q8_0":
        block = base + g * NBYTES
        d = half_at(block)
        low = signed(tl.load(block + 2 + j)) * d
        high = low
    elif TYPE == "Q4_0":
        block = base + g * NBYTES
        d = half_at(block)
        q = tl.load(block + 2 + j)
        low = d * ((q & 15).to(tl.float32) - 8.0)
        high = d * ((q >> 4).to(tl.float32) - 8.0)
    elif TYPE == "Q4_K" or TYPE == "Q5_K":
        block = base + g // 4 * NBYTES
        c = g % 4
        scales, minima = six_bit_scales(block, c)
        d = half_at(block)
        dmin = half_at(block + 2)
        if TYPE == "Q4_K":
            q = tl.load(block + 16 + c * 32 + j)
            low_q = q & 15
            high_q = q >> 4
        else:
            q = tl.load(block + 48 + c * 32 + j)
            fifth = tl.load(block + 16 + j) >> (2 * c).to(tl.uint8)
            low_q = (q & 15) | ((fifth & 1) << 4)
            high_q = (q >> 4) | ((fifth & 2) << 3)
        low = d * (scales & 255).to(tl.float32) * low_q.to(tl.float32) - dmin * (minima & 255).to(tl.float32)
        high = d * (scales >> 8).to(tl.float32) * high_q.to(tl.float32) - dmin * (minima >> 8).to(tl.float32)
    elif TYPE == "Q6_K":
        block = base + g // 8 * NBYTES
        u = g % 8
        d = half_at(block + 208)
        scale = block + 192 + u // 4 * 8 + u % 4
        q = tl.load(block + u * 16 + j)
        two = tl.load(block + 128 + u // 4 * 32 + u % 2 * 16 + j) >> (u // 2 % 2 * 2).to(tl.uint8)
        low_q = (q & 15) | ((two & 3) << 4)
        high_q = (q >> 4) | (two & 0x30)
        low = d * signed(tl.load(scale)) * (low_q.to(tl.float32) - 32.0)
        high = d * signed(tl.load(scale + 4)) * (high_q.to(tl.float32) - 32.0)
    else:
        tl.static_assert(TYPE == "IQ4_XS")
        block = base + g // 8 * NBYTES
        u = g % 8
        top = tl.load((block + 2).to(tl.pointer_type(tl.uint16))) >> (2 * u).to(tl.uint16)
        bottom = tl.load(block + 4 + u // 2) >> (u % 2 * 4).to(tl.uint8)
        scale = ((bottom & 15) | ((top & 3) << 4).to(tl.uint8)).to(tl.float32) - 32.0
        d = half_at(block) * scale
        q = tl.load(block + 8 + u * 16 + j)
        low = d * iq4(q & 15)
        high = d * iq4(q >> 4)
    return low, high


@triton.jit
def column(g, j, W: tl.constexpr, PARTS: tl.constexpr, RUN: tl.constexpr):
    """k of the first part of group g; the second part's is RUN * W further."""
    return g // RUN * (RUN * W * PARTS) + g % RUN * W + j


@triton.jit
def dequantize(
    q,
    out,
    groups,
    TYPE: tl.constexpr,
    NBYTES: tl.constexpr,
    W: tl.constexpr,
    PARTS: tl.constexpr,
    RUN: tl.constexpr,
    PER: tl.constexpr,
    G: tl.constexpr,
):
    """All blocks, row after row, to the dtype of `out`. G groups a program, a multiple of the PER groups of a block."""
    start = tl.program_id(0).to(tl.int64) * G
    base = q + start // PER * NBYTES
    out += start * (W * PARTS)
    g = tl.arange(0, G)[None, :, None]
    j = tl.arange(0, W)[None, None, :]
    left = groups - start
    live = g < left
    low, high = decode(base, tl.where(live, g, 0), j, TYPE, NBYTES)
    at = out + column(g, j, W, PARTS, RUN)
    mask = tl.broadcast_to(live, (1, G, W))
    tl.store(at, low.to(out.dtype.element_ty), mask=mask)
    if PARTS == 2:
        tl.store(at + RUN * W, high.to(out.dtype.element_ty), mask=mask)


@triton.heuristics({"EVEN": even})
@triton.jit(do_not_specialize=["m"])
def few_tokens(
    x,
    q,
    bias,
    y,
    m,
    n,
    k,
    TYPE: tl.constexpr,
    SIZE: tl.constexpr,
    NBYTES: tl.constexpr,
    W: tl.constexpr,
    PARTS: tl.constexpr,
    RUN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    G: tl.constexpr,
    EVEN: tl.constexpr,
):
    """y (m, n) = x (m, k) @ W.T + bias, BM >= m: every weight is read once, and sums stay in registers until the end.

    No `tl.dot`: its smallest tile has 16 tokens, and weights would move between threads for it. All tensors have the
    same four axes (BM, BN, G, W), so that nothing moves between threads inside the loop.
    """
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    base = (q + tl.minimum(rows, n - 1).to(tl.int64) * (k // SIZE * NBYTES))[None, :, None, None]
    tokens = tl.arange(0, BM)
    x_rows = x + (tl.minimum(tokens, m - 1) * k)[:, None, None, None]
    j = tl.arange(0, W)[None, None, None, :]
    groups = k // (W * PARTS)
    total = tl.zeros((BM, BN, G, W), tl.float32)
    for first in range(0, groups, G):
        g = first + tl.arange(0, G)[None, None, :, None]
        if not EVEN:
            live = g < groups
            g = tl.minimum(g, groups - 1)
        low, high = decode(base, g, j, TYPE, NBYTES)
        x_at = x_rows + column(g, j, W, PARTS, RUN)
        x_low = tl.load(x_at).to(tl.float32)
        if not EVEN:
            low = tl.where(live, low, 0.0)
            high = tl.where(live, high, 0.0)
            x_low = tl.where(live, x_low, 0.0)
        total = tl.fma(tl.broadcast_to(x_low, (BM, BN, G, W)), tl.broadcast_to(low, (BM, BN, G, W)), total)
        if PARTS == 2:
            x_high = tl.load(x_at + RUN * W).to(tl.float32)
            if not EVEN:
                x_high = tl.where(live, x_high, 0.0)
            total = tl.fma(tl.broadcast_to(x_high, (BM, BN, G, W)), tl.broadcast_to(high, (BM, BN, G, W)), total)
    out = tl.sum(tl.sum(total, axis=3), axis=2)
    if HAS_BIAS:
        out += tl.load(bias + tl.minimum(rows, n - 1)).to(tl.float32)[None, :]
    mask = (tokens < m)[:, None] & (rows < n)[None, :]
    tl.store(y + tokens[:, None].to(tl.int64) * n + rows[None, :], out.to(y.dtype.element_ty), mask=mask)


@triton.jit
def multiply(left, right, total, UPCAST: tl.constexpr):
    """total + left @ right. UPCAST is for Triton's interpreter, which multiplies the bits of bfloat16 as integers."""
    if UPCAST:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.heuristics({"EVEN": even})
@triton.jit(do_not_specialize=["m"])
def matmul(
    x,
    q,
    bias,
    y,
    m,
    n,
    k,
    TYPE: tl.constexpr,
    SIZE: tl.constexpr,
    NBYTES: tl.constexpr,
    W: tl.constexpr,
    PARTS: tl.constexpr,
    RUN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    G: tl.constexpr,
    EVEN: tl.constexpr,
):
    """y (m, n) = x (m, k) @ W.T + bias in tiles of BM tokens, BN rows and G groups, sums in float32.

    The product is made transposed, weights @ tokens: the left operand may stay in registers on Hopper, and the tensor
    cores' larger side lies along N, so that 16 tokens need no padding to 64. Low and high halves are two products,
    which spares weaving them together: a sum does not mind the order.
    """
    pids = tl.cdiv(m, BM)
    pid = tl.program_id(0)
    # Programs of the same rows of weights run side by side and share them through the cache.
    rows = pid // pids * BN + tl.arange(0, BN)
    tokens = pid % pids * BM + tl.arange(0, BM)
    base = (q + tl.minimum(rows, n - 1).to(tl.int64) * (k // SIZE * NBYTES))[:, None, None]
    x_rows = x + tl.minimum(tokens, m - 1).to(tl.int64)[None, :] * k
    j = tl.arange(0, W)[None, None, :]
    flat = tl.arange(0, G * W)
    groups = k // (W * PARTS)
    total = tl.zeros((BN, BM), tl.float32)
    for first in range(0, groups, G):
        g = first + tl.arange(0, G)[None, :, None]
        x_g = first + flat // W
        if not EVEN:
            live = g < groups
            g = tl.minimum(g, groups - 1)
            x_live = (x_g < groups)[:, None]
            x_g = tl.minimum(x_g, groups - 1)
        low, high = decode(base, g, j, TYPE, NBYTES)
        x_at = x_rows + column(x_g, flat % W, W, PARTS, RUN)[:, None]
        if not EVEN:
            low = tl.where(live, low, 0.0)
            high = tl.where(live, high, 0.0)
        x_low = tl.load(x_at) if EVEN else tl.load(x_at, mask=x_live, other=0.0)
        total = multiply(low.to(x_low.dtype).reshape(BN, G * W), x_low, total, UPCAST)
        if PARTS == 2:
            x_high = tl.load(x_at + RUN * W) if EVEN else tl.load(x_at + RUN * W, mask=x_live, other=0.0)
            total = multiply(high.to(x_high.dtype).reshape(BN, G * W), x_high, total, UPCAST)
    if HAS_BIAS:
        total += tl.load(bias + tl.minimum(rows, n - 1)).to(tl.float32)[:, None]
    at = y + tokens[:, None].to(tl.int64) * n + rows[None, :]
    tl.store(at, tl.trans(total).to(y.dtype.element_ty), mask=(tokens < m)[:, None] & (rows < n)[None, :])
