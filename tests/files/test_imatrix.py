"""Importance matrices: files of llama.cpp, written and read by ggml's own C code too, and every way to break one."""

from __future__ import annotations

import ctypes
import importlib.util
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantwire.quantizers.errors import FileError, QuantwireError
from quantwire.quantizers.files.imatrix import Imatrix, Sums, merge, read_imatrix, write_imatrix

QKV, MLP, EXPERTS = "double_blocks.0.img_attn.qkv.weight", "single_blocks.10.linear2.weight", "blk.0.ffn_up_exps.weight"


def sums(*rows: list[float], counts: list[int]) -> Sums:
    return Sums(torch.tensor(rows, dtype=torch.float64), torch.tensor(counts))


def example() -> Imatrix:
    entries = {
        MLP: sums([0.1, 2.0, 30.0], counts=[7]),
        QKV: sums([float(n) / 3 for n in range(40)], counts=[4096]),
        EXPERTS: sums([1.0, 2.0], [0.0, 0.0], [5.0, 0.25], counts=[3, 0, 2]),
    }
    return Imatrix(entries, ("a.json", "b.json --set Sampler.steps=4"), 8, 512)


# --- ggml's own reader and writer, the code behind llama-imatrix and llama-quantize ---


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


class _GgufParams(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("context", ctypes.POINTER(ctypes.c_void_p))]


@pytest.fixture(scope="module")
def ggml() -> Any:
    spec = importlib.util.find_spec("libggml")
    if spec is None or spec.origin is None:
        pytest.skip("libggml-python is not installed")
    found = [p for p in Path(spec.origin).parent.glob("*/*ggml-base.*") if p.suffix in (".so", ".dll", ".dylib")]
    lib = ctypes.CDLL(str(found[0]))
    for name in ("ggml_init", "gguf_init_empty", "gguf_init_from_file", "ggml_new_tensor_2d", "ggml_get_data_f32"):
        getattr(lib, name).restype = ctypes.c_void_p
    for name in ("gguf_find_key", "gguf_get_n_tensors"):
        getattr(lib, name).restype = ctypes.c_int64
    lib.gguf_get_arr_n.restype = ctypes.c_size_t
    for name in ("gguf_get_tensor_name", "gguf_get_arr_str", "gguf_get_val_str"):
        getattr(lib, name).restype = ctypes.c_char_p
    lib.ggml_get_tensor.restype = ctypes.c_void_p
    return lib


def written_by_ggml(lib: Any, path: Path, matrix: Imatrix) -> bytes:
    """The file as llama-imatrix makes it, call by call."""
    p, i64 = ctypes.c_void_p, ctypes.c_int64
    context = p(lib.ggml_init(_InitParams(1 << 20, None, False)))
    gguf = p(lib.gguf_init_empty())
    lib.gguf_set_val_str(gguf, b"general.type", b"imatrix")
    datasets = [d.encode() for d in matrix.datasets]
    array = (ctypes.c_char_p * len(datasets))(*datasets)
    lib.gguf_set_arr_str(gguf, b"imatrix.datasets", array, ctypes.c_size_t(len(datasets)))
    lib.gguf_set_val_u32(gguf, b"imatrix.chunk_count", ctypes.c_uint32(matrix.chunk_count))
    lib.gguf_set_val_u32(gguf, b"imatrix.chunk_size", ctypes.c_uint32(matrix.chunk_size))
    for name, entry in sorted(matrix.entries.items()):
        rows, columns = entry.squares.shape
        for suffix, width, values in (("in_sum2", columns, entry.squares), ("counts", 1, entry.counts)):
            tensor = p(lib.ggml_new_tensor_2d(context, ctypes.c_int(0), i64(width), i64(rows)))
            lib.ggml_set_name(tensor, f"{name}.{suffix}".encode())
            raw = values.float().numpy().tobytes()
            ctypes.memmove(lib.ggml_get_data_f32(tensor), raw, len(raw))
            lib.gguf_add_tensor(gguf, tensor)
    lib.gguf_write_to_file(gguf, str(path).encode(), ctypes.c_bool(False))
    lib.gguf_free(gguf)
    lib.ggml_free(context)
    return path.read_bytes()


