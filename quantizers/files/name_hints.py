"""What the name of a file says of its content, and where that is not so.

Names are hints of people to people: what a file holds is read from its header, and a name that disagrees is reported.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from ..ggml_types import BY_NUMBER

_PLAIN = {"bf16": "BF16", "bfloat16": "BF16", "fp16": "F16", "float16": "F16", "fp32": "F32", "float32": "F32"}
_LEAST_SHARE = 0.1  # of the bytes; a file has a few tensors of every plain dtype
_MOST_SHARE = 0.5  # that may be quantized in a file with the name of a plain dtype


class Content(NamedTuple):
    """What a file holds of one kind.

    Attributes:
        words: everything that names it, in lower case: scheme, type, format.
        quantized: whether it is no plain dtype of at least 16 bits.
        share: of the bytes of the file.
        shown: for people.
    """

    words: str
    quantized: bool
    share: float
    shown: str


def _has(*words: str) -> Callable[[Content], bool]:
    return lambda content: any(re.search(word, content.words) for word in words)


_FP8 = (r"fp8", r"float8", r"\bf8_")
_INT8 = (r"int8", r"\bi8\b", r"w8a8", r"\bu8\b")
_INT4 = (r"int4", r"w4", r"4-bit", r"4 bits")
# (words of which one is in such a name, the name, what it says, what the content must be).
_HINTS: tuple[tuple[tuple[str, ...], str, str, Callable[[Content], bool]], ...] = (
    (("nf4",), r"nf4", "nf4", _has("nf4")),
    (("nvfp4",), r"nvfp4", "nvfp4", _has("nvfp4")),
    (("mxfp8",), r"mxfp8", "mxfp8", _has("mxfp8")),
    (("mxfp4",), r"mxfp4", "mxfp4", _has("mxfp4")),
    (("fp4",), r"fp4", "fp4", _has("fp4", "float4")),
    (("e4m3",), r"(?:fp|float)8[_.-]?e4m3(?:fn)?|e4m3(?:fn)?", "fp8 e4m3", _has("e4m3")),
    (("e5m2",), r"(?:fp|float)8[_.-]?e5m2|e5m2", "fp8 e5m2", _has("e5m2")),
    (("fp8", "float8"), r"(?:fp|float)8(?![_.-]?e\dm\d)", "fp8", _has(*_FP8)),
    (("qfloat8",), r"qfloat8", "qfloat8", _has("qfloat8", "quanto.*float8")),
    (("qint8",), r"qint8", "qint8", _has("qint8", "quanto.*int8")),
    (("qint4",), r"qint4", "qint4", _has("qint4", "quanto.*int4")),
    (("qint2",), r"qint2", "qint2", _has("qint2", "quanto.*int2")),
    (("int8",), r"u?int8", "int8", _has(*_INT8)),
    (("int4",), r"u?int4", "int4", _has(*_INT4)),
    (("svdq",), r"svdq(?:uant)?", "SVDQuant", _has("svdq", "nunchaku")),
    (("gptq",), r"gptq", "GPTQ", _has("gptq")),
    (("awq",), r"awq", "AWQ", _has("awq")),
)
_GGML = re.compile(
    r"(?i)(?<![a-z0-9])(?P<type>I?Q\d_(?:[01]|K|XXS|XS|S|M|NL)|TQ[12]_0)(?P<size>_(?:XXS|XS|S|M|L|XL))?(?![a-z0-9])"
)
_START, _END = r"(?<![a-z0-9])(?:", r")(?![0-9])"


def contradictions(name: str, suffix_ok: bool, contents: Sequence[Content]) -> list[str]:
    """Sentences about what a name says and the content is not.

    Args:
        name: of the file, or of the folder that holds it.
        suffix_ok: whether the suffix is that of the container; checked by the caller, who knows it.
        contents: of the file, in any order.
    """
    found: list[str] = []
    quantized = [c for c in contents if c.quantized]
    right = False
    for said, fits in _said(name.lower()):
        if any(fits(c) for c in quantized):
            right = True
        else:
            found.append(f"Named {said}, but holds {_shown(contents)}.")
    plain = [(word, dtype) for word, dtype in _PLAIN.items() if _says(name.lower(), word)]
    if plain and not right and not found:
        word, dtype = plain[0]
        held = any(c.words == dtype.lower() and c.share >= _LEAST_SHARE for c in contents)
        if not held or sum(c.share for c in quantized) > _MOST_SHARE:
            found.append(f"Named {word}, but holds {_shown(contents)}.")
    if not suffix_ok:
        found.append(f"The suffix of '{name}' is not that of its content, and loaders go by it: rename the file.")
    return found


def _says(name: str, word: str) -> bool:
    return word in name and re.search(_START + word + _END, name) is not None


def _said(name: str) -> Iterable[tuple[str, Callable[[Content], bool]]]:
    """What the name claims, with the test of a content for it."""
    for words, pattern, said, fits in _HINTS:
        # To look for a word takes a thousandth of the time that compiling a pattern does.
        if any(word in name for word in words) and re.search(_START + pattern + _END, name):
            yield said, fits
    for match in _GGML.finditer(name):
        kind = match["type"].upper()
        # Mixtures such as IQ3_M are made of several types of their number of bits; Q4_K_M of Q4_K, Q6_K and others.
        group = kind.partition("_")[0] + "_" if kind.startswith("IQ") else kind
        known = [t.name.lower() for t in BY_NUMBER.values() if t.name.startswith(group)] or [kind.lower()]
        yield match[0].upper(), _ggml(known)


def _ggml(names: Sequence[str]) -> Callable[[Content], bool]:
    words = "|".join(map(re.escape, names))
    return lambda content: re.search(rf"\bgguf\b.*(?<!\w)({words})(?!\w)", content.words) is not None


def _shown(contents: Sequence[Content]) -> str:
    """The quantized kinds, or the plain one that takes most."""
    ordered = sorted(contents, key=lambda c: -c.share)
    kinds = [c.shown for c in ordered if c.quantized] or [c.shown for c in ordered[:1]]
    more = f" and {len(kinds) - 3} more" if len(kinds) > 3 else ""
    return (", ".join(kinds[:3]) + more) if kinds else "no tensors"
