"""The Triton kernels compiled for real GPUs, down to machine code. Run by `test_triton_gguf.py`; needs no GPU.

The interpreter knows neither registers nor types as the compiler does. Here every type, kernel and tile goes through
Triton's compiler and NVIDIA's assembler, which Triton's wheel brings, and what they report is checked: registers
spilled, shared memory, rounding.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from quantwire.quantizers.kernels.triton_gguf import BLOCKS
from quantwire.quantizers.kernels.triton_gguf.kernels import dequantize, few_tokens, matmul
from quantwire.quantizers.kernels.triton_gguf.launch import OPTIONS, constants
from quantwire.quantizers.kernels.triton_gguf.tiles import DEQUANTIZE_NUMEL, FEW, FUSED, Tile, fused_tiles

triton: Any = pytest.importorskip("triton")
TYPES = list(BLOCKS)
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
POINTERS = {HALF: "*fp16", BRAIN: "*bf16", FULL: "*fp32"}
# Compute capability 8.6 and 8.9 (RTX 30 and 40) give a program 99 KB of shared memory, the least of all from 8.0 on.
SHARED_NBYTES = 99 * 1024


class Built:
    """A compiled kernel: bytes of shared memory, registers a thread, bytes of stack (where registers spill), PTX."""

    def __init__(self, kernel: Any, pointers: dict[str, str], given: dict[str, Any], capability: int, **options: Any):
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        jit = kernel if isinstance(kernel, triton.runtime.JITFunction) else kernel.fn  # without the heuristics
        integers = [name for name in ("m", "n", "k", "groups") if name in jit.arg_names]
        signature = dict.fromkeys(jit.arg_names, "constexpr") | pointers | dict.fromkeys(integers, "i32")
        # As a launch would find them: addresses and sizes that 16 divides, except the number of tokens.
        hinted = [jit.arg_names.index(name) for name in (*pointers, *integers) if name not in ("m", "groups")]
        hints = {(i,): [["tt.divisibility", 16]] for i in hinted} if options.pop("aligned", True) else {}
        source = ASTSource(fn=jit, signature=signature, constexprs=given, attrs=hints)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options | OPTIONS)
        self.shared: int = made.metadata.shared
        self.ptx: str = made.asm["ptx"]
        self.cubin: bytes = made.asm["cubin"]

    def usage(self, folder: Path) -> tuple[int, int]:
        """Registers a thread and bytes of stack."""
        (folder / "kernel.cubin").write_bytes(self.cubin)
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        run = subprocess.run([tool, "-res-usage", folder / "kernel.cubin"], capture_output=True, text=True, check=True)
        found = re.search(r"REG:(\d+) STACK:(\d+)", run.stdout)
        assert found, run.stdout
        return int(found[1]), int(found[2])


def product(
    kernel: Any, type_name: str, tokens: int, tile: Tile, dtype: torch.dtype, capability: int, **more: Any
) -> Built:
    bias = more.pop("bias", True)
    given = constants(type_name) | {"HAS_BIAS": bias, "BM": tokens, "BN": tile.rows, "G": tile.groups(type_name)}
    given |= {"EVEN": more.pop("even", True)} | ({"UPCAST": False} if kernel is matmul else {})
    pointers = {"x": POINTERS[dtype], "q": "*u8", "bias": POINTERS[dtype], "y": POINTERS[dtype]}
    if not bias:
        del pointers["bias"]
        given["bias"] = None
    return Built(kernel, pointers, given, capability, num_warps=tile.warps, num_stages=tile.stages, **more)


def expansion(type_name: str, dtype: torch.dtype, capability: int) -> Built:
    b = BLOCKS[type_name]
    step = max(b.groups, DEQUANTIZE_NUMEL // (b.width * b.parts))
    given = constants(type_name, size=False) | {"PER": b.groups, "G": step}
    return Built(dequantize, {"q": "*u8", "out": POINTERS[dtype]}, given, capability, num_warps=4)


def rounds_to_nearest(built: Built, dtype: torch.dtype) -> bool:
    return bool(re.search(r"cvt\.rn\.bf16(x2)?\.f32" if dtype is BRAIN else r"cvt\.rn\.f16(x2)?\.f32", built.ptx))


@pytest.mark.parametrize("capability", [75, 80, 90])
@pytest.mark.parametrize("type_name", TYPES)
def test_dequantize(type_name: str, capability: int, tmp_path: Path) -> None:
    for dtype in {75: (HALF,), 80: (HALF, BRAIN, FULL), 90: (BRAIN,)}[capability]:
        built = expansion(type_name, dtype, capability)
        assert built.usage(tmp_path)[1] == 0
        assert built.shared <= 16 * 1024
        assert re.search(r"\bmul\.(rn\.)?f32", built.ptx)
        assert not re.search(r"\bfma\.", built.ptx)
        assert dtype is FULL or rounds_to_nearest(built, dtype)


@pytest.mark.parametrize(("capability", "tokens"), [(75, 1), (80, 1), (80, 8), (90, 1)])
@pytest.mark.parametrize("type_name", TYPES)
def test_few_tokens(type_name: str, capability: int, tokens: int, tmp_path: Path) -> None:
    for tile in FEW if capability == 80 else FEW[1:2]:
        built = product(few_tokens, type_name, tokens, tile, HALF, capability)
        assert built.usage(tmp_path)[1] == 0, tile
        assert built.shared <= 16 * 1024
        if tokens == 1:
            assert built.shared <= 8 * tile.warps, tile  # the last sum over warps; nothing inside the loop


@pytest.mark.parametrize(("capability", "tokens"), [(80, 16), (80, 32), (80, 64), (80, 128), (90, 16), (90, 128)])
@pytest.mark.parametrize("type_name", TYPES)
def test_tensor_cores(type_name: str, capability: int, tokens: int, tmp_path: Path) -> None:
    tiles = fused_tiles(tokens)
    for tile in tiles if (capability, tokens) in ((80, 32), (80, 128)) else tiles[1::2]:
        built = product(matmul, type_name, tokens, tile, HALF, capability)
        registers, stack = built.usage(tmp_path)
        assert stack == 0, (tile, registers, stack)
        assert built.shared <= SHARED_NBYTES, tile
        assert re.search(r"(wgmma\.mma_async|mma)\.sync\.aligned", built.ptx)


@pytest.mark.parametrize("type_name", TYPES)
def test_other_types_of_arguments(type_name: str, tmp_path: Path) -> None:
    """bfloat16, float32, no bias, rows that end inside a tile, and addresses and sizes that 16 does not divide."""
    variants: tuple[dict[str, Any], ...] = ({}, {"bias": False}, {"even": False, "aligned": False})
    for more in variants:
        assert product(few_tokens, type_name, 4, FEW[0], BRAIN, 80, **more).usage(tmp_path)[1] == 0
        built = product(matmul, type_name, 32, FUSED[0], BRAIN, 80, **more)
        assert built.usage(tmp_path)[1] == 0
        assert rounds_to_nearest(built, BRAIN)
    assert product(few_tokens, type_name, 4, FEW[0], FULL, 80).usage(tmp_path)[1] == 0


def test_below_8_0_tensor_cores_are_out_of_reach(tmp_path: Path) -> None:
    """Why `way` does not take them there, and the proof that spilling is noticed."""
    assert product(matmul, "Q4_K", 64, FUSED[0], HALF, 75).usage(tmp_path)[1] > 100
