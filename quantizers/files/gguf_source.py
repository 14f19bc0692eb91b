"""The bytes of a GGUF header: numbers, strings and arrays, each checked before it is read.

The limits bound memory and time whatever a file claims: at most 256 MiB, and well under a second.
"""

from __future__ import annotations

import functools
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from ..errors import FileError

# Names and single strings of a file together. A whole tokenizer.json (33 MB the largest) goes in; Python takes up to
# six times as much memory beside it while it decodes one.
MAX_TEXT_NBYTES = 1 << 25
MAX_STRINGS_NBYTES = 1 << 24  # strings of one array; the largest list of merges has 6 MB
# The largest vocabularies have 262,144 tokens and 514,906 merges, with a score and a type for each token.
MAX_ITEMS = 3 << 18
MAX_HEADER_NBYTES = 1 << 27  # with them it has 20 MB
WINDOW_NBYTES = 1 << 16

# Number in the file -> name, struct code. A bool is a byte, since struct's own takes every value.
VALUE_TYPES = {
    **{0: ("uint8", "B"), 1: ("int8", "b"), 2: ("uint16", "H"), 3: ("int16", "h"), 4: ("uint32", "I")},
    **{5: ("int32", "i"), 6: ("float32", "f"), 7: ("bool", "B"), 10: ("uint64", "Q"), 11: ("int64", "q")},
    12: ("float64", "d"),
}
CODES = dict(VALUE_TYPES.values())
LENGTH = struct.Struct("<Q")
SHORT_NBYTES, SHORT_STRINGS = 48, 256

Number = int | float | bool
T = TypeVar("T")


class Malformed(Exception):
    """What is wrong, without the file's name.

    Names out of the file stand in it as `shown` shows them: a damaged one may hold line breaks.
    """


def shown(name: str) -> str:
    """A name out of the file, on one line and not too long."""
    return repr(name) if len(name) <= 120 else f"{name[:120]!r}... ({len(name)} characters)"


def open_source(path: Path, use: Callable[[Source], T]) -> T:
    """Give the file to `use`.

    Raises:
        FileError: it cannot be read, or `use` finds it malformed.
    """
    try:
        with open(path, "rb") as file:
            return use(Source(file, path.stat().st_size))
    except OSError as err:
        raise FileError(f"{path}: cannot be read: {err.strerror or err}.") from err
    except Malformed as err:
        raise FileError(f"{path.name}: {err}.") from err


