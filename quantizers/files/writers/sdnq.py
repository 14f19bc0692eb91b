"""sdnq, as its layers are saved: `X.weight`, `X.scale`, `X.zero_point`, `X.svd_up`, `X.svd_down`.

The tensors do not tell how they are packed. That stands in the configuration: in a folder in `config.json`, in a single
file as JSON under `quantization_config` in its metadata. Every layer has an entry of its own, with the groups as they
came out, so that a loader comes to the same shapes whatever was asked for.

Sources: sdnq/quantizer.py (`SDNQConfig`, `apply_sdnq_to_module`) and utils.py (`get_quant_kwargs`) at 0.2.8.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...backends.sdnq.library import to_theirs
from ...formats.sdnq import BACKEND
from ...weight import QuantizedWeight
from .layout import Layout

CONFIG_KEY = "quantization_config"
_KEPT = (
    *("weights_dtype", "quantized_matmul_dtype", "group_size", "hadamard_group_size", "svd_rank", "svd_steps"),
    *("use_hadamard", "use_quantized_matmul"),
)


class SdnqWriter(Layout):
    id = "sdnq"
    title = "sdnq, as its own loader and diffusers read it"
    formats = tuple(entry.format_id for entry in BACKEND.entries)
    in_folders = True

    def tensors(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        layer = name.removesuffix("weight")
        return {layer + part: t for part, t in to_theirs(weight).items()}

    def note(self, name: str, weight: QuantizedWeight) -> Any:
        return {key: weight.meta[key] for key in _KEPT} | {"use_svd": "svd_up" in weight.tensors}

    def metadata(self, notes: Mapping[str, Any]) -> dict[str, str]:
        config = self.config(notes, ())
        return {CONFIG_KEY: json.dumps(config)} if config else {}

    def config(self, notes: Mapping[str, Any], plain: tuple[str, ...]) -> dict[str, Any] | None:
        if not notes:
            return None
        ((common, _),) = Counter(json.dumps(note, sort_keys=True) for note in notes.values()).most_common(1)
        general: dict[str, Any] = json.loads(common)
        others = {name: dict(note) for name, note in notes.items() if dict(note) != general}
        return {
            "quant_method": "sdnq",
            **general,
            "dequantize_fp32": True,  # scales are float32 here
            "add_skip_keys": False,
            # Names with their `.weight` are compared as a whole; without it a part of another name would match too.
            "modules_to_not_convert": sorted(plain),
            "modules_quant_config": others,
        }
