"""Write weights that are in memory, quantized or not, to a safetensors file in the layout of a writer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..report import Entry
from ..weight import QuantizedWeight
from .journal import partial, refuse_existing
from .quantized_file import Value
from .shards import index_of, index_text, shard_files, shards
from .verifying import verify_bytes
from .writers.base import Writer
from .writers.layout import metadata_of
from .writing import Item, Made, Stream, header_room

Config = Callable[[Mapping[str, Any], tuple[str, ...]], Mapping[str, str]]


def save_weights(
    target: Path,
    values: Mapping[str, Value],
    writer: Writer,
    *,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    shard_nbytes: int = 0,
    beside: tuple[str, ...] = (),
    config: Config | None = None,
    advance: Callable[[int], object] = lambda nbytes: None,
) -> tuple[Path, ...]:
    """Write names and their values; all files take their names when they are complete and read back as written.

    Args:
        target: the file; of several what they go by.
        values: name -> tensor, or weight in a format that the writer holds; on any device.
        metadata: the file's own strings, beside those of the writer.
        overwrite: replace files that are there.
        shard_nbytes: largest size of a file; 0 is no limit.
        beside: names of the files that `config` gives.
        config: (notes, names of the plain matrices) -> name and text of files to write in the same folder.
        advance: called with the bytes that were written since the last call; may raise to give up.
    Returns:
        the files that were written.
    Raises:
        FileError: it cannot be written, or is there already; what was there is as it was.
        SpecError, WeightError: a weight that the layout cannot hold.
    """
    strings = {"format": "pt", **(metadata or {})}
    room = header_room(values, len(json.dumps(strings)))
    sizes = [(name, v.nbytes, v.dtype if isinstance(v, Tensor) else None) for name, v in values.items()]
    items = shards(sizes, shard_nbytes, room)
    files = shard_files(target, items, room, 0)
    parts = files if len(files) > 1 else []
    names = (*((index_of(target).name,) if parts else ()), *beside)
    if not overwrite:
        refuse_existing(target, [*(path for path, _ in files), *(target.with_name(name) for name in names)])
    with partial(target, files[0][1], {}, False, overwrite, parts=parts, beside=names) as file:
        stream = Stream(file, len(files), room)

        def make(item: Item) -> Made:
            return _made(item.name, values[item.name], writer)

        stream.write(items, make, advance)
        stream.finish(make, advance, writer.once(stream.notes))
        plain = tuple(n for n, v in values.items() if isinstance(v, Tensor) and v.dim() == 2)
        texts = {names[0]: index_text(stream.where(), files, stream.nbytes)} if parts else {}
        texts |= config(stream.notes, plain) if config is not None else {}
        others = [n for n, v in values.items() if isinstance(v, Tensor)]
        stream.seal({**strings, **metadata_of(writer, stream.notes, others)}, texts)
        for path, contents in zip(file.paths, stream.contents(), strict=True):
            verify_bytes(target, path, contents, lambda nbytes: None)
    return tuple(path for path, _ in files)


def _made(name: str, value: Value, writer: Writer) -> Made:
    entry = Entry(name, "keep", "in memory", value.nbytes, value.nbytes)
    if isinstance(value, QuantizedWeight):
        return Made(writer.tensors(name, value), entry, writer.note(name, value))
    return Made({name: value}, entry)
