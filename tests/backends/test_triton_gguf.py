"""The GPU kernels for GGUF weights: what can be seen of them without a GPU.

Two of the tests start a process: one where Triton's interpreter runs the kernels against gguf's numpy, one where
Triton's compiler makes machine code for GPUs that need not be here. Triton is kept out of the environment of the other
tests (`make test-slow` puts it into .venv/triton): it takes 655 MB, bitsandbytes imports it where it finds it, and the
interpreter is chosen for a whole process.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
from quantwire.quantizers.errors import WeightError
from quantwire.quantizers.kernels.triton_gguf import BLOCKS, dequantize, kernel_for, refusal, run

HERE = Path(__file__).parent
APART = Path(sys.prefix) / "triton"


def in_own_process(module: str, tmp_path: Path, **environment: str) -> str:
    """Run a module of tests with Triton on the path; the output. Skips where there is no Triton."""
    if not APART.is_dir() and importlib.util.find_spec("triton") is None:
        pytest.skip(f"Triton is neither in {APART} nor installed: run `make test-slow`, on Linux")
    path = os.pathsep.join(p for p in (str(APART) if APART.is_dir() else "", os.environ.get("PYTHONPATH", "")) if p)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / module],
        env=os.environ | {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path)} | environment,
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    return result.stdout


def passed(output: str) -> int:
    """How many passed, of a run in which nothing was skipped."""
    found = re.search(r"^(\d+) passed(?!, .*skipped)", output, re.M)
    assert found, output[-2000:]
    return int(found[1])


@pytest.mark.slow
def test_the_interpreter_agrees_with_gguf(tmp_path: Path) -> None:
    assert passed(in_own_process("triton_gguf_values.py", tmp_path, TRITON_INTERPRET="1")) > 200


@pytest.mark.slow
def test_the_kernels_compile_for_gpus(tmp_path: Path) -> None:
    assert passed(in_own_process("triton_gguf_compile.py", tmp_path, TRITON_INTERPRET="0")) > 70


def test_sizes_of_blocks_are_those_of_gguf() -> None:
    for name, b in BLOCKS.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == (b.size, b.nbytes)
        assert b.groups * b.width * b.parts == b.size
        assert b.groups % b.run == 0


def test_importing_the_kernels_imports_no_triton() -> None:
    code = "import sys, quantwire.quantizers.kernels.triton_gguf; print('triton' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("device", "dtype", "name", "shape", "expected"),
    [
        ("cpu", torch.float16, "Q4_K", (8, 256), "the Triton kernels run on CUDA devices, not on cpu"),
        ("meta", torch.float16, "Q4_K", (8, 256), "the Triton kernels run on CUDA devices, not on meta"),
        ("cuda", torch.float16, "Q3_K", (8, 256), "there is no Triton kernel for Q3_K, only for Q8_0, Q4_0"),
        ("cuda", torch.float64, "Q4_K", (8, 256), "not in torch.float64"),
        ("cuda", torch.float16, "Q4_K", (8, 128), "shape (8, 128) has no rows of blocks of 256 values"),
        ("cuda", torch.float16, "Q8_0", (), "shape () has no rows of blocks of 32 values"),
    ],
)
def test_refusals_say_why(device: str, dtype: torch.dtype, name: str, shape: tuple[int, ...], expected: str) -> None:
    assert expected in refusal(torch.device(device), dtype, name, shape)


def test_where_the_kernels_cannot_run_there_is_none_and_calling_them_is_an_error() -> None:
    cpu = torch.device("cpu")
    assert kernel_for("Q4_K", cpu, torch.bfloat16, 1) is None
    with pytest.raises(WeightError, match=r"Q8_0: the Triton kernels run on CUDA devices, not on cpu\.\nUse the eager"):
        run(torch.zeros(1, 32), torch.zeros(1, 34, dtype=torch.uint8), "Q8_0", 1, 32, None)
    with pytest.raises(WeightError, match="not on cpu"):
        dequantize(torch.zeros(1, 34, dtype=torch.uint8), "Q8_0", (1, 32), torch.float32)
