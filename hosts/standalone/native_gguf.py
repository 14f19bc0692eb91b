"""diffusers' own GGUF layer, for carrier `library`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...quantizers.weight import QuantizedWeight, refuse_full_precision_load


def make_gguf_linear(q: QuantizedWeight, bias: Tensor | None) -> nn.Module:
    """diffusers' `GGUFLinear` with a `GGUFParameter` on the same blocks; computes in the weight's original dtype."""
    import gguf
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    n, k = q.orig_shape
    kind = gguf.GGMLQuantizationType[q.format_id.removeprefix("gguf-").upper().replace("-", "_")]
    with torch.device("meta"):
        layer: Any = GGUFLinear(k, n, bias=bias is not None, compute_dtype=q.orig_dtype)
    layer.weight = GGUFParameter(q.tensors["qdata"].clone(), quant_type=kind)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    layer.register_load_state_dict_pre_hook(
        lambda module, state, prefix, *rest: refuse_full_precision_load(state, prefix, q.format_id)
    )
    return layer.eval()
