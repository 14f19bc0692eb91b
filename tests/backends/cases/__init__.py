"""What the conformance suite must know of each format, one module a backend, and the checks that it makes."""

from __future__ import annotations

from . import bnb, comfy, gguf, layerwise, nncf, quanto, sdnq, torchao
from .case import DTYPES, Case

BY_BACKEND: dict[str, list[Case]] = {
    "bnb": bnb.CASES,
    "quanto": quanto.CASES,
    "comfy": comfy.CASES,
    "sdnq": sdnq.CASES,
    "torchao": torchao.CASES,
    "nncf": nncf.CASES,
    "layerwise": layerwise.CASES,
    "gguf": gguf.CASES,
}
CASES: list[Case] = [case for cases in BY_BACKEND.values() for case in cases]

__all__ = ["BY_BACKEND", "CASES", "DTYPES", "Case"]
