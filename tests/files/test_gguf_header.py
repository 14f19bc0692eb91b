"""The headers of GGUF files: arrays, limits, models in several files, and what is said of damaged ones."""

from __future__ import annotations

import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from quantwire.quantizers.errors import FileError
from quantwire.quantizers.files import gguf_header, gguf_source
from quantwire.quantizers.files.checkpoint import read_gguf
from quantwire.quantizers.files.gguf_header import GgufHeader, read_array, read_gguf_header
from quantwire.quantizers.files.gguf_parts import read_gguf_parts

U8, U16, U32, I32, F32, BOOL, STRING, ARRAY, U64, F64 = 0, 2, 4, 5, 6, 7, 8, 9, 10, 12
GGML_F32, GGML_Q8_0 = 0, 8
CODES = {U8: "B", U16: "H", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", F64: "d"}


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def key(name: bytes, kind: int, value: Any) -> bytes:
    raw = text(value) if kind == STRING else struct.pack(f"<{CODES[kind]}", value)
    return text(name) + struct.pack("<I", kind) + raw


def array(name: bytes, kind: int, items: Sequence[Any], count: int | None = None) -> bytes:
    head = text(name) + struct.pack("<IIQ", ARRAY, kind, len(items) if count is None else count)
    return head + (b"".join(map(text, items)) if kind == STRING else struct.pack(f"<{len(items)}{CODES[kind]}", *items))


def info(name: bytes, shape: tuple[int, ...], kind: int = GGML_F32, offset: int = 0) -> bytes:
    """`shape` innermost first, as in the file."""
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def gguf(
    keys: Sequence[bytes] = (),
    infos: Sequence[bytes] = (),
    data: bytes = b"",
    counts: tuple[int, int] | None = None,
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    tensor_count, key_count = counts or (len(infos), len(keys))
    head = struct.pack("<4sIQQ", b"GGUF", version, tensor_count, key_count) + b"".join((*keys, *infos))
    return head + b"\0" * (-len(head) % alignment) + data


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[bytes], GgufHeader]:
    def read(content: bytes) -> GgufHeader:
        (tmp_path / "a.gguf").write_bytes(content)
        return read_gguf_header(tmp_path / "a.gguf")

    return read


@pytest.fixture
def refused(tmp_path: Path) -> Callable[[bytes], str]:
    """The message for a file; it names the file and stands on the first line."""

    def read(content: bytes) -> str:
        path = tmp_path / "a.gguf"
        path.write_bytes(content)
        with pytest.raises(FileError) as failure:
            read_gguf_header(path)
        message = str(failure.value)
        assert message.startswith("a.gguf: ")
        assert all(c.isprintable() or c == "\n" for c in message)
        assert len(message.splitlines()) <= 2
        assert len(message) < 700
        return message

    return read


# Arrays


def test_arrays(tmp_path: Path) -> None:
    long = [i - 70_000 for i in range(200_000)]
    scores = [i / 8 for i in range(5000)]
    tokens = ["a", "", "\N{SNOWMAN}" * 100, "nul\0inside", "x" * 300, *(f"token{i}" for i in range(30_000)), "", ""]
    path = tmp_path / "a.gguf"
    path.write_bytes(
        gguf(
            [
                key(b"general.architecture", STRING, b"llama"),
                array(b"sections", I32, [16, 24, -24, 0]),
                array(b"flags", BOOL, [True, False]),
                array(b"none", U8, []),
                array(b"no-strings", STRING, []),
                array(b"long", I32, long),
                array(b"scores", F32, scores),
                array(b"tokens", STRING, [t.encode() for t in tokens]),
                key(b"after", F64, 0.1),
            ]
        )
    )
    header = read_gguf_header(path)
    assert header.metadata == {"general.architecture": "llama", "after": 0.1}
    assert header.arrays == {"sections": (16, 24, -24, 0), "flags": (True, False), "none": ()}
    assert header.arrays["flags"][0] is True
    assert {k: (r.kind, r.count) for k, r in header.located.items()} == {
        "no-strings": ("string", 0),
        "long": ("int32", 200_000),
        "scores": ("float32", 5000),
        "tokens": ("string", len(tokens)),
    }
    assert read_array(path, header, "tokens") == tuple(tokens)
    assert read_array(path, header, "long") == tuple(long)
    assert read_array(path, header, "scores") == tuple(scores)
    assert read_array(path, header, "sections") == (16, 24, -24, 0)
    assert read_array(path, header, "no-strings") == ()


def test_arrays_as_the_library_reads_them(tmp_path: Path) -> None:
    library: Any = pytest.importorskip("gguf")
    path = tmp_path / "a.gguf"
    writer = library.GGUFWriter(str(path), "llama")
    tokens = [f"\N{GREEK SMALL LETTER ALPHA}{i}" for i in range(5000)]
    writer.add_array("tokenizer.ggml.tokens", tokens)
    writer.add_array("tokenizer.ggml.scores", [-i / 2 for i in range(5000)])
    writer.add_array("tokenizer.ggml.token_type", [1, 3, 6])
    writer.add_array("tokenizer.ggml.flags", [True, False])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    header, fields = read_gguf_header(path), library.GGUFReader(str(path)).fields
    for name in ("tokens", "scores", "token_type", "flags"):
        full = f"tokenizer.ggml.{name}"
        assert list(read_array(path, header, full)) == fields[full].contents()


@pytest.mark.parametrize("length", [1, 7, 255, 256, 257, 65_528, 65_536, 70_000, 200_000])
def test_strings_at_the_edges_of_the_window(tmp_path: Path, length: int) -> None:
    tokens = ["a" * (i % 3) + "b" * length for i in range(8)] + ["c"]
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf([array(b"t", STRING, [t.encode() for t in tokens]), key(b"k", U8, 7)]))
    header = read_gguf_header(path)
    assert header.metadata == {"k": 7}
    assert read_array(path, header, "t") == tuple(tokens)


