"""GGUF: see `backends/gguf`."""

from __future__ import annotations

from .declare import Argument, Backend, FormatEntry

# Bits a weight with the scales, and the values of a block.
_TYPES = {
    **{"q8_0": (8.5, 32), "q4_0": (4.5, 32), "q4_1": (5, 32), "q5_0": (5.5, 32), "q5_1": (6, 32)},
    **{"q2_k": (2.625, 256), "q3_k": (3.4375, 256), "q4_k": (4.5, 256), "q5_k": (5.5, 256), "q6_k": (6.5625, 256)},
    **{"iq1_s": (1.5625, 256), "iq1_m": (1.75, 256), "iq2_xxs": (2.0625, 256), "iq2_xs": (2.3125, 256)},
    **{"iq2_s": (2.5625, 256), "iq3_xxs": (3.0625, 256), "iq3_s": (3.4375, 256), "iq4_nl": (4.5, 32)},
    **{"iq4_xs": (4.25, 256), "tq1_0": (1.6875, 256), "tq2_0": (2.0625, 256), "mxfp4": (4.25, 32), "nvfp4": (4.5, 64)},
}


def _id(name: str) -> str:
    return "gguf-" + name.replace("_", "-")


BACKEND = Backend(
    name="gguf",
    package="libggml-python",
    licence="MIT",
    about="The tensor types of llama.cpp and GGUF files; weights stay in the blocks of the file.",
    entries=tuple(
        FormatEntry(_id(name), "gguf", "make", bits, f"GGUF {name.upper()}, blocks of {block}")
        for name, (bits, block) in _TYPES.items()
    ),
    arguments={"type": Argument("q8_0", tuple(_TYPES), effect="GGUF tensor type.")},
    selectors=("type",),
    chosen={_id(name): {"type": name} for name in _TYPES},
    also={"gguf": "MIT"},
)
