"""What of each format's tensors belongs to which row of the weight.

A layout splits a weight into tensors whose first axis are its rows, single values that count for all of it, and tables
that all rows share, and joins them again. Most formats lie that way as they are. The others:

    bnb-nf4, bnb-fp4       one flat run of blocks; rows are apart where K is a multiple of the block. Scales that are
                           quantized themselves come back as the float32 numbers that they stand for.
    quanto-qint4, -qint2   of P codes a byte, code i belongs to group row i * G / P and so on: unpacked and packed again
    comfy-nvfp4, -mxfp8    rows padded, scales in tiles of 128 x 4
    nncf-int4-asym         two zero points a byte
    sdnq-*                 packed in a stream (through the library where words cross rows), transposed for the quantized
                           product, low-rank factors
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from ..backends.bnb.four_bit import DEFAULT_BLOCK_SIZE, plain_absmax
from ..errors import WeightError
from ..formats.sdnq import bits_of
from ..ggml_types import TYPES, type_name
from ..kernels.tiles import from_tiles, to_tiles
from ..registry import get_entry, require_reader
from ..weight import QuantizedWeight

Index = slice | Tensor


@dataclass(frozen=True)
class Parts:
    """Rows of a weight, out of the order of its format.

    Attributes:
        weight: the whole weight that they come from.
        n: how many rows.
        rows: tensors with one entry of the first axis for each row.
        scalars: single values that count for all rows.
        shared: tables that all rows use.
        orig_dtype: of the weight to make.
    """

    weight: QuantizedWeight
    n: int
    rows: dict[str, Tensor]
    scalars: Mapping[str, Tensor]
    shared: Mapping[str, Tensor]
    orig_dtype: torch.dtype

    @property
    def format_id(self) -> str:
        return self.weight.format_id

    def made(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any] | None = None) -> QuantizedWeight:
        q = self.weight
        found = {name: tensors[name] for name in q.tensors if name in tensors}  # in the format's order
        meta = q.meta if meta is None else meta
        return QuantizedWeight(q.format_id, found, (self.n, *q.orig_shape[1:]), self.orig_dtype, meta)


@dataclass(frozen=True)
class RowLayout:
    """A format that keeps its rows apart as it is.

    Attributes:
        tables: tensors that all rows share.
        singles: tensors that count for all rows, whatever their shape; others do where they hold one value and the
            weight has more rows.
        scalars_by_row: whether such a value may become one for each row.
        follows_shape: keys of the meta that follow from the shape.
    """

    tables: tuple[str, ...] = ()
    singles: tuple[str, ...] = ()
    scalars_by_row: bool = True
    follows_shape: tuple[str, ...] = field(default=())

    def split(self, q: QuantizedWeight, rows: Index) -> Parts:
        """Raises:
        WeightError: the rows are not apart.
        """
        return self._split(q, dict(q.tensors), rows)

    def join(self, parts: Parts) -> QuantizedWeight:
        """Raises:
        WeightError: so many rows cannot be stored.
        """
        return parts.made({**parts.rows, **parts.scalars, **parts.shared})

    def merge(self, parts: Sequence[Parts], names: Sequence[str], rows: dict[str, Tensor]) -> Mapping[str, Tensor]:
        """Tables for all parts, some of whose tables differ.

        Args:
            names: of these.
            rows: of all parts together; may be replaced.
        """
        raise refusal(parts[0].weight, f"the {names[0]} of the parts differs, and one weight has one", "joined")

    def _split(self, q: QuantizedWeight, tensors: Mapping[str, Tensor], rows: Index) -> Parts:
        n = q.orig_shape[0]
        found: dict[str, Tensor] = {}
        scalars: dict[str, Tensor] = {}
        for name, t in tensors.items():
            if name in self.tables:
                continue
            if name in self.singles or (name != "qdata" and t.numel() == 1 and (n != 1 or not t.dim())):
                scalars[name] = t
            elif not t.dim() or t.shape[0] != n:
                raise refusal(q, f"its {name} has shape {tuple(t.shape)}, which is not one entry for each of {n} rows")
            else:
                found[name] = pick(t, rows)
        shared = {name: t for name, t in tensors.items() if name in self.tables}
        return Parts(q, counted(rows), found, scalars, shared, q.orig_dtype)


class GgufLayout(RowLayout):
    def split(self, q: QuantizedWeight, rows: Index) -> Parts:
        n, qdata, block = q.orig_shape[0], q.tensors["qdata"], TYPES[type_name(q.format_id)].block
        if len(q.orig_shape) < 2 or (q.numel // max(n, 1)) % block or qdata.numel() % max(n, 1):
            raise refusal(q, f"blocks of {block} values run across its rows")
        return self._split(q, {"qdata": qdata if qdata.shape[0] == n else qdata.reshape(n, -1)}, rows)


class BnbFourBitLayout(RowLayout):
    def split(self, q: QuantizedWeight, rows: Index) -> Parts:
        n, k = q.orig_shape
        block = int(q.meta.get("block_size", DEFAULT_BLOCK_SIZE))
        if k % block:
            raise refusal(q, f"K={k} is not a multiple of its block of {block}, so blocks run across rows")
        tensors = {"qdata": as_dtype(q.tensors["qdata"], torch.uint8).reshape(n, k // 2)}
        return self._split(q, tensors | {"absmax": plain_absmax(q).reshape(n, k // block)}, rows)

    def join(self, parts: Parts) -> QuantizedWeight:
        storage = parts.weight.tensors["qdata"].dtype
        packed = parts.rows["qdata"].reshape(-1)
        if packed.numel() % storage.itemsize == 0:  # else the bytes stay bytes, which the format knows too
            packed = as_dtype(packed, storage)
        return parts.made({"qdata": packed.unsqueeze(1), "absmax": parts.rows["absmax"].reshape(-1)})


class QuantoPackedLayout(RowLayout):
    def split(self, q: QuantizedWeight, rows: Index) -> Parts:
        (n, k), group = q.orig_shape, q.tensors["qdata"].shape[1]
        if k % group:
            raise refusal(q, f"K={k} is not a multiple of its group of {group}")
        count = k // group
        codes = self._codes(q.tensors["qdata"], _bits(q), _groups(rows, count)).reshape(-1, k)
        scales = {name: q.tensors[name].reshape(n, count) for name in ("scale", "shift")}
        parts = self._split(q, scales, rows)
        parts.rows["qdata"] = codes
        return parts

    def _codes(self, packed: Tensor, bits: int, groups: Index) -> Tensor:
        """Codes (groups, group) uint8, without unpacking the others."""
        part, mask = packed.shape[0], (1 << bits) - 1
        if isinstance(groups, Tensor):
            groups = groups.to(packed.device)
            shift = (groups // max(part, 1) * bits).to(torch.uint8).unsqueeze(1)
            return (packed[groups % max(part, 1)] >> shift) & mask
        found = [packed[:0]]
        for i in range(8 // bits):
            a, b = max(groups.start, i * part), min(groups.stop, (i + 1) * part)
            if a < b:
                found.append((packed[a - i * part : b - i * part] >> (bits * i)) & mask)
        return torch.cat(found)

    def join(self, parts: Parts) -> QuantizedWeight:
        bits, group = _bits(parts.weight), parts.weight.tensors["qdata"].shape[1]
        codes = parts.rows["qdata"].reshape(-1, group)
        planes = 8 // bits
        part = -(-codes.shape[0] // planes)
        packed = torch.zeros(part, group, dtype=torch.uint8, device=codes.device)
        for i in range(planes):
            taken = codes[i * part : (i + 1) * part]
            packed[: taken.shape[0]] |= taken << (bits * i)
        return parts.made({"qdata": packed, **{name: parts.rows[name].reshape(-1, 1) for name in ("scale", "shift")}})


class ComfyTiledLayout(RowLayout):
    """nvfp4 and mxfp8."""

    def split(self, q: QuantizedWeight, rows: Index) -> Parts:
        n, nvfp4 = q.orig_shape[0], q.format_id == "comfy-nvfp4"
        name, block = ("block_scale", 8) if nvfp4 else ("scale", 32)  # bytes of qdata with one scale
        qdata = q.tensors["qdata"]
        tiled = from_tiles(q.tensors[name], qdata.shape[0], qdata.shape[1] // block)
        return self._split(q, {**q.tensors, "qdata": qdata[:n], name: tiled[:n]}, rows)

    def join(self, parts: Parts) -> QuantizedWeight:
        nvfp4 = parts.format_id == "comfy-nvfp4"
        name, multiple = ("block_scale", 16) if nvfp4 else ("scale", 32)
        tiled = to_tiles(parts.rows[name])
        if parts.weight.tensors[name].dim() == 1:
            tiled = tiled.flatten()
        qdata = parts.rows["qdata"]
        fill = -parts.n % multiple
        if fill:
            zeros = torch.zeros(fill, qdata.shape[1], dtype=torch.uint8, device=qdata.device)
            qdata = torch.cat([qdata.contiguous().view(torch.uint8), zeros]).view(qdata.dtype)
        return parts.made({**parts.scalars, "qdata": qdata, name: tiled})


class NncfInt4AsymLayout(RowLayout):
    def split(self, q: QuantizedWeight, rows: Index) -> Parts:
        packed = q.tensors["zero_point"].reshape(-1)
        codes = torch.stack([packed & 15, packed >> 4], dim=-1).reshape(q.tensors["scale"].shape)
        return self._split(q, {**q.tensors, "zero_point": codes}, rows)

    def join(self, parts: Parts) -> QuantizedWeight:
        codes = parts.rows["zero_point"].reshape(-1)
        if codes.numel() % 2:
            raise refusal(parts.weight, f"{parts.n} rows have an odd number of zero points, and two share a byte")
        pairs = codes.reshape(-1, 2)
        return parts.made({**parts.rows, "zero_point": pairs[:, 0] | pairs[:, 1] << 4})


@dataclass(frozen=True)
class SdnqLayout(RowLayout):
    tables: tuple[str, ...] = ("svd_down",)
    follows_shape: tuple[str, ...] = (
        *("quantized_weight_shape", "quantized_scale_shape", "quantized_zero_point_shape", "result_shape"),
        "use_quantized_matmul",
    )

    def split(self, q: QuantizedWeight, rows: Index) -> Parts:
        t = dict(q.tensors)
        if q.meta["use_quantized_matmul"]:
            turned = [name for name in t if name.startswith("svd") or _is_turned(q)]
            t |= {name: t[name].t() for name in turned}
        bits = _stream_bits(q)
        if bits:
            n, k = q.orig_shape
            if k % _together(bits):
                t["qdata"] = _library_codes(q, bits)
            else:
                t["qdata"] = t["qdata"].reshape(n, -1)
        return self._split(q, t, rows)

    def join(self, parts: Parts) -> QuantizedWeight:
        q, n, k = parts.weight, parts.n, parts.weight.orig_shape[1]
        t = {**parts.rows, **parts.scalars, **parts.shared}
        bits = _stream_bits(q)
        if bits:
            if n * k % _together(bits):
                raise refusal(
                    q, f"{n} rows of {k} values are no multiple of the {_together(bits)} that it packs together"
                )
            t["qdata"] = _library_packed(q, t["qdata"], bits) if k % _together(bits) else t["qdata"]
            t["qdata"] = t["qdata"].reshape(-1, *q.tensors["qdata"].shape[1:])
        meta = dict(q.meta)
        meta["quantized_weight_shape"] = [n, *meta["quantized_weight_shape"][1:]]
        meta["result_shape"] = meta["result_shape"] and [n, k]
        if meta["use_quantized_matmul"]:
            turned = _is_turned(q)
            # The library's own limits of its quantized product.
            if n >= 32 and n % 16 == 0:
                names = [name for name in t if name.startswith("svd") or turned]
                t |= {name: _turned_like(q.tensors[name], t[name]) for name in names}
                if turned:
                    meta["quantized_weight_shape"] = [k, n]
            else:
                meta["use_quantized_matmul"] = False
                if turned:
                    meta["quantized_weight_shape"] = [n, k]
                t = {name: value.contiguous() for name, value in t.items()}
        meta["quantized_scale_shape"] = list(t["scale"].shape)
        if "zero_point" in t:
            meta["quantized_zero_point_shape"] = list(t["zero_point"].shape)
        return parts.made(t, meta)

    def merge(self, parts: Sequence[Parts], names: Sequence[str], rows: dict[str, Tensor]) -> Mapping[str, Tensor]:
        """Low-rank factors of several weights: `up` in blocks along the diagonal, `down` below one another."""
        blocks = cast("Callable[..., Tensor]", cast(Any, torch).block_diag)
        rows["svd_up"] = blocks(*(p.rows["svd_up"] for p in parts))
        return {"svd_down": torch.cat([p.shared["svd_down"] for p in parts])}


def _is_turned(q: QuantizedWeight) -> bool:
    """Whether values and scales are stored as (K, N), for sdnq's quantized product."""
    scale = q.tensors["scale"]
    return (
        q.meta["use_quantized_matmul"]
        and not q.meta["re_quantize_for_matmul"]
        and scale.dim() == 2
        and tuple(scale.shape) == (1, q.orig_shape[0])
    )


