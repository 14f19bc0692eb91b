"""A model file seen by its header: names, dtypes, shapes and places of its tensors, whatever the container.

No tensor is read before it is asked for; then each one is a map of its own, which goes when the tensor does.
"""

from __future__ import annotations

import functools
import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import FileError
from ..ggml_types import TYPES
from .bounded_json import loads
from .file_state import check_unchanged, file_state
from .locate import Container, Located, locate, refuse_missing
from .regular import open_regular
from .safetensors_header import Header, parse, read_header

if TYPE_CHECKING:  # looking at a header does not need torch, whose import takes a second
    import torch
    from torch import Tensor

SMALL_NBYTES = 1 << 16
CONFIG_NBYTES = 1 << 24
CONFIGS = ("config.json", "quantization_config.json", "quanto_qmap.json", "quantize_config.json", "quant_config.json")


@dataclass(frozen=True)
class Entry:
    """What a header tells of one tensor.

    Attributes:
        dtype: as the file calls it: safetensors' name (`BF16`, `F8_E4M3`), or ggml's type (`Q4_K`).
        shape: as torch has it, outermost dimension first; of GGUF blocks the shape of the values.
        file: where its bytes are.
        start: first byte within that file.
        nbytes: how many.
        stored: the shape that the header gives, where the file records another one for the tensor beside it, as GGUF
            files do for weights whose rows are no whole blocks; else empty.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int
    stored: tuple[int, ...] = ()

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """None for ggml's block types, and for what torch cannot hold."""
        from .quantized_file import DTYPES

        return DTYPES.get(self.dtype)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class ModelFile:
    """The header of a model.

    Attributes:
        located: its files.
        entries: name -> tensor, of all files together.
        metadata: the file's own strings; of several files all of them, the first one's first.
        configs: JSON objects of the component's folder by file name (`config.json`, ...); empty for a single file.
        state: of `file_state` of each file, from before its header was read.
    """

    located: Located
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: dict[str, Any]())
    state: Mapping[Path, dict[str, int]] = field(default_factory=lambda: dict[Path, dict[str, int]]())

    @property
    def path(self) -> Path:
        return self.located.path

    @property
    def container(self) -> Container:
        return self.located.container

    @property
    def nbytes(self) -> int:
        """Of all tensors together."""
        return sum(e.nbytes for e in self.entries.values())

    def has(self, name: str, *dtypes: str) -> bool:
        """Whether there is such a tensor, in one of these dtypes if any are given."""
        entry = self.entries.get(name)
        return entry is not None and (not dtypes or entry.dtype in dtypes)

    def small(self, name: str) -> bytes:
        """The bytes of a small tensor, such as `X.comfy_quant`.

        Raises:
            FileError: more than 64 KiB, or unreadable.
        """
        entry = self.entries[name]
        if entry.nbytes > SMALL_NBYTES:
            raise FileError(f"{entry.file.name}: '{name}' has {entry.nbytes} bytes, expected at most {SMALL_NBYTES}.")
        try:
            # Without a buffer: a file has hundreds of these, far apart, and a buffer would read 8 KiB for each.
            with open(entry.file, "rb", buffering=0) as file:
                file.seek(entry.start)
                data = file.read(entry.nbytes)
        except OSError as err:
            raise FileError(f"{entry.file}: cannot be read: {err.strerror}.") from err
        if len(data) < entry.nbytes:
            raise FileError(f"{entry.file.name}: truncated: '{name}' is not all there.\nDownload it again.")
        return data

    def json(self, name: str) -> dict[str, Any]:
        """A small tensor of bytes that holds a JSON object, such as `X.comfy_quant`.

        Raises:
            FileError: it does not.
        """
        try:
            value = _parsed(self.small(name))
        except ValueError as err:
            raise FileError(f"{self.path.name}: '{name}' does not hold JSON.") from err
        if not isinstance(value, dict):
            raise FileError(f"{self.path.name}: '{name}' does not hold a JSON object.")
        return dict(cast("dict[str, Any]", value))

    def read(self, name: str) -> Tensor:
        """One tensor on a copy-on-write map of its own; of GGUF blocks their bytes, (nbytes,) uint8.

        Raises:
            FileError: the file changed, cannot be read, or has a dtype that torch cannot hold.
        """
        import torch

        e = self.entries[name]
        dtype = torch.uint8 if e.dtype in TYPES else e.torch_dtype
        if dtype is None:
            raise FileError(f"{e.file.name}: '{name}' has dtype {e.dtype}, which torch cannot hold.")
        shape = (e.nbytes,) if e.dtype in TYPES else e.shape
        if not e.nbytes:
            return torch.empty(shape, dtype=dtype)
        page = e.start - e.start % mmap.ALLOCATIONGRANULARITY
        try:
            with open(e.file, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if e.start + e.nbytes > size:
                    raise FileError(
                        f"{e.file.name}: changed while it was read: {size} bytes, expected {e.start + e.nbytes}."
                    )
                data = mmap.mmap(file.fileno(), e.start + e.nbytes - page, access=mmap.ACCESS_COPY, offset=page)
        except (OSError, ValueError) as err:
            raise FileError(f"{e.file}: cannot be read: {err}.") from err
        raw = cast(
            "Tensor", cast(Any, torch).frombuffer(data, dtype=torch.uint8, count=e.nbytes, offset=e.start - page)
        )
        if e.start % dtype.itemsize:
            raw = raw.clone()  # vector loads of some processors need aligned addresses
        return raw.view(dtype).reshape(shape)

    def check_unchanged(self) -> None:
        """Raises:
        FileError: a file is another one than when its header was read.
        """
        for path, state in self.state.items():
            check_unchanged(path, state)

    @functools.cached_property
    def groups(self) -> Mapping[str, tuple[str, ...]]:
        """Layer -> the last parts of the names of its tensors: `blocks.0.to_q` -> ("weight", "weight_scale", ...)."""
        found: dict[str, list[str]] = {}
        for name in self.entries:
            layer, _, last = name.rpartition(".")
            found.setdefault(layer, []).append(last)
        return {layer: tuple(lasts) for layer, lasts in found.items()}


@functools.lru_cache(maxsize=64)  # hundreds of layers say the same few things; a text of 64 KiB is small
def _parsed(raw: bytes) -> object:
    return loads(raw)


def open_model(path: Path) -> ModelFile:
    """Open a model by its header.

    Raises:
        FileError: what `locate` refuses; damaged; parts that do not go together.
    """
    located = locate(path)
    return _open_gguf(located) if located.container is Container.GGUF else open_safetensors(located)


def open_safetensors(located: Located) -> ModelFile:
    """Open the safetensors files of a model, which may not have their names yet."""
    path = located.path
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    state: dict[Path, dict[str, int]] = {}
    for file in located.files:
        state[file] = file_state(file)
        header = read_header(file)
        for key, value in (header.metadata or {}).items():
            metadata.setdefault(key, value)
        base = header.data_start
        for name, e in header.entries.items():
            if name in entries:
                raise FileError(f"{path.name}: '{name}' stands in two of its files.")
            start, end = e["data_offsets"]
            entries[name] = Entry(name, e["dtype"], tuple(e["shape"]), file, base + start, end - start)
    refuse_missing(located, entries)
    return ModelFile(located, entries, metadata, _configs(located.folder), state)


def open_damaged(path: Path) -> tuple[ModelFile, tuple[Header, ...]]:
    """Open a model whose headers may be damaged, for the doctor: the tensors that are readable.

    Returns:
        the model, with the first tensor of each name; the headers of safetensors files, with their faults.
    Raises:
        FileError: what `locate` refuses; nothing readable; of GGUF whatever is wrong.
    """
    located = locate(path)
    if located.container is Container.GGUF:
        return _open_gguf(located), ()
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    state = {file: file_state(file) for file in located.files}
    headers = tuple(map(parse, located.files))
    for file, header in zip(located.files, headers, strict=True):
        metadata = (header.metadata or {}) | metadata
        for name, e in header.entries.items():
            start, end = e["data_offsets"]
            entries.setdefault(
                name, Entry(name, e["dtype"], tuple(e["shape"]), file, header.data_start + start, end - start)
            )
    return ModelFile(located, entries, metadata, _configs(located.folder), state), headers


def _open_gguf(located: Located) -> ModelFile:
    from .gguf_parts import orig_shape, read_gguf_parts

    entries: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    state: dict[Path, dict[str, int]] = {}
    parts = read_gguf_parts(located.path)
    for part in parts:
        state[part.path] = file_state(part.path)
        for t in part.header.tensors:
            shape = orig_shape(part.path, parts[0].header, t)
            stored = t.shape if shape != t.shape else ()
            entries[t.name] = Entry(t.name, t.kind, shape, part.path, t.start, t.nbytes, stored)
        for key, value in part.header.metadata.items():
            if isinstance(value, str):
                metadata.setdefault(key, value)
    return ModelFile(located, entries, metadata, {}, state)


def _configs(folder: Path | None) -> dict[str, Mapping[str, Any]]:
    """JSON objects beside the weights; a file that is none is passed over, since only some schemes need one."""
    found: dict[str, Mapping[str, Any]] = {}
    for name in CONFIGS if folder is not None else ():
        path = cast(Path, folder) / name
        try:
            with open_regular(path) as file:
                raw = file.read(CONFIG_NBYTES + 1)
            value: object = loads(raw) if len(raw) <= CONFIG_NBYTES else None
        except (OSError, ValueError, FileError):
            continue
        if isinstance(value, dict):
            found[name] = cast("dict[str, Any]", value)
    return found
