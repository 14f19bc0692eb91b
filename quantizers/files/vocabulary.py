"""Tokenizers between GGUF metadata and the files that ComfyUI's tokenizers read.

A GGUF file holds a vocabulary as arrays (`tokenizer.ggml.tokens`, `.scores`, `.token_type`, ...). ComfyUI brings the
tokenizers of CLIP, T5, Llama 3 and Qwen itself; for umT5 and Gemma it wants the bytes of a SentencePiece model, for
Mistral those of a tekken.json.

A SentencePiece model is one protocol buffer message (google/sentencepiece sentencepiece_model.proto), of which the few
fields below are read back or written. They are encoded here: the protobuf package is no part of ComfyUI, and the
sentencepiece package alone cannot write a model.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import FileError
from .gguf_header import GgufHeader, read_array

Arrays = Mapping[str, Sequence[Any]]
PREFIX = "tokenizer.ggml."
UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # SentencePiece.Type, and llama.cpp's token types, which equal it
MODEL_TYPES = {"t5": UNIGRAM, "llama": BPE}
# Field numbers. ModelProto:
PIECES, TRAINER, NORMALIZER = 1, 2, 3
# ModelProto.SentencePiece:
PIECE, SCORE, TYPE = 1, 2, 3
# TrainerSpec:
MODEL_TYPE, VOCAB_SIZE, BYTE_FALLBACK = 3, 4, 35
IDS = {"unknown": 40, "bos": 41, "eos": 42, "padding": 43}
NAMES = {"unknown": 45, "bos": 46, "eos": 47, "padding": 48}  # by these the library finds the ids when it runs
# NormalizerSpec:
CHARSMAP, ADD_PREFIX, REMOVE_SPACES = 2, 3, 4


# T5 has such a table in the first block only; ComfyUI brings T5's tokenizer, and not umT5's.
UMT5_SIGN = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"


def wanted_tokenizer(architecture: str, metadata: Mapping[str, Any], names: Collection[str]) -> str:
    """Which tokenizer ComfyUI wants out of the file: `spiece_model`, `tekken_model`, or empty where it has its own.

    Args:
        architecture, metadata: of a GGUF file.
        names: of its tensors, as ComfyUI has them.
    """
    if architecture.startswith("gemma") or UMT5_SIGN in names:
        return "spiece_model"
    return "tekken_model" if metadata.get(f"{PREFIX}pre") == "tekken" else ""


def read_vocabulary(path: Path, header: GgufHeader, name: str) -> bytes:
    """The tokenizer of a GGUF file.

    Args:
        path: of the file, the first one of several.
        header: of that file.
        name: `spiece_model` or `tekken_model`.
    Raises:
        FileError: the file has no such vocabulary.
    """
    make = {"spiece_model": sentencepiece_model, "tekken_model": tekken_json}[name]
    wanted = ["tokens", "token_type"] if name == "tekken_model" else ["tokens", "scores", "token_type"]
    charsmap = f"{PREFIX}precompiled_charsmap"
    if charsmap in header.arrays or charsmap in header.located:
        wanted.append("precompiled_charsmap")
    return make(header.metadata, {n: read_array(path, header, PREFIX + n) for n in wanted})


def sentencepiece_model(metadata: Mapping[str, Any], arrays: Arrays) -> bytes:
    """The SentencePiece model that a GGUF vocabulary came from, as far as tokenizing depends on it.

    Args:
        metadata: single values by key.
        arrays: `tokens`, `scores`, `token_type`, and `precompiled_charsmap` where the file has one, without `PREFIX`.
    Raises:
        FileError: a vocabulary of another kind, or arrays of different lengths.
    """
    kind = metadata.get(f"{PREFIX}model")
    if kind not in MODEL_TYPES:
        raise FileError(f"its vocabulary is of the kind {kind!r}, not a SentencePiece model ({', '.join(MODEL_TYPES)})")
    tokens, scores, types = (arrays[n] for n in ("tokens", "scores", "token_type"))
    if not len(tokens) == len(scores) == len(types):
        raise FileError(f"its vocabulary has {len(tokens)} tokens, {len(scores)} scores and {len(types)} types")
    pieces = b"".join(
        _message(PIECES, _string(PIECE, t) + _float(SCORE, s) + _number(TYPE, k))
        for t, s, k in zip(tokens, scores, types, strict=True)
    )
    trainer = _number(MODEL_TYPE, MODEL_TYPES[str(kind)]) + _number(VOCAB_SIZE, len(tokens))
    trainer += _number(BYTE_FALLBACK, int(BYTE in types))
    for name, field in IDS.items():
        number = metadata.get(f"{PREFIX}{name}_token_id")
        if name == "unknown" and number is None:
            number = next((i for i, k in enumerate(types) if k == UNKNOWN), None)
        if number is not None and 0 <= number < len(tokens):
            trainer += _number(field, number) + _string(NAMES[name], tokens[number])
    normalizer = _number(ADD_PREFIX, int(bool(metadata.get(f"{PREFIX}add_space_prefix", True))))
    normalizer += _number(REMOVE_SPACES, int(bool(metadata.get(f"{PREFIX}remove_extra_whitespaces", False))))
    charsmap = bytes(n & 255 for n in arrays.get("precompiled_charsmap", ()))
    return pieces + _message(TRAINER, trainer) + _message(NORMALIZER, _message(CHARSMAP, charsmap) + normalizer)


def sentencepiece_metadata(model: bytes) -> dict[str, Any]:
    """GGUF metadata of a SentencePiece model, arrays as lists: what `sentencepiece_model` takes back.

    Raises:
        FileError: not a SentencePiece model, or one that llama.cpp has no kind for.
    """
    parts: dict[int, list[bytes]] = {PIECES: [], TRAINER: [], NORMALIZER: []}
    for field, value in _fields(model):
        if field in parts and isinstance(value, bytes):
            parts[field].append(value)
    pieces = [dict(_fields(piece)) for piece in parts[PIECES]]
    trainer, normalizer = (dict(_fields(b"".join(parts[n]))) for n in (TRAINER, NORMALIZER))
    kinds = {number: name for name, number in MODEL_TYPES.items()}
    kind = kinds.get(int(trainer.get(MODEL_TYPE, UNIGRAM)))
    if kind is None or not pieces:
        raise FileError("not a SentencePiece model of unigrams or of byte pairs")
    found: dict[str, Any] = {
        "model": kind,
        "tokens": [piece[PIECE].decode() for piece in pieces],
        "scores": [struct.unpack("<f", piece.get(SCORE, b"\0\0\0\0"))[0] for piece in pieces],
        "token_type": [int(piece.get(TYPE, NORMAL)) for piece in pieces],
        "add_space_prefix": bool(normalizer.get(ADD_PREFIX, 1)),
        "remove_extra_whitespaces": bool(normalizer.get(REMOVE_SPACES, 1)),
    }
    if normalizer.get(CHARSMAP):
        found["precompiled_charsmap"] = list(normalizer[CHARSMAP])
    for (name, field), default in zip(IDS.items(), (0, 1, 2, -1), strict=True):
        number = _signed(int(trainer.get(field, default)))
        if number >= 0:
            found[f"{name}_token_id"] = number
    return {f"{PREFIX}{name}": value for name, value in found.items()}


def tekken_json(metadata: Mapping[str, Any], arrays: Arrays) -> bytes:
    """The tekken.json of a Mistral vocabulary.

    Args:
        arrays: `tokens` and `token_type`; the tokens are bytes spelled as GPT-2 does.
    Raises:
        FileError: another vocabulary, or one whose special tokens do not stand first.
    """
    kind, pre = metadata.get(f"{PREFIX}model"), metadata.get(f"{PREFIX}pre")
    if kind != "gpt2" or pre != "tekken":
        raise FileError(f"its vocabulary is of the kind {kind!r}, {pre!r}, not tekken")
    tokens, types = arrays["tokens"], arrays["token_type"]
    special = next((i for i, k in enumerate(types) if k == NORMAL), 0)
    late = next((i for i in range(special, len(types)) if types[i] == CONTROL), None)
    if not special or late is not None or len(tokens) != len(types):
        raise FileError("its special tokens do not stand before all others, as in a tekken vocabulary")
    spelled = {letter: byte for byte, letter in byte_letters().items()}
    vocabulary = [
        {"rank": i, "token_bytes": base64.b64encode(bytes(spelled[c] for c in token)).decode()}
        for i, token in enumerate(tokens[special:])
    ]
    config = {"default_vocab_size": len(tokens), "default_num_special_tokens": special}
    named = [{"rank": i, "token_str": token} for i, token in enumerate(tokens[:special])]
    return json.dumps({"config": config, "vocab": vocabulary, "special_tokens": named}).encode()


def tekken_metadata(model: bytes) -> dict[str, Any]:
    """GGUF metadata of a tekken.json, arrays as lists: what `tekken_json` takes back. Merges are left out.

    Raises:
        FileError: not a tekken.json.
    """
    letters = byte_letters()
    try:
        held: Any = json.loads(model)
        special: list[Any] = sorted(held["special_tokens"], key=lambda token: token["rank"])
        count = held["config"]["default_num_special_tokens"]
        ranks = held["config"]["default_vocab_size"] - count
        words = [base64.b64decode(word["token_bytes"]) for word in held["vocab"] if word["rank"] < ranks]
        names = [token["token_str"] for token in special]
    except (ValueError, KeyError, TypeError) as err:
        raise FileError(f"not a tekken.json: {err!r}") from err
    names += [f"<SPECIAL_{i}>" for i in range(len(names), count)]
    return {
        f"{PREFIX}model": "gpt2",
        f"{PREFIX}pre": "tekken",
        f"{PREFIX}tokens": [*names, *("".join(letters[byte] for byte in word) for word in words)],
        f"{PREFIX}token_type": [CONTROL] * count + [NORMAL] * len(words),
    }


def byte_letters() -> dict[int, str]:
    """How GPT-2's vocabularies spell bytes: printable ones as they are, the others as letters from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


# Protocol buffers: a field is a number and wire type, then a varint (0), 8 bytes (1), a length and bytes (2), or 4 (5).


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _message(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value if value else b""


def _string(field: int, value: str) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value.encode())) + value.encode()


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(field, value) of a message; numbers as int, all others as bytes."""
    at = 0
    while at < len(message):
        key, at = _read_varint(message, at)
        field, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _read_varint(message, at)
            yield field, value
            continue
        length = {1: 8, 5: 4}.get(wire)
        if wire == 2:
            length, at = _read_varint(message, at)
        if length is None or at + length > len(message):
            raise FileError(f"not a SentencePiece model (byte {at})")
        yield field, message[at : at + length]
        at += length


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise FileError(f"not a SentencePiece model (byte {at})")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