class Source:
    """The file through a window: a header is read in few calls and never held whole.

    A memory map was not chosen: a file that becomes shorter while it is read would end the process.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file = file
        self.size = size
        self.at = 0
        self.window = b""
        self.window_start = 0

    def check(self, nbytes: int, what: str) -> None:
        """Raises: Malformed: fewer bytes are left, or the header would become too long."""
        if nbytes > self.size - self.at:
            raise Malformed(
                f"truncated GGUF file: {what} at byte {self.at} needs {nbytes} bytes, {self.size - self.at} are left"
            )
        if self.at + nbytes > MAX_HEADER_NBYTES:
            raise Malformed(
                f"corrupt GGUF file: {what} at byte {self.at} would end at byte {self.at + nbytes}; "
                f"headers of more than {MAX_HEADER_NBYTES} bytes are not read"
            )

    def index(self, nbytes: int, what: str) -> int:
        """Where in the window the next bytes stand; they are there, and mostly more."""
        index = self.at - self.window_start
        if not 0 <= index <= len(self.window) - nbytes:
            self.check(nbytes, what)
            self.window = self.read(WINDOW_NBYTES, nbytes, what)
            self.window_start, index = self.at, 0
        return index

    def read(self, nbytes: int, least: int, what: str) -> bytes:
        self.file.seek(self.at)
        found = self.file.read(nbytes)
        if len(found) < least:
            raise Malformed(f"truncated GGUF file: {what} at byte {self.at}: the file became shorter")
        return found

    def take(self, nbytes: int, what: str) -> bytes:
        self.check(nbytes, what)
        if nbytes > WINDOW_NBYTES:
            found = self.read(nbytes, nbytes, what)
        else:
            index = self.index(nbytes, what)
            found = self.window[index : index + nbytes]
        self.at += nbytes
        return found

    def skip(self, nbytes: int, what: str) -> None:
        self.check(nbytes, what)
        self.at += nbytes

    def u32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        return int.from_bytes(self.take(8, what), "little")


def read_numbers(source: Source, kind: str, count: int, what: str) -> tuple[Number, ...]:
    """Args: kind: a name of `VALUE_TYPES`."""
    at, form = source.at, struct.Struct(f"<{count}{CODES[kind]}")
    values = form.unpack(source.take(form.size, what))
    if kind != "bool":
        return values
    for i, value in enumerate(values):
        if value not in (0, 1):
            raise Malformed(f"corrupt GGUF file: {what} at byte {at + i} is the bool {value}")
    return tuple(map(bool, values))


def read_strings(source: Source, count: int, nbytes: int, what: str) -> tuple[str, ...]:
    """Args: nbytes: of all strings with their lengths."""
    start = source.at
    if nbytes - 8 * count > MAX_STRINGS_NBYTES:
        raise Malformed(f"corrupt GGUF file: {what} at byte {start} has more than {MAX_STRINGS_NBYTES} bytes of text")
    raw, length_at = source.take(nbytes, what), LENGTH.unpack_from
    found: list[str] = []
    at = 0
    for i in range(count):
        end = at + 8 + length_at(raw, at)[0] if at + 8 <= nbytes else nbytes + 1
        if end > nbytes:
            raise Malformed(f"corrupt GGUF file: item {i} of {what} at byte {start + at} changed while it was read")
        try:
            found.append(raw[at + 8 : end].decode())
        except UnicodeDecodeError as err:
            byte = start + at + 8 + err.start
            raise Malformed(f"corrupt GGUF file: item {i} of {what} is not UTF-8 (byte {byte})") from None
        at = end
    return tuple(found)


def skip_strings(source: Source, count: int, what: str) -> None:
    """Pass over strings by their lengths: most items of a header are tokens."""
    left, length_at = count, LENGTH.unpack_from
    while left:
        index = source.index(8, what)
        window, last = source.window, len(source.window) - 8
        passed, at = _pass_short(window, index, left)
        while passed < left and at <= last:
            at += 8 + length_at(window, at)[0]
            passed += 1
        left -= passed
        # Only the last one can reach beyond the window, so that one check is enough.
        source.skip(at - index, what)


def _pass_short(window: bytes, index: int, most: int) -> tuple[int, int]:
    """Pass over strings of 1 to 255 bytes without a zero among them, as tokens are: (number, index after them).

    Their lengths are the bytes before runs of seven zeros. That a found string ends where the next one begins proves
    each; where one does not, the rest is left to the caller. Four times as fast as a loop over the lengths, but numpy's
    import takes longer than that saves: without it a regular expression does it, at twice the speed of the loop.
    """
    np: Any = sys.modules.get("numpy")
    if not hasattr(np, "flatnonzero"):  # another thread may be importing it
        return _match_short(window, index, most)
    data: Any = np.frombuffer(window, np.uint8)
    zeros = np.flatnonzero(data[index + 1 :] == 0) + index + 1
    starts = zeros[:-6][zeros[6:] - zeros[:-6] == 6] - 1
    if not len(starts) or starts[0] != index:
        return 0, index
    ends = starts + 8 + data[starts]
    linked = ends[:-1] == starts[1:]
    passed = min(most, len(starts) if linked.all() else int(linked.argmin()) + 1)
    return passed, cast(int, ends[passed - 1].item())


@functools.cache
def _short_strings() -> re.Pattern[bytes]:
    """So many strings of 1 to 48 bytes: each alternative begins with its own length, so at most one of them matches."""
    lengths = (b"%b\\0{7}.{%d}" % (re.escape(bytes([n])), n) for n in range(1, SHORT_NBYTES + 1))
    return re.compile(b"(?s:%b){%d}" % (b"|".join(lengths), SHORT_STRINGS))


def _match_short(window: bytes, index: int, most: int) -> tuple[int, int]:
    """`_pass_short` without numpy, for runs of short strings."""
    passed = 0
    while most - passed >= SHORT_STRINGS:
        found = _short_strings().match(window, index)
        if found is None:
            break
        passed, index = passed + SHORT_STRINGS, found.end()
    return passed, index
