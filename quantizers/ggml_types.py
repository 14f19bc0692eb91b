"""The block types of GGUF files: numbers, sizes, and the format id of each.

A row of K values is K / `block` blocks of `nbytes` bytes. Source: ggml-org/ggml, ggml.h (numbers) and ggml-common.h
(sizes); a test holds the table to the gguf package's. It stands here so that a file can be opened without importing
that package, which takes longer than reading a header.
"""

from __future__ import annotations

from dataclasses import dataclass

MAGIC = b"GGUF"  # how a GGUF file begins


@dataclass(frozen=True)
class GgmlType:
    """One tensor type.

    Attributes:
        name: ggml's, such as `Q4_K`.
        number: in files.
        block: values a block.
        nbytes: bytes a block.
        needs_importance: ggml aborts the process when it quantizes to it without an importance matrix.
    """

    name: str
    number: int
    block: int
    nbytes: int
    needs_importance: bool = False

    @property
    def bits(self) -> float:
        """Bits a value, scales included."""
        return 8 * self.nbytes / self.block


_QUANTIZED = (
    GgmlType("Q4_0", 2, 32, 18),
    GgmlType("Q4_1", 3, 32, 20),
    GgmlType("Q5_0", 6, 32, 22),
    GgmlType("Q5_1", 7, 32, 24),
    GgmlType("Q8_0", 8, 32, 34),
    GgmlType("Q2_K", 10, 256, 84),
    GgmlType("Q3_K", 11, 256, 110),
    GgmlType("Q4_K", 12, 256, 144),
    GgmlType("Q5_K", 13, 256, 176),
    GgmlType("Q6_K", 14, 256, 210),
    GgmlType("IQ2_XXS", 16, 256, 66, needs_importance=True),
    GgmlType("IQ2_XS", 17, 256, 74, needs_importance=True),
    GgmlType("IQ3_XXS", 18, 256, 98),
    GgmlType("IQ1_S", 19, 256, 50, needs_importance=True),
    GgmlType("IQ4_NL", 20, 32, 18),
    GgmlType("IQ3_S", 21, 256, 110),
    GgmlType("IQ2_S", 22, 256, 82),
    GgmlType("IQ4_XS", 23, 256, 136),
    GgmlType("IQ1_M", 29, 256, 56),
    GgmlType("TQ1_0", 34, 256, 54),
    GgmlType("TQ2_0", 35, 256, 66),
    GgmlType("MXFP4", 39, 32, 17),
    GgmlType("NVFP4", 40, 64, 36),
)
_PLAIN = (
    GgmlType("F32", 0, 1, 4),
    GgmlType("F16", 1, 1, 2),
    GgmlType("I8", 24, 1, 1),
    GgmlType("I16", 25, 1, 2),
    GgmlType("I32", 26, 1, 4),
    GgmlType("I64", 27, 1, 8),
    GgmlType("F64", 28, 1, 8),
    GgmlType("BF16", 30, 1, 2),
)

# Block types that hold weights, by name; Q8_1 and Q8_K, which ggml uses for activations only, are not among them.
TYPES = {t.name: t for t in _QUANTIZED}
PLAIN_TYPES = {t.name: t for t in _PLAIN}
BY_NUMBER = {t.number: t for t in (*_QUANTIZED, *_PLAIN)}


def format_id(name: str) -> str:
    """`Q4_K` -> `gguf-q4-k`."""
    return "gguf-" + name.lower().replace("_", "-")


def type_name(format_id: str) -> str:
    """`gguf-q4-k` -> `Q4_K`."""
    return format_id.removeprefix("gguf-").upper().replace("-", "_")
