"""torchao in safetensors, as diffusers and transformers save it.

`X._weight_qdata`, `X._weight_scale`, ...; in the file's metadata under `X.weight` JSON with the class and its
attributes, for every other tensor `{"_type": "Tensor"}`, and all names under `tensor_names`. torchao's own function
makes the tensors and the JSON.

torchao-int4wo is not written so: it holds plain nibbles, and the classes that torchao reads from files pack them for
one kind of GPU.

Source: torchao/prototype/safetensors at 0.18; diffusers quantizers/torchao at 0.42.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any, cast

from torch import Tensor

from ...backends.torchao.library import load
from ...registry import require_reader
from ...weight import QuantizedWeight
from .layout import Layout, modules

NAMES = "tensor_names"
_PLAIN = json.dumps({"_type": "Tensor"})
_CONFIGS = {
    "torchao-int8wo": "Int8WeightOnlyConfig",
    "torchao-int8dyn": "Int8DynamicActivationInt8WeightConfig",
    "torchao-float8wo": "Float8WeightOnlyConfig",
}


class TorchaoWriter(Layout):
    id = "torchao"
    title = "torchao, as diffusers saves it in safetensors"
    formats = tuple(_CONFIGS)
    in_folders = True

    def refuse_together(self, formats: Collection[str]) -> str | None:
        if len(set(formats)) > 1:
            return f"diffusers reads one configuration of torchao a folder, got {', '.join(sorted(set(formats)))}"
        return None

    def tensors(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        return _flat(name, weight)[0]

    def note(self, name: str, weight: QuantizedWeight) -> Any:
        meta = weight.with_tensors({key: t.to("meta") for key, t in weight.tensors.items()})
        return {"format": weight.format_id, "json": _flat(name, meta)[1][name]}

    def metadata(self, notes: Mapping[str, Any]) -> dict[str, str]:
        return self.metadata_of_all(notes, ())

    def metadata_of_all(self, notes: Mapping[str, Any], plain: Collection[str]) -> dict[str, str]:
        """`metadata` with the file's other tensors, which torchao's readers want named too.

        Args:
            plain: names of all tensors that are not quantized.
        """
        layers = {name: str(note["json"]) for name, note in notes.items()}
        if not layers:
            return {}
        return {**layers, **dict.fromkeys(plain, _PLAIN), NAMES: json.dumps([*layers, *plain])}

    def config(self, notes: Mapping[str, Any], plain: tuple[str, ...]) -> dict[str, Any] | None:
        if not notes:
            return None
        made = getattr(load("torchao.quantization"), _CONFIGS[next(iter(notes.values()))["format"]])()
        return {
            "quant_method": "torchao",
            "quant_type": {"default": load("torchao.core.config").config_to_dict(made)},
            "modules_to_not_convert": modules(plain),
        }


def _flat(name: str, weight: QuantizedWeight) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a weight, and the metadata: see the module's docstring."""
    layer: Any = require_reader(weight.format_id).to_native(weight, None)
    support = load("torchao.prototype.safetensors.safetensors_support")
    return cast(
        "tuple[dict[str, Tensor], dict[str, str]]", support.flatten_tensor_state_dict({name: layer.weight.data})
    )
