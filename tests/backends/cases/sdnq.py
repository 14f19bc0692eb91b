"""Conformance cases of sdnq."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from quantwire.quantizers.backends.sdnq.library import library
from torch import Tensor, nn

from .case import ROUNDING, Case, Library

THEIR_NAMES = {
    "weight": "qdata",
    "scale": "scale",
    "zero_point": "zero_point",
    "svd_up": "svd_up",
    "svd_down": "svd_down",
}


def by_library(weights_dtype: str, **config: Any) -> Library:
    """What `sdnq_quantize_layer` makes of an `nn.Linear` under an `SDNQConfig`."""

    def make(w: Tensor) -> tuple[Mapping[str, Tensor], Tensor]:
        sdnq = library()
        linear = nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype)
        linear.load_state_dict({"weight": w})
        with torch.random.fork_rng():
            torch.manual_seed(0)  # its SVD is randomized, and ours runs from this seed
            config_object = sdnq.SDNQConfig(weights_dtype=weights_dtype, **config)
            layer, _ = sdnq.sdnq_quantize_layer(linear, config_object)
        restored = layer.sdnq_dequantizer(
            **sdnq.utils.get_sdnq_params(layer),
            dtype=torch.float32,
            skip_quantized_matmul=layer.sdnq_dequantizer.use_quantized_matmul,
        )
        assert {n for n in sdnq.quantizer.sdnq_keys if getattr(layer, n, None) is not None} <= THEIR_NAMES.keys()
        found = {ours: getattr(layer, theirs) for theirs, ours in THEIR_NAMES.items()}
        return {name: t.detach() for name, t in found.items() if t is not None}, restored

    return make


EVEN = {(4096, 64): "", (33, 64): "", (7, 160): "", (48, 96): ""}
# 2-bit values go 4 to a byte, 3- and 5-bit ones in eights, 4-bit ones in pairs, 6-bit ones in fours.
EIGHTS = {(5, 34): "N=5 by K=34 is 170 values, no multiple of the 8 that ", **EVEN}
FOURS = {(5, 34): "N=5 by K=34 is 170 values, no multiple of the 4 that ", **EVEN}
TWOS = {(3, 33): "N=3 by K=33 is 99 values, no multiple of the 2 that ", (1, 34): "", (5, 34): "", **EVEN}
ANY = {(3, 33): "", (1, 34): "", (5, 34): "", (1, 256): "", **EVEN}
MATMUL = 0.02  # activations are quantized to 8 bits too

CASES: list[Case] = [
    Case("sdnq-int8", 41, by_library("int8"), native=ROUNDING, refused=ANY),
    Case("sdnq-uint8", 42, by_library("uint8"), native=ROUNDING, refused=ANY),
    Case("sdnq-int6", 29, by_library("int6"), native=0.0, refused=FOURS),
    Case("sdnq-uint6", 30, by_library("uint6"), native=0.0, refused=FOURS),
    Case("sdnq-int5", 23, by_library("int5"), native=0.0, refused=EIGHTS),
    Case("sdnq-uint5", 24, by_library("uint5"), native=0.0, refused=EIGHTS),
    Case("sdnq-int4", 17, by_library("int4"), native=ROUNDING, refused=TWOS),
    Case("sdnq-uint4", 19, by_library("uint4"), native=ROUNDING, refused=TWOS),
    Case("sdnq-uint3", 13.5, by_library("uint3"), native=0.0, refused=EIGHTS),
    Case("sdnq-uint2", 8, by_library("uint2"), native=0.0, refused=FOURS),
    Case("sdnq-float8-e4m3fn", 30, by_library("float8_e4m3fn"), native=ROUNDING, refused=ANY),
    Case("sdnq-float4-e2m1fn", 17, by_library("float4_e2m1fn"), native=ROUNDING, refused=TWOS),
    Case("sdnq;type=uint4;group-size=32", 20, by_library("uint4", group_size=32), native=ROUNDING, refused=TWOS),
    Case(
        "sdnq;type=uint4;use-hadamard=true",
        19,
        by_library("uint4", use_hadamard=True),
        native=0.0,
        refused={(5, 34): "K=34 is not a multiple of 4, the smallest Hadamard rotation", (40, 24): "", **EVEN},
    ),
    Case(
        "sdnq;type=uint4;use-svd=true;svd-rank=16",
        19,
        by_library("uint4", use_svd=True, svd_rank=16),
        native=ROUNDING,
        zeros_exact=False,  # the factors of the SVD give a row of zeros the rounding errors of its singular vectors
        refused={
            (7, 160): "svd-rank 16: its factors alone are as large as the weight of N=7 by K=160",
            (40, 24): "svd-rank 16: its factors alone are as large as the weight of N=40 by K=24",
            (4096, 64): "",
            (33, 64): "",
            (48, 96): "",
        },
    ),
    Case(
        "sdnq-int8;quantized-matmul=true",
        41,
        by_library("int8", use_quantized_matmul=True),
        product=MATMUL,
        native=0.0,
        refused=ANY,
    ),
    Case("sdnq;type=uint7", 36, by_library("uint7"), native=0.0, refused={(3, 33): "N=3 by K=33 is 99 values", **EVEN}),
    Case("sdnq;type=int12", 66, by_library("int12"), native=0.0, refused=FOURS),
    Case("sdnq;type=float6_e3m2fn", 24, by_library("float6_e3m2fn"), native=0.0, refused=FOURS),
]
