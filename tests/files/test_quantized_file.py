"""Quantized files: every format comes back bit for bit, and damage is named."""

from __future__ import annotations

import itertools
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from quantwire.quantizers.apply import quantize_tensor
from quantwire.quantizers.errors import FileError, WeightError
from quantwire.quantizers.files.quantized_file import file_metadata, read_quantized, write_quantized
from quantwire.quantizers.registry import availability, format_ids, get_quantizer
from quantwire.quantizers.spec import QuantSpec
from quantwire.quantizers.weight import QuantizedWeight, TensorMeta
from safetensors import safe_open
from torch import Tensor


def raw(t: Tensor) -> Tensor:
    return t.contiguous().reshape(-1).view(torch.uint8)


def same(a: Tensor | QuantizedWeight, b: Tensor | QuantizedWeight) -> bool:
    """Equal bytes, dtypes and shapes, and for weights everything else too."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(raw(a), raw(b))
    assert isinstance(a, QuantizedWeight)
    assert isinstance(b, QuantizedWeight)
    fields = [(w.format_id, w.orig_shape, w.orig_dtype, dict(w.meta), list(w.tensors)) for w in (a, b)]
    return fields[0] == fields[1] and all(same(t, b.tensors[n]) for n, t in a.tensors.items())


def weight_in(format_id: str, shape: tuple[int, int] = (64, 256)) -> QuantizedWeight:
    if not availability(format_id).works:
        pytest.skip(f"{format_id}: {availability(format_id).reason}")
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    reason = get_quantizer(format_id).refuse(QuantSpec(format_id), TensorMeta("x.weight", shape, w.dtype))
    if reason is not None:
        pytest.skip(f"{format_id}: {reason}")
    return quantize_tensor("x.weight", w, QuantSpec(format_id))[0]


@pytest.mark.parametrize("shape", [(64, 256), (33, 512)], ids=str)
@pytest.mark.parametrize("format_id", format_ids())
def test_every_format_comes_back(tmp_path: Path, format_id: str, shape: tuple[int, int]) -> None:
    weight = weight_in(format_id, shape)
    values: dict[str, Any] = {"a.weight": weight, "a.bias": torch.arange(33.0), "b.weight": weight}
    write_quantized(tmp_path / "q.safetensors", values.items(), {"spec": "here"})
    found = read_quantized(tmp_path / "q.safetensors")
    assert set(found.tensors) == set(values)
    for name, value in values.items():
        assert same(found.tensors[name], value), name
    dequantize = get_quantizer(format_id).dequantize
    back: Any = found.tensors["b.weight"]
    assert torch.equal(dequantize(back, torch.float32), dequantize(weight, torch.float32))
    assert file_metadata(found) == {"version": 1, "spec": "here"}


DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64,
    torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.float8_e8m0fnu, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
]  # fmt: skip


def test_every_dtype_and_the_library_reads_them(tmp_path: Path) -> None:
    """Odd sizes too: the data of a small tensor must not misalign that of the next one."""
    tensors: dict[str, Tensor] = {}
    for i, dtype in enumerate(DTYPES):
        data = torch.arange(0, 7 * dtype.itemsize, dtype=torch.uint8) % 2
        tensors[f"t{i}"] = data.view(dtype).clone()
        tensors[f"t{i}.none"] = torch.empty((0, 3), dtype=dtype)
        tensors[f"t{i}.scalar"] = data.view(dtype)[0].clone()
    tensors["large odd"] = torch.arange(100_001).to(torch.uint8)
    tensors["after it"] = torch.randn(100, 1000)
    tensors["a view"] = torch.randn(8, 6).t()
    path = tmp_path / "t.safetensors"
    write_quantized(path, tensors.items(), {})
    found = read_quantized(path).tensors
    with safe_open(str(path), "pt") as file:
        for name, tensor in tensors.items():
            assert same(found[name], tensor), name
            assert same(file.get_tensor(name), tensor), name
            assert found[name].data_ptr() % tensor.element_size() == 0, name  # type: ignore[union-attr]


@pytest.mark.parametrize("count", [1, 300])
def test_a_header_larger_than_its_room(tmp_path: Path, count: int) -> None:
    """`expected` is an estimate; the data moves when it was too low."""
    tensors = {f"{'long' * 50}.{i}": torch.full((64, 7), i, dtype=torch.int32) for i in range(count)}
    write_quantized(tmp_path / "t.safetensors", tensors.items(), {"note": "x" * 9000}, expected=0)
    found = read_quantized(tmp_path / "t.safetensors")
    assert all(same(found.tensors[name], tensor) for name, tensor in tensors.items())


def test_only_one_value_is_asked_for_at_a_time(tmp_path: Path) -> None:
    """The writer has put each value down before the next is made: the file grows with every one."""
    sizes: list[int] = []

    def values() -> Any:
        for i in range(4):
            yield f"t{i}", torch.zeros(1 << 20)
            (temporary,) = tmp_path.glob("*.tmp")
            sizes.append(temporary.stat().st_size)

    write_quantized(tmp_path / "t.safetensors", values(), {})
    assert [b - a for a, b in itertools.pairwise(sizes)] == [4 << 20] * 3


def test_writing_in_a_map_changes_no_file(tmp_path: Path) -> None:
    write_quantized(tmp_path / "t.safetensors", {"t": torch.zeros(5000)}.items(), {})
    found: Any = read_quantized(tmp_path / "t.safetensors").tensors["t"]
    found += 1
    again: Any = read_quantized(tmp_path / "t.safetensors").tensors["t"]
    assert not again.any()


def test_what_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(b"before")
    qdata = {"qdata": torch.zeros(4, dtype=torch.uint8)}
    bad = QuantizedWeight("bnb-nf4", qdata, (2, 4), torch.bfloat16, {"shape": (1, 2)})
    cases: list[tuple[str, list[tuple[str, Any]]]] = [
        ("not plain JSON", [("x.weight", bad)]),
        ("a second tensor of this name", [("x", torch.zeros(1)), ("x", torch.zeros(1))]),
        ("cannot hold torch.complex128", [("x", torch.zeros(1, dtype=torch.complex128))]),
    ]
    for said, values in cases:
        with pytest.raises(WeightError, match=said):
            write_quantized(path, values, {})
        assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]
        assert path.read_bytes() == b"before"


def damaged(path: Path, how: str) -> None:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    own = header["__metadata__"]
    if how == "truncated":
        path.write_bytes(content[:-1])
        return
    if how == "no metadata":
        del header["__metadata__"]
    elif how == "newer":
        own["quantwire"] = json.dumps({"version": 99})
    elif how == "not JSON":
        own["x.weight"] = "{"
    elif how == "unknown format":
        own["x.weight"] = own["x.weight"].replace("gguf-q8-0", "gguf-q9-9")
    elif how == "missing part":
        own["x.weight"] = own["x.weight"].replace('["qdata"]', '["qdata", "scale"]')
    new = json.dumps(header).encode().ljust(length)
    assert len(new) == length
    path.write_bytes(content[:8] + new + content[8 + length :])


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("truncated", "truncated"),
        ("no metadata", "not a quantized file of this pack"),
        ("newer", "version 99"),
        ("not JSON", "'x.weight' is not JSON"),
        ("unknown format", "'gguf-q9-9', which this version does not know"),
        ("missing part", "corrupt metadata of 'x.weight'"),
    ],
)
def test_damage_is_named(tmp_path: Path, how: str, said: str) -> None:
    path = tmp_path / "damaged.safetensors"
    write_quantized(path, [("x.weight", weight_in("gguf-q8-0"))], {})
    damaged(path, how)
    with pytest.raises(FileError, match=r"damaged\.safetensors") as caught:
        read_quantized(path)
    assert said in str(caught.value)