def _turned_like(was: Tensor, t: Tensor) -> Tensor:
    """Transposed, and in memory as it was: the library has chosen the order for its kernels."""
    return t.t().contiguous() if was.is_contiguous() else t.contiguous().t()


def _stream_bits(q: QuantizedWeight) -> int:
    """Bits of a value where values are packed over the flattened weight, else 0."""
    bits = bits_of(str(q.meta["weights_dtype"]).replace("_", "-"))
    return 0 if bits in (8, 16) else bits


def _together(bits: int) -> int:
    """Values that fill whole words: of 8 bits up to 7 bits, of 16 above 8."""
    word = 8 if bits < 8 else 16
    return word // math.gcd(word, bits)


def _functions(q: QuantizedWeight, bits: int) -> dict[str, Callable[..., Tensor]]:
    from ..backends.sdnq.library import library

    require_reader(q.format_id)
    return library().packed_int.packed_int_function_dict[f"uint{bits}"]


def _library_codes(q: QuantizedWeight, bits: int) -> Tensor:
    return _functions(q, bits)["unpack"](q.tensors["qdata"], torch.Size(q.orig_shape))


def _library_packed(q: QuantizedWeight, codes: Tensor, bits: int) -> Tensor:
    return _functions(q, bits)["pack"](codes)


