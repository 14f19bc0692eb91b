"""Reading model files: good ones, and every way in which one can be broken."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from quantwire.quantizers.errors import FileError
from quantwire.quantizers.files.checkpoint import (
    Checkpoint,
    read_checkpoint,
    read_gguf,
    read_safetensors,
    replace_file,
    write_safetensors,
)
from quantwire.quantizers.files.safetensors_header import read_safetensors_header
from quantwire.quantizers.registry import get_quantizer
from quantwire.quantizers.weight import QuantizedLinear, QuantizedWeight
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int64]


def fault(path: Path) -> str:
    """The message of the FileError; its first line stands alone and names the file."""
    with pytest.raises(FileError) as failure:
        read_checkpoint(path)
    first = str(failure.value).splitlines()[0]
    assert path.name in first
    assert first.endswith(".")
    return first


def broken(folder: Path, content: bytes, name: str = "model.bin") -> str:
    path = folder / name
    path.write_bytes(content)
    return fault(path)


def reads_or_names_the_fault(path: Path) -> Checkpoint | None:
    try:
        return read_checkpoint(path)
    except FileError:
        fault(path)
        return None


# safetensors


def safetensors_bytes(header: Any, data: bytes = b"\0" * 16, pad_to: int = 0) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    raw = raw.ljust(pad_to)
    return struct.pack("<Q", len(raw)) + raw + data


def entry(dtype: Any = "F32", shape: Any = (4,), offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_safetensors_round_trip(tmp_path: Path) -> None:
    tensors = {str(d): torch.arange(6).reshape(2, 3).to(d) for d in DTYPES}
    tensors |= {
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
    }
    path = tmp_path / "sub" / "a.safetensors"
    write_safetensors(path, tensors, {"note": "ü"})
    for read in (read_checkpoint(path), read_safetensors(path)):
        assert read.tensors.keys() == tensors.keys()
        for name, expected in tensors.items():
            got = read.tensors[name]
            assert isinstance(got, Tensor)
            assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
            assert torch.equal(got.float(), expected.float())
        assert (read.metadata, read.path) == ({"note": "ü"}, path)
    assert [p.name for p in path.parent.iterdir()] == ["a.safetensors"]


def test_content_decides_not_the_name(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(safetensors_bytes({"a": entry()}))
    assert list(read_checkpoint(path).tensors) == ["a"]


@pytest.mark.parametrize("length", [128, 256, 512, 0x8002, 65536])
def test_any_header_length(tmp_path: Path, length: int) -> None:
    """The length's first byte can be 0, or 0x80 as in a pickle."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors_bytes({"a": entry()}, pad_to=length))
    assert torch.equal(read_checkpoint(path).tensors["a"], torch.zeros(4))  # type: ignore[arg-type]