def read_by_ggml(lib: Any, path: Path, names: list[str]) -> tuple[list[str], int, dict[str, np.ndarray]]:
    """Datasets, chunk count and the tensors asked for, as llama-quantize reads them."""
    p = ctypes.c_void_p
    context = p()
    gguf = p(lib.gguf_init_from_file(str(path).encode(), _GgufParams(False, ctypes.pointer(context))))
    assert gguf.value, "ggml cannot open the file"
    key = ctypes.c_int64(lib.gguf_find_key(gguf, b"imatrix.datasets"))
    count = lib.gguf_get_arr_n(gguf, key)
    datasets = [lib.gguf_get_arr_str(gguf, key, ctypes.c_size_t(i)).decode() for i in range(count)]
    chunks = lib.gguf_get_val_u32(gguf, ctypes.c_int64(lib.gguf_find_key(gguf, b"imatrix.chunk_count")))
    arrays: dict[str, np.ndarray] = {}
    lib.ggml_nelements.restype = ctypes.c_int64
    for name in names:
        tensor = p(lib.ggml_get_tensor(context, name.encode()))
        assert tensor.value, name
        size = lib.ggml_nelements(tensor)
        pointer = ctypes.cast(lib.ggml_get_data_f32(tensor), ctypes.POINTER(ctypes.c_float))
        arrays[name] = np.ctypeslib.as_array(pointer, (size,)).copy()
    lib.gguf_free(gguf)
    lib.ggml_free(context)
    return datasets, chunks, arrays


def test_the_bytes_are_those_of_ggml(ggml: Any, tmp_path: Path) -> None:
    write_imatrix(tmp_path / "ours.gguf", example())
    assert (tmp_path / "ours.gguf").read_bytes() == written_by_ggml(ggml, tmp_path / "theirs.gguf", example())


def test_ggml_opens_our_file(ggml: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write_imatrix(path, example())
    names = [f"{name}.{suffix}" for name in (QKV, MLP, EXPERTS) for suffix in ("in_sum2", "counts")]
    datasets, chunks, arrays = read_by_ggml(ggml, path, names)
    assert (tuple(datasets), chunks) == (example().datasets, 8)
    for name, entry in example().entries.items():
        assert np.array_equal(arrays[f"{name}.in_sum2"], entry.squares.float().numpy().ravel())
        assert np.array_equal(arrays[f"{name}.counts"], entry.counts.float().numpy())


def test_a_file_of_ggml_is_read(ggml: Any, tmp_path: Path) -> None:
    written_by_ggml(ggml, tmp_path / "a.gguf", example())
    same(read_imatrix(tmp_path / "a.gguf"), example())


# --- reading, writing, looking up ---


def same(got: Imatrix, wanted: Imatrix) -> None:
    assert dict.fromkeys(sorted(got.entries)) == dict.fromkeys(sorted(wanted.entries))
    assert got.datasets == wanted.datasets
    assert (got.chunk_count, got.chunk_size, got.calls_only) == (wanted.chunk_count, wanted.chunk_size, False)
    for name, entry in wanted.entries.items():
        assert torch.equal(got.entries[name].squares.float(), entry.squares.float())
        assert torch.equal(got.entries[name].counts, entry.counts)


def test_round_trip(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "a.gguf", example())
    read = read_imatrix(tmp_path / "a.gguf")
    same(read, example())
    write_imatrix(tmp_path / "b.gguf", read)
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()


def test_importance_is_the_mean_as_llama_quantize_computes_it(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "a.gguf", example())
    read = read_imatrix(tmp_path / "a.gguf")
    found = read.find(MLP)
    assert found is not None
    assert found.dtype == torch.float32
    wanted = np.array([0.1, 2.0, 30.0], np.float32) / np.float32(7)  # float sums over a float count
    assert np.array_equal(found.numpy(), wanted)
    direct = example().find(MLP)
    assert direct is not None
    assert torch.equal(direct, found)
    experts = read.find(EXPERTS)
    assert experts is not None
    # The expert that no input reached weighs all columns alike.
    assert experts.tolist() == [[torch.tensor(1 / 3).item(), torch.tensor(2 / 3).item()], [1.0, 1.0], [2.5, 0.125]]
    assert read.find("double_blocks.0.img_attn.proj.weight") is None


def test_a_weight_that_no_input_reached_weighs_all_columns_alike() -> None:
    found = Imatrix({QKV: sums([0.0, 0.0], counts=[0])}).find(QKV)
    assert found is not None
    assert found.tolist() == [1.0, 1.0]


def test_sums_of_several_files_add(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "a.gguf", Imatrix({QKV: sums([1.0, 2.0], counts=[2])}, ("a",), 1, 2))
    other = {QKV: sums([5.0, 1.0], counts=[6]), MLP: sums([4.0], counts=[1])}
    write_imatrix(tmp_path / "b.gguf", Imatrix(other, ("b",), 3, 2))
    both = merge([read_imatrix(tmp_path / "a.gguf"), read_imatrix(tmp_path / "b.gguf")])
    found = both.find(QKV)
    assert found is not None
    assert found.tolist() == [0.75, 0.375]
    assert both.entries[QKV].counts.tolist() == [8]
    assert both.entries.keys() == {QKV, MLP}
    assert (both.datasets, both.chunk_count, both.chunk_size) == (("a", "b"), 4, 2)


def test_files_of_other_sizes_are_not_merged() -> None:
    matrices = [Imatrix({QKV: sums([1.0] * n, counts=[1])}) for n in (3, 4)]
    with pytest.raises(FileError, match=rf"^'{QKV}': importance matrices of different sizes \(3 and 4\)"):
        merge(matrices)


def test_long_names_are_written_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = f"{'a' * 80}.weight"
    write_imatrix(tmp_path / "a.gguf", Imatrix({name: sums([1.0], counts=[1])}))
    assert "longer than ggml allows" in caplog.text
    assert list(read_imatrix(tmp_path / "a.gguf").entries) == [name]


# --- the binary form before GGUF ---


def legacy(*entries: tuple[str, int, list[float]], end: bytes = b"") -> bytes:
    parts = [struct.pack("<i", len(entries))]
    for name, calls, values in entries:
        parts.append(struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(values)))
        parts.append(struct.pack(f"<{len(values)}f", *values))
    return b"".join(parts) + end


