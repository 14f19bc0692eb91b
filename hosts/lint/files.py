"""Model files as lint sees them: where a name is looked for, and what a header tells of the formats inside."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ...quantizers.errors import FileError, near
from ..standalone.folders import ModelFolders
from .catalog import IN_ITS_FOLDER

# Folders beside those that the embedded host knows: the older names of ComfyUI, and the packs' own.
FOLDERS: Mapping[str, tuple[str, ...]] = {
    "controlnet": ("controlnet", "t2i_adapter"),
    "unet_gguf": ("diffusion_models", "unet_gguf"),
    "quantized": ("diffusion_models", "checkpoints"),  # of LoadQuantized
    "clip_gguf": ("text_encoders", "clip_gguf"),
    "vae": ("vae", "vae_approx"),
}
# Where a value FOLDER/NAME of the pack's file nodes may point.
NAMED_FOLDERS = ("diffusion_models", "text_encoders", "checkpoints", "vae", "loras", "controlnet", "clip_vision")
MOST_MARKS = 64  # `comfy_quant` tensors that are read; a file has one a layer, mostly all alike
MARK_NBYTES = 4096
NATIVE: Mapping[str, str] = {
    "float8_e4m3fn": "comfy-fp8-e4m3fn",
    "float8_e5m2": "comfy-fp8-e5m2",
    "nvfp4": "comfy-nvfp4",
    "mxfp8": "comfy-mxfp8",
    "int8_tensorwise": "comfy-int8",
    "convrot_w4a4": "comfy-w4a4-convrot",
    "asym_w4a8_int8": "comfy-w4a8",
}
BNB_MARKS = {".quant_state.bitsandbytes__nf4": "bnb-nf4", ".quant_state.bitsandbytes__fp4": "bnb-fp4"}


class Header(NamedTuple):
    """What the header of a file tells: the formats inside, or why it cannot be read."""

    formats: tuple[str, ...]
    fault: str = ""


@dataclass(frozen=True)
class Headers:
    """What was read of files, by path, time and size; kept from one check to the next by a host that runs on."""

    read: dict[tuple[Path, int, int], Header] = field(default_factory=lambda: dict[tuple[Path, int, int], Header]())
    layers: dict[tuple[Path, int, int], tuple[str, ...]] = field(
        default_factory=lambda: dict[tuple[Path, int, int], tuple[str, ...]]()
    )


class ModelFiles:
    """The model folders, listed and read once each."""

    def __init__(self, host: ModelFolders, headers: Headers | None = None) -> None:
        self.host = host
        self._lists: dict[str, list[str]] = {}
        self._found: dict[tuple[str, str], Path | None] = {}
        self._headers = headers if headers is not None else Headers()

    def names(self, folder: str) -> list[str]:
        if folder == IN_ITS_FOLDER:
            return [f"{own}/{name}" for own in NAMED_FOLDERS for name in self.names(own)]
        if folder not in self._lists:
            found = {n for part in FOLDERS.get(folder, (folder,)) for n in self.host.list_files(part)}
            gguf_only = folder.endswith("_gguf") and folder != "clip_gguf"
            self._lists[folder] = sorted(n for n in found if not gguf_only or n.lower().endswith(".gguf"))
        return self._lists[folder]

    def find(self, folder: str, name: str) -> Path | None:
        """The path of a file; None where it is not there."""
        folder, name = _parted(folder, name)
        if (folder, name) not in self._found:
            paths = (path for part in FOLDERS.get(folder, (folder,)) for path in self.host.candidates(part, name))
            # False, too, for a name that no file system takes.
            self._found[folder, name] = next((path for path in paths if os.path.isfile(path)), None)
        return self._found[folder, name]

    def missing(
        self, folder: str, name: str, *, listed: bool, here: bool = False
    ) -> tuple[str, tuple[str, ...]] | None:
        """(message, remedies) for a file that is not there; None where it is.

        Args:
            listed: only the names of the list count, as for ComfyUI's own loaders; else also another path to a file.
            here: for a server that runs, whose folders no option can change.
        """
        names = self.names(folder)
        found = self.find(folder, name)
        if found is not None and (not listed or name in names):
            return None
        if folder == IN_ITS_FOLDER and name.partition("/")[0] not in NAMED_FOLDERS:
            return f"{name!r} is not of the form FOLDER/NAME.", (f"Folders: {', '.join(NAMED_FOLDERS)}.",)
        folder, name = _parted(folder, name)
        names = self.names(folder)
        parts = " or ".join(FOLDERS.get(folder, (folder,)))
        if found is not None:
            ends = f"/{Path(os.path.normpath(name)).as_posix()}"
            same = next((n for n in sorted(names, key=len, reverse=True) if ends.endswith(f"/{n}")), "")
            wanted = f"Write {same!r}." if same else "Write its name as the list has it."
            return f"{name!r} leads to a file in {parts}, but is not a name in the list of choices.", (wanted,)
        gone = self.dead_link(folder, name)
        if gone is not None:
            return f"{name!r} is a link to {gone}, which is not there.", ("Mend the link, or put the file there.",)
        turned = name.replace("\\", "/")
        if turned != name and self.find(folder, turned) is not None:
            return (
                f"{name!r} is written with Windows' separators; the file is {turned!r} here.",
                (f"Write {turned!r}.",),
            )
        hint = near(name, names)
        shown = (
            f" There: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}."
            if names
            else " No model file is there."
        )
        message = f"{name!r} is not in {parts}.{hint or shown}"
        searched = ", ".join(str(m) for m in self.host.models)
        way = "Put the file there" if here else "Put the file there, or name the folder with --models"
        return message, (f"{way} (searched: {searched}).",)

    def dead_link(self, folder: str, name: str) -> str | None:
        """Where a link leads whose file is gone; None where there is no such link."""
        folder, name = _parted(folder, name)
        for part in FOLDERS.get(folder, (folder,)):
            for path in self.host.candidates(part, name):
                try:
                    return os.readlink(path)
                except (OSError, ValueError):  # no link, or a name that no file system takes
                    continue
        return None

    def formats(self, path: Path) -> tuple[str, ...]:
        """Ids of the quantized formats inside, from the header; empty for a plain or unreadable file."""
        return self._header(path).formats

    def _header(self, path: Path) -> Header:
        key = _state(path)
        found = self._headers.read.get(key)  # held here: another thread may clear the table
        if found is None:
            try:
                read = gguf_formats if path.suffix.lower() == ".gguf" else safetensors_formats
                found = Header(tuple(read(path)) if path.suffix.lower() in SUFFIXES else ())
            except (FileError, OSError) as err:
                found = Header((), str(err))
            self._headers.read[key] = found
        return found

    def layer_formats(self, path: Path) -> tuple[str, ...]:
        """Formats of all layers that are quantized in a model's files, by every scheme that LoadQuantized knows."""
        from ...quantizers.files.model_file import open_model
        from ...quantizers.files.schemes.scan import scan
        from ...quantizers.files.whole_model import model_of

        key = _state(path)
        found = self._headers.layers.get(key)
        if found is None:
            try:
                layers = scan(open_model(model_of(path))).layers.values()
            except (FileError, OSError):
                layers = ()
            found = tuple({layer.format_id: None for layer in layers if layer.format_id})
            self._headers.layers[key] = found
        return found

    def fault(self, path: Path) -> str:
        """Why the header of a file cannot be read; empty where it can, and for files of other kinds."""
        return self._header(path).fault


