"""Damaged GGUF files: whatever is in a header, a reader refuses it by name or gives what the file really holds.

Each case is a valid file with one to four mutations: bytes, cuts, splices with other files, and above all numbers of
the header (lengths, counts, types, dimensions, offsets, values) set to what breaks readers. A case may take a second
of CPU time, and address space may grow by 256 MiB: the process's own limit is set for it, so that memory which is asked
for and never touched counts too.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import mmap
import struct
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantwire.quantizers.errors import FileError
from quantwire.quantizers.files.checkpoint import read_checkpoint, read_gguf
from quantwire.quantizers.files.gguf_header import GgufHeader, read_array, read_part_header
from quantwire.quantizers.files.imatrix import read_imatrix
from quantwire.quantizers.weight import QuantizedWeight

gguf: Any = pytest.importorskip("gguf")
hypothesis: Any = pytest.importorskip("hypothesis")
st: Any = pytest.importorskip("hypothesis.strategies")
resource: Any = pytest.importorskip("resource")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits memory through /proc and RLIMIT_AS")

MAX_NBYTES, MAX_S = 256 << 20, 1.0
VALUE_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
POWERS = (*range(10), 12, 15, 16, 20, 22, 24, 25, 27, 31, 32, 33, 40, 53, 61, 62, 63, 64)
EXTREMES = sorted({min((1 << e) + d, (1 << 64) - 1) for e in POWERS for d in (-1, 0, 1)})
EXTREMES += [9, 13, 24, 31, 39, 41, 0x7FC00000, 0x7FF8000000000000]  # types at the ends of the tables; nan


@dataclass
class Seed:
    """A valid file, and where the numbers of its header stand: (byte, size)."""

    name: str
    content: bytes
    numbers: list[tuple[int, int]] = field(default_factory=list)
    header_nbytes: int = 0

    def __post_init__(self) -> None:
        self.header_nbytes = _Walk(self.content, self.numbers).walk()


class _Walk:
    """Finds the numbers of a valid file's header, without the code that is tested."""

    def __init__(self, content: bytes, numbers: list[tuple[int, int]]) -> None:
        self.content, self.numbers, self.at = content, numbers, 4

    def number(self, code: str) -> int:
        size = struct.calcsize(f"<{code}")
        (value,) = struct.unpack_from(f"<{code}", self.content, self.at)
        self.numbers.append((self.at, size))
        self.at += size
        return value

    def string(self) -> None:
        length = self.number("Q")
        self.at += length

    def value(self, kind: int) -> None:
        if kind == STRING:
            self.string()
        elif kind == ARRAY:
            item, count = self.number("I"), self.number("Q")
            for _ in range(count):
                self.value(item)
        else:
            self.number(VALUE_CODES[kind])

    def walk(self) -> int:
        self.number("I")
        tensors, keys = self.number("Q"), self.number("Q")
        for _ in range(keys):
            self.string()
            self.value(self.number("I"))
        for _ in range(tensors):
            self.string()
            for _ in range(self.number("I")):
                self.number("Q")
            self.number("I"), self.number("Q")
        return self.at


def written(path: Path, arch: str, fill: Callable[[Any], None]) -> bytes:
    """A file as the gguf package writes it."""
    writer = gguf.GGUFWriter(str(path), arch)
    fill(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def image_model(writer: Any) -> None:
    types = gguf.GGMLQuantizationType
    rng = np.random.default_rng(0)
    writer.add_file_type(7)
    writer.add_array("comfy.gguf.orig_shape.patch.weight", [4, 3, 2, 2])
    writer.add_tensor("patch.weight", rng.standard_normal((6, 8)).astype(np.float32))
    writer.add_tensor("img_in.bias", rng.standard_normal(5).astype(np.float16))
    for name, kind in (("a", types.Q8_0), ("b", types.Q4_0), ("c", types.MXFP4), ("d", types.BF16)):
        rows = gguf.quants.quantize(rng.standard_normal((3, 64)).astype(np.float32), kind)
        writer.add_tensor(f"double_blocks.0.{name}.weight", rows, raw_dtype=kind)
    blocks = np.zeros((2, 144), np.uint8)
    writer.add_tensor("double_blocks.1.weight", blocks, raw_dtype=types.Q4_K)
    writer.add_tensor("steps", np.arange(4, dtype=np.int64))


def text_encoder(writer: Any) -> None:
    writer.add_uint32("llama.block_count", 2)
    writer.add_float32("llama.rope.freq_base", 1e4)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_string("tokenizer.chat_template", "{{ messages }}" * 9)
    writer.add_array("tokenizer.ggml.tokens", [f"tok{i}" for i in range(120)] + ["\N{SNOWMAN}" * 99, "", "x"])
    writer.add_array("tokenizer.ggml.scores", [-i / 3 for i in range(123)])
    writer.add_array("tokenizer.ggml.token_type", [1, 2, 3] * 41)
    writer.add_tensor("blk.0.attn_q.weight", np.ones((8, 32), np.float32))
    writer.add_tensor("output_norm.weight", np.ones(32, np.float32))


def aligned(writer: Any) -> None:
    writer.add_custom_alignment(128)
    writer.add_uint64("big", 1 << 63)
    writer.add_float64("pi", 3.14)
    writer.add_int8("small", -1)
    for i in range(6):
        writer.add_tensor(f"t{i}", np.full((2, i + 1), i, np.float32))


def part_of_two(writer: Any) -> None:
    writer.add_uint16("split.no", 0)
    writer.add_uint16("split.count", 1)
    writer.add_int32("split.tensors.count", 1)
    writer.add_tensor("only", np.ones(4, np.float32))


def importance(writer: Any) -> None:
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["wiki"])
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name in ("blk.0.a.weight", "blk.0.b.weight"):
        writer.add_tensor(f"{name}.in_sum2", np.arange(8, dtype=np.float32).reshape(1, 8))
        writer.add_tensor(f"{name}.counts", np.full((1, 1), 3, np.float32))


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> list[Seed]:
    folder = tmp_path_factory.mktemp("seeds")
    fills = {"flux": image_model, "llama": text_encoder, "sd1": aligned, "t5": part_of_two, "": importance}
    return [Seed(fill.__name__, written(folder / fill.__name__, arch, fill)) for arch, fill in fills.items()]


