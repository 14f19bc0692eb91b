"""Products of few tokens by ggml's own kernels, on the packed weight.

    y = x @ dequantize(q).T

ggml rounds x to 8 bits in blocks and multiplies integers, as llama.cpp does, and the weight is read once, packed. How
far that is from the dequantized product, for normal values (tests/backends/test_gguf_ggml.py):

- types with blocks of 32 (and NVFP4), whose x is rounded in blocks of 32: 0.53 %, and 1.3 % where every 64th column of
  x is 100 times as large;
- types with blocks of 256, whose x is rounded in blocks of 256: 0.72 %, and 2.9 % with such columns.

The first kind keeps the scales of x in float16, so tiny x would lose their digits and large ones become inf. Each row
of x is therefore multiplied by a power of two first, and its product divided by it, both of which are exact.

One `ggml_mul_mat` a thread, each over its share of the weight's rows with
one thread of ggml's, so that no pool of ggml's is started. Source: ggml-org/ggml, ggml.h and ggml-cpu.h.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import torch
from torch import Tensor

from ...errors import SpecError, WeightError
from ...ggml_types import PLAIN_TYPES, GgmlType
from .ggml import FLOAT_NBYTES, Ggml, address, in_threads

NODES = 16  # of a graph that holds one product
SLACK_NBYTES = 1 << 16  # tensors, graph and padding of one product (measured: 12 KiB)
# The largest of a row of x is brought to [512, 1024): below 2,048, where ggml's sum of 32 overflows float16, and so far
# above 0 that blocks whose values are a hundred thousandth keep all digits of their scale.
EXPONENT = 10
BIAS, MANTISSA_BITS = 127, 23  # of float32
OBJECT_NBYTES = 32  # ggml_object, which lies before every tensor


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


class Products:
    """`multiply` on an opened library.

    Raises:
        SpecError: the library has no CPU part, or its tensors are laid out in an unknown way.
    """

    def __init__(self, ggml: Ggml) -> None:
        if ggml.cpu_library is None:
            raise SpecError(f"ggml's products cannot be used: {ggml.cpu_reason}.")
        base, pointer = ggml.base_library, ctypes.c_void_p
        for name, result, arguments in (
            ("ggml_init", pointer, [_InitParams]),
            ("ggml_free", None, [pointer]),
            ("ggml_new_tensor_2d", pointer, [pointer, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]),
            ("ggml_mul_mat", pointer, [pointer, pointer, pointer]),
            ("ggml_new_graph_custom", pointer, [pointer, ctypes.c_size_t, ctypes.c_bool]),
            ("ggml_build_forward_expand", None, [pointer, pointer]),
            ("ggml_get_data", pointer, [pointer]),
            ("ggml_set_no_alloc", None, [pointer, ctypes.c_bool]),
            ("ggml_tensor_overhead", ctypes.c_size_t, []),
        ):
            function = getattr(base, name)
            function.restype, function.argtypes = result, arguments
        self._base = base
        self._compute = ggml.cpu_library.ggml_graph_compute_with_ctx
        self._compute.restype, self._compute.argtypes = ctypes.c_int, [pointer, pointer, ctypes.c_int]
        self._data_offset = self._find_data_offset()
        self._memory = _Memory()

    def multiply(self, kind: GgmlType, x: Tensor, qdata: Tensor, threads: int = 0) -> Tensor:
        """(M, K) float times (N, bytes a row) uint8 -> (M, N) float32, all on the CPU.

        Rows of x that are not finite give nan.

        Raises:
            WeightError: shapes, dtypes or places do not fit.
        """
        m, k = x.shape
        n, row_nbytes = qdata.shape
        if k % kind.block or row_nbytes != k // kind.block * kind.nbytes:
            raise WeightError(f"{kind.name}: rows of {k} values do not lie in {tuple(qdata.shape)} uint8.")
        if qdata.dtype is not torch.uint8 or {x.device.type, qdata.device.type} != {"cpu"}:
            raise WeightError(f"{kind.name}: ggml multiplies on the CPU, got {x.device} and {qdata.device}.")
        if not m or not n or not k:
            return torch.zeros(m, n, dtype=torch.float32, device="cpu")
        x, qdata = x.detach().to(torch.float32).resolve_neg().contiguous(), qdata.resolve_neg().contiguous()
        x, back = _scaled(x)
        parts: dict[int, Tensor] = {}

        def run(start: int, stop: int) -> None:
            parts[start] = out = torch.empty(m, stop - start, dtype=torch.float32, device="cpu")
            self._run(kind, x, address(qdata) + start * row_nbytes, out)

        in_threads(run, n, threads, least=64)
        ordered = [parts[start] for start in sorted(parts)]
        return (ordered[0] if len(ordered) == 1 else torch.cat(ordered, dim=1)).mul_(back)

    def _run(self, kind: GgmlType, x: Tensor, rows: int, out: Tensor) -> None:
        m, k = x.shape
        base, float32 = self._base, PLAIN_TYPES["F32"].number
        source, target = address(x), address(out)
        # x in 8 bits takes less than x: ggml ends the process where its memory does not suffice.
        memory, nbytes = self._memory.take(m * k * FLOAT_NBYTES + SLACK_NBYTES)
        context = base.ggml_init(_InitParams(nbytes, memory, True))
        try:
            weight = self._tensor(context, kind.number, k, out.shape[1], rows)
            product = base.ggml_mul_mat(context, weight, self._tensor(context, float32, k, m, source))
            self._point(product, target)
            graph = base.ggml_new_graph_custom(context, NODES, False)
            base.ggml_build_forward_expand(graph, product)
            base.ggml_set_no_alloc(context, False)
            status = self._compute(context, graph, 1)
        finally:
            base.ggml_free(context)
        if status != 0:
            raise WeightError(f"{kind.name}: ggml's product failed with status {status}.")

    def _tensor(self, context: int, number: int, k: int, rows: int, address: int) -> int:
        tensor = self._base.ggml_new_tensor_2d(context, number, k, rows)
        self._point(tensor, address)
        return tensor

    def _point(self, tensor: int, address: int) -> None:
        ctypes.c_void_p.from_address(tensor + self._data_offset).value = address

    def _find_data_offset(self) -> int:
        """Where `ggml_tensor.data` lies: found by its value, so that another version's layout is noticed."""
        memory = (ctypes.c_uint8 * SLACK_NBYTES)()
        context = self._base.ggml_init(_InitParams(SLACK_NBYTES, ctypes.addressof(memory), False))
        try:
            tensor = self._base.ggml_new_tensor_2d(context, PLAIN_TYPES["F32"].number, 4, 4)
            data = self._base.ggml_get_data(tensor)
            words = (self._base.ggml_tensor_overhead() - OBJECT_NBYTES) // ctypes.sizeof(ctypes.c_void_p)
            values = (ctypes.c_void_p * words).from_address(tensor)
            places = [8 * i for i in range(words) if values[i] == data]
            if len(places) != 1:
                raise SpecError(f"the layout of ggml's tensors is unknown ({len(places)} places look like the data).")
            self._point_at(tensor, places[0], data + 64)
            if self._base.ggml_get_data(tensor) != data + 64:
                raise SpecError("the layout of ggml's tensors is unknown (their data cannot be set).")
        finally:
            self._base.ggml_free(context)
        return places[0]

    @staticmethod
    def _point_at(tensor: int, offset: int, address: int) -> None:
        ctypes.c_void_p.from_address(tensor + offset).value = address


def _scaled(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x times powers of two, and (M, 1) of what takes the product back: nan for rows that are not finite.

    ggml itself would lose a nan: its largest value of a block leaves them out.
    """
    low, high = torch.aminmax(x, dim=1, keepdim=True)
    largest = torch.maximum(-low, high)
    shift = (EXPONENT - torch.frexp(largest).exponent).clamp_(1 - BIAS, BIAS - 1)
    finite = torch.isfinite(largest)
    # By their bits, since torch's powers are rounded.
    there, back = (((BIAS + s) << MANTISSA_BITS).view(torch.float32) for s in (shift, -shift))
    return x * torch.where(finite, there, 1.0), torch.where(finite, back, float("nan"))


class _Memory(threading.local):
    """Memory for ggml's work, one block a thread."""

    def __init__(self) -> None:
        self._block: Any = None

    def take(self, nbytes: int) -> tuple[int, int]:
        if self._block is None or ctypes.sizeof(self._block) < nbytes:
            self._block = (ctypes.c_uint8 * nbytes)()
        return ctypes.addressof(self._block), ctypes.sizeof(self._block)
