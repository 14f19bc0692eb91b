"""What a model of the same name leaves beside a new one, and would be read in its place: an index and its shards."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .locate import INDEX_NBYTES, INDEX_SUFFIX

SAFETENSORS = ".safetensors"


def former_files(target: Path, written: Iterable[Path]) -> list[Path]:
    """Files of a model of this name that a new one does not replace; loaders look for an index first.

    Args:
        target: what the new model goes by.
        written: the files that come to be.
    Returns:
        the index, then the shards that it names, then a single file where the new model has several.
    """
    if target.suffix.lower() != SAFETENSORS:
        return []
    new = {path.name for path in written}
    index = target.with_name(f"{target.stem}{INDEX_SUFFIX}")
    names = [index.name, *_shards(target, index), target.name]
    return [target.with_name(n) for n in dict.fromkeys(names) if n not in new and os.path.lexists(target.with_name(n))]


def _shards(target: Path, index: Path) -> list[str]:
    """Names in an index that are those of shards of this model; what else it names is not ours to remove."""
    try:
        if index.stat().st_size > INDEX_NBYTES:
            return []
        read: Any = json.loads(index.read_text(encoding="utf-8"))
        names = {str(name) for name in read["weight_map"].values()}
    except (OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return []
    shard = re.compile(rf"{re.escape(target.stem)}-\d{{5}}-of-\d{{5}}{re.escape(target.suffix)}")
    return sorted(name for name in names if shard.fullmatch(name))
