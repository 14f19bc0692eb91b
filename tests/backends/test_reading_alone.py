"""Weights that are made already are read and multiplied with torch alone, without the library that made them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases.absent import run_without
from quantwire.quantizers.backends.bnb.four_bit import CODEBOOKS, BnbFourBit
from quantwire.quantizers.registry import format_ids, get_quantizer, require
from quantwire.quantizers.spec import QuantSpec

LIBRARIES = {
    "bnb": ("bitsandbytes",),
    "quanto": ("optimum",),
    "comfy": ("comfy_kitchen",),
    "torchao": ("torchao",),
    "nncf": ("nncf",),
}
FORMATS = [f for f in format_ids() if f.partition("-")[0] in LIBRARIES]
WITH_OPTIONS = ["bnb-nf4;bits4-use-double-quant=true", "bnb-fp4;bits4-block-size=128", "comfy;type=int8;scale=tensor"]

READ = """
import sys, torch
from quantwire.quantizers.registry import availability, require_reader
from quantwire.quantizers.weight import QuantizedWeight
for q, values, x, out in torch.load({path!r}, weights_only=False):
    assert not availability(q.format_id).works, q.format_id
    quantizer = require_reader(q.format_id)
    found = quantizer.dequantize(q, torch.float32)
    error = float((found - values).norm() / values.norm())
    product = quantizer.linear(x, q, None)
    print(q.format_id, error, float((product - out).norm() / out.norm()))
assert not [m for m in sys.modules if m.startswith({prefixes!r})]
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", LIBRARIES)
def test_weights_are_read_where_the_library_is_absent(backend: str, tmp_path: Path) -> None:
    uris = [u for u in (*FORMATS, *WITH_OPTIONS) if u.startswith(backend)]
    seed = torch.Generator().manual_seed(0)
    x, made = torch.randn(5, 512, generator=seed), []
    for uri in uris:
        spec = QuantSpec.from_uri(uri)
        quantizer = require(spec.format_id)
        q = quantizer.quantize(torch.randn(48, 512, generator=seed), spec)
        made.append((q, quantizer.dequantize(q, torch.float32), x, quantizer.linear(x, q, None)))
    if backend == "bnb":  # blocks across rows
        q = require("bnb-nf4").quantize(torch.randn(3, 96, generator=seed), QuantSpec("bnb-nf4"))
        narrow = torch.randn(5, 96, generator=seed)
        values = require("bnb-nf4").dequantize(q, torch.float32)
        made.append((q, values, narrow, require("bnb-nf4").linear(narrow, q, None)))
    torch.save(made, tmp_path / "weights.pt")
    (tmp_path / "site").mkdir()
    code = READ.format(path=str(tmp_path / "weights.pt"), prefixes=LIBRARIES[backend])
    said = run_without(tmp_path / "site", code, *LIBRARIES[backend])
    lines = [line.split() for line in said.splitlines()]
    assert [line[0] for line in lines] == [q.format_id for q, *_ in made]
    for name, values, product in lines:
        # Rotations and products are sums, which may be rounded in another order.
        assert float(values) <= (1e-6 if "convrot" in name or name == "comfy-w4a8" else 0.0), name
        assert float(product) < 1e-5, name


@pytest.mark.parametrize("format_id", FORMATS)
def test_reading_is_probed_without_making_weights(format_id: str) -> None:
    state = get_quantizer(format_id).probe_reading()
    assert state.works, state.reason


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_codebooks_are_those_of_bitsandbytes(kind: str) -> None:
    library = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(torch.tensor(CODEBOOKS[kind]), library.get_4bit_type(kind, device="cpu"))
    assert torch.equal(BnbFourBit(kind).codebook(), library.get_4bit_type(kind, device="cpu"))
