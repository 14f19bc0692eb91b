"""What a text encoder has beside its weights, and what a conversion makes of it: tokenizer, sizes, heads.

ComfyUI's files of umT5, Gemma and Mistral hold their tokenizer as a tensor of bytes; a GGUF file holds a vocabulary as
arrays. Each becomes the other. Rotary bases, epsilons and merges are not in safetensors files, so llama.cpp's own
programs do not run what is made of them; loaders of text encoders do.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from ..errors import FileError
from .architectures import Found
from .gguf_header import ARRAY, STRING
from .gguf_layout import number, text
from .layouts.llama_cpp import (
    ARCHITECTURES,
    ASSUMED_HEADS,
    VISION,
    Heads,
    config_heads,
    gguf_heads,
    hyperparameters,
    shape_heads,
)
from .layouts.target import Target
from .signatures import TEXT
from .sources import GgufSource, Source
from .vocabulary import read_vocabulary, sentencepiece_metadata, tekken_metadata, wanted_tokenizer

# Tensor of bytes -> GGUF metadata of it. ComfyUI reads one more, the JSON of the tokenizers library.
TOKENIZERS: Mapping[str, Callable[[bytes], dict[str, Any]]] = {
    "spiece_model": sentencepiece_metadata,
    "tekken_model": tekken_metadata,
}
TOKENIZER_JSON = "tokenizer_json"
UINT8, INT32, FLOAT32, BOOL = 0, 5, 6, 7  # value types
WITH_MMPROJ = ("qwen2vl", "qwen3vl")  # whose GGUF files hold no vision part, but the original does


def tokenizer_tensors(found: Found, source: Source) -> dict[str, str]:
    """Name in the source -> name that ComfyUI reads, of the tensors of bytes that are a text encoder's tokenizer."""
    if found.component != TEXT:
        return {}
    held: dict[str, str] = {}
    for name, meta in source.metas.items():
        leaf = name.rpartition(".")[2]
        # In a checkpoint each text encoder may have its own.
        ours = found.prefix.startswith(name.removesuffix(leaf)) and leaf not in held.values()
        if ours and leaf in (*TOKENIZERS, TOKENIZER_JSON) and meta.dtype is torch.uint8 and len(meta.shape) == 1:
            held[name] = leaf
    return held


def tokenizers(found: Found, source: Source, names: Sequence[str]) -> tuple[dict[str, bytes], list[str]]:
    """The tokenizer that goes into a safetensors file, and warnings.

    Args:
        names: of the tensors of that file.
    """
    made = {leaf: _bytes(source, name) for name, leaf in tokenizer_tensors(found, source).items()}
    if found.component != TEXT or not isinstance(source, GgufSource):
        return made, []
    wanted = wanted_tokenizer(found.architecture, source.header.metadata, names)
    if not wanted or wanted in made:
        return made, []
    try:
        return {**made, wanted: read_vocabulary(source.path, source.header, wanted)}, []
    except FileError as err:
        why = str(err).splitlines()[0].rstrip(".")
        return made, [f"no tokenizer in the new file, and ComfyUI has none for this text encoder ('{wanted}'): {why}"]


def text_warnings(found: Found, source: Source, targets: Sequence[Target], gguf: bool, doubt: str) -> list[str]:
    """What a text encoder loses.

    Args:
        doubt: of `find_heads`.
    """
    if found.component != TEXT:
        return []
    warnings = [doubt] if doubt and any(piece.heads for t in targets for piece in t.pieces) else []
    used = {piece.source for t in targets for piece in t.pieces}
    vision = vision_tensors(found, source, used)
    if vision:
        warnings.append(
            f"the vision part ({len(vision)} tensors, such as {vision[0]}) is left out: image prompts will not work "
            "with this file alone; they need the model's mmproj file (GGUF) beside it"
        )
    elif found.layout == "llama.cpp" and not gguf and found.architecture in WITH_MMPROJ:
        warnings.append(
            "the vision part is a GGUF file of its own (mmproj) and is not converted: image prompts will not work with "
            "the new file; keep the GGUF file and its mmproj for them, or take the original safetensors file"
        )
    if gguf and TOKENIZER_JSON in tokenizer_tensors(found, source).values():
        warnings.append(f"'{TOKENIZER_JSON}' is left out: a GGUF file has no place for it that loaders read")
    return warnings


