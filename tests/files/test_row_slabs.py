"""Quantizing a few rows at a time: the same bits as at once, and a bound on the memory of a conversion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from quantwire.quantizers.backends.bnb import four_bit
from quantwire.quantizers.files import row_slabs
from quantwire.quantizers.registry import get_entry, require
from quantwire.quantizers.spec import QuantSpec
from quantwire.quantizers.weight import QuantizedWeight
from small_flux import flux, save
from torch import Tensor

MIB = 1 << 20
PACKAGES = {"bnb": "bitsandbytes", "torchao": "torchao", "nncf": "nncf", "sdnq": "sdnq"}
PACKAGES |= {"quanto": "optimum.quanto", "comfy": "comfy_kitchen"}
KINDS = [
    *(
        "bnb-int8",
        "bnb-nf4",
        "bnb-fp4;bits4-block-size=4096",
        "comfy-int8-convrot",
        "comfy-w4a4-convrot",
        "torchao-int8wo",
        "torchao-int8dyn",
    ),
    *("torchao-float8wo", "torchao-float8wo;group-size=32", "torchao-int4wo", "nncf-int8-sym", "nncf-int8-asym"),
    *("nncf-int4-sym", "nncf-int4-asym", "nncf-nf4", "quanto-qint8", "quanto-qfloat8-e4m3fn", "quanto-qint4"),
    *("quanto-qint2", "sdnq-int8", "sdnq-int5", "sdnq-uint4", "sdnq-uint4;group-size=64", "sdnq-float4-e2m1fn"),
]
QUICK = ("comfy-int8-convrot", "comfy-w4a4-convrot", "bnb-int8", "bnb-nf4")  # the others bring heavy libraries
NESTED = "bits4-use-double-quant=true"
CONVERT = """
import json, sys
from contextlib import nullcontext
from pathlib import Path
from quantwire.quantizers.files.convert_plan import Request
from quantwire.quantizers.files.converting import convert

class Bar:
    def update(self, n, /):
        pass

source, target, kind = sys.argv[1:]
report = convert(Request(Path(source), Path(target), kind), lambda total: nullcontext(Bar()))
(line,) = [l for l in open("/proc/self/status") if l.startswith("VmHWM:")]
print(json.dumps({"peak": int(line.split()[1]) * 1024, "quantized": sum(e.format_id != "" for e in report.entries)}))
"""


def values(n: int, k: int, dtype: torch.dtype) -> Tensor:
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(n)) / 30
    w[n // 2] = 0  # the scale of such a row is a case of its own in most libraries
    return w.to(dtype)


def raw(t: Tensor) -> Tensor:
    return t.contiguous().reshape(-1).view(torch.uint8)


def assert_same(made: QuantizedWeight, whole: QuantizedWeight) -> None:
    assert list(made.tensors) == list(whole.tensors)
    for name, t in whole.tensors.items():
        assert made.tensors[name].dtype == t.dtype
        assert made.tensors[name].shape == t.shape
        assert torch.equal(raw(made.tensors[name]), raw(t)), name
    assert (made.format_id, made.orig_shape, made.orig_dtype) == (whole.format_id, whole.orig_shape, whole.orig_dtype)
    assert made.meta == whole.meta


@pytest.mark.parametrize("uri", [pytest.param(k, marks=[pytest.mark.slow] if k not in QUICK else []) for k in KINDS])
def test_slabs_give_the_same_bits(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = QuantSpec.from_uri(uri)
    pytest.importorskip(PACKAGES[get_entry(spec.format_id).backend])
    monkeypatch.setattr(row_slabs, "SLAB_NUMEL", 1 << 16)
    w = values(1536, 512, torch.bfloat16)
    assert 0 < row_slabs.slab_rows(spec, tuple(w.shape)) < len(w) / 2
    assert_same(row_slabs.quantize_slabs(w, spec), require(spec.format_id).quantize(w, spec))


@pytest.mark.slow
@pytest.mark.parametrize("uri", ["comfy-int8-convrot", "quanto-qint4", "nncf-int4-asym", "sdnq-uint4"])
def test_a_last_slab_may_be_smaller(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = QuantSpec.from_uri(uri)
    pytest.importorskip(PACKAGES[get_entry(spec.format_id).backend])
    monkeypatch.setattr(row_slabs, "SLAB_NUMEL", 1 << 18)
    w = values(1280, 256, torch.float32)
    step = row_slabs.slab_rows(spec, tuple(w.shape))
    assert step
    assert (len(w) // row_slabs.PLANES.get(spec.format_id, 1)) % step
    assert_same(row_slabs.quantize_slabs(w, spec), require(spec.format_id).quantize(w, spec))


@pytest.mark.parametrize("uri", ["comfy-w4a8", "comfy-nvfp4", "sdnq-uint4;use-svd=true"])
def test_what_looks_at_all_rows_is_not_cut(uri: str) -> None:
    assert row_slabs.slab_rows(QuantSpec.from_uri(uri), (1 << 14, 1 << 12)) == 0


@pytest.mark.parametrize("shape", [(1536, 768), (1001, 130)], ids=str)
@pytest.mark.parametrize("uri", [f"bnb-nf4;{NESTED}", f"bnb-fp4;{NESTED};bits4-block-size=128", "bnb-nf4"])
def test_bitsandbytes_in_slabs(uri: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    spec, w = QuantSpec.from_uri(uri), values(*shape, torch.bfloat16)
    whole = require(spec.format_id).quantize(w, spec)
    monkeypatch.setattr(four_bit, "SLAB_NUMEL", 1 << 16)
    assert_same(require(spec.format_id).quantize(w, spec), whole)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 MiB, the largest tensor 63 MiB."""
    return save(tmp_path_factory.mktemp("large") / "in.safetensors", flux(1, 3328))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
@pytest.mark.parametrize("kind", ["comfy-w4a4-convrot", "torchao-float8wo", "comfy-fp8-e4m3fn"])
def test_memory_of_a_conversion(large: Path, tmp_path: Path, kind: str) -> None:
    """At most 400 MiB and three times the largest tensor: of everything, the interpreter and its libraries too."""
    pytest.importorskip(PACKAGES[get_entry(kind).backend])
    env = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-W", "ignore", "-c", CONVERT, str(large), str(tmp_path / "out.safetensors"), kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    largest = 3 * 3328 * 3328 * 2
    assert found["quantized"] >= 4
    assert found["peak"] <= 400 * MIB + 3 * largest, f"{found['peak'] / MIB:.0f} MiB"
