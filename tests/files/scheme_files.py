"""What the tests of the schemes share: small real models, edited copies of files, and comparing with a library."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from quantwire.quantizers.files.model_file import open_model
from quantwire.quantizers.files.schemes.base import Fault
from quantwire.quantizers.files.schemes.scan import Scan, scan
from quantwire.quantizers.registry import get_quantizer
from quantwire.quantizers.weight import QuantizedWeight
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

ROUNDING = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-5}
TOKENS = 48
FLUX: dict[str, Any] = {
    **{"patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 32},
    **{"num_attention_heads": 4, "joint_attention_dim": 64, "pooled_projection_dim": 32, "guidance_embeds": True},
    "axes_dims_rope": (8, 12, 12),
}


def flux() -> Any:
    """A small FLUX transformer of diffusers, bfloat16, always the same."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model: Any = FluxTransformer2DModel(**FLUX)
    return model.to(torch.bfloat16)


class Two(nn.Module):
    """Two linear layers, one without a bias, and what stays plain."""

    def __init__(self, k: int = 256, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(k, 48, dtype=dtype)
        self.b = nn.Linear(k, 32, dtype=dtype, bias=False)
        self.norm = nn.LayerNorm(48, dtype=dtype)


def looked(path: Path) -> Scan:
    return scan(open_model(path))


def codes(found: Scan) -> set[str]:
    return {fault.code for fault in found.faults}


def fault(found: Scan, code: str) -> Fault:
    return next(f for f in found.faults if f.code == code)


def edited(source: Path, target: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None]) -> Path:
    """A copy of a file with its tensors and metadata changed in place by `change`."""
    with safe_open(source, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata() or {})
    change(tensors, metadata)
    save_file({name: t.clone() for name, t in tensors.items()}, target, metadata or None)
    return target


def weight_of(found: Scan, name: str) -> QuantizedWeight:
    layer = found.layers[name]
    assert layer.format_id, layer.why
    weight = found.read(name)
    assert isinstance(weight, QuantizedWeight)
    assert weight.format_id == layer.format_id
    assert weight.orig_shape == layer.shape
    return weight


def equals(found: Scan, name: str, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """The weight of the file is that of the library, bit for bit.

    Args:
        expected: dequantized by the library.
        dtype: of the weight; that of `expected` without.
    """
    weight = weight_of(found, name)
    assert weight.orig_dtype == (dtype or expected.dtype)
    assert torch.equal(get_quantizer(weight.format_id).dequantize(weight, expected.dtype), expected), name


def computes(
    found: Scan, name: str, layer: Callable[[Tensor], Tensor], bias: Tensor | None, rounding: torch.dtype | None = None
) -> None:
    """A product with the weight is that of the library's layer, up to the rounding of its dtype.

    Args:
        rounding: the dtype in which the library restores the weight; that of the weight without.
    """
    weight = weight_of(found, name)
    dtype = weight.orig_dtype
    x = torch.randn(TOKENS, weight.orig_shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        theirs = layer(x).float()
        ours = get_quantizer(weight.format_id).linear(x, weight, bias).float()
    assert float((ours - theirs).norm() / theirs.norm()) < ROUNDING[rounding or dtype], name