def vision_tensors(found: Found, source: Source, used: set[str]) -> list[str]:
    """Names of a text encoder's vision part that are left out."""
    return [n for n in source.metas if n not in used and VISION.search(n)] if found.component == TEXT else []


def find_heads(found: Found, source: Source) -> tuple[Heads | None, str]:
    """The heads of a text encoder whose rows of q and k llama.cpp reorders by them.

    Returns:
        None where nothing tells, with a warning for the case that it matters.
    """
    names = ARCHITECTURES.get(found.architecture)
    if found.component != TEXT or names is None or not names.rotary:
        return None, ""
    if isinstance(source, GgufSource):
        heads = gguf_heads(source.header.metadata, source.metas)
        return heads, "" if heads else ASSUMED_HEADS
    config, why = _config(source.files[0].parent) if source.files else ({}, "")
    heads = config_heads(config, source.metas)
    if heads is None and config:
        why = "the config.json beside the file is of another model, or does not tell: "
    heads = heads or shape_heads(source.metas)
    return heads, "" if heads else why + ASSUMED_HEADS


def _config(folder: Path) -> tuple[dict[str, Any], str]:
    """config.json of a folder, and why it was not read."""
    path = folder / "config.json"
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, ""
    except (OSError, ValueError) as err:
        return {}, f"{path.name} beside the file cannot be read ({err}): "
    return (cast("dict[str, Any]", config), "") if isinstance(config, dict) else ({}, "")


def known_architecture(found: Found, source: Source) -> Found:
    """With the name in a GGUF file of llama.cpp's, where that is known: qwen3 and qwen3vl have the same tensors."""
    declared = source.strings.get("general.architecture", "") if isinstance(source, GgufSource) else ""
    if found.component != TEXT or found.layout != "llama.cpp" or declared not in ARCHITECTURES:
        return found
    return dataclasses.replace(found, architecture=declared)


def key_name(key: bytes) -> str:
    """Of a GGUF key with its value."""
    (length,) = struct.unpack_from("<Q", key)
    return key[8 : 8 + length].decode()


def renamed_key(key: bytes, old: str, new: str) -> bytes:
    """A GGUF key `old.*` as `new.*`, others as they are: a loader looks its keys up by the architecture."""
    name = key_name(key)
    if not old or not name.startswith(f"{old}."):
        return key
    rest = key[8 + len(name.encode()) :]
    name = new + name.removeprefix(old)
    return struct.pack("<Q", len(name.encode())) + name.encode() + rest


def text_keys(found: Found, source: Source, heads: Heads | None = None) -> list[bytes]:
    """The keys, none for what is no text encoder of llama.cpp's.

    Raises:
        FileError: a tokenizer that cannot be read.
    """
    if found.component != TEXT or found.layout != "transformers" or found.architecture not in ARCHITECTURES:
        return []
    values: dict[str, Any] = dict(hyperparameters(found.architecture, source.metas, heads))
    for name, leaf in tokenizer_tensors(found, source).items():
        if leaf in TOKENIZERS:
            try:
                values |= TOKENIZERS[leaf](_bytes(source, name))
            except FileError as err:
                raise FileError(f"{source.label}: '{name}': {err}.") from err
    return [_key(name, value) for name, value in values.items()]


def _bytes(source: Source, name: str) -> bytes:
    return bytes(cast(Any, source.open(name).rows.reshape(-1)).numpy())


def _key(name: str, value: Any) -> bytes:
    if isinstance(value, bool):
        return _head(name, BOOL) + struct.pack("<?", value)
    if isinstance(value, int):
        return number(name, value)
    if isinstance(value, str):
        return text(name, value)
    return _head(name, ARRAY) + _array(name, value)


def _array(name: str, items: list[Any]) -> bytes:
    if isinstance(items[0], str):
        spelled = [item.encode() for item in items]
        return struct.pack("<IQ", STRING, len(items)) + b"".join(struct.pack("<Q", len(s)) + s for s in spelled)
    if isinstance(items[0], float):
        return struct.pack("<IQ", FLOAT32, len(items)) + struct.pack(f"<{len(items)}f", *items)
    if name.endswith("precompiled_charsmap"):
        return struct.pack("<IQ", UINT8, len(items)) + bytes(items)
    return struct.pack("<IQ", INT32, len(items)) + struct.pack(f"<{len(items)}i", *items)


def _head(name: str, kind: int) -> bytes:
    return struct.pack("<Q", len(name.encode())) + name.encode() + struct.pack("<I", kind)