@pytest.mark.parametrize("end", [b"", struct.pack("<ii", 4, 7) + b"data.tx"], ids=["no-end", "with-dataset"])
def test_the_form_before_gguf(tmp_path: Path, end: bytes) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(legacy((QKV, 4, [1.0, 3.0]), ("output.weight", 0, [5.0]), end=end))
    read = read_imatrix(path)
    assert (read.datasets, read.chunk_count, read.calls_only) == ((("data.tx",), 4, True) if end else ((), 0, True))
    for name, wanted in ((QKV, [0.25, 0.75]), ("output.weight", [5.0])):
        found = read.find(name)
        assert found is not None
        assert found.tolist() == wanted
    with pytest.raises(FileError, match="so their sums do not add up"):
        merge([read, example()])
    with pytest.raises(FileError, match="cannot be written: the importance matrix counts calls"):
        write_imatrix(tmp_path / "b.gguf", read)


# --- bad files ---


def refusal(path: Path) -> str:
    with pytest.raises(FileError) as failure:
        read_imatrix(path)
    first = str(failure.value).splitlines()[0]
    assert path.name in first
    assert first.endswith((".", ")."))
    return first


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        pytest.param(sums([1.0, float("nan")], counts=[1]), "1 of 2 sums are nan, inf or negative.", id="nan"),
        pytest.param(sums([1.0, float("inf")], counts=[1]), "1 of 2 sums are nan, inf or negative.", id="inf"),
        pytest.param(sums([1.0, -1.0], counts=[1]), "1 of 2 sums are nan, inf or negative.", id="negative"),
        pytest.param(sums([1.0, 1.0], counts=[-1]), "1 of 1 counts are nan, inf or negative.", id="count"),
        pytest.param(sums([1.0, 1.0, 1.0], counts=[1, 2]), "3 sums do not go with 2 counts.", id="lengths"),
    ],
)
def test_bad_values_are_refused_by_name(ggml: Any, tmp_path: Path, entry: Sums, message: str) -> None:
    path = tmp_path / "a.gguf"
    if entry.squares.shape[0] != entry.counts.shape[0]:
        write_raw(path, {f"{QKV}.in_sum2": [1.0, 1.0, 1.0], f"{QKV}.counts": [1.0, 2.0]})
    else:
        written_by_ggml(ggml, path, Imatrix({QKV: entry}))
    assert refusal(path) == f"a.gguf: '{QKV}': {message}"


def write_raw(path: Path, tensors: dict[str, list[float]], general_type: str = "imatrix", **keys: Any) -> None:
    """A GGUF file made with gguf's writer, so of any content."""
    gguf: Any = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(path), "none")
    writer.add_type(general_type)
    for key, value in keys.items():
        (writer.add_uint64 if isinstance(value, int) else writer.add_string)(f"imatrix.{key}", value)
    for name, values in tensors.items():
        writer.add_tensor(name, np.array(values, np.float16 if "f16" in name else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        pytest.param({"a.in_sum2": [1.0]}, "'a.counts' is missing", id="no-counts"),
        pytest.param({"a.counts": [1.0]}, "'a.in_sum2' is missing", id="no-sums"),
        pytest.param({"a.in_sum": [1.0]}, "'a.in_sum2' is missing", id="only-plain-sums"),
        pytest.param({"a.weight": [1.0]}, "without entries", id="other-tensors"),
        pytest.param({"f16.in_sum2": [1.0], "f16.counts": [1.0]}, "has type F16, expected F32", id="type"),
    ],
)
def test_incomplete_entries(tmp_path: Path, tensors: dict[str, list[float]], message: str) -> None:
    write_raw(tmp_path / "a.gguf", tensors)
    assert message in refusal(tmp_path / "a.gguf")