def test_header_alone_needs_no_data_in_memory(tmp_path: Path) -> None:
    """A file of a terabyte, of which the file system holds only the header."""
    nbytes = 1 << 40
    path = tmp_path / "huge.safetensors"
    head = safetensors_bytes({"a": entry("U8", [nbytes], [0, nbytes])}, b"")
    with open(path, "wb") as file:
        file.write(head)
        try:
            file.truncate(len(head) + nbytes)
        except OSError:
            pytest.skip("this file system has no sparse files")
    assert read_safetensors_header(path)["a"]["shape"] == [nbytes]


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        pytest.param(b"{ ", b"", "corrupt safetensors header: not JSON", id="not-json-short"),
        pytest.param(b"not json", b"", "corrupt safetensors header: not JSON", id="not-json"),
        pytest.param(b"[" * 100_000, b"", "corrupt safetensors header: not JSON", id="deep-nesting"),
        pytest.param(b'{"a": ' + b"9" * 5000 + b"}", b"", "corrupt safetensors header: not JSON", id="huge-number"),
        pytest.param(b'{"\xff": 1}', b"", "corrupt safetensors header: not JSON", id="not-utf-8"),
        pytest.param([1, 2], b"", "corrupt safetensors header: a list, expected an object", id="list"),
        pytest.param({"a": None}, b"", "corrupt safetensors header: 'a' is not an object", id="null-entry"),
        pytest.param({"a": {}}, b"", "corrupt safetensors header: 'a' has the unknown dtype None", id="empty-entry"),
        pytest.param({"a": entry("F31")}, None, "'a' has the unknown dtype 'F31'", id="unknown-dtype"),
        pytest.param({"a": entry(["F32"])}, None, "'a' has the unknown dtype ['F32']", id="dtype-no-string"),
        pytest.param({"a": entry(shape=[-4])}, None, "'a' has the shape [-4]", id="negative-shape"),
        pytest.param({"a": entry(shape=[True, 4])}, None, "'a' has the shape [True, 4]", id="boolean-shape"),
        pytest.param({"a": entry(shape=4)}, None, "'a' has the shape 4", id="shape-no-list"),
        pytest.param({"a": entry(offsets=[-16, 0])}, None, "'a' has the offsets [-16, 0]", id="negative-offset"),
        pytest.param({"a": entry(offsets=[16, 0])}, None, "'a' has the offsets [16, 0]", id="reversed-offsets"),
        pytest.param({"a": entry(offsets=[0])}, None, "'a' has the offsets [0]", id="one-offset"),
        pytest.param({"a": entry(offsets=["0", "16"])}, None, "'a' has the offsets ['0', '16']", id="text-offsets"),
        pytest.param(
            {"a": entry(offsets=[0, 12])},
            None,
            "'a' with shape [4] and dtype F32 needs 16 bytes, its offsets hold 12",
            id="size-mismatch",
        ),
        pytest.param(
            {"a": entry(shape=[2**40, 2**40])},
            None,
            f"'a' with shape [{2**40}, {2**40}] and dtype F32 needs {2**82} bytes, its offsets hold 16",
            id="huge-shape",
        ),
        pytest.param(
            {"a": entry(), "b": entry(offsets=[8, 24])},
            b"\0" * 24,
            "'b' begins at 8, the tensor before it ends at 16",
            id="overlap",
        ),
        pytest.param({"a": entry(offsets=[16, 32])}, b"\0" * 32, "'a' begins at 16, the tensor before it", id="hole"),
        pytest.param({"a": entry()}, b"\0" * 15, "truncated: the tensors need 16 bytes, 15 are there", id="over-long"),
        pytest.param({"a": entry()}, b"\0" * 17, "corrupt: 1 bytes follow the last tensor", id="trailing-bytes"),
        pytest.param({"__metadata__": {"a": 1}}, b"", "__metadata__ does not map strings to strings", id="metadata"),
        pytest.param({"__metadata__": []}, b"", "__metadata__ does not map strings to strings", id="metadata-list"),
    ],
)
def test_corrupt_safetensors(tmp_path: Path, header: Any, data: bytes | None, message: str) -> None:
    content = safetensors_bytes(header, b"\0" * 16 if data is None else data)
    assert message in broken(tmp_path, content, "a.safetensors")
    with pytest.raises(FileError):
        read_safetensors_header(tmp_path / "a.safetensors")


def test_every_truncation_of_a_safetensors_file(tmp_path: Path) -> None:
    whole = safetensors_bytes({"a": entry(), "__metadata__": {"k": "v"}})
    for length in range(len(whole)):
        broken(tmp_path, whole[:length], "a.safetensors")


def test_no_damage_to_a_safetensors_header_escapes(tmp_path: Path) -> None:
    whole = safetensors_bytes({"a": entry(), "b": entry("BF16", [2, 4], [16, 32])}, b"\0" * 32)
    rng = random.Random(0)
    path = tmp_path / "a.safetensors"
    results = []
    for _ in range(400):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            content[rng.randrange(len(whole) - 32)] = rng.randrange(256)
        path.write_bytes(content)
        results.append(reads_or_names_the_fault(path))
    assert None in results


# Other files


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_torch_save_is_refused_whatever_its_name(tmp_path: Path, zipped: bool, name: str) -> None:
    path = tmp_path / name
    torch.save({"a": torch.zeros(4)}, path, _use_new_zipfile_serialization=zipped)
    assert fault(path) == f"{name}: a file of torch.save is not read, because reading one may run code."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes are too few for a safetensors file"),
        (b"1234567", "7 bytes are too few for a safetensors file"),
        (b"<!DOCTYPE html><html></html>", "not a safetensors file (its header would have "),
        (b"\0" * 100, "not a safetensors file (its header would have 0 bytes)"),
        (b"GGUF", "truncated GGUF file: the version at byte 4 needs 4 bytes, 0 are left"),
    ],
    ids=["empty", "short", "html", "zeros", "magic-only"],
)
def test_files_that_are_none(tmp_path: Path, content: bytes, message: str) -> None:
    assert message in broken(tmp_path, content)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert fault(tmp_path / "none.gguf").endswith("cannot be read: No such file or directory.")
    assert "cannot be read: " in fault(tmp_path)
    with pytest.raises(FileError, match="cannot be read"):
        read_safetensors_header(tmp_path / "none.safetensors")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": torch.zeros(4)})
    before = path.read_bytes()
    shared = torch.zeros(8)
    with pytest.raises(RuntimeError, match="share memory"):
        write_safetensors(path, {"a": shared, "b": shared})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_an_unwritable_target_is_a_file_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot be written: "):
        write_safetensors(tmp_path / "file" / "a.safetensors", {"a": torch.zeros(4)})
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileError, match="cannot be written: "):
        write_safetensors(tmp_path / "folder", {"a": torch.zeros(4)})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


