"""How the six types lie in memory, as the numbers that the kernels are compiled for.

Values come in groups that share one scale and lie side by side, in both the bytes and the row. Where two values share a
byte, a group has two parts: its low halves and its high halves, `run * width` values further along K:

    k(g, part, j) = g // run * (run * width * parts) + g % run * width + part * run * width + j

Source: ggml-org/ggml, ggml-common.h, and gguf's `quants.py`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Blocks:
    """Attributes:
    size: values of a block.
    nbytes: bytes of a block.
    width: values of a part of a group.
    parts: 2 where low and high halves of a byte are different values, else 1.
    run: groups that lie side by side before their second parts begin.
    """

    size: int
    nbytes: int
    width: int
    parts: int
    run: int = 1

    @property
    def groups(self) -> int:
        """Groups of a block."""
        return self.size // (self.width * self.parts)


BLOCKS = {
    "Q8_0": Blocks(32, 34, 32, 1),
    "Q4_0": Blocks(32, 18, 16, 2),
    "Q4_K": Blocks(256, 144, 32, 2),
    "Q5_K": Blocks(256, 176, 32, 2),
    "Q6_K": Blocks(256, 210, 16, 2, run=4),
    "IQ4_XS": Blocks(256, 136, 16, 2),
}