def _state(path: Path) -> tuple[Path, int, int]:
    """A file that was replaced has another."""
    try:
        stat = path.stat()
    except OSError:
        return path, 0, 0
    return path, stat.st_mtime_ns, stat.st_size


SUFFIXES = (".gguf", ".safetensors", ".sft")


def _parted(folder: str, name: str) -> tuple[str, str]:
    """Folder and name of a file, for values that hold both, too."""
    if folder != IN_ITS_FOLDER:
        return folder, name
    own, _, rest = name.partition("/")
    return own, rest


def gguf_formats(path: Path) -> list[str]:
    """`gguf-q4-k`, ... for the types of the blocks in a GGUF file, the most frequent first.

    Raises:
        FileError: not GGUF, truncated or corrupt.
    """
    from collections import Counter

    from ...quantizers.files.gguf_parts import read_gguf_parts
    from ...quantizers.ggml_types import PLAIN_TYPES, format_id

    kinds = Counter(t.kind for part in read_gguf_parts(path) for t in part.header.tensors)
    return [format_id(kind) for kind, _ in kinds.most_common() if kind not in PLAIN_TYPES]


def safetensors_formats(path: Path) -> list[str]:
    """ComfyUI's native formats and bitsandbytes' 4-bit ones in a safetensors file.

    Raises:
        FileError: not safetensors, truncated or corrupt.
    """
    from ...quantizers.files.safetensors_header import read_safetensors_header

    header = read_safetensors_header(path)
    metadata = header.get("__metadata__") or {}
    found: dict[str, None] = {}
    found.update(dict.fromkeys(_from_metadata(metadata.get("_quantization_metadata"))))
    marks = [entry for name, entry in header.items() if name.endswith(".comfy_quant")]
    found.update(dict.fromkeys(_from_marks(path, marks[:MOST_MARKS])))
    for ending, format_id in BNB_MARKS.items():
        if any(name.endswith(ending) for name in header):
            found[format_id] = None
    if any(name.endswith("scaled_fp8") for name in header):  # the form before `comfy_quant`; converted when loaded
        found["comfy-fp8-e4m3fn"] = None
    return list(found)


def _from_metadata(text: object) -> Iterable[str]:
    try:
        layers: Any = json.loads(text).get("layers", {}) if isinstance(text, str) else {}
        return [f for layer in layers.values() if (f := _native(layer))]
    except (ValueError, RecursionError, AttributeError):
        return []


def _from_marks(path: Path, entries: list[Any]) -> Iterable[str]:
    """The format that each `comfy_quant` tensor names: a JSON text of a few dozen bytes."""
    found: list[str] = []
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        for entry in entries:
            begin, end = entry["data_offsets"]
            file.seek(start + begin)
            try:
                format_id = _native(json.loads(file.read(min(end - begin, MARK_NBYTES))))
            except (ValueError, RecursionError):
                continue
            found += [format_id] if format_id else []
    return found


def _native(conf: object) -> str:
    if not isinstance(conf, dict) or not isinstance(conf.get("format"), str):
        return ""
    format_id = NATIVE.get(conf["format"], "")
    return "comfy-int8-convrot" if format_id == "comfy-int8" and conf.get("convrot") else format_id
