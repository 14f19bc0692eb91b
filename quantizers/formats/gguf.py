"""GGUF: see `backends/gguf`."""

from __future__ import annotations

from .declare import Argument, Backend, FormatEntry

# Bits a weight with the scales; llama.cpp and other converters make files of these.
_READ_ONLY_GGUF = [
    FormatEntry(f"gguf-{name}", "gguf", "make_reader", bits, f"GGUF {name.upper().replace('-', '_')}", writes=False)
    for name, bits in {
        **{"q4-1": 5, "q5-0": 5.5, "q5-1": 6, "q2-k": 2.625, "q3-k": 3.4375, "q4-k": 4.5, "q5-k": 5.5, "q6-k": 6.5625},
        **{"iq1-s": 1.5625, "iq1-m": 1.75, "iq2-xxs": 2.0625, "iq2-xs": 2.3125, "iq2-s": 2.5625, "iq3-xxs": 3.0625},
        **{"iq3-s": 3.4375, "iq4-nl": 4.5, "iq4-xs": 4.25, "tq1-0": 1.6875, "tq2-0": 2.0625, "mxfp4": 4.25},
        **{"nvfp4": 4.5},
    }.items()
]

BACKEND = Backend(
    name="gguf",
    package="gguf",
    licence="MIT",
    about="The tensor types of llama.cpp and GGUF files; weights stay in the blocks of the file.",
    entries=(
        FormatEntry("gguf-q8-0", "gguf", "make", 8.5, "GGUF Q8_0, blocks of 32"),
        FormatEntry("gguf-q4-0", "gguf", "make", 4.5, "GGUF Q4_0, blocks of 32"),
        *_READ_ONLY_GGUF,
    ),
    arguments={"type": Argument("q8_0", ("q8_0", "q4_0"), effect="GGUF tensor type.")},
    selectors=("type",),
    chosen={"gguf-q8-0": {"type": "q8_0"}, "gguf-q4-0": {"type": "q4_0"}},
)
