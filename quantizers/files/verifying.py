"""Look at a written file again, before it takes its name: all bytes by checksum, and some layers by their values.

The pages are dropped from the system's cache first, where it has a call for that, so that the bytes come from the disk.
"""

from __future__ import annotations

import dataclasses
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import FileError
from ..kernels.compare import compare
from ..registry import require_reader
from ..report import Entry
from ..weight import QuantizedWeight
from .locate import Container, Located
from .model_file import open_safetensors
from .quantized_file import BLOCK_NBYTES
from .schemes.scan import scan
from .writing import crc_of

LAYERS = 4
SLACK_DB = 0.1  # a sum of the same terms in another order
Content = tuple[str, int, int, int]  # name, first byte, byte after the last, CRC-32


def verify_bytes(target: Path, path: Path, contents: Sequence[Content], advance: Callable[[int], object]) -> None:
    """Compare every byte of a file with what was written.

    Args:
        target: the name that it is to get, for messages.
        contents: without holes, in the order of the file.
    Raises:
        FileError: the disk gives other bytes back.
    """
    block = bytearray(BLOCK_NBYTES)
    with open(path, "rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for name, start, end, wanted in contents:
            crc, at = 0, start
            while at < end:
                size = file.readinto(memoryview(block)[: end - at])
                if not size:
                    break
                crc = zlib.crc32(memoryview(block)[:size], crc)
                at += size
                advance(size)
            if at < end or crc != wanted:
                raise damaged(target, f"'{name}' has CRC-32 {crc:08x} on the disk, {wanted:08x} was written")
        if file.read(1):
            raise damaged(target, f"there is more behind byte {contents[-1][2]}")


def damaged(target: Path, what: str) -> FileError:
    return FileError(
        f"{target}: what was written is not what stands on the disk: {what}.\n"
        "Nothing was kept under this name. Check the disk and the memory, or write elsewhere."
    )


def sample(names: Sequence[str]) -> list[str]:
    """Layers to look at, from the first to the last."""
    if len(names) <= LAYERS:
        return list(names)
    return [names[i * (len(names) - 1) // (LAYERS - 1)] for i in range(LAYERS)]


def verify_layers(
    target: Path,
    paths: Sequence[Path],
    entries: Mapping[str, Entry],
    values: Callable[[str], Tensor | QuantizedWeight],
    every: int,
) -> None:
    """Open quantized layers as a loader does, and compare them with their source.

    Args:
        paths: where the files are.
        entries: of the layers to look at; the file must be as near to the source as they say.
        values: name -> (N, K) source, or the layer that was copied.
        every: of how many rows one was measured.
    Raises:
        FileError: a layer is not found, cannot be read, or is another one.
    """
    files = tuple(paths)
    container = Container.SAFETENSORS if len(files) == 1 else Container.SHARDED
    found = scan(open_safetensors(Located(target, container, files)))
    for name, entry in entries.items():
        layer = found.layers.get(name)
        if layer is None or not layer.format_id:
            fault = next((f.text for f in found.faults if f.tensor.startswith(name.removesuffix("weight"))), "")
            why = layer.why if layer is not None else fault or "no scheme finds it"
            raise damaged(target, f"'{name}' cannot be read as {entry.format_id}: {why}")
        source = values(name)
        shape = source.orig_shape if isinstance(source, QuantizedWeight) else tuple(source.shape)
        # Some layouts pad a weight and do not tell by how much: a model knows its shape.
        known = dataclasses.replace(layer, shape=shape)
        weight = found.scheme(layer).weight(known, found.file.read)
        if isinstance(source, QuantizedWeight):
            if _sums(weight) != _sums(source):
                raise damaged(target, f"'{name}' is not the layer that was copied")
            continue
        _compare(target, name, entry, weight, source, every)


def _sums(weight: QuantizedWeight) -> list[int]:
    """Checksums of what a weight holds; in whichever roles, which differ between formats that hold the same."""
    return sorted(crc_of([t]) for t in weight.tensors.values())


def _compare(target: Path, name: str, entry: Entry, weight: QuantizedWeight, source: Tensor, every: int) -> None:
    quantizer = require_reader(weight.format_id)
    restored = quantizer.form(weight)
    d = compare(source, restored if restored is not None else quantizer.dequantize(weight, torch.float32), every)
    allowed = entry.noise * 10 ** (SLACK_DB / 10) + 1e-12 * entry.signal
    if not d.noise <= allowed:
        raise damaged(target, f"'{name}' is off by {d.noise:.6g} (sum of squares), {entry.noise:.6g} was measured")