def test_sums_of_newer_files_and_fractions_are_taken_as_llama_cpp_takes_them(tmp_path: Path) -> None:
    write_raw(tmp_path / "a.gguf", {"a.in_sum": [1.0, -9.0], "a.in_sum2": [1.0, 3.0], "a.counts": [1.5], "b": [1.0]})
    read = read_imatrix(tmp_path / "a.gguf")
    assert list(read.entries) == ["a"]
    assert read.entries["a"].counts.tolist() == [2]  # lround


def test_a_model_is_no_importance_matrix(tmp_path: Path) -> None:
    write_raw(tmp_path / "model.gguf", {"a.weight": [1.0]}, general_type="model")
    assert "not an importance matrix (its general.type is 'model', not 'imatrix')" in refusal(tmp_path / "model.gguf")


def test_keys_of_the_wrong_type(tmp_path: Path) -> None:
    write_raw(tmp_path / "a.gguf", {"a.in_sum2": [1.0], "a.counts": [1.0]}, chunk_count="many")
    assert "expected numbers" in refusal(tmp_path / "a.gguf")


def test_numbers_of_calls_that_a_file_cannot_say(tmp_path: Path) -> None:
    write_raw(tmp_path / "a.gguf", {"a.in_sum2": [1.0], "a.counts": [1.0]}, chunk_count=1 << 32)
    assert "expected numbers of 32 bits" in refusal(tmp_path / "a.gguf")
    most = Imatrix({QKV: sums([1.0], counts=[1])}, (), (1 << 32) - 1)
    write_imatrix(tmp_path / "b.gguf", most)
    assert read_imatrix(tmp_path / "b.gguf").chunk_count == (1 << 32) - 1
    with pytest.raises(FileError, match="4294967296 model calls together: a file holds 4294967295"):
        merge([most, Imatrix({}, (), 1)])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0\0\0\0",
        b"{}" * 50,
        struct.pack("<ii", 1, 1 << 30) + b"name",
        legacy((QKV, 1, [1.0, 2.0]))[:-1],
        legacy((QKV, 1, [])),
        legacy((QKV, -1, [1.0])),
        legacy((QKV, 1, [1.0]), (QKV, 1, [1.0])),
        struct.pack("<iii", 1, 2, -1) + b"\xff\xff",
    ],
    ids=["empty", "no-entries", "text", "huge-name", "cut", "no-values", "negative-calls", "twice", "not-utf-8"],
)
def test_files_of_no_known_form(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.dat"
    path.write_bytes(content)
    assert "not an importance matrix: neither GGUF, nor llama.cpp's form before it" in refusal(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="cannot be read: No such file"):
        read_imatrix(tmp_path / "none.gguf")


def mutants(content: bytes) -> Iterator[bytes]:
    generator = random.Random(5)
    for length in range(0, len(content), 7):
        yield content[:length]
    for _ in range(1500):
        mutant = bytearray(content)
        for _ in range(generator.choice([1, 1, 4])):
            mutant[generator.randrange(len(mutant))] = generator.choice([0, 1, 0x7F, 0xFF, generator.randrange(256)])
        yield bytes(mutant)


@pytest.mark.parametrize("form", ["gguf", "dat"])
def test_damaged_files_are_refused_or_read_never_anything_else(tmp_path: Path, form: str) -> None:
    path = tmp_path / "a"
    write_imatrix(path, Imatrix({QKV: sums([1.0, 2.0], counts=[3]), MLP: sums([1.0], counts=[1])}, ("a",), 1, 3))
    content = path.read_bytes() if form == "gguf" else legacy((QKV, 3, [1.0, 2.0]), (MLP, 1, [4.0]))
    refused = 0
    for mutant in mutants(content):
        path.write_bytes(mutant)
        try:
            found = [read_imatrix(path).find(name) for name in (QKV, MLP)]
        except QuantwireError:
            refused += 1
        else:
            assert all(f is None or bool((torch.isfinite(f) & (f >= 0)).all()) for f in found)
    assert refused > 100


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"old")
    for matrix, said in (
        (Imatrix({}), "has no entries"),
        (Imatrix({QKV: sums([1e300], counts=[1])}), "beyond float32"),
    ):
        with pytest.raises(FileError, match=said):
            write_imatrix(path, matrix)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"]