def test_an_array_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf([key(b"k", U8, 7)]))
    header = read_gguf_header(path)
    with pytest.raises(FileError, match=r"^a.gguf: it has no array 'tokens' \(no such key\)\.\n"):
        read_array(path, header, "tokens")
    with pytest.raises(FileError, match=r"^a.gguf: it has no array 'k' \(a single value\)\."):
        read_array(path, header, "k")


def test_a_token_that_is_not_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    content = gguf([array(b"t", STRING, [b"one", b"tw\xff", b"three"])])
    path.write_bytes(content)
    header = read_gguf_header(path)
    with pytest.raises(FileError) as failure:
        read_array(path, header, "t")
    at = content.index(b"\xff")
    assert str(failure.value) == f"a.gguf: corrupt GGUF file: item 1 of 't' is not UTF-8 (byte {at})."


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        pytest.param(gguf(), "truncated GGUF file: 't' at byte ", id="shorter"),
        pytest.param(
            gguf([array(b"t", STRING, [b"a" * 9, b"b" * 9])]), "item 1 of 't' at byte 66 changed", id="longer-items"
        ),
    ],
)
def test_a_file_that_changed_since_its_header_was_read(tmp_path: Path, changed: bytes, message: str) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf([array(b"t", STRING, [b"a", b"b"]), key(b"pad", STRING, b"p" * 99)]))
    header = read_gguf_header(path)
    path.write_bytes(changed)
    with pytest.raises(FileError) as failure:
        read_array(path, header, "t")
    assert message in str(failure.value)


# What is refused, by name and byte


