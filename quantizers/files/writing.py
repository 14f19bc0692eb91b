"""Write quantized safetensors files front to back, in bounded memory, so that an interrupted run can go on.

Sizes are known when a layer is quantized, so data stands behind room for the header, which is written at the end. There
may be no holes in the data, and every tensor begins at a multiple of its element size. So what has a size that is no
multiple of `ALIGN` comes at the end, the largest elements first: small tensors wait in memory, and of a large one the
layer is made again when its turn comes. Quantizing is deterministic, so it is the same.

The journal holds for each finished layer the places and checksums of its tensors, the small ones that wait, its line of
the report, and what the layout wants to know of it. What is written follows from the order of the layers and from
nothing else, so a run that continues ends with the same bytes.

While one layer is written and its CRC-32 is formed, the next one is made.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from ..errors import FileError, WeightError
from ..report import Entry
from .journal import Partial
from .quantized_file import DTYPES, NAMES

ALIGN = 16
ROOM_ALIGN = 64
SMALL_NBYTES = 1 << 16  # what may wait in memory
ITEMSIZES = (16, 8, 4, 2, 1)
TENSORS_A_LAYER = 8
HEADER_NBYTES_A_TENSOR = 160  # beside its name
LATE = "\0"  # before the name of a tensor that is written late, in the journal


@dataclass(frozen=True)
class Item:
    """A tensor of the model: a layer to quantize or copy, or a tensor that is kept.

    Attributes:
        part: index of the file that it goes to.
        nbytes: as predicted.
        kept: its dtype where it stays one tensor, of exactly that many bytes.
    """

    name: str
    part: int
    nbytes: int
    kept: torch.dtype | None = None

    @property
    def late(self) -> bool:
        return self.kept is not None and _is_late(self.nbytes)


@dataclass(frozen=True)
class Made:
    """What becomes of an item.

    Attributes:
        tensors: by their names in the file.
        note: of `Writer.note`.
        crc: CRC-32 of the values that it was made from.
    """

    tensors: Mapping[str, Tensor]
    entry: Entry
    note: Any = None
    crc: int = 0


Make = Callable[[Item], Made]
Advance = Callable[[int], object]


@dataclass
class _Part:
    """What stands in one file so far.

    Attributes:
        at: bytes of data.
        places: name -> (dtype, shape, first byte, byte after the last).
        waiting: small tensors for the end.
        late: (element size, item, tensor) of large tensors for the end.
        header: with its length in front and blanks behind, as it is in the file.
    """

    at: int = 0
    places: dict[str, tuple[str, list[int], int, int]] = field(default_factory=lambda: {})
    crcs: dict[str, int] = field(default_factory=lambda: {})
    waiting: dict[str, Tensor] = field(default_factory=lambda: {})
    late: list[tuple[int, Item, str]] = field(default_factory=lambda: [])
    header: bytes = b""


def header_room(names: Iterable[str], more: int = 0) -> int:
    """Bytes to leave for the header.

    Args:
        names: of the layers, and of the tensors that are kept.
        more: bytes of metadata, as they are in JSON.
    """
    each = TENSORS_A_LAYER + 1  # and a note in the metadata
    needed = 4096 + 2 * more + sum(each * (len(json.dumps(n)) + HEADER_NBYTES_A_TENSOR) for n in names)
    return -(-needed // ROOM_ALIGN) * ROOM_ALIGN


class Stream:
    """The files of one conversion, on their way.

    Attributes:
        entries: name of each finished item -> its line of the report.
        notes: name -> what the layout noted of it; of quantized ones only.
        sources: name -> CRC-32 of the values that it was made from.
    """

    def __init__(self, file: Partial, parts: int, room: int) -> None:
        self._file = file
        self._room = room
        self._parts = [_Part() for _ in range(parts)]
        self._order: dict[str, int] = {}
        self.entries: dict[str, Entry] = {}
        self.notes: dict[str, Any] = {}
        self.sources: dict[str, int] = {}

    def write(self, items: Sequence[Item], make: Make, advance: Advance) -> None:
        """Write all items but what has to come at the end.

        Args:
            make: called in this thread, for one item after the other.
            advance: called with bytes of finished items; may raise to give up.
        """
        self._order = {item.name: i for i, item in enumerate(items)}
        with ThreadPoolExecutor(1, "quantwire-write") as pool:
            before: tuple[Item, Future[None]] | None = None
            for item in items:
                if item.late and item.kept is not None:
                    self._parts[item.part].late.append((item.kept.itemsize, item, item.name))
                    continue
                if item.name in self._file.done:
                    self._replay(item, self._file.done[item.name])
                    advance(item.nbytes)
                    continue
                made = make(item)
                if before is not None:
                    before[1].result()
                    advance(before[0].nbytes)
                before = item, pool.submit(self._store, item, made)
                del made
            if before is not None:
                before[1].result()
                advance(before[0].nbytes)

    def finish(self, make: Make, advance: Advance, last: Mapping[str, Tensor]) -> None:
        """Write what comes at the end of each file.

        Args:
            last: small tensors, or tensors of bytes in any size, that belong to no item.
        """
        for index, part in enumerate(self._parts):
            if index == len(self._parts) - 1:
                part.waiting |= {n: t for n, t in last.items() if t.element_size() > 1 or t.nbytes <= SMALL_NBYTES}
            for itemsize in ITEMSIZES:
                for name in [n for n, t in part.waiting.items() if t.element_size() == itemsize]:
                    self._put(index, name, part.waiting.pop(name))
                # Two threads noted them, so their order is none.
                late = sorted((self._order[it.name], n, it) for size, it, n in part.late if size == itemsize)
                for _, name, item in late:
                    self._write_late(index, item, name, make, advance)
        for name, tensor in last.items():
            if name not in self._parts[-1].places:
                self._put(len(self._parts) - 1, name, tensor)

    def seal(self, metadata: Mapping[str, str], beside: Mapping[str, str]) -> None:
        """Write the headers.

        Raises:
            FileError: more than there is room for.
        """
        for index, part in enumerate(self._parts):
            header: dict[str, Any] = {"__metadata__": dict(metadata)}
            for name, (dtype, shape, start, end) in part.places.items():
                header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
            raw = json.dumps(header, separators=(",", ":")).encode()
            if 8 + len(raw) > self._room:
                raise FileError(f"The header has {len(raw)} bytes, room was left for {self._room - 8}.")
            part.header = struct.pack("<Q", self._room - 8) + raw.ljust(self._room - 8)
            self._file.write(part.header, 0, index)
        self._file.seal([self._room + part.at for part in self._parts], beside)

    def contents(self) -> list[list[tuple[str, int, int, int]]]:
        """Of each file, in their order, (name, first byte, byte after the last, CRC-32); the header is one of them."""
        found: list[list[tuple[str, int, int, int]]] = []
        for part in self._parts:
            inside = [
                (name, self._room + start, self._room + end, part.crcs[name])
                for name, (_, _, start, end) in part.places.items()
            ]
            header = ("the header", 0, self._room, zlib.crc32(part.header))
            found.append([header, *sorted(inside, key=lambda c: c[1:])])
        return found

    def where(self) -> dict[str, int]:
        """Tensor -> index of its file."""
        return {name: index for index, part in enumerate(self._parts) for name in part.places}

    @property
    def nbytes(self) -> int:
        """Of all data."""
        return sum(part.at for part in self._parts)

    def _store(self, item: Item, made: Made) -> None:
        """Write what has its place now, and note everything in the journal."""
        part = self._parts[item.part]
        written: list[str] = []
        small: dict[str, Any] = {}
        late: dict[str, int] = {}
        before = part.at
        for name, t in sorted(made.tensors.items(), key=lambda pair: -pair[1].element_size()):
            if not _odd(t.nbytes):
                self._put(item.part, name, t)
                written.append(name)
            elif _is_late(t.nbytes):
                late[name] = t.element_size()
                part.late.append((t.element_size(), item, name))
            else:
                part.waiting[name] = t.detach().cpu().clone()
                small[name] = _packed(t)
        self._known(item.name, made)
        record = self._record(item.part, item.name, written, small, late)
        self._file.finished(item.name, part.at - before, record)

    def _write_late(self, index: int, item: Item, name: str, make: Make, advance: Advance) -> None:
        key = item.name if item.late else LATE + name
        if key in self._file.done:
            self._replay(item, self._file.done[key])
        else:
            made = make(item)
            if item.late:
                self._known(item.name, made)
            self._put(index, name, made.tensors[name])
            record = self._record(index, item.name if item.late else "", [name], {}, {})
            self._file.finished(key, made.tensors[name].nbytes, record)
        if item.late:
            advance(item.nbytes)

    def _known(self, name: str, made: Made) -> None:
        self.entries[name], self.sources[name] = made.entry, made.crc
        if made.note is not None:
            self.notes[name] = made.note

    def _record(
        self, index: int, name: str, written: Sequence[str], small: Mapping[str, Any], late: Mapping[str, int]
    ) -> dict[str, Any]:
        part = self._parts[index]
        record: dict[str, Any] = {"tensors": {n: [*part.places[n], part.crcs[n]] for n in written}}
        record |= {"small": dict(small), "late": dict(late)}
        if name:
            record |= {"entry": dataclasses.asdict(self.entries[name]), "crc": self.sources[name]}
            record["note"] = self.notes.get(name)
        return record

    def _replay(self, item: Item, record: Mapping[str, Any]) -> None:
        """What an earlier run did."""
        part = self._parts[item.part]
        for name, (dtype, shape, start, end, crc) in record["tensors"].items():
            part.places[name], part.crcs[name] = (dtype, shape, start, end), crc
            part.at = max(part.at, end)
        part.waiting |= {name: _unpacked(packed) for name, packed in record["small"].items()}
        part.late += [(itemsize, item, name) for name, itemsize in record["late"].items()]
        if "entry" in record:
            self.entries[item.name], self.sources[item.name] = Entry(**record["entry"]), record["crc"]
            if record["note"] is not None:
                self.notes[item.name] = record["note"]

    def _put(self, index: int, name: str, t: Tensor) -> None:
        part = self._parts[index]
        if name in part.places or name == "__metadata__":
            raise WeightError(f"'{name}': a second tensor of this name cannot be written.")
        if t.dtype not in NAMES:
            raise WeightError(f"'{name}': a safetensors file cannot hold {t.dtype}.")
        raw = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        end = part.at + raw.numel()
        if raw.numel():
            content = cast(Any, raw.numpy())
            self._file.write(content, self._room + part.at, index)
            part.crcs[name] = zlib.crc32(content)
        else:
            part.crcs[name] = 0
        part.places[name] = NAMES[t.dtype], list(t.shape), part.at, end
        part.at = end


def _odd(nbytes: int) -> bool:
    return nbytes % ALIGN > 0


def _is_late(nbytes: int) -> bool:
    return _odd(nbytes) and nbytes > SMALL_NBYTES


def _packed(t: Tensor) -> list[Any]:
    raw = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return [NAMES[t.dtype], list(t.shape), base64.b64encode(bytes(cast(Any, raw.numpy()))).decode()]


def _unpacked(packed: Sequence[Any]) -> Tensor:
    dtype, shape, text = packed
    raw = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
    return raw.view(DTYPES[dtype]).reshape(shape)


def crc_of(values: Iterable[Tensor]) -> int:
    """CRC-32 of the bytes of tensors, one after the other."""
    crc = 0
    for t in values:
        raw = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        crc = zlib.crc32(cast(Any, raw.numpy()), crc) if raw.numel() else crc
    return crc
