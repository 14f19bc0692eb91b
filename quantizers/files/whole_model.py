"""The model that a weights file belongs to, where it is not a model by itself."""

from __future__ import annotations

from pathlib import Path

from ..errors import FileError
from .locate import INDEX_SUFFIX, PART_NAME, locate


def model_of(path: Path) -> Path:
    """The index of a part, the folder of a component's weights, or the file itself.

    Lists of choices hold weights files only: an index has another ending, and how a component was quantized may stand
    in the JSON files beside its weights.
    """
    part = PART_NAME.fullmatch(path.name)
    if part is not None and (path.parent / f"{part['stem']}{INDEX_SUFFIX}").is_file():
        path = path.parent / f"{part['stem']}{INDEX_SUFFIX}"
    if not (path.parent / "config.json").is_file():
        return path
    try:
        located = locate(path.parent)
    except FileError:
        return path
    return path.parent if path in (*located.files, located.index) else path
