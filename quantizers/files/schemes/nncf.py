"""NNCF: the state dict of a torch model after `nncf.compress_weights`.

The packed weight keeps its name, `X.weight`; what restores it is a hook of the model, and its tensors stand under the
hook's name, in which dots of the weight's name are colons:

    __nncf_hooks.post_hooks.X:weight__0.0._scale        float16 (N, 1), in groups (N, G, 1)
    __nncf_hooks.post_hooks.X:weight__0.0._zero_point   uint8 (N, 1); of 4 bits packed, (N * G / 2, 1)

    int8-sym, -asym   X.weight int8, uint8 (N, K)
    int4-sym, -asym   X.weight uint8 (N * K / 2, 1), even index low; sym holds the value plus 8

Other modes (nf4, fp8, mxfp4) NNCF writes for OpenVINO only, not for torch. The dtype that the weight had is not in the
file; it is taken from the bias.

Source: nncf/torch/quantization/layers.py and function_hook/hook_storage.py at 3.4.0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from ..model_file import ModelFile
from .base import Fault, Layer
from .broken import FLOATS, Broken, attempt, need, need_numel

if TYPE_CHECKING:
    from torch import Tensor

    from ...weight import QuantizedWeight
    from .base import Read

HOOKS = "__nncf_hooks."
POST = f"{HOOKS}post_hooks."
_FAILS = "NNCF's model stops with an error about missing or unexpected keys."
_NOISE = "NNCF computes with other numbers, or stops with an error about shapes."


class NncfScheme:
    id = "nncf"
    title = "NNCF"
    library = "nncf"

    def find(self, file: ModelFile) -> Iterable[Layer | Fault]:
        for hook, lasts in file.groups.items():
            if POST in hook and not {"_scale", "_zero_point"}.isdisjoint(lasts):
                prefix, _, rest = hook.partition(POST)
                operation = rest.rpartition("__")[0].replace(":", ".")
                if operation.endswith("weight"):
                    yield from _layer(file, prefix + operation, hook)

    def weight(self, layer: Layer, read: Read) -> QuantizedWeight:
        from ...weight import QuantizedWeight
        from ..quantized_file import DTYPES

        n, k = layer.shape
        tensors = {role: read(name) for role, name in layer.tensors.items()}
        tensors["scale"] = tensors["scale"].reshape(n, -1)
        four = layer.format_id.startswith("nncf-int4")
        tensors["qdata"] = tensors["qdata"].reshape(n, k // 2 if four else k)
        if "zero_point" in tensors:
            zero: Tensor = tensors["zero_point"]
            tensors["zero_point"] = zero.reshape(-1) if four else zero.reshape(n, 1)
        return QuantizedWeight(layer.format_id, tensors, layer.shape, DTYPES[layer.dtype])


def _layer(file: ModelFile, name: str, hook: str) -> Iterator[Layer | Fault]:
    parts = {"qdata": name, "scale": f"{hook}._scale", "zero_point": f"{hook}._zero_point"}
    tensors = {role: part for role, part in parts.items() if part in file.entries}
    if "qdata" not in tensors:
        text = f"'{name}' is missing, but '{next(iter(tensors.values()))}' is there."
        yield Fault("weight-missing", name, text, _FAILS)
        return
    bias = file.entries.get(name.removesuffix("weight") + "bias")
    dtype = bias.dtype if bias is not None and bias.dtype in FLOATS else "BF16"
    layer = Layer(name, NncfScheme.id, "compressed", "", tensors, file.entries[name].shape, dtype)
    yield from attempt(
        lambda: _typed(file, layer, parts["scale"]), name, layer.scheme, layer.type, tensors, layer.shape
    )


def _typed(file: ModelFile, layer: Layer, scale_name: str) -> Layer:
    """
    Raises:
        Broken: tensors that are of no mode of NNCF.
    """
    qdata = need(file, layer.name, _NOISE, "I8", "U8")
    scale = need(file, scale_name, _FAILS, "F16")
    n, groups = scale.shape[0] if scale.shape else 0, scale.numel // max(scale.shape[0] if scale.shape else 1, 1)
    zero_point = file.entries.get(layer.tensors.get("zero_point", ""))
    packed = qdata.dtype == "U8" and qdata.shape[-1:] == (1,)
    if qdata.dtype == "U8" and not packed and zero_point is None:
        name = scale_name.removesuffix("_scale") + "_zero_point"
        raise Broken("tensor-missing", name, f"'{name}' is missing, and '{qdata.name}' is uint8.", _FAILS)
    k, rest = divmod(qdata.numel * (2 if packed else 1), n or 1)
    fits = n > 0 and not rest and k > 0 and groups > 0 and k % groups == 0
    if not fits or (not packed and (len(qdata.shape) != 2 or qdata.shape[0] != n or groups != 1)):
        text = f"'{scale.name}' has shape {list(scale.shape)}, which is no scale a row or group of '{qdata.name}'."
        raise Broken("scale-shape", scale.name, f"{text[:-1]}, {list(qdata.shape)}.", _NOISE)
    if zero_point is not None:
        need(file, zero_point.name, _NOISE, "U8")
        need_numel(zero_point, -(-n * groups // 2) if packed else n, _NOISE)
    kind = f"int{4 if packed else 8}-{'asym' if zero_point is not None else 'sym'}"
    shown = kind if groups == 1 else f"{kind}, groups of {k // groups}"
    return dataclasses.replace(
        layer, type=shown, format_id=f"nncf-{kind}", shape=(n, k), options={"group_size": k // groups}
    )
