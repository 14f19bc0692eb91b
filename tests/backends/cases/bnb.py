"""Conformance cases of bnb."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from .case import ROUNDING, Case, Library

ODD = {(64, 33): "K=33 is odd, and two values share a byte", (5, 34): "", (1, 256): "", (33, 64): ""}
ANY = {(64, 33): "", (1, 33): "", (5, 34): ""}
REPACKED = "bitsandbytes repacks to bfloat16 blocks on AVX512-BF16 machines"


def int8(w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """`Linear8bitLt`, loaded in the right order; the move to the device is what quantizes."""
    bnb: Any = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(w.shape[1], w.shape[0], bias=False, has_fp16_weights=False)
    layer.load_state_dict({"weight": w})
    weight = layer.to("cpu").weight
    tensors = {"qdata": weight.CB, "absmax": weight.SCB}
    return tensors, bnb.functional.int8_vectorwise_dequant(weight.CB, weight.SCB)


def four_bit(
    quant_type: str, nested: bool = False, block_size: int = 64, storage: torch.dtype = torch.uint8
) -> Library:
    """`Linear4bit` with these options."""

    def make(w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        bnb: Any = pytest.importorskip("bitsandbytes")
        layer = bnb.nn.Linear4bit(w.shape[1], w.shape[0], bias=False, quant_type=quant_type, quant_storage=storage)
        layer.weight = bnb.nn.Params4bit(
            w,
            requires_grad=False,
            blocksize=block_size,
            quant_type=quant_type,
            compress_statistics=nested,
            quant_storage=storage,
            module=layer,
        )
        weight = layer.to("cpu").weight
        s = weight.quant_state
        tensors = {"qdata": weight.data, "absmax": s.absmax}
        if nested:
            tensors |= {"nested_absmax": s.state2.absmax, "nested_code": s.state2.code, "offset": s.offset}
        # As one row: its CPU kernel (0.50.2, AVX-512) takes wrong maxima where a block crosses rows.
        s.dtype, s.shape = torch.float32, torch.Size((1, w.numel()))
        with torch.compiler.set_stance("force_eager"):  # it would compile C++ for blocks above 1024
            return tensors, bnb.functional.dequantize_4bit(weight.data, s).reshape(w.shape)

    return make


def case(uri: str, sqnr_db: float, library: Library, native: float | None = 0.005, **others: Any) -> Case:
    return Case(uri, sqnr_db, library, native=native, native_why=REPACKED, **{"refused": ODD, **others})


CASES: list[Case] = [
    Case("bnb-int8", 41, int8, product=0.03, native=ROUNDING, refused=ANY, overflow=True),
    Case("bnb-int8;int8-threshold=0", 41, int8, product=0.03, native=ROUNDING, refused=ANY, overflow=True),
    case("bnb-nf4", 19.5, four_bit("nf4")),
    case("bnb-fp4", 17, four_bit("fp4")),
    case("bnb-nf4;bits4-use-double-quant=true", 19.5, four_bit("nf4", nested=True)),
    case("bnb-nf4;bits4-compute-dtype=float32", 19.5, four_bit("nf4")),
    case("bnb-nf4;bits4-block-size=32", 20, four_bit("nf4", block_size=32)),
    case("bnb-fp4;bits4-block-size=128", 16.5, four_bit("fp4", block_size=128)),
    # On a CPU the library compiles C++ for such blocks, and `to_native` refuses.
    case("bnb-nf4;bits4-block-size=4096", 16.5, four_bit("nf4", block_size=4096), native=None),
    case(
        "bnb-nf4;bits4-quant-storage=float32;bits4-use-double-quant=true",
        19.5,
        four_bit("nf4", nested=True, storage=torch.float32),
        refused={(1, 34): "N=1 with K=34 packs into 17 bytes, not a multiple of the 4 of bits4-quant-storage=float32"},
    ),
    case("bnb-nf4;bits4-quant-storage=bfloat16", 19.5, four_bit("nf4", storage=torch.bfloat16), refused={(2, 34): ""}),
    case("bnb-fp4;bits4-quant-storage=int8", 17, four_bit("fp4", storage=torch.int8)),
]
