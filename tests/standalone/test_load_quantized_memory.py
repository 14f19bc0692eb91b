"""What loading a quantized file takes: the weights stay on a map of the file, and are never all dequantized."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from quantwire.hosts.standalone import flux
from quantwire.quantizers.files.writers import writer_for
from quantwire.quantizers.weight import QuantizedWeight
from safetensors.torch import save_file
from torch import Tensor

MIB = 1 << 20
HIDDEN, DOUBLE, SINGLE = 1536, 4, 8  # 300 MiB in 4 bits, 1.2 GiB in bfloat16
LOAD = """
import json, sys
from pathlib import Path
import torch
from quantwire.hosts.standalone import flux
from quantwire.hosts.standalone.quantized import load_quantized
from quantwire.quantizers.registry import require_reader

def status():
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.endswith(" kB")}
    return found["VmHWM"], found["RssAnon"]

flux.build(flux.FluxConfig(128, 1, 1, 64, 8, 8, False))
require_reader("bnb-nf4")
Path("/proc/self/clear_refs").write_text("5")
peak, anon = status()
model, report = load_quantized(Path(sys.argv[1]))
after, after_anon = status()
told = {"peak": after - peak, "anon": after_anon - anon, "weights": report.nbytes_out, "full": report.nbytes_in}
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FLUX in NF4, of random codes."""
    config = flux.FluxConfig(HIDDEN, DOUBLE, SINGLE, 64, 64, 64, False)
    model = flux.build(config)
    rows: dict[str, list[int]] = {}
    tails: dict[str, tuple[int, ...]] = {}
    for row in flux.key_map(config):
        shape = tuple(model.get_parameter(row.target).shape)
        rows.setdefault(row.source, []).append(shape[0])
        tails[row.source] = shape[1:]
    writer, seed = writer_for("bnb-nf4"), torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {}
    for name, counts in rows.items():
        shape = (sum(counts), *tails[name])
        if len(shape) < 2 or "blocks" not in name:
            found[name] = torch.zeros(shape, dtype=torch.bfloat16)
            continue
        n, k = shape
        codes = torch.randint(0, 256, (n * k // 2, 1), dtype=torch.uint8, generator=seed)
        tensors = {"qdata": codes, "absmax": torch.full((n * k // 64,), 0.02)}
        weight = QuantizedWeight("bnb-nf4", tensors, (n, k), torch.bfloat16, {"compute_dtype": None})
        found |= writer.tensors(name, weight)
    path = tmp_path_factory.mktemp("large") / "large-nf4.safetensors"
    save_file(found, str(path))
    return path


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux' peak of resident memory")
def test_the_model_is_never_dequantized(large: Path) -> None:
    size = large.stat().st_size
    assert size > 300 * MIB
    done = subprocess.run([sys.executable, "-c", LOAD, str(large)], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    print({key: f"{value / MIB:.0f} MiB" for key, value in told.items()}, f"file {size / MIB:.0f} MiB")
    assert told["full"] > 3 * size
    assert told["peak"] < 0.5 * size  # the pages of the file itself, where they were looked at
    assert told["anon"] < 0.15 * size  # memory that is not the file
