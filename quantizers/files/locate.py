"""Which files make the model that a path names: a single file, the parts of an index, or the weights of a folder.

Nothing but the first bytes of a file and the JSON of an index is read here.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path, PureWindowsPath
from typing import Any, cast

from ..errors import FileError, near
from ..ggml_types import MAGIC
from .bounded_json import loads
from .regular import open_regular

ZIP_MAGIC = b"PK"
PICKLE_MAGIC = b"\x80"  # then the protocol number, 2 to 5
GGUF_SUFFIX = ".gguf"
INDEX_SUFFIX = ".safetensors.index.json"
INDEX_NAME = re.compile(r"\.index(\.\w+)?\.json$")  # one of pickles, or of a variant such as fp16, too
PART_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<variant>\.\w+)?\.safetensors")
ADDRESS = re.compile(r"[a-z][a-z0-9+]+:/", re.IGNORECASE)  # pathlib makes one slash of two
HEAD_NBYTES = 64
INDEX_NBYTES = 1 << 26  # those of the largest models have 10 MB
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Where diffusers and transformers put the weights of one component.
_NAMES = ("diffusion_pytorch_model", "model")


class Container(str, Enum):
    """How a model is stored."""

    SAFETENSORS = "safetensors"
    SHARDED = "sharded safetensors"
    GGUF = "GGUF"


@dataclass(frozen=True)
class Located:
    """The files of a model.

    Attributes:
        path: what was asked for.
        container: what the files are.
        files: in the order of their names; of GGUF the one that was asked for, whichever part it is.
        folder: of a diffusers or transformers component, whose JSON files belong to the model; else None.
        index: the `*.index.json`, or None.
        where: tensor -> file name, as the index says; empty without one.
    """

    path: Path
    container: Container
    files: tuple[Path, ...]
    folder: Path | None = None
    index: Path | None = None
    where: Mapping[str, str] = field(default_factory=lambda: dict[str, str]())


def locate(path: Path) -> Located:
    """Find the files of a model by content: safetensors, a `*.safetensors.index.json`, a component's folder, or GGUF.

    Raises:
        FileError: missing, of another kind, one of several parts, or an index that is wrong.
    """
    if "\0" in str(path):
        raise FileError(f"{str(path)!r}: cannot be read: a path has no NUL character.")
    try:
        return _located(path)
    except OSError as err:
        todo = "\nIt is a link that leads back to itself: delete it." if err.errno == errno.ELOOP else ""
        raise FileError(f"{path}: cannot be read: {err.strerror}.{_similar(path)}{todo}") from err


def _located(path: Path) -> Located:
    if ADDRESS.match(str(path)) and not path.exists():
        raise FileError(f"'{path}' is an address, and only files are read here.\nDownload the file first.")
    if path.is_dir():
        return _in_folder(path)
    if INDEX_NAME.search(path.name):
        return _indexed(path, path)
    with open_regular(path) as file:
        head = file.read(HEAD_NBYTES)
    if head[:4] == MAGIC:
        return Located(path, Container.GGUF, (path,))
    if is_pickle(head):
        raise pickled(path.name)
    _refuse_others(path, head)
    _refuse_part(path)
    return Located(path, Container.SAFETENSORS, (path,))


def is_pickle(head: bytes) -> bool:
    """Whether a file that begins so was made by `torch.save`.

    Args:
        head: at least 8 bytes. The length of a safetensors header may begin with 0x80 too, but then zeros follow.
    """
    old = head[:1] == PICKLE_MAGIC and head[1:2] in (b"\2", b"\3", b"\4", b"\5") and any(head[4:8])
    return head[:2] == ZIP_MAGIC or old


def _refuse_others(path: Path, head: bytes) -> None:
    """What does not begin as a safetensors file, where its beginning or its name says what it is."""
    if not head:
        raise FileError(f"{path.name}: is empty.\nGet the file again.")
    if path.suffix.lower() == GGUF_SUFFIX and head[8:9] != b"{":
        raise FileError(
            f"{path.name}: not a GGUF file (it begins with {head[:4]!r}).\n"
            "It is damaged, or something else; get it again."
        )
    if not any(byte < 9 or 13 < byte < 32 for byte in head):
        raise FileError(
            f"{path.name}: a text file, no model (it begins with {head[:16]!r}).\n"
            "Give a safetensors or GGUF file; a download that failed may have left an error page."
        )


def pickled(name: str) -> FileError:
    return FileError(
        f"{name}: a file of torch.save is not read, because reading one may run code.\nConvert it to safetensors first."
    )


def _refuse_part(path: Path) -> None:
    part = PART_NAME.fullmatch(path.name)
    if part is None or int(part["count"]) < 2:
        return
    index = next((p for p in _indexes(path.parent) if p.name.startswith(f"{part['stem']}.")), None)
    todo = (
        f"Give their index '{index}', or the folder."
        if index is not None
        else f"Give the index of them, '{part['stem']}{INDEX_SUFFIX}', which is not beside it: download it too."
    )
    raise FileError(f"{path.name}: one of {int(part['count'])} parts of a model.\n{todo}")


def _indexes(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*.json") if INDEX_NAME.search(p.name))


def _similar(path: Path) -> str:
    try:
        return near(path.name, [p.name for p in path.parent.iterdir()])
    except OSError:
        return ""


def _in_folder(folder: Path) -> Located:
    """The weights of one component; a whole pipeline is refused with the names of its components."""
    for stem in _NAMES:
        if (folder / f"{stem}{INDEX_SUFFIX}").is_file():
            return _indexed(folder, folder / f"{stem}{INDEX_SUFFIX}", folder)
        if (folder / f"{stem}.safetensors").is_file():
            return Located(folder, Container.SAFETENSORS, (folder / f"{stem}.safetensors",), folder)
    for stem in _NAMES:
        variants = _variants(folder, stem)
        if len(variants) == 1:
            (file,) = variants.values()
            index = INDEX_NAME.search(file.name) is not None
            return _indexed(folder, file, folder) if index else Located(folder, Container.SAFETENSORS, (file,), folder)
        if variants:
            raise FileError(
                f"{folder}: {len(variants)} variants of one model: {', '.join(variants)}.\n"
                f"Give one of them: {', '.join(map(str, variants.values()))}."
            )
    raise FileError(f"{folder}: no weights of one model in this folder.\n{_instead(folder)}")


def _variants(folder: Path, stem: str) -> dict[str, Path]:
    """Name of a variant, such as `fp16` -> `STEM.fp16.safetensors`, or `STEM.safetensors.index.fp16.json` of parts."""
    single = re.compile(rf"{stem}\.(\w+)\.safetensors")
    index = re.compile(rf"{stem}\.safetensors\.index\.(\w+)\.json")
    names = sorted(p.name for p in folder.iterdir() if p.is_file())
    return {m[1]: folder / name for name in names if (m := single.fullmatch(name) or index.fullmatch(name))}


def _instead(folder: Path) -> str:
    """What to give in place of a folder without weights that it is known by."""
    indexes = _indexes(folder)
    if indexes:
        return f"Give one of its indexes: {', '.join(map(str, indexes))}."
    parts = sorted(p.name for p in folder.glob("*.safetensors") if PART_NAME.fullmatch(p.name))
    if parts:
        stem = PART_NAME.fullmatch(parts[0])
        name = f"{stem['stem'] if stem else _NAMES[0]}{INDEX_SUFFIX}"
        return f"It holds {len(parts)} parts such as '{parts[0]}', but not their index.\nDownload '{name}' too."
    inside = sorted(p.name for p in folder.iterdir() if p.is_dir() and any(p.glob("*.safetensors")))
    if inside:
        return f"Give one of its components: {', '.join(str(folder / name) for name in inside)}."
    pickle = next((p.name for p in sorted(folder.iterdir()) if p.suffix in PICKLES), None)
    if pickle is not None:
        return str(pickled(pickle))
    return f"Expected {' or '.join(f'{stem}.safetensors' for stem in _NAMES)} there, or an index of them."


def _indexed(path: Path, index: Path, folder: Path | None = None) -> Located:
    """All the files of an index.

    Args:
        path: what the user gave.
    """
    where = _weight_map(index)
    names = sorted(set(where.values()))
    files = tuple(_part(index, name) for name in names)
    held: dict[tuple[int, int], Path] = {}
    for file in files:
        stat = file.stat()
        other = held.setdefault((stat.st_dev, stat.st_ino), file)
        if other is not file:
            raise FileError(
                f"{index.name}: '{other.name}' and '{file.name}' are one file under two names.\nDownload both again."
            )
    return Located(path, Container.SHARDED, files, folder or index.parent, index, where)


def _weight_map(index: Path) -> dict[str, str]:
    none = f"{index.name}: not an index of safetensors files"
    with open_regular(index) as file:
        size = os.fstat(file.fileno()).st_size
        if size > INDEX_NBYTES:
            raise FileError(f"{none}: {size} bytes, expected at most {INDEX_NBYTES}.")
        try:
            data: Any = loads(file.read(INDEX_NBYTES))
            where = cast("dict[str, object]", data["weight_map"]).items()
        except (ValueError, KeyError, TypeError, AttributeError) as err:
            why = str(err) if isinstance(err, ValueError) else "no 'weight_map'"
            raise FileError(f"{none} ({why}).") from err
    found = {tensor: file for tensor, file in where if isinstance(file, str)}
    if len(found) != len(where):
        raise FileError(f"{none}: its 'weight_map' does not map tensors to names of files.")
    return found


def _part(index: Path, name: str) -> Path:
    """A file that an index names.

    Only names are taken, no paths: an index comes from somebody else. What a name links to may be anywhere, as in the
    cache of huggingface_hub, since only who owns the folder can make a link.
    """
    plain = Path(name).name == name == PureWindowsPath(name).name and name not in ("", ".", "..") and name.isprintable()
    if not plain:
        raise FileError(f"{index.name}: names the file {name[:200]!r}, which is not beside it.")
    if Path(name).suffix in PICKLES:
        raise pickled(name)
    file = index.parent / name
    if not file.is_file():
        what = "is a link to nothing, or not a file" if os.path.lexists(file) else "is missing"
        raise FileError(f"{index.name}: the file '{name}' {what}.\nDownload it again.")
    return file


def refuse_missing(located: Located, found: Mapping[str, Any]) -> None:
    """Refuse parts that do not hold the tensors that their index names.

    Args:
        found: the tensors of all parts by their names.
    """
    missing = [tensor for tensor in located.where if tensor not in found]
    if missing and located.index is not None:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise FileError(
            f"{located.index.name}: '{missing[0]}'{more} is to be in '{located.where[missing[0]]}', which does not "
            "hold it.\nDownload that file and the index again, both from one place."
        )