MIB = 1 << 20
KEY0 = 24  # where the first key or info begins


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "truncated GGUF file: the magic at byte 0 needs 4 bytes, 0 are left", id="empty"),
        pytest.param(b"GGML" + bytes(99), "not a GGUF file (it begins with b'GGML'", id="magic"),
        pytest.param(gguf(version=1), "GGUF version 1 cannot be read", id="version-1"),
        pytest.param(gguf(version=4), "GGUF version 4 cannot be read, only little-endian 2 and 3", id="version-4"),
        pytest.param(
            struct.pack(">4sIQQ", b"GGUF", 3, 1, 1) + bytes(99),
            "big-endian GGUF version 3 (byte 4) cannot be read, only little-endian 2 and 3.\nConvert it: `gguf-convert",
            id="big-endian",
        ),
        pytest.param(gguf(counts=(0, 2**63)), f"truncated GGUF file: the {2**63} keys", id="huge-key-count"),
        pytest.param(gguf(counts=(2**63, 0)), f"truncated GGUF file: the {2**63} tensors", id="huge-tensor-count"),
        pytest.param(
            gguf(counts=(0, 70_000), data=bytes(MIB)), "corrupt GGUF file: 70000 keys in its first", id="keys-limit"
        ),
        pytest.param(
            gguf(counts=(140_000, 0), data=bytes(4 * MIB)), "140000 tensors in its first 24 bytes", id="tensors-limit"
        ),
        pytest.param(
            gguf([array(b"t", U8, [], 2**63)]), f"truncated GGUF file: 't' at byte 49 needs {2**63}", id="huge-array"
        ),
        pytest.param(
            gguf([array(b"t", STRING, [], 2**63)]), f"'t' at byte 49 needs {2**66} bytes", id="huge-string-array"
        ),
        pytest.param(
            gguf([array(b"t", U8, [], 2 * MIB)], data=bytes(2 * MIB)),
            f"corrupt GGUF file: 't' has {2 * MIB} items (byte 37), at most {3 << 18}",
            id="items-limit",
        ),
        pytest.param(
            gguf([array(b"%d" % i, U8, bytes(MIB // 2)) for i in range(9)]),
            f"'8' has {MIB // 2} items (byte {37 + 8 * (MIB // 2 + 25)}), at most",
            id="all-items-limit",
        ),
        pytest.param(
            gguf([text(b"n" * MIB)]), f"a key would have {MIB} bytes (byte {KEY0}), at most 65535", id="long-key"
        ),
        pytest.param(
            gguf(infos=[info(b"n" * MIB, (1,))]), f"a tensor name would have {MIB} bytes (byte 24)", id="long-name"
        ),
        pytest.param(
            gguf([key(b"a", STRING, b"x" * 20 * MIB), key(b"b", STRING, b"y" * 20 * MIB)]),
            f"'b' at byte {24 + 21 + 20 * MIB + 13} makes more than",
            id="text-limit",
        ),
        pytest.param(gguf([key(b"k", STRING, b"ab\xff")]), "'k' is not UTF-8 (byte 47)", id="value-not-utf-8"),
        pytest.param(gguf([key(b"k\xff", U8, 1)]), "a key is not UTF-8 (byte 33)", id="key-not-utf-8"),
        pytest.param(gguf(infos=[info(b"\xc0", (1,))]), "a tensor name is not UTF-8 (byte 32)", id="name-not-utf-8"),
        pytest.param(gguf([key(b"k", U8, 1), key(b"k", U8, 1)]), "the key 'k' at byte 38 appears twice", id="same-key"),
        pytest.param(
            gguf([array(b"k", STRING, []), key(b"k", U8, 1)]), "the key 'k' at byte 49 appears twice", id="same-array"
        ),
        pytest.param(
            gguf(infos=[info(b"a", (8,)), info(b"a", (8,), offset=32)], data=bytes(64)),
            "'a' appears twice (infos at bytes 24 and 57)",
            id="same-name",
        ),
        pytest.param(
            gguf([text(b"k") + struct.pack("<IB", BOOL, 2)]), "'k' at byte 37 is the bool 2", id="bool-of-two"
        ),
        pytest.param(
            gguf([text(b"k") + struct.pack("<IIQ3B", ARRAY, BOOL, 3, 0, 1, 9)]),
            "byte 51 is the bool 9",
            id="bool-array",
        ),
        pytest.param(gguf([text(b"k") + struct.pack("<I", 13)]), "unknown value type 13 (byte 33)", id="value-type"),
        pytest.param(
            gguf([text(b"k") + struct.pack("<IIQ", ARRAY, ARRAY, 1)]), "an array of the unknown type 9", id="nested"
        ),
        *(
            pytest.param(
                gguf([key(b"general.alignment", kind, value)]), f"alignment {shown} is not", id=f"align-{name}"
            )
            for name, kind, value, shown in (
                ("nan", F32, float("nan"), "nan"),
                ("inf", F64, float("inf"), "inf"),
                ("negative", I32, -32, "-32"),
                ("float", F32, 32.0, "32.0"),
                ("huge", U64, 2**63, str(2**63)),
                ("4", U32, 4, "4"),
                ("bool", BOOL, True, "True"),
                ("text", STRING, b"32\n" + b"\0" * 500, r"'32\n\x00" + r"\x00" * 116 + "'... (503 characters)"),
            )
        ),
        pytest.param(gguf(infos=[info(b"a", (8,), 77)], data=bytes(32)), "'a' has the unknown ggml type 77", id="type"),
        pytest.param(
            gguf(infos=[info(b"a", (32,), 31)], data=bytes(32)),
            "'a' has GGUF type Q4_0_4_4, which cannot be read here (info at byte 24).\nToday's tools",
            id="withdrawn-type",
        ),
        pytest.param(gguf(infos=[info(b"a", (1,) * 9)]), "'a' would have 9 dimensions (byte 33)", id="dimensions"),
        pytest.param(
            gguf(infos=[info(b"a", (33,), GGML_Q8_0)], data=bytes(99)), "'a' has rows of 33, no multiple of", id="rows"
        ),
        pytest.param(
            gguf(infos=[info(b"a", (), GGML_Q8_0)], data=bytes(99)), "'a' has rows of 1, no multiple", id="scalar-block"
        ),
        pytest.param(
            gguf(infos=[info(b"a", (2**62, 4))], data=bytes(64)), f"'a' ends at byte {2**66 + 96}", id="wrapping-size"
        ),
        pytest.param(
            gguf(infos=[info(b"a", (0, 2**62, 4))], data=bytes(64)),
            f"has the shape (4, {2**62}, 0)",
            id="empty-overflow",
        ),
        pytest.param(
            gguf(infos=[info(b"a", (8,), offset=2**64 - 32)], data=bytes(32)), f"ends at byte {2**64 + 64}", id="offset"
        ),
        pytest.param(
            gguf(infos=[info(b"a", (0,), offset=96)], data=bytes(32)), "'a' ends at byte 160, the", id="empty-outside"
        ),
        pytest.param(
            gguf(infos=[info(b"a", (16,)), info(b"b", (8,), offset=32)], data=bytes(64)),
            "'a' and 'b' overlap (bytes 96 to 160, and from 128)",
            id="overlap",
        ),
        pytest.param(
            gguf([text(b"k\n\x1b[31m\0") + struct.pack("<I", 13)]),
            r"'k\n\x1b[31m\x00' has the unknown value type 13",
            id="control-characters",
        ),
        pytest.param(
            gguf(infos=[info(b"\n" * 60_000, (8,), 77)]),
            "... (60000 characters) has the unknown",
            id="long-damaged-name",
        ),
        pytest.param(gguf([key(b"split.count", F32, float("nan"))]), "'split.count' is nan, expected", id="split-nan"),
        pytest.param(gguf([key(b"split.count", I32, -1)]), "'split.count' is -1, expected 0 to", id="split-negative"),
    ],
)
def test_refused(refused: Callable[[bytes], str], content: bytes, message: str) -> None:
    tracemalloc.start()
    start = time.thread_time()
    try:
        found = refused(content)
        assert time.thread_time() - start < 1
        assert tracemalloc.get_traced_memory()[1] < 256 * MIB
    finally:
        tracemalloc.stop()
    assert message in found


def test_too_much_text_in_an_array(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf([array(b"t", STRING, [b"x" * 20 * MIB])]))
    header = read_gguf_header(path)
    with pytest.raises(FileError, match=r"'t' at byte 49 has more than 16777216 bytes of text"):
        read_array(path, header, "t")


def test_header_longer_than_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a smaller limit: at the real one the file would have 128 MiB."""
    monkeypatch.setattr(gguf_source, "MAX_HEADER_NBYTES", 5000)
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf([array(b"t", STRING, [b"x" * 90] * 60)]))
    with pytest.raises(FileError, match=r"'t' at byte 49 would end at byte \d+; headers of more than 5000 bytes"):
        read_gguf_header(path)


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(b"GGUF", id="zeros"),
        pytest.param(struct.pack("<4sIQQ", b"GGUF", 3, 0, 2**63), id="keys"),
        pytest.param(struct.pack("<4sIQQ", b"GGUF", 3, 0, 1 << 16), id="most-keys"),
        pytest.param(struct.pack("<4sIQQ", b"GGUF", 3, 1 << 17, 0), id="most-tensors"),
        pytest.param(gguf([array(b"t", STRING, [], 2**31)], counts=(0, 3))[:49], id="strings"),
        pytest.param(gguf([array(b"t", STRING, [], 3 << 18)], counts=(0, 3))[:49], id="most-strings"),
        pytest.param(gguf([array(b"t", F64, [], 2**31)], counts=(0, 3))[:49], id="numbers"),
        pytest.param(gguf([text(b"k") + struct.pack("<IQ", STRING, 2**33)])[:45], id="string"),
    ],
)
def test_twenty_gib_of_zeros(tmp_path: Path, head: bytes) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(head)
    with open(path, "r+b") as file:
        file.truncate(20 << 30)
    start = time.thread_time()
    with pytest.raises(FileError):
        read_gguf_header(path)
    assert time.thread_time() - start < 1


# The high-water mark counts what other libraries allocate too, and costs no time. That of getrusage was not chosen: a
# child begins with its parent's.
PEAK = """
import re, sys
from pathlib import Path
from quantwire.quantizers.files.gguf_header import known_types, read_array, read_gguf_header
known_types()
def status(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024
before = status("VmRSS")
path = Path(sys.argv[1])
header = read_gguf_header(path)
print(len(header.metadata["k"] if "k" in header.metadata else read_array(path, header, "t")))
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("what", ["text", "strings"])
def test_memory_of_the_largest_that_is_read(tmp_path: Path, what: str) -> None:
    """What Python needs most for: one character beyond 16 bits makes all of a string wide."""
    path, wide = tmp_path / "a.gguf", "\N{GRINNING FACE}".encode()
    if what == "text":
        expected = gguf_source.MAX_TEXT_NBYTES - 4
        path.write_bytes(gguf([key(b"k", STRING, b"x" * (expected - 1) + wide)]))
    else:
        expected = gguf_source.MAX_ITEMS
        path.write_bytes(gguf([array(b"t", STRING, [b"x" * 12 + wide] * expected)]))
    done = subprocess.run([sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True)
    length, peak = map(int, done.stdout.split())
    assert length == expected
    assert peak < 256 * MIB, f"{peak / MIB:.0f} MiB"


def test_the_limits_leave_room() -> None:
    """The largest vocabulary of today: Gemma 3 with 262,144 tokens and 514,906 merges."""
    assert gguf_source.MAX_ITEMS >= 1.5 * 514_906
    assert gguf_header.MAX_ALL_ITEMS >= 2 * (514_906 + 3 * 262_144)
    assert gguf_source.MAX_TEXT_NBYTES > 33_384_568, "its tokenizer.json"
    assert gguf_header.MAX_TENSORS >= 2 * 61 * 256 * 3, "a tensor for each expert of the largest models"


def test_odd_and_right(opened: Callable[[bytes], GgufHeader], tmp_path: Path) -> None:
    """Empty and scalar tensors, names longer than ggml's, another alignment, and no padding behind the last tensor."""
    name = b"\xc3\xa9" * 500
    header = opened(
        gguf(
            [key(b"general.alignment", U32, 64)],
            [
                info(b"scalar", ()),
                info(b"empty", (4, 0), offset=64),
                info(name, (2, 1, 3, 1, 1), offset=64),
                info(b"blocks", (32, 0), GGML_Q8_0, 128),
            ],
            bytes(64 + 24),
            alignment=64,
        )
    )
    assert [(t.name, t.kind, t.shape, t.nbytes) for t in header.tensors] == [
        ("scalar", "F32", (), 4),
        ("empty", "F32", (0, 4), 0),
        (name.decode(), "F32", (1, 1, 3, 1, 2), 24),
        ("blocks", "Q8_0", (0, 32), 0),
    ]
    assert {t.start % 64 for t in header.tensors} == {0}
    tensors = read_gguf(tmp_path / "a.gguf").tensors
    assert [tuple(t.shape) for t in tensors.values() if isinstance(t, torch.Tensor)] == [
        *((), (0, 4), (1, 1, 3, 1, 2), (0, 32))
    ]


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(array(b"comfy.gguf.orig_shape.a", F32, [float("nan"), 8.0]), id="nan"),
        pytest.param(array(b"comfy.gguf.orig_shape.a", I32, [-2, -4]), id="negative"),
        pytest.param(array(b"comfy.gguf.orig_shape.a", I32, [3, 3]), id="other-size"),
        pytest.param(array(b"comfy.gguf.orig_shape.a", BOOL, [True] * 3), id="bools"),
        pytest.param(array(b"comfy.gguf.orig_shape.a", I32, [8, *[1] * 8]), id="dimensions"),
        pytest.param(array(b"comfy.gguf.orig_shape.a", STRING, [b"8"]), id="strings"),
        pytest.param(array(b"comfy.gguf.orig_shape.empty", U64, [2**63, 0]), id="huge-and-empty"),
        pytest.param(array(b"comfy.gguf.orig_shape.empty", U64, [2**62, 0, 4]), id="wrapping-and-empty"),
    ],
)
def test_another_shape_that_cannot_be(tmp_path: Path, shape: bytes) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf([shape], [info(b"a", (8,)), info(b"empty", (0, 2), offset=32)], bytes(32)))
    with pytest.raises(FileError, match=r"^a\.gguf: corrupt GGUF file: '(a|empty)' has shape .* does not go with it"):
        read_gguf(path)


def test_version_2(opened: Callable[[bytes], GgufHeader]) -> None:
    assert opened(gguf([key(b"k", U8, 1)], version=2)).metadata == {"k": 1}


@pytest.mark.parametrize("what", ["folder", "missing"])
def test_no_file(tmp_path: Path, what: str) -> None:
    path = tmp_path / "a.gguf"
    if what == "folder":
        path.mkdir()
    with pytest.raises(FileError, match=r"a\.gguf: cannot be read: "):
        read_gguf_header(path)


# Models in several files


def part(no: int, count: int, names: Sequence[bytes], total: int, keys: Sequence[bytes] = ()) -> bytes:
    split = [key(b"split.no", U16, no), key(b"split.count", U16, count), key(b"split.tensors.count", I32, total)]
    infos = [info(n, (8,), offset=32 * i) for i, n in enumerate(names)]
    return gguf([*keys, *split], infos, b"".join(struct.pack("<8f", *[10 * no + i] * 8) for i in range(len(names))))


def three_parts(folder: Path, **changed: bytes) -> list[Path]:
    contents = {
        "p1": part(0, 3, [], 3, [key(b"general.architecture", STRING, b"flux")]),
        "p2": part(1, 3, [b"a", b"b"], 3),
        "p3": part(2, 3, [b"c"], 3),
    }
    paths = [folder / f"my-model-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for path, content in zip(paths, (contents | changed).values(), strict=True):
        path.write_bytes(content)
    return paths


@pytest.mark.parametrize("first", [0, 1, 2])
def test_any_part_opens_the_whole_model(tmp_path: Path, first: int) -> None:
    paths = three_parts(tmp_path)
    read = read_gguf(paths[first])
    assert read.metadata == {"general.architecture": "flux"}
    values = {name: float(t[0]) for name, t in read.tensors.items() if isinstance(t, torch.Tensor)}
    assert values == {"a": 10, "b": 11, "c": 20}
    assert [p.path for p in read_gguf_parts(paths[first])] == paths


def test_a_part_is_never_taken_for_the_model(tmp_path: Path) -> None:
    paths = three_parts(tmp_path)
    with pytest.raises(FileError, match=r"^my-model-00002-of-00003.gguf: one of the 3 files of a model, which cannot"):
        read_gguf_header(paths[1])


def test_a_missing_part(tmp_path: Path) -> None:
    paths = three_parts(tmp_path)
    paths[1].unlink()
    missing = r"one of the 3 files of a model, and my-model-00002-of-00003.gguf is not beside it\.\nPut all"
    with pytest.raises(FileError, match=missing):
        read_gguf(paths[2])
    paths[0].unlink()
    with pytest.raises(FileError, match=r"and my-model-00001-of-00003.gguf is not beside it \(nor are 1 others\)"):
        read_gguf(paths[2])


@pytest.mark.parametrize(
    "name", ["part.gguf", "m-00002-of-00004.gguf", "m-00004-of-00003.gguf", "m-00000-of-00003.gguf"]
)
def test_a_renamed_part(tmp_path: Path, name: str) -> None:
    renamed = three_parts(tmp_path)[1].rename(tmp_path / name)
    with pytest.raises(FileError, match=r"one of the 3 files of a model, but not named as one\.\nGive all of them"):
        read_gguf(renamed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        pytest.param(
            {"p3": part(1, 3, [b"c"], 3)}, "not part 3 of my-model-00001-of-00003.gguf: 'split.no' is 1", id="no"
        ),
        pytest.param({"p3": part(2, 4, [b"c"], 3)}, "'split.count' is 4, expected 3", id="count"),
        pytest.param({"p3": part(2, 3, [b"c"], 5)}, "'split.tensors.count' is 5, expected 3", id="other-model"),
        pytest.param({"p3": gguf(infos=[info(b"c", (8,))], data=bytes(32))}, "'split.no' is None", id="whole-model"),
        pytest.param({"p3": part(2, 3, [b"a"], 3)}, "'a' is in my-model-00002-of-00003.gguf too", id="same-name"),
        pytest.param(
            {"p3": part(2, 3, [], 3)}, "3 files hold 2 tensors, 'split.tensors.count' is 3", id="tensor-count"
        ),
        pytest.param(
            {"p3": part(2, 3, [b"c"], 3)[:-1]}, "00003-of-00003.gguf: truncated GGUF file: 'c'", id="truncated"
        ),
    ],
)
def test_parts_that_do_not_belong_together(tmp_path: Path, changed: dict[str, bytes], message: str) -> None:
    paths = three_parts(tmp_path, **changed)
    with pytest.raises(FileError) as failure:
        read_gguf(paths[0])
    assert message in str(failure.value)


def test_a_model_split_into_one(tmp_path: Path) -> None:
    path = tmp_path / "any name.gguf"
    path.write_bytes(part(0, 1, [b"a"], 1))
    assert list(read_gguf(path).tensors) == ["a"]
    assert [t.name for t in read_gguf_header(path).tensors] == ["a"]
