"""A model in several safetensors files, as transformers and diffusers name and index them.

    NAME-00001-of-00003.safetensors, ..., NAME.safetensors.index.json

Which tensor goes into which file follows from predicted sizes, so that it is known before the work. Those of one layer
stay together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..errors import SpecError
from .locate import INDEX_SUFFIX
from .writing import Item

Size = tuple[str, int, "torch.dtype | None"]  # name, bytes, dtype of what is kept as one tensor


def shards(sizes: Sequence[Size], limit: int, room: int) -> list[Item]:
    """Items in the given order, in files of at most so many bytes; what is larger alone has a file for itself.

    Args:
        limit: bytes of a file; 0 is one file.
        room: bytes of each file before its data.
    Raises:
        SpecError: the limit leaves no room for data.
    """
    if limit and limit < 2 * room:
        raise SpecError(f"--shard-size: {limit} bytes, and the header alone takes {room}.\nGive at least {2 * room}.")
    items: list[Item] = []
    part = filled = 0
    for name, nbytes, kept in sizes:
        if limit and filled and filled + nbytes > limit - room:
            part, filled = part + 1, 0
        filled += nbytes
        items.append(Item(name, part, nbytes, kept))
    return items


def shard_files(target: Path, items: Sequence[Item], room: int, more: int) -> list[tuple[Path, int]]:
    """Names and predicted sizes of the files.

    Args:
        more: bytes that come behind the items of the last one.
    """
    count = max((item.part for item in items), default=0) + 1
    sizes = [room] * count
    for item in items:
        sizes[item.part] += item.nbytes
    sizes[-1] += more
    if count == 1:
        return [(target, sizes[0])]
    names = (f"{target.stem}-{i + 1:05}-of-{count:05}{target.suffix}" for i in range(count))
    return [(target.with_name(name), size) for name, size in zip(names, sizes, strict=True)]


def index_of(target: Path) -> Path:
    return target.with_name(f"{target.stem}{INDEX_SUFFIX}")


def index_text(where: Mapping[str, int], files: Sequence[tuple[Path, int]], nbytes: int) -> str:
    """The index of several files.

    Args:
        where: tensor -> index of its file.
        nbytes: of all tensors.
    """
    found = {name: files[part][0].name for name, part in sorted(where.items())}
    return json.dumps({"metadata": {"total_size": nbytes}, "weight_map": found}, indent=2) + "\n"
