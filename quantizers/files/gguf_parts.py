"""Models in several GGUF files, as llama.cpp's gguf-split cuts them.

They are named `NAME-00001-of-00003.gguf`; the keys `split.no` (from 0), `split.count` and `split.tensors.count` stand
in each, the model's own keys in the first only, whose tensors may be none.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import NamedTuple

from ..errors import FileError
from .gguf_header import MAX_DIMENSIONS, MAX_NUMEL, GgufHeader, GgufTensor, Types, read_part_header
from .gguf_source import shown

PART_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL | re.IGNORECASE | re.ASCII)
ORIG_SHAPE = "comfy.gguf.orig_shape."
AGAIN = "Download the model again, all files from one place."


class GgufPart(NamedTuple):
    """One file of a model."""

    path: Path
    header: GgufHeader


def read_gguf_parts(path: Path, types: Types | None = None) -> tuple[GgufPart, ...]:
    """Read the headers of all files of a model, whichever of them `path` is; mostly it is one.

    Args:
        types: as for `read_gguf_header`.
    Raises:
        FileError: as `read_gguf_header`; a part is missing, renamed, or does not belong to the others.
    """
    header = read_part_header(path, types)
    if header.parts == 1:
        return (GgufPart(path, header),)
    paths = _part_paths(path, header.parts)
    missing = [p.name for p in paths if not p.is_file()]
    if missing:
        others = f" (nor are {len(missing) - 1} others)" if len(missing) > 1 else ""
        raise FileError(
            f"{path.name}: one of the {header.parts} files of a model, and {missing[0]} is not beside it{others}.\n"
            "Put all of them into one folder, under the names that they were published with."
        )
    parts = tuple(GgufPart(p, header if p == path else read_part_header(p, types)) for p in paths)
    _check(parts)
    return parts


def named_parts(path: Path) -> list[Path]:
    """The files of a model as the name of one of them tells, which costs no read; there or not."""
    match = PART_NAME.fullmatch(path.name)
    if match is None or not 1 <= int(match[2]) <= int(match[3]):
        return [path]
    return _part_paths(path, int(match[3]))


def _part_paths(path: Path, count: int) -> list[Path]:
    match = PART_NAME.fullmatch(path.name)
    if match is None or int(match[3]) != count or not 1 <= int(match[2]) <= count:
        raise FileError(
            f"{path.name}: one of the {count} files of a model, but not named as one.\n"
            f"Give all of them the names that they were published with: NAME-00001-of-{count:05}.gguf and so on."
        )
    start, end = match.start(2), match.end(2)
    return [path.with_name(f"{path.name[:start]}{i + 1:05}{path.name[end:]}") for i in range(count)]


def _check(parts: tuple[GgufPart, ...]) -> None:
    """Every part says that it is that one, and all tensors are there once."""
    total = parts[0].header.metadata.get("split.tensors.count")
    seen: dict[str, str] = {}
    for i, (path, header) in enumerate(parts):
        for key, expected in (("split.no", i), ("split.count", len(parts)), ("split.tensors.count", total)):
            found = header.metadata.get(key)
            if type(found) is not type(expected) or found != expected:
                got = shown(found) if isinstance(found, str) else found
                raise FileError(
                    f"{path.name}: not part {i + 1} of {parts[0].path.name}: {key!r} is {got}, expected {expected}.\n"
                    f"{AGAIN}"
                )
        for tensor in header.tensors:
            if tensor.name in seen:
                raise FileError(f"{path.name}: {shown(tensor.name)} is in {seen[tensor.name]} too.\n{AGAIN}")
            seen[tensor.name] = path.name
    if total is not None and total != len(seen):
        raise FileError(
            f"{parts[0].path.name}: {len(parts)} files hold {len(seen)} tensors, 'split.tensors.count' is {total}.\n"
            f"{AGAIN}"
        )


def orig_shape(path: Path, header: GgufHeader, t: GgufTensor) -> tuple[int, ...]:
    """The shape of a tensor, which converters record where ggml cannot have it: other rows, or more dimensions.

    Args:
        header: of the first part, which has the keys of the model.
    Raises:
        FileError: another number of values than the tensor has.
    """
    key = ORIG_SHAPE + t.name
    found = header.arrays.get(key, (-1,) if key in header.located else None)
    if found is None:
        return t.shape
    shape = tuple(n for n in found if type(n) is int and 0 <= n <= MAX_NUMEL)
    right = len(shape) == len(found) <= MAX_DIMENSIONS and math.prod(shape) == math.prod(t.shape)
    if not right or math.prod(n or 1 for n in shape) > MAX_NUMEL:
        raise FileError(
            f"{path.name}: corrupt GGUF file: {shown(t.name)} has shape {t.shape}, and its other shape under "
            f"{ORIG_SHAPE}* does not go with it."
        )
    return shape