# GGUF

U8, U32, STRING, ARRAY = 0, 4, 8, 9
F32, Q8_0, Q8_K = 0, 8, 15


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def info(name: bytes, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    """`shape` innermost first, as in the file."""
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dims + struct.pack("<IQ", kind, offset)


ARCH = key(b"general.architecture", STRING, text(b"flux"))


def gguf_bytes(
    keys: tuple[bytes, ...] = (ARCH,),
    infos: tuple[bytes, ...] = (info(b"a", (32, 2), F32, 0), info(b"b", (32, 2), Q8_0, 256)),
    data: bytes = bytes(256) + b"\0\x3c" + bytes(range(32)) + b"\0\x40" + bytes(range(32)) + bytes(28),
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    tensor_count, key_count = counts or (len(infos), len(keys))
    head = struct.pack("<4sIQQ", b"GGUF", version, tensor_count, key_count) + b"".join((*keys, *infos))
    return head + b"\0" * (-len(head) % alignment) + data


DATA_NBYTES = 256 + 68  # without the padding at the end


def test_gguf_read(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf_bytes((ARCH, key(b"n", U32, struct.pack("<I", 7)), key(b"x", STRING, text(b"y")))))
    read = read_checkpoint(path)
    assert read.metadata == {"general.architecture": "flux", "x": "y"}
    a, b = read.tensors["a"], read.tensors["b"]
    assert isinstance(a, Tensor)
    assert torch.equal(a, torch.zeros(2, 32))
    assert isinstance(b, QuantizedWeight)
    assert (b.format_id, b.orig_shape, b.orig_dtype, b.nbytes) == ("gguf-q8-0", (2, 32), torch.bfloat16, 68)
    expected = torch.arange(32.0) * torch.tensor([[1.0], [2.0]])
    assert torch.equal(get_quantizer("gguf-q8-0").dequantize(b, torch.float32), expected)


def test_gguf_equals_the_reader_of_the_library(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    array = key(b"tokens", ARRAY, struct.pack("<IQ", STRING, 2) + text(b"one") + text(b""))
    numbers = key(b"scores", ARRAY, struct.pack("<IQ3I", U32, 3, 1, 2, 3))
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf_bytes((array, numbers, ARCH)))
    theirs = gguf.GGUFReader(str(path))
    ours = read_gguf(path).tensors
    assert list(ours) == [t.name for t in theirs.tensors]
    for t in theirs.tensors:
        value = ours[t.name]
        raw = value.tensors["qdata"] if isinstance(value, QuantizedWeight) else value
        assert torch.equal(raw, torch.from_numpy(t.data.copy()))


def test_gguf_without_an_architecture(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf_bytes(keys=()))
    assert read_gguf(path).metadata == {"general.architecture": ""}


def test_writing_to_a_mapped_tensor_changes_no_file_and_does_not_crash(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    content = gguf_bytes()
    path.write_bytes(content)
    weight = read_gguf(path).tensors["b"]
    assert isinstance(weight, QuantizedWeight)
    layer = QuantizedLinear(weight, None)
    layer.load_state_dict({"qdata": torch.ones_like(layer.qdata)})
    assert bool((layer.qdata == 1).all())
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(gguf_bytes(version=1), "GGUF version 1 cannot be read, only little-endian 2 and 3", id="version"),
        pytest.param(
            gguf_bytes(version=0x03000000), "big-endian GGUF version 3 (byte 4) cannot be read", id="big-endian"
        ),
        pytest.param(gguf_bytes(counts=(2**63, 1)), "GGUF file", id="huge-tensor-count"),
        pytest.param(gguf_bytes(counts=(2, 2**63)), "GGUF file", id="huge-key-count"),
        pytest.param(
            gguf_bytes((key(b"k", ARRAY, struct.pack("<IQ", U8, 2**62)),)), f"'k' at byte 49 needs {2**62}", id="array"
        ),
        pytest.param(
            gguf_bytes((key(b"k", ARRAY, struct.pack("<IQ", STRING, 2**62)),)), "truncated GGUF file: 'k'", id="strings"
        ),
        pytest.param(
            gguf_bytes((key(b"k", ARRAY, struct.pack("<IQ", ARRAY, 1)),)), "'k' is an array of the unknown", id="nested"
        ),
        pytest.param(gguf_bytes((key(b"k", 99, b""),)), "'k' has the unknown value type 99", id="value-type"),
        pytest.param(gguf_bytes((struct.pack("<Q", 2**60),)), f"a key would have {2**60} bytes", id="long-string"),
        pytest.param(gguf_bytes((key(b"\xff", U8, b"\0"),)), "a key is not UTF-8", id="not-utf-8"),
        pytest.param(
            gguf_bytes((key(b"general.alignment", U32, struct.pack("<I", 0)),)), "alignment 0 is not", id="alignment-0"
        ),
        pytest.param(
            gguf_bytes((key(b"general.alignment", U32, struct.pack("<I", 48)),)), "alignment 48", id="alignment-48"
        ),
        pytest.param(
            gguf_bytes(infos=(text(b"a") + struct.pack("<I", 2**31),)), f"'a' would have {2**31} dim", id="dimensions"
        ),
        pytest.param(
            gguf_bytes(infos=(info(b"a", (2**32, 2**32), F32, 0),)), "truncated GGUF file: 'a' ends at", id="wrapping"
        ),
        pytest.param(gguf_bytes(infos=(info(b"a", (32,), 77, 0),)), "'a' has the unknown ggml type 77", id="type"),
        pytest.param(
            gguf_bytes(infos=(info(b"a", (33, 2), Q8_0, 0),)), "'a' has rows of 33, no multiple of", id="row-length"
        ),
        pytest.param(gguf_bytes(infos=(info(b"a", (32,), F32, 4),)), "'a' is not aligned (offset 4)", id="unaligned"),
        pytest.param(
            gguf_bytes(infos=(info(b"a", (32,), F32, 2**64 - 32),)), "truncated GGUF file: 'a' ends at", id="far-offset"
        ),
        pytest.param(
            gguf_bytes(infos=(info(b"a", (32, 2), F32, 0), info(b"b", (32,), F32, 32))),
            "'a' and 'b' overlap",
            id="overlap",
        ),
        pytest.param(
            gguf_bytes(infos=(info(b"a", (8,), F32, 0), info(b"a", (8,), F32, 32))), "'a' appears twice", id="twice"
        ),
        pytest.param(
            gguf_bytes(infos=(info(b"a", (256,), Q8_K, 0),)),
            "'a' has GGUF type Q8_K, which cannot be read here",
            id="unreadable-type",
        ),
    ],
)
def test_corrupt_gguf(tmp_path: Path, content: bytes, message: str) -> None:
    assert message in broken(tmp_path, content, "a.gguf")


def test_every_truncation_of_a_gguf_file(tmp_path: Path) -> None:
    whole = gguf_bytes()
    needed = len(whole) - 28
    for length in range(4, needed):
        assert "truncated" in broken(tmp_path, whole[:length], "a.gguf"), length
    (tmp_path / "a.gguf").write_bytes(whole[:needed])
    assert len(read_gguf(tmp_path / "a.gguf").tensors) == 2


def test_no_damage_to_a_gguf_header_escapes(tmp_path: Path) -> None:
    whole = gguf_bytes((ARCH, key(b"tokens", ARRAY, struct.pack("<IQ", STRING, 2) + text(b"one") + text(b"two"))))
    rng = random.Random(0)
    path = tmp_path / "a.gguf"
    results = []
    for _ in range(600):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            content[rng.randrange(4, len(whole) - DATA_NBYTES)] = rng.randrange(256)
        path.write_bytes(content)
        results.append(reads_or_names_the_fault(path))
    assert None in results
    assert any(results)


def test_temporary_files_are_nobody_elses(tmp_path: Path) -> None:
    path, users_own, plain = tmp_path / "a.bin", tmp_path / "a.bin.tmp", tmp_path / "plain"
    users_own.write_bytes(b"mine")
    plain.touch()

    def outer(temporary: Path) -> None:
        temporary.write_bytes(b"outer")
        replace_file(path, lambda other: None if other == temporary else other.write_bytes(b"inner"))
        assert temporary.read_bytes() == b"outer"

    replace_file(path, outer)  # type: ignore[arg-type]
    assert path.read_bytes() == b"outer"
    assert users_own.read_bytes() == b"mine"
    assert path.stat().st_mode == plain.stat().st_mode
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "a.bin.tmp", "plain"]