def as_dtype(t: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes of a tensor as another dtype, flat."""
    flat = t.reshape(-1)
    if flat.dtype == dtype:
        return flat
    if flat.storage_offset() * flat.element_size() % dtype.itemsize:
        flat = flat.clone()
    return flat.view(dtype)


def pick(t: Tensor, rows: Index) -> Tensor:
    """Entries of the first axis; a view for a slice."""
    if isinstance(rows, slice):
        return t[rows]
    rows = rows.to(t.device)
    if t.element_size() > 1:
        return t.index_select(0, rows)
    return t.contiguous().view(torch.uint8).index_select(0, rows).view(t.dtype)  # not every 8-bit float can be indexed


def counted(rows: Index) -> int:
    return rows.stop - rows.start if isinstance(rows, slice) else rows.numel()


def _groups(rows: Index, count: int) -> Index:
    """The groups of some rows, of which each has `count`."""
    if isinstance(rows, slice):
        return slice(rows.start * count, rows.stop * count)
    return (rows.unsqueeze(1) * count + torch.arange(count, device=rows.device)).reshape(-1)


def _bits(q: QuantizedWeight) -> int:
    return 2 if q.format_id == "quanto-qint2" else 4


def refusal(q: QuantizedWeight, reason: str, what: str = "cut or joined") -> WeightError:
    return WeightError(
        f"{q.format_id} of shape {q.orig_shape} cannot be {what} by rows: {reason}.\n"
        "Use a file in the key layout of this host, or convert the full-precision model instead."
    )


PLAIN = RowLayout()
LAYOUTS: Mapping[str, RowLayout] = {
    "bnb-nf4": BnbFourBitLayout(),
    "bnb-fp4": BnbFourBitLayout(),
    "quanto-qint4": QuantoPackedLayout(),
    "quanto-qint2": QuantoPackedLayout(),
    "comfy-fp8-e4m3fn": RowLayout(singles=("scale",)),
    "comfy-fp8-e5m2": RowLayout(singles=("scale",)),
    "comfy-nvfp4": ComfyTiledLayout(singles=("scale",), scalars_by_row=False),
    "comfy-mxfp8": ComfyTiledLayout(),
    "comfy-w4a8": RowLayout(tables=("codebook",)),
    "nncf-int4-asym": NncfInt4AsymLayout(),
}
BACKENDS: Mapping[str, RowLayout] = {"gguf": GgufLayout(), "sdnq": SdnqLayout()}


def layout_of(q: QuantizedWeight) -> RowLayout:
    return LAYOUTS.get(q.format_id) or BACKENDS.get(get_entry(q.format_id).backend, PLAIN)
