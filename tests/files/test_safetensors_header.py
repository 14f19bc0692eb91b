"""Headers that no file should have: refused by name, in bounded memory and time; and what of one is still readable."""

from __future__ import annotations

import json
import os
import re
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from damaged_files import joined, layout
from quantwire.quantizers.errors import FileError
from quantwire.quantizers.files.bounded_json import MAX_NBYTES, DuplicateKey, estimate_nbytes, loads
from quantwire.quantizers.files.checkpoint import read_checkpoint
from quantwire.quantizers.files.safetensors_header import METADATA, parse, read_safetensors_header

GOOD: dict[str, Any] = {"a": ("F32", [4]), "b": ("BF16", [2, 4])}


def entry(dtype: Any = "F32", shape: Any = (4,), offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def file_of(tmp_path: Path, header: Any, data: bytes = b"\0" * 16) -> Path:
    path = tmp_path / "a.safetensors"
    path.write_bytes(joined(header, data))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(FileError) as err:
        read_safetensors_header(path)
    assert str(err.value).startswith(("a.safetensors: ", str(path)))
    assert len(str(err.value)) < 1000
    return str(err.value)


NAMES = {
    "nul": ("a\0b", "has a control character in its name"),
    "newline": ("a\nb", "has a control character in its name"),
    "escape": ("\x1b[2J", "has a control character in its name"),
    "long": ("x" * 1025, "is a name of 1025 characters, expected at most 1024"),
}


@pytest.mark.parametrize("case", NAMES)
def test_names_that_nobody_can_print(tmp_path: Path, case: str) -> None:
    name, message = NAMES[case]
    assert message in refusal(file_of(tmp_path, {name: entry()}))


def test_half_a_surrogate_pair_is_no_name(tmp_path: Path) -> None:
    raw = json.dumps({"X": entry()}).replace('"X"', '"\\ud800"').encode()
    assert "control character" in refusal(file_of(tmp_path, raw))


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../b", "..\\b"])
def test_a_name_like_a_path_is_only_a_name(tmp_path: Path, name: str) -> None:
    path = file_of(tmp_path, {name: entry()})
    assert list(read_safetensors_header(path)) == [name]
    (fault,) = parse(path).faults
    assert (fault.code, fault.tensor, fault.fatal) == ("header-path", name, False)


HEADERS: dict[str, tuple[Any, str]] = {
    "key-twice": (b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), "'a' stands twice in an object"),
    "field-twice": (
        b'{"a":{"dtype":"F32","dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
        "'dtype' stands twice in an object",
    ),
    "metadata-twice": (b'{"__metadata__":{},"__metadata__":{"a":"b"}}', "'__metadata__' stands twice in an object"),
    "product": ({"a": entry(shape=[0, 2**62, 2**62], offsets=[0, 0])}, "which is beyond 2**63 values"),
    "size": ({"a": entry(shape=[2**64 - 1], offsets=[0, 16])}, "its offsets hold 16"),
    "dimensions": ({"a": entry(shape=[1] * 65, offsets=[0, 4])}, "has 65 dimensions, expected at most 64"),
    "many-sizes": ({"a": entry(shape=[2**63] * 200_000)}, "has 200000 dimensions, expected at most 64"),
    "fraction": ({"a": entry(shape=[4.0])}, "has the shape [4.0]"),
    "exponent": (b'{"a":{"dtype":"F32","shape":[1e400],"data_offsets":[0,16]}}', "has the shape [inf]"),
    "nan": (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,16]}}', "not JSON (NaN is no JSON)"),
    "digits": (b'{"a":' + b"9" * 100_000 + b"}", "not JSON (a number of 100000 digits)"),
    "utf-16": (json.dumps({"a": entry()}).encode("utf-16"), "not JSON (not UTF-8"),
    "mark": (b"\xef\xbb\xbf{}", "not JSON ("),
    "half-byte": ({"a": entry("F4", [3], [0, 2])}, "needs 1 bytes, its offsets hold 2"),
    "metadata-number": ({METADATA: {"step": 3}, "a": entry()}, "does not map strings to strings"),
    "metadata-list": ({METADATA: [], "a": entry()}, "does not map strings to strings"),
    "long-values": ({"a": entry(dtype=["x" * 10_000] * 100)}, "has the unknown dtype ["),
    "nested": ({"a": entry(shape=json.loads("[" * 400 + "]" * 400))}, "has the shape ["),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_headers(tmp_path: Path, case: str) -> None:
    header, message = HEADERS[case]
    start = time.process_time()
    assert message in refusal(file_of(tmp_path, header))
    assert time.process_time() - start < 1


