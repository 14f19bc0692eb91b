"""ggml's C library (PyPI libggml-python, MIT), called through ctypes: quantize, dequantize, and products of few tokens.

ggml ends the whole process on a shape that it does not like, and IQ types on nan and on very large numbers, so every
function here checks shapes, dtypes, places and values before it calls. Work is cut into ranges of rows for threads of
our own: ctypes gives the interpreter lock free during a call, results are the same bytes with any number of threads,
and ggml's own thread pool, whose threads spin while they wait, is never started.

`libggml-base` quantizes and dequantizes and runs on every CPU. `libggml-cpu` has the products; on x86-64 it is built
for AVX2, F16C and FMA, so it is opened only where torch found AVX2 too. Every address that goes to C is `address`'s,
because a wrong one ends the process as well. Source: ggml-org/ggml, ggml.h and ggml-cpu.h.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
import itertools
import os
import platform
import re
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import SpecError, WeightError
from ...ggml_types import TYPES, GgmlType
from ...kernels.expand import BLOCK_NUMEL

PACKAGE = "libggml-python"
MINIMUM = (0, 20)
# Larger weights are no weights: most types' float16 scales end before, and the IQ types end the process (from 1e15 on).
LARGEST = 1e9
# NVFP4 in GGUF has float8 scales up to 448, values up to 6, and no scale of the whole tensor: larger ones are cut off.
LARGEST_OF = {"NVFP4": 448.0 * 6.0}
# An importance matrix counts by its ratios; ggml's sums overflow near the end of float32 (seen at 1e38).
LARGEST_IMPORTANCE = 1e15
TILE_NUMEL = 294_912  # float32 values that a thread has at a time, 1.2 MB: measured; a call costs 2 us
FLOAT_NBYTES = 4

_ROW = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class _Traits(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("interleave", ctypes.c_int64),
        ("nbytes", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p),
    ]


class Ggml:
    """The opened library. Use `library()`.

    Attributes:
        version: of the PyPI package.
        base_library, cpu_library: as opened; the second is None where it cannot be used.
        cpu_reason: why not, else "".
    """

    def __init__(self) -> None:
        self.version = _version()
        base = _open("ggml-base")
        base.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
        base.ggml_quantize_chunk.restype = ctypes.c_size_t
        base.ggml_quantize_chunk.argtypes = [
            *(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p),
            *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p),
        ]
        self.base_library = base
        self._rows_of: dict[str, Any] = {}
        for name, t in TYPES.items():
            traits = base.ggml_get_type_traits(t.number).contents
            if (traits.block, traits.nbytes) != (t.block, t.nbytes) or not traits.to_float:
                raise SpecError(f"{PACKAGE} {self.version} has another layout of {name} than GGUF files.")
            self._rows_of[name] = _ROW(traits.to_float)
        self.cpu_library, self.cpu_reason = cpu, _ = _open_cpu(base)
        if cpu is not None:
            cpu.ggml_cpu_init()
        converters = ("ggml_fp32_to_bf16_row", "ggml_fp32_to_fp16_row")
        converters = converters if cpu is None else ("ggml_cpu_fp32_to_bf16", "ggml_cpu_fp32_to_fp16")
        self._from_float = {
            dtype: _row_function(cpu or base, name)
            for dtype, name in zip((torch.bfloat16, torch.float16), converters, strict=True)
        }

    def quantize(
        self,
        kind: GgmlType,
        values: Tensor,
        importance: Tensor | None = None,
        threads: int = 0,
        largest: float | None = None,
    ) -> Tensor:
        """Quantize rows.

        Args:
            values: (N, K) float32 on the CPU, contiguous.
            importance: (K,) float32, not negative: the weight of a column's error. Without one, types that need it get
                the same for all columns.
            threads: 0 is as many as torch uses.
            largest: no value's magnitude is larger, and none is nan: the caller has looked. None is not known.
        Returns:
            (N, bytes a row) uint8.
        Raises:
            WeightError: nan, inf or values beyond the range of every type; an importance that is not finite, negative
                or of another length.
        """
        if values.ndim != 2 or values.dtype is not torch.float32 or values.device.type != "cpu":
            raise WeightError(f"ggml takes (N, K) float32 values on the CPU, got {tuple(values.shape)} {values.dtype}.")
        n, k = values.shape
        if k % kind.block:
            raise WeightError(f"K={k} is not a multiple of {kind.name}'s block size {kind.block}.")
        values = values.resolve_neg().contiguous()
        out = torch.empty(n, k // kind.block * kind.nbytes, dtype=torch.uint8, device="cpu")
        if not values.numel():
            return out
        address(values)  # before anything reads them
        check_range(kind, values, largest)
        weights = _checked_importance(importance, k, kind)
        self.base_library.ggml_quantize_init(kind.number)  # tables are made once; not from several threads at a time

        def run(start: int, stop: int) -> None:  # holds the tensors as long as a thread is in it
            source, target = address(values), address(out)
            matrix = None if weights is None else address(weights)
            self.base_library.ggml_quantize_chunk(kind.number, source, target, start * k, stop - start, k, matrix)

        in_threads(run, n, threads)
        return out

    def dequantize(self, kind: GgmlType, qdata: Tensor, out: Tensor, start: int = 0, threads: int = 0) -> Tensor:
        """Write rows [start, start + len(out)) of `qdata` into `out`.

        Float32 values rounded once to the dtype of `out`, a tile at a time.

        Args:
            qdata: (N, bytes a row) uint8 on the CPU; rows contiguous.
            out: (rows, K) of any float dtype on the CPU, contiguous.
        Raises:
            WeightError: shapes, dtypes or places do not fit.
        """
        rows, k = out.shape
        row_nbytes = k // kind.block * kind.nbytes
        fault = (
            k % kind.block
            or qdata.shape != (qdata.shape[0], row_nbytes)
            or not 0 <= start <= start + rows <= qdata.shape[0]
            or qdata.dtype is not torch.uint8
            or not qdata.is_contiguous()
            or not out.is_contiguous()
            or not out.is_floating_point()
            or {qdata.device.type, out.device.type} != {"cpu"}
        )
        if fault:
            raise WeightError(
                f"{kind.name}: rows {start} to {start + rows} of {k} values do not lie in {tuple(qdata.shape)} "
                f"{qdata.dtype} (a row has {row_nbytes} bytes), or cannot be {out.dtype}."
            )
        if not out.numel():
            return out
        to_float = self._rows_of[kind.name]
        if out.dtype is not torch.float32 and out.dtype not in self._from_float:
            return self._dequantize_tiles(kind, qdata, out, start, threads)
        if out.dtype is torch.float32:

            def run(first: int, last: int) -> None:
                source = address(qdata) + (start + first) * row_nbytes
                to_float(source, address(out) + first * k * FLOAT_NBYTES, (last - first) * k)

        else:
            convert = self._from_float[out.dtype]
            step = max(1, TILE_NUMEL // k)

            def run(first: int, last: int) -> None:
                tile, source, target = _tile(step * k), address(qdata), address(out)
                for row in range(first, last, step):
                    numel = (min(row + step, last) - row) * k
                    to_float(source + (start + row) * row_nbytes, tile, numel)
                    convert(tile, target + row * k * out.element_size(), numel)

        in_threads(run, rows, threads, TILE_NUMEL // k)
        return out

    def _dequantize_tiles(self, kind: GgmlType, qdata: Tensor, out: Tensor, start: int, threads: int) -> Tensor:
        """Into dtypes that ggml does not write."""
        rows, k = out.shape
        tile = torch.empty(min(rows, max(1, BLOCK_NUMEL // k)), k, dtype=torch.float32, device="cpu")
        for row in range(0, rows, len(tile)):
            part = out[row : row + len(tile)]
            part.copy_(self.dequantize(kind, qdata, tile[: len(part)], start + row, threads))
        return out


@functools.cache
def library() -> Ggml:
    """Open the library, once.

    Raises:
        ImportError: libggml-python is not installed, or holds no library for this system.
        SpecError: its types are laid out otherwise.
    """
    return Ggml()


def address(t: Tensor) -> int:
    """Of the first value, for C to read or write.

    Raises:
        WeightError: the tensor has no memory of its own (it is fake, batched, a subclass or on another device), or its
            values are not what lies there in a row.
    """
    plain = is_plain(t) and t.device.type == "cpu" and t.is_contiguous() and not (t.is_neg() or t.is_conj())
    try:
        found = t.data_ptr() if plain else 0
    except RuntimeError:  # torch.func's tensors have none
        found = 0
    if not found:
        raise WeightError(
            f"ggml reads and writes plain, contiguous tensors on the CPU, got {type(t).__name__} {tuple(t.shape)} "
            f"{t.dtype} on {t.device} with strides {t.stride()}."
        )
    return found


def is_plain(*tensors: Tensor | None) -> bool:
    """No subclasses, which may have no memory (FakeTensor) or a meaning of their own."""
    return all(t is None or type(t) in (Tensor, torch.nn.Parameter) for t in tensors)


def check_range(kind: GgmlType, values: Tensor, largest: float | None = None) -> None:
    """Refuse what the type cannot hold.

    Args:
        values: not empty.
        largest: as in `Ggml.quantize`.
    Raises:
        WeightError: nan, or values beyond its range.
    """
    limit = LARGEST_OF.get(kind.name, LARGEST)
    if largest is not None and largest <= limit:
        return
    low, high = (float(v) for v in torch.aminmax(values))
    # Written so that nan is refused too.
    if not (low >= -limit and high <= limit):
        raise WeightError(f"values from {low:.3g} to {high:.3g} exceed what {kind.name} can hold.")


def _version() -> str:
    try:
        version = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"{PACKAGE} is not installed") from None
    if tuple(map(int, re.findall(r"\d+", version)[: len(MINIMUM)])) < MINIMUM:
        raise ImportError(f"{PACKAGE} {version} is too old; {'.'.join(map(str, MINIMUM))} or newer is needed")
    return version


def _open(name: str) -> ctypes.CDLL:
    found = importlib.util.find_spec("libggml")
    if found is None or not found.submodule_search_locations:
        raise ImportError(f"{PACKAGE} is not installed")
    root = Path(next(iter(found.submodule_search_locations)))
    for pattern in (f"lib*/lib{name}.so", f"lib*/lib{name}.dylib", f"bin/{name}.dll", f"bin/lib{name}.dll"):
        path = next(iter(sorted(root.glob(pattern))), None)
        if path is not None:
            return ctypes.CDLL(str(path))
    raise ImportError(f"{PACKAGE} has no {name} for {platform.system()} {platform.machine()}")


def _open_cpu(base: ctypes.CDLL) -> tuple[ctypes.CDLL | None, str]:
    """The part with the products, or None and why it cannot be used."""
    if not _has_vector_units():
        return None, "this CPU has no AVX2"
    cpu = _open("ggml-cpu")
    # The loader takes a library of the same name that is in the process already, such as the one that llama-cpp-python
    # brings, for the base of this one: tensors of one version would be computed by another.
    if sys.platform != "win32":
        seen = [_function_address(lib) for lib in (base, cpu, ctypes.CDLL(None))]
        if seen[1] != seen[0] or seen[2] not in (seen[0], None):
            return None, "another copy of libggml-base was loaded into this process before"
    return cpu, ""


def _function_address(library: ctypes.CDLL) -> int | None:
    function = getattr(library, "ggml_get_type_traits", None)
    return None if function is None else ctypes.cast(function, ctypes.c_void_p).value


def _has_vector_units() -> bool:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True  # wheels for ARM are built for the base of that architecture
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def _row_function(library: ctypes.CDLL, name: str) -> Callable[[int, int, int], None]:
    function = getattr(library, name)
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    function.restype = None
    return function


def _checked_importance(importance: Tensor | None, k: int, kind: GgmlType) -> Tensor | None:
    ones = torch.ones(k, dtype=torch.float32, device="cpu")
    if importance is None:
        return ones if kind.needs_importance else None
    weights = importance.detach().to("cpu", torch.float32).resolve_neg().contiguous()
    if weights.shape != (k,):
        raise WeightError(f"the importance matrix has shape {tuple(weights.shape)}, expected ({k},).")
    low, high = (float(v) for v in torch.aminmax(weights))
    if not (low >= 0 and high < float("inf")):
        raise WeightError(f"the importance matrix has values from {low:.3g} to {high:.3g}, expected 0 and more.")
    if high == 0:  # nothing was measured: ggml would divide by the sum
        return ones
    return weights / high if high > LARGEST_IMPORTANCE else weights


class _Tiles(threading.local):
    def __init__(self) -> None:
        self.buffer: Any = None


_tiles = _Tiles()


def _tile(numel: int) -> int:
    """Address of this thread's float32 buffer."""
    if _tiles.buffer is None or ctypes.sizeof(_tiles.buffer) < numel * FLOAT_NBYTES:
        _tiles.buffer = (ctypes.c_float * numel)()
    return ctypes.addressof(_tiles.buffer)


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="quantwire-ggml")


if hasattr(os, "register_at_fork"):  # a child has the pools, but none of their threads
    os.register_at_fork(after_in_child=_pool.cache_clear)


def in_threads(run: Callable[[int, int], None], rows: int, threads: int, least: int = 1) -> None:
    """Call `run` with ranges of rows, the first in this thread.

    Args:
        least: rows below which a thread is not worth its start.
    """
    threads = min(threads or torch.get_num_threads(), max(1, rows // max(least, 1)))
    if threads <= 1:
        run(0, rows)
        return
    edges = [rows * i // threads for i in range(threads + 1)]
    others: list[Future[None]] = []
    try:
        for a, b in itertools.pairwise(edges[1:]):
            others.append(_pool(threads - 1).submit(run, a, b))
        run(edges[0], edges[1])
    finally:
        wait(others)  # they write into our buffers: in any case, and for all of them
    for other in others:
        other.result()
