"""bitsandbytes: see `backends/bnb`."""

from __future__ import annotations

from .declare import FLOAT_DTYPES, Argument, Backend, FormatEntry

_FOUR_BIT = ("bnb-nf4", "bnb-fp4")
_BLOCK_SIZES = ("32", "64", "128", "256", "512", "1024", "2048", "4096")
_STORAGE = ("uint8", "int8", "float16", "bfloat16", "float32", "float64")

BACKEND = Backend(
    name="bnb",
    package="bitsandbytes",
    licence="MIT",
    about="LLM.int8 multiplies in 8 bits with outlier columns in 16; nf4 and fp4 are 4-bit codebooks in blocks. "
    "Modules to skip are named by `exclude`.",
    entries=(
        FormatEntry("bnb-int8", "bnb", "make", 8, "LLM.int8, one scale a row, W8A8 with outlier columns"),
        FormatEntry("bnb-nf4", "bnb", "make", 4, "NormalFloat4, blocks of 64"),
        FormatEntry("bnb-fp4", "bnb", "make", 4, "4-bit float, blocks of 64"),
    ),
    arguments={
        "bits": Argument(8, ("4", "8"), "int", effect="8 is LLM.int8, 4 is nf4 or fp4."),
        "bits4-quant-type": Argument("fp4", ("fp4", "nf4"), applies=_FOUR_BIT, effect="The 4-bit codebook."),
        "bits4-compute-dtype": Argument(None, FLOAT_DTYPES, applies=_FOUR_BIT, effect="dtype of the product."),
        "bits4-use-double-quant": Argument(
            False, (), "bool", applies=_FOUR_BIT, effect="Quantize the block maxima too: 0.37 bits a weight less."
        ),
        "bits4-block-size": Argument(
            64, _BLOCK_SIZES, "int", applies=_FOUR_BIT, effect="Values that share a maximum; 32 bits each block."
        ),
        "bits4-quant-storage": Argument(
            "uint8", _STORAGE, applies=_FOUR_BIT, effect="dtype as which the packed bytes are held; same bytes."
        ),
        "int8-threshold": Argument(
            6.0,
            (),
            "float",
            0,
            10,
            ("bnb-int8",),
            "Activation columns above it are multiplied in 16 bits; 0 is off, and activations above 65504 then "
            "overflow float16.",
        ),
    },
    selectors=("bits", "bits4-quant-type"),
    chosen={
        "bnb-int8": {"bits": 8},
        "bnb-nf4": {"bits": 4, "bits4-quant-type": "nf4"},
        "bnb-fp4": {"bits": 4, "bits4-quant-type": "fp4"},
    },
    tensors=("absmax", "nested_absmax", "nested_code", "offset"),
)