# What is readable of a damaged header


def test_a_sound_file_has_no_faults(tmp_path: Path) -> None:
    header, data = layout(GOOD, {"k": "v"})
    found = parse(file_of(tmp_path, header, data))
    assert found.faults == ()
    assert found.metadata == {"k": "v"}
    assert found.entries == {name: header[name] for name in GOOD}
    assert found.size == found.data_start + len(data)


DAMAGED: dict[str, tuple[Any, int, list[str], list[str]]] = {
    # header, bytes of data, codes, tensors that are readable
    "dtype": ({"a": entry("F31"), "b": entry(offsets=[16, 32])}, 32, ["header-dtype"], ["b"]),
    "dtype-and-hole": (
        {"a": entry("F31"), "b": entry(offsets=[20, 36])}, 36, ["header-dtype", "header-hole"], ["b"]
    ),
    "dtype-and-trailing": (
        {"a": entry(), "b": entry("F31", offsets=[16, 32])}, 33, ["header-dtype", "header-trailing"], ["a"]
    ),
    "overlap": ({"a": entry(), "b": entry(offsets=[8, 24])}, 24, ["header-overlap"], ["a", "b"]),
    "hole": ({"a": entry(), "b": entry(offsets=[20, 36])}, 36, ["header-hole"], ["a", "b"]),
    "truncated": ({"a": entry(), "b": entry(offsets=[16, 32])}, 31, ["header-truncated"], ["a", "b"]),
    "trailing": ({"a": entry()}, 17, ["header-trailing"], ["a"]),
    "metadata": ({METADATA: {"a": 1, "b": "c"}, "a": entry()}, 16, ["header-metadata"], ["a"]),
    "twice": (b'{"a":1,"a":%s}' % json.dumps(entry()).encode(), 16, ["header-duplicate"], ["a"]),
    "two": ({"a": 1, "b": entry(), "c": entry(shape=[5])}, 16, ["header-entry", "header-size"], ["b"]),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_what_is_left_of_a_damaged_header(tmp_path: Path, case: str) -> None:
    header, nbytes, codes, names = DAMAGED[case]
    path = file_of(tmp_path, header, b"\0" * nbytes)
    found = parse(path)
    assert [fault.code for fault in found.faults] == codes
    assert list(found.entries) == names
    assert refusal(path) == f"a.safetensors: {found.faults[0].text}"


def test_the_strings_of_damaged_metadata_are_kept(tmp_path: Path) -> None:
    found = parse(file_of(tmp_path, {METADATA: {"a": 1, "b": "c"}, "a": entry()}))
    assert found.metadata == {"b": "c"}
    assert found.raw_metadata == {"a": 1, "b": "c"}


def test_many_faults_do_not_fill_the_memory(tmp_path: Path) -> None:
    found = parse(file_of(tmp_path, {f"t{i}": 0 for i in range(20_000)}, b""))
    assert len(found.faults) == 1000
    assert found.entries == {}


# Files that are none


def opens_and_refuses(path: Path, message: str) -> None:
    for read in (read_safetensors_header, read_checkpoint):
        start = time.monotonic()
        with pytest.raises(FileError, match=message):
            read(path)
        assert time.monotonic() - start < 5


def test_a_pipe_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.safetensors")
    opens_and_refuses(tmp_path / "a.safetensors", "cannot be read: a pipe, expected a file")


def test_a_link_to_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a.safetensors").symlink_to("pipe")
    opens_and_refuses(tmp_path / "a.safetensors", "a pipe, expected a file")


def test_a_socket_a_folder_and_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s.safetensors")
        opens_and_refuses(Path("s.safetensors"), "a socket, expected a file")
    opens_and_refuses(tmp_path, "a folder, expected a file")
    opens_and_refuses(Path("/dev/zero"), "a device, expected a file")


def test_a_link_to_itself(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    opens_and_refuses(tmp_path / "a", "cannot be read: Too many levels of symbolic links")


def test_a_path_with_a_nul(tmp_path: Path) -> None:
    opens_and_refuses(tmp_path / "a\0b", "a path has no NUL character")


# JSON

MEASURE = """
import resource, sys, time
from pathlib import Path
from quantwire.quantizers.errors import FileError
from quantwire.quantizers.files.model_file import open_model
from quantwire.quantizers.files.schemes.scan import scan
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
before = peak()
try:
    file = open_model(Path(sys.argv[1]))
    print(peak() - before, time.process_time(), len(file.entries), scan(file).faults)
except FileError as err:
    print(peak() - before, time.process_time(), err)
"""
MIB = 1 << 20
# What stands before, what is repeated and how often, and what stands behind.
LIST, TEXT = b'{"a":[', b'{"__metadata__":{"a":"'
BOMBS: dict[str, tuple[bytes, bytes, int, bytes]] = {
    "lists": (LIST, b"[],", 31 * MIB, b"0]}"),
    "objects": (LIST, b"{},", 31 * MIB, b"0]}"),
    "numbers": (LIST, b"1,", 47 * MIB, b"0]}"),
    "strings": (LIST, b'"ab",', 19 * MIB, b"0]}"),
    "deep": (b"", b"[", 95 * MIB, b""),
    "wide": (TEXT, b"x", 95 * MIB, "\N{BOMB}".encode() + b'"}}'),
    "escaped": (TEXT, b"x", 95 * MIB, rb"\ud83d\udca3" + b'"}}'),
}
# As large as is let through, so that the estimate is held against what is really taken.
JUST_FITTING: dict[str, tuple[bytes, bytes, int, bytes]] = {
    "lists": (LIST, b"[],", 1_950_000, b"0]}"),
    "objects": (LIST, b"{},", 740_000, b"0]}"),
    "numbers": (LIST, b"12345678901234,", 3_700_000, b"0]}"),
    "strings": (LIST, b'"ab",', 2_100_000, b"0]}"),
    "text": (TEXT, b"x", 99_000_000, b'"}}'),
    "wide": (TEXT, b"x", 24_000_000, "\N{BOMB}".encode() + b'"}}'),
    "escaped": (TEXT, b"x", 33_000_000, rb"\ud83d\udca3" + b'"}}'),
}


def repeated(before: bytes, unit: bytes, count: int, behind: bytes) -> bytes:
    return before + unit * count + behind


def measured(path: Path) -> tuple[int, float, str]:
    """(MiB beyond what the imports take, seconds, what came of it), in a process of its own."""
    done = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True)
    nbytes, seconds, rest = done.stdout.split(" ", 2)
    return int(nbytes), float(seconds), rest


@pytest.mark.slow
@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_of_100_mb_are_refused(tmp_path: Path, bomb: str) -> None:
    mib, seconds, message = measured(file_of(tmp_path, repeated(*BOMBS[bomb]), b""))
    assert re.search(r"JSON of \d+ bytes that would take \d+ MiB, expected at most 192", message)
    assert mib < 110, "no more than the text itself"
    assert seconds < 5


@pytest.mark.slow
@pytest.mark.parametrize("bomb", JUST_FITTING)
def test_what_is_let_through_stays_below_256_mib(tmp_path: Path, bomb: str) -> None:
    raw = repeated(*JUST_FITTING[bomb])
    assert 0.9 * MAX_NBYTES < estimate_nbytes(raw) <= MAX_NBYTES
    mib, seconds, message = measured(file_of(tmp_path, raw, b""))
    assert "would take" not in message
    assert mib < 256
    assert seconds < 10


@pytest.mark.slow
def test_a_hundred_thousand_tensors_are_read(tmp_path: Path) -> None:
    name = "model.diffusion_model.double_blocks.{}.img_attn.qkv.weight"
    header = {name.format(i): entry("F16", [1, 1], [2 * i, 2 * i + 2]) for i in range(100_000)}
    mib, seconds, message = measured(file_of(tmp_path, header, bytes(200_000)))
    assert message.startswith("100000 ()")
    assert mib < 256
    assert seconds < 20


def test_a_bomb_of_10_mb_is_refused(tmp_path: Path) -> None:
    assert "would take" in refusal(file_of(tmp_path, b'{"a":[' + b"[]," * (3 * MIB) + b"0]}", b""))


def test_json_is_strict() -> None:
    assert loads(b'{"a": [1, 2.5, null, "\xc3\xa4"]}') == {"a": [1, 2.5, None, "ä"]}
    with pytest.raises(DuplicateKey, match="'a' stands twice"):
        loads(b'{"b": {"a": 1, "a": 2}}')
    twice: list[str] = []
    assert loads(b'{"a": 1, "a": 2}', duplicate=twice.append) == {"a": 2}
    assert twice == ["a"]
    with pytest.raises(ValueError, match="nested too deep"):
        loads(b"[" * 100_000)
    with pytest.raises(ValueError, match="expected at most 0"):
        loads(b"[1, 2, 3]", limit=10)


def test_a_header_that_ends_early_is_no_sound_one(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", 50) + b"{}" + b" " * 20)
    assert "truncated: the header needs 58 bytes, the file has 30" in refusal(path)
