"""Inputs that several nodes share, and how reports reach the user."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from ..hosts import current
from ..quantizers.apply import LoraMode, OnFailure
from ..quantizers.compat.modes import Carrier
from ..quantizers.errors import SpecError
from ..quantizers.registry import format_ids
from ..quantizers.spec import QuantSpec

CATEGORY = "quantwire"
FROM_CONFIG = "from config"


def format_input() -> tuple[list[str], dict[str, Any]]:
    tooltip = "What the weights become. `quantwire formats` tells which of these run on this machine."
    return ([*format_ids(), FROM_CONFIG], {"default": "bnb-nf4", "tooltip": tooltip})


def carrier_input() -> tuple[list[str], dict[str, Any]]:
    tooltip = (
        "What holds the weights. quantwire: plain tensors, which every offload mode can move. "
        "library: the library's own layers, as other tools make them."
    )
    return ([Carrier.QUANTWIRE.value, Carrier.LIBRARY.value], {"default": Carrier.QUANTWIRE.value, "tooltip": tooltip})


def optional_inputs() -> dict[str, Any]:
    """Carrier, config, layers to keep, LoRA mode, on failure."""
    lora = (
        "How LoRAs on the quantized layers are applied. exact: in floating point when a layer computes. requantize: "
        "merged and quantized again once, as ComfyUI does, which is faster to sample and loses part of the LoRA."
    )
    keep = (
        "Layers that stay at full precision beside the sensitive ones: names or patterns such as *.attn.to_out.*, "
        "separated by commas or lines."
    )
    failure = (
        "error: stop at a layer that cannot be quantized. full precision: leave such layers as they are, with a "
        "warning."
    )
    return {
        "carrier": carrier_input(),
        "config": ("QUANT_CONFIG", {"tooltip": "Options of the backend, from QuantConfig."}),
        "keep_layers": ("STRING", {"default": "", "multiline": True, "tooltip": keep}),
        "lora": ([m.value for m in LoraMode], {"default": LoraMode.EXACT.value, "tooltip": lora}),
        "on_failure": ([f.value for f in OnFailure], {"default": OnFailure.ERROR.value, "tooltip": failure}),
    }


def spec_from_inputs(format_id: str, config: QuantSpec | None, keep_layers: str) -> QuantSpec:
    """Merge a node's widgets with a linked config.

    Raises:
        SpecError: `from config` without a config, or a config for another format.
    """
    if format_id == FROM_CONFIG:
        if config is None:
            raise SpecError("format is 'from config', but no QuantConfig is linked to `config`.")
        spec = config
    elif config is not None and config.format_id != format_id:
        raise SpecError(
            f"format is {format_id}, but the linked config is for {config.format_id}.\n"
            f"Set format to '{FROM_CONFIG}', or change the config."
        )
    else:
        spec = config or QuantSpec(format_id)
    keep = tuple(p.strip() for p in re.split(r"[,\n]", keep_layers) if p.strip())
    return replace(spec, exclude=(*spec.exclude, *keep))


def with_report(report: Any, *outputs: Any) -> dict[str, Any]:
    """A node result whose report is also shown as text and kept as data."""
    current().show_text(str(report))
    return {"ui": {"text": [str(report)], "report": [report.to_dict()]}, "result": outputs}
