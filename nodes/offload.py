"""OffloadCompat: stop a graph whose quantized weights would break under the offload mode, before it samples."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from ..hosts import current
from ..quantizers.compat.modes import OffloadMode, VerdictLevel
from ..quantizers.compat.rules import Verdict, check, find_carriers, raise_on_block
from .common import CATEGORY, with_report

log = logging.getLogger(__name__)
AUTO = "auto"


@dataclass(frozen=True)
class OffloadReport:
    """What OffloadCompat found: verdicts by component."""

    mode: OffloadMode
    verdicts: dict[str, list[Verdict]]

    def to_dict(self) -> dict[str, Any]:
        return {"mode": self.mode.value, "verdicts": {c: [v.to_dict() for v in vs] for c, vs in self.verdicts.items()}}

    def __str__(self) -> str:
        lines = [f"{c}: {v.level.value}: {v.headline}" for c, vs in self.verdicts.items() for v in vs]
        return "\n".join(lines) or f"No quantized layers; offload mode {self.mode.value} is safe."


class OffloadCompat:
    DESCRIPTION = (
        "Checks whether the quantized weights of a model can run with an offload mode, and stops the graph before "
        "sampling when they cannot, with the reason and ways out."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("MODEL", "REPORT", "CLIP")
    RETURN_NAMES = ("model", "report", "clip")
    OUTPUT_TOOLTIPS = ("The model, unchanged.", "The verdicts.", "The text encoders, unchanged.")
    FUNCTION = "check"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        mode = "How weights will be offloaded while the graph runs. auto: what the host does now."
        action = "block: stop on a conflict. warn: log it and go on. report: only tell in the report."
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model to check."}),
                "mode": ([AUTO, *(m.value for m in OffloadMode)], {"default": AUTO, "tooltip": mode}),
                "action": (["block", "warn", "report"], {"default": "block", "tooltip": action}),
            },
            "optional": {"clip": ("CLIP", {"tooltip": "Text encoders to check too."})},
        }

    def check(self, model: Any, mode: str, action: str, clip: Any = None) -> dict[str, Any]:
        host = current()
        chosen = host.offload_mode(model) if mode == AUTO else OffloadMode(mode)
        components = {**host.components(model), **(host.components(clip) if clip is not None else {})}
        verdicts = {name: check(find_carriers(module), chosen) for name, module in components.items()}
        for name, found in verdicts.items():
            if action == "block":
                raise_on_block(found, name)
            for verdict in found:
                if action != "report" and verdict.level is not VerdictLevel.OK:
                    log.warning("%s: %s", name, verdict.headline)
        report = OffloadReport(chosen, {name: found for name, found in verdicts.items() if found})
        return with_report(report, model, report, clip)
