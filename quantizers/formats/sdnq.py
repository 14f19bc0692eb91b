"""SDNQ: see `backends/sdnq`.

The library has 176 weight types. The twelve that its users choose from are listed; a URI can name every other one that
does what its name says, such as `sdnq;type=uint7`. Their names follow a rule, so they are made from it here: `int` and
`uint` with their bits, and floats as `float<bits>-e<exponent>m<mantissa>` with `fn` (a sign bit) or `fnu` (none).

Not offered, as measured with sdnq 0.2.8 (the backend's tests hold the library to it):
- `uint9` to `uint15`, `int32`, `uint32`: the largest value of each row does not fit the storage and wraps around;
- floats with one exponent bit, signed below 15 bits and unsigned below 16: far below what their mantissa holds
  (`float8_e1m6fn` 22 dB, where int8 has 43);
- `float8_e8m0fnu` has no sign; `float32` is multiplied in place when dequantized; `uint1` and `float1_e1m0fnu` are
  stored as int64 and so are as large as bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import SpecError, near
from .declare import Argument, Backend, FormatEntry

_LISTED = {
    "int8": "int8, one scale a row or per group of up to 1,024",
    "uint8": "uint8 with zero point, one scale a row or per group of up to 1,024",
    "int6": "int6, one scale a row or per group of up to 256",
    "uint6": "uint6 with zero point, one scale a row or per group of up to 256",
    "int5": "int5, groups of 128",
    "uint5": "uint5 with zero point, groups of 128",
    "int4": "int4, groups of 64",
    "uint4": "uint4 with zero point, groups of 64",
    "uint3": "uint3 with zero point, groups of 32",
    "uint2": "uint2 with zero point, groups of 16, whose scales make it larger than uint4",
    "float8-e4m3fn": "float8 e4m3, one scale a row or per group of up to 1,024",
    "float4-e2m1fn": "4-bit float e2m1, groups of 64",
}


def _float_types(bits: int) -> list[str]:
    """The packed float types of so many bits, with a sign (`fn`) and without (`fnu`)."""
    # From one exponent bit or two up, see above.
    signed = [f"float{bits}-e{e}m{bits - 1 - e}fn" for e in range(1 if bits >= 15 else 2, 6) if e < bits]
    unsigned = [f"float{bits}-e{e}m{bits - e}fnu" for e in range(1 if bits == 16 else 2, 6) if e <= bits]
    return signed + unsigned


def _all_types() -> list[str]:
    whole = [*(f"int{b}" for b in (2, 3, 7, *range(9, 17))), "uint7", "uint16"]
    native = ["bfloat16", "float16", "float8-e5m2", "float8-e4m3fnuz", "float8-e5m2fnuz"]
    floats = [t for bits in range(2, 17) for t in _float_types(bits)]
    # The library's own packing of e4m3 has a name that tells it from torch's.
    floats = ["float8-e4m3fn-sdnq" if t == "float8-e4m3fn" else t for t in floats]
    return [*_LISTED, *(t for t in [*whole, *native, *floats] if t not in _LISTED)]


TYPES: tuple[str, ...] = tuple(_all_types())


def _short_names() -> dict[str, str]:
    """The library's other names of its usual floats: `fp8` is `float8-e4m3fn`, `ufp8` is `float8-e4m4fnu`."""
    exponents = {4: 2, 5: 2, 6: 3, 7: 3, 8: 4, 9: 4} | dict.fromkeys(range(10, 17), 5)
    signed = {f"fp{b}": f"float{b}-e{e}m{b - 1 - e}fn" for b, e in exponents.items()}
    unsigned = {f"ufp{b}": f"float{b}-e{e}m{b - e}fnu" for b, e in exponents.items()}
    return signed | unsigned | {"fp16": "float16", "bf16": "bfloat16"}


SHORT_NAMES = _short_names()


@dataclass(frozen=True)
class WeightType(Argument):
    """`type`: takes the library's spellings too (`float8_e4m3fn`, `fp8`), and keeps the first line of errors short."""

    def parse(self, backend: str, name: str, text: str) -> Any:
        word = SHORT_NAMES.get(text, text.replace("_", "-"))
        if word in self.choices:
            return word
        listed, others = ", ".join(_LISTED), ", ".join(t for t in self.choices if t not in _LISTED)
        raise SpecError(
            f"{backend}: argument '{name}' must be a weight type such as int8 or uint4, got '{text}'."
            f"{near(word, self.choices)}\nTypes: {listed}. Also: {others}."
        )


def library_name(format_id: str) -> str:
    """The library's name of a format's weight type: `sdnq-float8-e4m3fn` -> `float8_e4m3fn`."""
    return format_id.removeprefix("sdnq-").replace("-", "_")


def bits_of(weight_type: str) -> int:
    """Bits a value: the number that its name holds."""
    return int("".join(c for c in weight_type.partition("-")[0] if c.isdigit()))


def _entry(weight_type: str) -> FormatEntry:
    listed = weight_type in _LISTED
    summary = _LISTED.get(weight_type, f"{weight_type.replace('-', ' ')}, by the library's automatic group size")
    return FormatEntry(f"sdnq-{weight_type}", "sdnq", "make", bits_of(weight_type), summary, listed=listed)


BACKEND = Backend(
    name="sdnq",
    package="sdnq",
    licence="GPL-3.0-only",
    about=(
        "SD.Next's quantization: any width from 2 to 16 bits, whole or float, with optional SVD and Hadamard steps. "
        "Its licence is GPL-3.0, so it comes with no bundle of this pack: installing it is your choice."
    ),
    entries=tuple(map(_entry, TYPES)),
    arguments={
        "type": WeightType(
            "int8",
            TYPES,
            effect="Weight type. The library's own names are understood too, such as float8_e4m3fn and fp8.",
        ),
        "group-size": Argument(
            0,
            (),
            "int",
            -1,
            1 << 20,
            effect="Values along K that share a scale. 0 is the library's automatic rule (64 for 4 bits, 2 times as "
            "many for each bit more and with SVD; one group a row where quantized-matmul reads 6 or more bits), -1 is "
            "one group a row. Where it does not divide K, the library takes a larger group that does, at most the row.",
        ),
        "use-svd": Argument(
            False, (), "bool", effect="Keep the largest singular values beside the weight, in its own dtype."
        ),
        "svd-rank": Argument(
            32, (), "int", 1, 4096, effect="How many singular values, at most N and K; needs use-svd=true."
        ),
        "svd-steps": Argument(
            8, (), "int", 0, 128, effect="Power iterations of the randomized SVD; needs use-svd=true."
        ),
        "use-hadamard": Argument(
            False, (), "bool", effect="Rotate groups of up to 256 columns before quantizing, which spreads outliers."
        ),
        "quantized-matmul": Argument(
            False,
            (),
            "bool",
            effect="Quantize activations too and multiply in 8 bits (16 for float types of 16), from 32 tokens up and "
            "where N and K are multiples of 16 and at least 32.",
        ),
        "dynamic": Argument(
            False,
            (),
            "bool",
            effect="Start at this type and take, for each layer, the first one that loses no more than "
            "dynamic-threshold. Predicted sizes are those of the starting type.",
        ),
        "dynamic-threshold": Argument(
            0.0,
            (),
            "float",
            0,
            1,
            effect="Largest mean squared error by the weight's variance; 0 is the library's rule, 10 to the power of "
            "minus half the bits. Needs dynamic=true.",
        ),
    },
    selectors=("type",),
    chosen={f"sdnq-{t}": {"type": t} for t in TYPES},
    tensors=("scale", "zero_point", "svd_up", "svd_down"),
)
