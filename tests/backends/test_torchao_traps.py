"""What torchao does to a process that imports it, and that using it through us does not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases.absent import run_without
from quantwire.quantizers.registry import available_formats, get_quantizer
from quantwire.quantizers.spec import QuantSpec
from torch import Tensor

FORMATS = [f for f in available_formats() if f.startswith("torchao-")]
USE = """
import torch
from quantwire.quantizers.registry import get_quantizer
from quantwire.quantizers.spec import QuantSpec
for name in ("int8wo", "int8dyn", "int4wo", "float8wo"):
    quantizer = get_quantizer("torchao-" + name)
    q = quantizer.quantize(torch.randn(32, 256), QuantSpec("torchao-" + name))
    quantizer.to_native(q, None)(torch.randn(2, 256))
"""

pytestmark = pytest.mark.skipif(not FORMATS, reason="torchao does not run here")


def python(code: str) -> tuple[str, str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_the_library_by_itself_warns_at_import() -> None:
    _, said = python("import torchao")
    if "Failed to load" not in said:
        pytest.skip("this build of torchao loads all of its extensions, so it has nothing to say")
    assert "_C_" in said


def test_through_us_it_says_nothing() -> None:
    assert python("import warnings; warnings.simplefilter('always')" + USE) == ("", "")


def test_only_its_import_is_silenced() -> None:
    report = """
import json, logging, sys, warnings
import torch  # has filters of its own
before = list(warnings.filters)
""" + USE + """
assert "torchao" in sys.modules
names = ("torchao", "torch.utils._pytree")
print(json.dumps([[len(logging.getLogger(n).filters) for n in names], warnings.filters == before]))
logging.getLogger("torchao").warning("Failed to load /x/_C_y.so")
"""  # fmt: skip
    out, said = python(report)
    assert json.loads(out) == [[0, 0], True]
    assert "Failed to load /x/_C_y.so" in said


@pytest.mark.slow
def test_the_settings_of_the_compiler_stay() -> None:
    """`torchao.quantize_` with a config of its defaults changes them for the whole process."""
    settings = "import torch._inductor.config as c; before = c.save_config_portable()\n"
    changed = (
        "import json; after = c.save_config_portable(); print(json.dumps([k for k in after if after[k] != before[k]]))"
    )
    library = (
        "import torch\nfrom torchao.quantization import quantize_, Int8WeightOnlyConfig\n"
        "quantize_(torch.nn.Linear(64, 64), Int8WeightOnlyConfig())\n"
    )
    assert json.loads(python(settings + library + changed)[0])
    assert json.loads(python(settings + USE + changed)[0]) == []


def test_a_missing_library_is_a_reason(tmp_path: Path) -> None:
    code = """
import json
from quantwire.quantizers.registry import availability, format_ids
states = {f: availability(f) for f in format_ids() if f.startswith("torchao-")}
print(json.dumps({f: [s.works, s.reason, s.remedy] for f, s in states.items()}))
"""
    states = json.loads(run_without(tmp_path, code, "torchao"))
    assert sorted(states) == sorted(FORMATS)
    for state in states.values():
        assert state == [
            False,
            "torchao is not installed.",
            "Run `pip install torchao`, or choose bnb-int8, bnb-nf4 or a gguf format.",
        ]


@pytest.mark.parametrize("format_id", FORMATS)
def test_a_layer_of_the_library_loads_its_own_state(format_id: str) -> None:
    """The guard against full-precision values must not stop the library's tensors, which say that they are float."""
    quantizer, spec = get_quantizer(format_id), QuantSpec(format_id)
    one, other = (quantizer.to_native(quantizer.quantize(values(64, 256, seed), spec), None) for seed in (0, 1))
    x = values(3, 256, 2)
    assert not torch.equal(one(x), other(x))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(x), other(x))


def test_float8_rows_of_zeros_are_nan_in_the_library_and_zeros_here() -> None:
    from torchao import quantization

    library: Any = quantization
    w = values(16, 64, 0)
    w[3] = 0
    raw = library.Float8Tensor.from_hp(w).dequantize()
    assert raw[3].isnan().all()
    quantizer = get_quantizer("torchao-float8wo")
    restored = quantizer.dequantize(quantizer.quantize(w, QuantSpec("torchao-float8wo")), torch.float32)
    assert torch.equal(restored[3], torch.zeros(64))
    rest = [i for i in range(16) if i != 3]
    assert torch.equal(restored[rest], raw[rest])


def test_float16_products_do_not_overflow_between_the_scales() -> None:
    """The library's W8A8 product rounds to float16 before it applies the scale of the weight."""
    quantizer, spec = get_quantizer("torchao-int8dyn"), QuantSpec("torchao-int8dyn")
    w, x = torch.full((8, 256), 0.01).half(), torch.full((1, 256), 20.0).half()
    q = quantizer.quantize(w, spec)
    assert quantizer.to_native(q, None)(x).isinf().all()
    assert torch.allclose(quantizer.linear(x, q, None), x @ w.T, rtol=0.02)


def test_int8dyn_quantizes_activations_like_the_library() -> None:
    quantizer, spec = get_quantizer("torchao-int8dyn"), QuantSpec("torchao-int8dyn")
    q = quantizer.quantize(values(48, 96, 0), spec)
    x = values(7, 96, 1)
    x[2] = 0
    assert torch.equal(quantizer.linear(x, q, None), quantizer.to_native(q, None)(x))


def values(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
