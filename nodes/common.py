"""Inputs that several nodes share, and how reports reach the user."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..hosts import current
from ..quantizers import quoting
from ..quantizers.choices import AUTO, LoraMode, OnFailure
from ..quantizers.compat.modes import Carrier
from ..quantizers.errors import SpecError, near
from ..quantizers.registry import format_ids
from ..quantizers.rules import RuleSet
from ..quantizers.spec import QuantSpec

CATEGORY = "quantwire"
FROM_CONFIG = "from config"
ALL = "all"
NO_CONFIG = "no QuantConfig is linked to `config`, or the node that is linked found no format"
LEVELS = ("ok", "unknown", "warn", "block")  # of offload verdicts, the worst last
LLM = "llm"  # whichever language model is among the encoders


def format_input(auto: bool = False) -> tuple[list[str], dict[str, Any]]:
    tooltip = "What the weights become. `quantwire formats` tells which of these run on this machine."
    chosen = " auto: the best one that fits into the memory that is free now; the report says why." if auto else ""
    words = [*format_ids(), FROM_CONFIG, *([AUTO] if auto else [])]
    return (words, {"default": "bnb-nf4", "tooltip": tooltip + chosen})


def check_format(format: str | None, auto: bool = False) -> bool | str:
    """For VALIDATE_INPUTS: the formats, with a word on llama.cpp's names of types. None is a link."""
    words, _ = format_input(auto)
    if format is None or format in words:
        return True
    from ..quantizers.files.recipes import ALIASES, RECIPES
    from ..quantizers.ggml_types import format_id

    text, name = f"format {format!r} is not among its {len(words)} choices.", str(format).upper()
    recipe = RECIPES.get(ALIASES.get(name, name))
    if recipe is None or format_id(recipe.base) not in words:
        return text + near(str(format), words)
    mixed = "Mixtures of types such as Q4_K_M are made by `quantwire convert` and ConvertModel."
    return f"{text} Did you mean {format_id(recipe.base)}? {mixed}"


def carrier_input() -> tuple[list[str], dict[str, Any]]:
    tooltip = (
        "What holds the weights. quantwire: plain tensors, which every offload mode can move. "
        "library: the library's own layers, as other tools make them."
    )
    return ([Carrier.QUANTWIRE.value, Carrier.LIBRARY.value], {"default": Carrier.QUANTWIRE.value, "tooltip": tooltip})


def optional_inputs() -> dict[str, Any]:
    """Carrier, config, layers to keep, LoRA mode, on failure."""
    lora = (
        "How LoRAs are applied. exact: in floating point when a quantized layer computes; keeps the LoRA whole. "
        "requantize: merged into the weights, which costs nothing while sampling and loses part of the LoRA, most at 4 "
        "bits. One that is added later is merged by dequantizing, adding and quantizing again; without ComfyUI, one "
        "that is on the model already is merged before quantizing."
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
        "config": ("QUANT_CONFIG", {"tooltip": "Options from QuantConfig, rules for single layers from QuantRules."}),
        "keep_layers": ("STRING", {"default": "", "multiline": True, "tooltip": keep}),
        "lora": ([m.value for m in LoraMode], {"default": LoraMode.EXACT.value, "tooltip": lora}),
        "on_failure": ([f.value for f in OnFailure], {"default": OnFailure.ERROR.value, "tooltip": failure}),
    }


def spec_from_inputs(format_id: str, config: QuantSpec | RuleSet | None, keep_layers: str) -> QuantSpec:
    """Merge a node's widgets with a linked config.

    Raises:
        SpecError: no format, `from config` without a config that names one, or a config for another format.
    """
    if not isinstance(format_id, str):  # ComfyUI lets null through, and what a link brings
        raise SpecError(f"format is {format_id!r}, which is no name of a format.\nChoose one in the node.")
    rules = config.rules if isinstance(config, RuleSet) else ()
    config = None if isinstance(config, RuleSet) else config
    if format_id == FROM_CONFIG:
        if config is None:
            what = "the linked QuantRules has no base config" if rules else NO_CONFIG
            raise SpecError(f"format is 'from config', but {what}.\nChoose a format here, or link a QuantConfig.")
        spec = config
    elif config is not None and config.format_id != format_id:
        raise SpecError(
            f"format is {format_id}, but the linked config is for {config.format_id}.\n"
            f"Set format to '{FROM_CONFIG}', or change the config."
        )
    else:
        spec = config or QuantSpec(format_id)
    return replace(spec, exclude=(*spec.exclude, *patterns(keep_layers)), rules=(*spec.rules, *rules))


def patterns(keep_layers: str) -> tuple[str, ...]:
    """Layer patterns separated by commas or lines; one that holds a comma stands in quotes."""
    return tuple(pattern for line in keep_layers.splitlines() for pattern in quoting.items(line))


def one_line(err: SpecError) -> str:
    """The message for VALIDATE_INPUTS, whose answers are one line."""
    return " ".join(str(err).splitlines())


def with_report(report: Any, *outputs: Any) -> dict[str, Any]:
    """A node result whose report is also shown as text and kept as data."""
    current().show_text(str(report))
    shown = {"text": [str(report)], "report": [report.to_dict()]}
    badge = badge_of(report)
    return {"ui": {**shown, "quantwire": [badge]} if badge else shown, "result": outputs}


def badge_of(report: Any) -> dict[str, Any]:
    """The few numbers that the editor shows on the node after a run; empty for a report without any."""
    badge: dict[str, Any] = {}
    if getattr(report, "nbytes_in", 0):  # told by its fields: the class takes torch to import
        badge = {"nbytes_before": report.nbytes_in, "nbytes_after": report.nbytes_out, "sqnr_db": report.sqnr_db}
        badge |= {"format": report.format_id, "warnings": len(report.warnings)}
    levels = [v.level.value for found in getattr(report, "verdicts", {}).values() for v in found]
    if levels:
        badge["level"] = max(levels, key=LEVELS.index)
    verdict = getattr(report, "verdict", None)
    return badge | ({"verdict": verdict} if isinstance(verdict, str) else {})


def stamp(paths: Iterable[Path]) -> str:
    """For IS_CHANGED: a file that was replaced, appeared or went makes another one."""
    return ", ".join(f"{path.name}:{_times(path)}" for path in paths)


def _times(path: Path) -> str:
    try:
        stat = path.stat()
    except OSError:
        return "none"
    return f"{stat.st_mtime_ns}:{stat.st_size}"