# Mutations, as plain values: hypothesis makes them, repeats them from its seed, and makes a failing case small.

PLACE = st.integers(0, (1 << 32) - 1)  # modulo the number of places
BYTES = st.tuples(st.just("bytes"), st.lists(st.tuples(PLACE, st.integers(0, 255)), min_size=1, max_size=6))
NUMBER = st.tuples(st.just("number"), PLACE, st.sampled_from(EXTREMES))
NUDGE = st.tuples(st.just("nudge"), PLACE, st.integers(-40, 40))
CUT = st.tuples(st.just("cut"), PLACE)
DROP = st.tuples(st.just("drop"), PLACE, st.integers(1, 64))
SPLICE = st.tuples(st.just("splice"), PLACE, st.integers(0, 4), PLACE, st.integers(1, 400), st.booleans())
MUTATIONS = st.lists(st.one_of(NUMBER, NUMBER, NUMBER, NUDGE, NUDGE, BYTES, SPLICE, DROP, CUT), min_size=1, max_size=4)


def mutated(seed: Seed, mutations: list[Any], seeds: list[Seed]) -> bytes:
    content = bytearray(seed.content)
    for kind, *values in mutations:
        if kind == "bytes":
            for place, value in values[0]:
                content[place % min(len(content), seed.header_nbytes)] = value
        elif kind in ("number", "nudge"):
            at, size = seed.numbers[values[0] % len(seed.numbers)]
            if at + size <= len(content):
                old = int.from_bytes(content[at : at + size], "little")
                new = values[1] if kind == "number" else old + values[1]
                content[at : at + size] = (new % (1 << 8 * size)).to_bytes(size, "little")
        elif kind == "cut":
            del content[max(1, values[0] % len(content)) :]
        elif kind == "drop":
            at = values[0] % len(content)
            del content[at + (at == 0) : at + values[1]]
        else:
            place, other, source, nbytes, insert = values
            from_ = seeds[other % len(seeds)]
            start, at = source % from_.header_nbytes, place % min(len(content), seed.header_nbytes)
            content[at : at if insert else at + nbytes] = from_.content[start : start + nbytes]
    return bytes(content)


# What must hold


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """One second of CPU time, and 256 MiB more address space than now; beyond it an allocation fails.

    Without the garbage collector, which takes as long as the rest of the process has objects.
    """
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + MAX_NBYTES, hard))
    gc.disable()
    start = time.thread_time()
    try:
        yield
    finally:
        took = time.thread_time() - start
        gc.enable()
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert took < MAX_S, f"{took:.2f} s"


def check_consistent(header: GgufHeader, size: int) -> None:
    """Independent of the reader: sizes by gguf's table, places inside the file, nothing twice."""
    sizes = {t.name: gguf.GGML_QUANT_SIZES[t] for t in gguf.GGMLQuantizationType}
    end = 0
    for t in sorted(header.tensors, key=lambda t: (t.start, t.nbytes)):
        block, nbytes = sizes[t.kind]
        numel = 1
        for n in t.shape:
            assert n >= 0
            numel *= n
        assert numel % block == 0
        assert t.nbytes == numel // block * nbytes
        if t.nbytes:
            assert t.start >= end, "overlap"
            end = t.start + t.nbytes
            assert end <= size
    assert len({t.name for t in header.tensors}) == len(header.tensors)
    assert not header.metadata.keys() & (header.arrays.keys() | header.located.keys())


def check_tensors(path: Path, content: bytes, header: GgufHeader) -> None:
    """`read_gguf` gives the bytes at the places that the header names."""
    tensors = read_gguf(path).tensors
    assert list(tensors) == [t.name for t in header.tensors]
    for t in header.tensors:
        value = tensors[t.name]
        raw = value.tensors["qdata"] if isinstance(value, QuantizedWeight) else value
        assert raw.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() == content[t.start : t.start + t.nbytes]


