"""GGUF keys of a text encoder that is converted: its sizes, and its tokenizer where the file holds one.

ComfyUI's files of umT5, Gemma and Mistral hold their tokenizer as a tensor of bytes; a GGUF file holds a vocabulary as
arrays. Rotary bases, epsilons and merges are not in such files, so llama.cpp's own programs do not run what is made of
them; loaders of text encoders do.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any, cast

from ..errors import FileError
from .architectures import Found
from .gguf_header import ARRAY, STRING
from .gguf_layout import number, text
from .layouts.llama_cpp import ARCHITECTURES, hyperparameters
from .sources import Source
from .stream import TensorFile
from .vocabulary import sentencepiece_metadata, tekken_metadata

TOKENIZERS: Mapping[str, Callable[[bytes], dict[str, Any]]] = {
    "spiece_model": sentencepiece_metadata,
    "tekken_model": tekken_metadata,
}
UINT8, INT32, FLOAT32, BOOL = 0, 5, 6, 7  # value types


def text_keys(found: Found, source: Source) -> list[bytes]:
    """The keys, none for what is no text encoder of llama.cpp's.

    Raises:
        FileError: a tokenizer that cannot be read.
    """
    if found.component != "text encoder" or found.layout != "transformers" or found.architecture not in ARCHITECTURES:
        return []
    values: dict[str, Any] = dict(hyperparameters(found.architecture, source.metas))
    for file in map(TensorFile, source.files):
        for name in file.shapes:
            read = TOKENIZERS.get(name.rpartition(".")[2])
            if read is None:
                continue
            try:
                values |= read(bytes(cast(Any, file.read(name)).numpy()))
            except FileError as err:
                raise FileError(f"{source.label}: '{name}': {err}.") from err
    return [_key(name, value) for name, value in values.items()]


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
