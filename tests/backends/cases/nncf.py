"""Conformance cases of nncf.

The integers come from `nncf.compress_weights` on one linear layer: the buffers of the layer that it returns, and what
its decompressor makes of them. It refuses nf4 for torch models, so there the library's part is `weight_lowering`, the
functions behind `compress_weights`, with the scale in float16 as its OpenVINO writer stores it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .case import Case, Library


def compressed(mode: str, group_size: int = -1) -> Library:
    def make(w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        pytest.importorskip("nncf")
        import nncf
        from nncf.torch.function_hook.wrapper import get_hook_storage

        n, k = w.shape
        layer = nn.Linear(k, n, bias=False, dtype=w.dtype)
        layer.load_state_dict({"weight": w})
        options: dict[str, Any] = {} if mode.startswith("int8") else {"group_size": group_size, "all_layers": True}
        data = nncf.Dataset([torch.ones(1, k, dtype=w.dtype)])
        model: Any = nncf.compress_weights(layer, mode=nncf.CompressWeightsMode(mode), dataset=data, **options)
        (hook,) = [h for h in get_hook_storage(model).modules() if "Decompressor" in type(h).__name__]
        decompressor: Any = hook
        qdata = model.weight.data
        tensors = {"qdata": qdata.reshape(n, -1), "scale": decompressor._scale.reshape(n, -1)}
        if mode.endswith("asym"):
            zero_point = decompressor._zero_point
            tensors["zero_point"] = zero_point.flatten() if mode.startswith("int4") else zero_point
        decompressor.result_dtype = torch.float32
        return tensors, decompressor(qdata).reshape(n, k)

    return make


def nf4(group_size: int) -> Library:
    def make(w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        pytest.importorskip("nncf")
        import nncf
        from nncf.quantization.algorithms.weight_compression.config import WeightCompressionConfig
        from nncf.quantization.algorithms.weight_compression.constants import NF4_QUANTILES
        from nncf.quantization.algorithms.weight_compression.weight_lowering import (
            compress_weight,
            do_float_dequantization,
        )
        from nncf.tensor import Tensor as NncfTensor
        from nncf.tensor import TensorDataType

        config = WeightCompressionConfig(nncf.CompressWeightsMode.NF4, group_size)
        result = compress_weight(NncfTensor(w.contiguous()), (1,), config)
        n, k = w.shape
        table = torch.from_numpy(NF4_QUANTILES)
        index = (result.tensor.data.reshape(n, k, 1) == table).int().argmax(-1)
        result.tensor = result.tensor.astype(TensorDataType.float16)
        result.scale = result.scale.astype(TensorDataType.float16)
        restored = do_float_dequantization(result, -1 if group_size == -1 else 1).data.reshape(n, k)
        packed = (index[:, ::2] + 16 * index[:, 1::2]).to(torch.uint8)
        return {"qdata": packed, "scale": result.scale.data.reshape(n, -1)}, restored.float()

    return make


REFUSED = {
    (34, 33): "K=33 is odd, and two values share a byte",
    (34, 96): "K=96 is not a multiple of group-size 128; group-size=32 fits",
    (34, 34): "K=34 is not a multiple of group-size 128; group-size=-1 fits",
    (4096, 128): "",
}

CASES: list[Case] = [
    Case("nncf-int8-sym", 42, compressed("int8_sym"), refused={(3, 33): "", (1, 34): ""}, overflow=True),
    Case("nncf-int8-asym", 42.7, compressed("int8_asym"), refused={(3, 33): "", (1, 34): ""}, overflow=True),
    Case("nncf-int4-sym", 18.1, compressed("int4_sym", 128), refused=REFUSED, overflow=True),
    Case("nncf-int4-sym;group-size=32", 20, compressed("int4_sym", 32), refused={(33, 64): ""}, overflow=True),
    Case("nncf-int4-sym;group-size=-1", 16.5, compressed("int4_sym"), refused={(33, 34): ""}, overflow=True),
    Case("nncf-int4-asym", 18.5, compressed("int4_asym", 128), refused=REFUSED, overflow=True),
    Case(
        "nncf-int4-asym;group-size=64",
        19.6,
        compressed("int4_asym", 64),
        refused={(33, 192): "N=33 rows have an odd number of zero points, and two share a byte", (33, 128): ""},
        overflow=True,
    ),
    Case("nncf-nf4", 19.4, nf4(128), refused=REFUSED, overflow=True),
    Case("nncf-nf4;group-size=32", 20, nf4(32), refused={(33, 64): ""}, overflow=True),
    Case("nncf-nf4;group-size=-1", 18.5, nf4(-1), refused={(33, 34): ""}, overflow=True),
]