def accepted(path: Path, content: bytes) -> bool:
    """Read everything that can be read; only FileError may come out. Whether the header was accepted."""
    path.write_bytes(content)
    with bounded():
        try:
            header = read_part_header(path)
        except FileError as err:
            check_message(err)
            with contextlib.suppress(FileError):
                read_checkpoint(path)
            return False
        for key, ref in header.located.items():
            try:
                assert len(read_array(path, header, key)) == ref.count
            except FileError as err:
                check_message(err)
        try:
            check_tensors(path, content, header)
        except FileError as err:
            check_message(err)
        with contextlib.suppress(FileError):
            read_imatrix(path)
    check_consistent(header, len(content))
    return True


def check_message(err: FileError) -> None:
    message = str(err)
    assert message.startswith("case.gguf: ")
    assert all(c.isprintable() or c == "\n" for c in message)
    assert len(message) < 1000


@pytest.mark.parametrize("index", range(5))
def test_unmutated_as_the_library_reads_them(seeds: list[Seed], tmp_path: Path, index: int) -> None:
    seed, path = seeds[index], tmp_path / "case.gguf"
    assert accepted(path, seed.content)
    header, theirs = read_part_header(path), gguf.GGUFReader(str(path))
    fields = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    ours = {k: list(read_array(path, header, k)) for k in (*header.arrays, *header.located)}
    assert ours | dict(header.metadata) == fields
    assert [(t.name, t.kind, list(t.shape), t.start, t.nbytes) for t in header.tensors] == [
        (t.name, t.tensor_type.name, t.shape.tolist()[::-1], t.data_offset, t.n_bytes) for t in theirs.tensors
    ]
    if seed.name == "importance":
        assert len(read_imatrix(path).entries) == 2


def fuzz(seeds: list[Seed], path: Path, most: int) -> tuple[int, int]:
    """Number of different damaged files that were read, and of those that were accepted."""
    seen: set[bytes] = set()
    count = 0

    @hypothesis.settings(
        max_examples=most,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(st.integers(0, len(seeds) - 1), MUTATIONS)
    def case(index: int, mutations: list[Any]) -> None:
        nonlocal count
        content = mutated(seeds[index], mutations, seeds)
        digest = hashlib.blake2b(content, digest_size=8).digest()
        if digest not in seen and content != seeds[index].content:
            count += accepted(path, content)
            seen.add(digest)

    case()
    return len(seen), count


def test_damaged_headers(seeds: list[Seed], tmp_path: Path) -> None:
    cases, count = fuzz(seeds, tmp_path / "case.gguf", 700)
    assert cases >= 500
    assert 20 <= count <= cases - 200, "mutations must neither be harmless nor all fatal"


def legacy_matrix() -> Seed:
    """llama.cpp's form before GGUF: entries of a name, calls and sums; numbers of calls at the end, and the data."""
    content = struct.pack("<i", 2)
    numbers = [(0, 4)]
    for name in (b"blk.0.a.weight", b"blk.0.b.weight"):
        numbers += [(len(content), 4), (len(content) + 4 + len(name), 4), (len(content) + 8 + len(name), 4)]
        content += struct.pack(f"<i{len(name)}sii8f", len(name), name, 3, 8, *range(8))
    numbers += [(len(content), 4), (len(content) + 4, 4)]
    seed = Seed.__new__(Seed)
    seed.name, seed.content, seed.numbers = "legacy", content + struct.pack("<ii4s", 3, 4, b"wiki"), numbers
    seed.header_nbytes = len(seed.content)
    return seed


def test_damaged_matrices_of_the_old_form(tmp_path: Path) -> None:
    seed, path, results = legacy_matrix(), tmp_path / "case.dat", {True: 0, False: 0}
    path.write_bytes(seed.content)
    assert len(read_imatrix(path).entries) == 2

    @hypothesis.settings(max_examples=600, derandomize=True, database=None, deadline=None)
    @hypothesis.given(MUTATIONS)
    def case(mutations: list[Any]) -> None:
        path.write_bytes(mutated(seed, mutations, [seed]))
        try:
            with bounded():
                entries = read_imatrix(path).entries
            assert all(bool(torch.isfinite(e.squares).all()) for e in entries.values())
            results[True] += 1
        except FileError:
            results[False] += 1

    case()
    assert sum(results.values()) >= 500
    assert min(results.values()) >= 10


@pytest.mark.slow
def test_twenty_thousand_damaged_headers(seeds: list[Seed], tmp_path: Path) -> None:
    cases, count = fuzz(seeds, tmp_path / "case.gguf", 26_000)
    assert cases >= 20_000
    assert 500 <= count <= cases - 5000
    print(f"{cases} damaged files, {count} accepted")


def test_the_limits_can_fail(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Cannot allocate memory"), bounded():
        mmap.mmap(-1, MAX_NBYTES + (1 << 20))  # malloc may have so much at hand that was freed before
    end = time.thread_time() + MAX_S + 0.01
    with pytest.raises(AssertionError, match=r"1\.\d+ s"), bounded():
        sum(iter(lambda: time.thread_time() > end, True))
