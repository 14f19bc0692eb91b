"""diffusers' own GGUF layer, for carrier `library`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...quantizers.errors import SpecError
from ...quantizers.weight import FullPrecisionGuard, QuantizedWeight


def make_gguf_linear(q: QuantizedWeight, bias: Tensor | None) -> nn.Module:
    """diffusers' `GGUFLinear` with a `GGUFParameter` on the same blocks; computes in the weight's original dtype.

    Raises:
        SpecError: a block type that diffusers does not have.
    """
    import gguf
    from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES, GGUFLinear, GGUFParameter

    n, k = q.orig_shape
    kind = gguf.GGMLQuantizationType[q.format_id.removeprefix("gguf-").upper().replace("-", "_")]
    if kind not in SUPPORTED_GGUF_QUANT_TYPES:
        raise SpecError(f"{q.format_id}: diffusers has no layer for this block type.\nUse carrier `quantwire`.")
    with torch.device("meta"):
        layer: Any = GGUFLinear(k, n, bias=bias is not None, compute_dtype=q.orig_dtype)
    layer.weight = GGUFParameter(q.tensors["qdata"].clone(), quant_type=kind)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    layer.register_load_state_dict_pre_hook(FullPrecisionGuard(q.format_id))
    return layer.eval()
