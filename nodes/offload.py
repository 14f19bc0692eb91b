"""OffloadCompat: stop a graph whose quantized weights would break under the offload mode, or set a mode."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..hosts import current
from ..quantizers.compat.modes import OffloadMode
from ..quantizers.errors import SpecError
from .common import CATEGORY, one_line, with_report

if TYPE_CHECKING:
    from ..hosts.offload import OffloadSettings

AUTO = "auto"
MODES = (AUTO, *(m.value for m in OffloadMode))


class OffloadCompat:
    DESCRIPTION = (
        "Checks whether the quantized weights of a model can run with an offload mode, and stops the graph before "
        "sampling when they cannot, with the reason and ways out. What leaves the node is checked once more right "
        "before it runs, if it or the host's memory mode was changed. Without ComfyUI it can also set the mode."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("MODEL", "REPORT", "CLIP", "VAE", "*")
    RETURN_NAMES = ("model", "report", "clip", "vae", "pipeline")
    OUTPUT_TOOLTIPS = (
        "The model, with the guard on it.",
        "The verdicts, with causes, evidence and ways out.",
        "The text encoders, with the guard on them.",
        "The VAE, with the guard on it.",
        "The other object; with the guard on it where it is a model object of the host.",
    )
    FUNCTION = "check"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        mode = (
            "How weights will be offloaded while the graph runs. auto: what the host does now. none, model, "
            "sequential, balanced and group are modes of diffusers and `quantwire run`; none, partial, novram and "
            "dynamic are modes of ComfyUI."
        )
        action = "block: stop on a conflict. warn: log it and go on. report: only tell in the report."
        return {
            "required": {
                "mode": (list(MODES), {"default": AUTO, "tooltip": mode}),
                "action": (["block", "warn", "report"], {"default": "block", "tooltip": action}),
            },
            "optional": {**_objects(), **_settings()},
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls,
        mode: str | None = None,
        set_mode: bool | None = None,
        group_level: str | None = None,
        blocks_per_group: int | None = None,
        use_stream: bool | None = None,
        keep_on: str | None = None,
        device_gib: float | None = None,
        low_watermark: float | None = None,
        high_watermark: float | None = None,
    ) -> bool | str:
        """None is a link, or not given."""
        settings = {
            "group_level": group_level,
            "blocks_per_group": blocks_per_group,
            "use_stream": use_stream,
            "keep_on": keep_on,
            "device_gib": device_gib,
            "low_watermark": low_watermark,
            "high_watermark": high_watermark,
        }
        given = {name: value for name, value in settings.items() if value is not None}
        faults = [text for name, value in given.items() if (text := _fault(name, value))]
        if mode is not None and mode not in MODES:
            faults.insert(0, f"mode {mode!r} is not among its choices: {', '.join(MODES)}.")
        elif set_mode and mode is not None:
            try:
                _wanted(mode, {name: value for name, value in given.items() if not _fault(name, value)})
            except SpecError as err:
                faults.append(one_line(err))
        return " ".join(faults) or True

    def check(
        self,
        mode: str,
        action: str,
        model: Any = None,
        clip: Any = None,
        vae: Any = None,
        pipeline: Any = None,
        set_mode: bool = False,
        group_level: str = "block",
        blocks_per_group: int = 1,
        use_stream: bool = False,
        keep_on: str = "memory",
        device_gib: float = 0.0,
        low_watermark: float = 0.2,
        high_watermark: float = 0.6,
    ) -> dict[str, Any]:
        from .offload_check import run

        if mode not in MODES:  # ComfyUI lets null through, and what a link brings
            raise SpecError(f"mode {mode!r} is not among its choices.\nChoose one of: {', '.join(MODES)}.")
        settings = {
            "group_level": group_level,
            "blocks_per_group": blocks_per_group,
            "use_stream": use_stream,
            "keep_on": keep_on,
            "device_gib": device_gib,
            "low_watermark": low_watermark,
            "high_watermark": high_watermark,
        }
        objects = {"model": model, "clip": clip, "vae": vae, "pipeline": pipeline}
        wanted = _wanted(mode, settings) if set_mode else None
        given = {name: obj for name, obj in objects.items() if obj is not None}
        out, report = run(given, None if mode == AUTO else OffloadMode(mode), action, settings, wanted)
        return with_report(report, out.get("model"), report, out.get("clip"), out.get("vae"), out.get("pipeline"))


def _objects() -> dict[str, Any]:
    other = (
        "Any other object that holds models: a ControlNet, a pipeline or a wrapper of another pack. Its modules are "
        "looked for inside; the report says what was found."
    )
    return {
        "model": ("MODEL", {"tooltip": "The model to check."}),
        "clip": ("CLIP", {"tooltip": "Text encoders to check too."}),
        "vae": ("VAE", {"tooltip": "A VAE to check too."}),
        "pipeline": ("*", {"tooltip": other}),
    }


def _settings() -> dict[str, Any]:
    """Names and defaults are those of `OffloadSettings`."""
    set_mode = (
        "Run what leaves this node in the chosen mode, instead of only checking it. Without ComfyUI only: ComfyUI "
        "chooses its mode when it starts."
    )
    level = "group: what moves at a time. block: blocks of the model. leaf: single layers."
    blocks = "group by block: how many blocks move together."
    stream = "group: copy the next part while the device computes; takes a GPU."
    keep = "sequential, balanced and group: where weights wait that are not on the device."
    gib = "balanced: GiB of the device to use. 0: what is free."
    low = "balanced: share of the device above which components that are not in use are moved out."
    high = "balanced: the largest share that one component may take; a larger one is split."
    share = {"min": 0.0, "max": 1.0, "step": 0.05}
    return {
        "set_mode": ("BOOLEAN", {"default": False, "tooltip": set_mode}),
        "group_level": (["block", "leaf"], {"default": "block", "tooltip": level}),
        "blocks_per_group": ("INT", {"default": 1, "min": 1, "max": 1000, "tooltip": blocks}),
        "use_stream": ("BOOLEAN", {"default": False, "tooltip": stream}),
        "keep_on": (["memory", "disk"], {"default": "memory", "tooltip": keep}),
        "device_gib": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 4096.0, "step": 0.5, "tooltip": gib}),
        "low_watermark": ("FLOAT", {"default": 0.2, **share, "tooltip": low}),
        "high_watermark": ("FLOAT", {"default": 0.6, **share, "tooltip": high}),
    }


def _fault(name: str, value: Any) -> str:
    """What the host no longer checks of an input that VALIDATE_INPUTS takes: its choices, its range."""
    kind, options = _settings()[name]
    if isinstance(kind, list):
        return "" if value in kind else f"{name} {value!r} is not among its choices: {', '.join(kind)}."
    low, high = options.get("min"), options.get("max")
    if low is None or low <= value <= high:
        return ""
    return f"{name} {value} is not in its range, {low} to {high}."


def _wanted(mode: str, settings: dict[str, Any]) -> OffloadSettings:
    """The settings to run with.

    Raises:
        SpecError: no mode was chosen, one that the host cannot set, or a setting that the mode does not have.
    """
    from ..hosts.offload import OffloadSettings

    if mode == AUTO:
        raise SpecError(
            "set_mode is on and mode is auto, which names no mode to set.\nChoose one, or turn set_mode off."
        )
    current().check_offload(OffloadMode(mode))
    wanted = OffloadSettings(OffloadMode(mode), **settings)
    current().check_offload(wanted.mode, wanted)
    return wanted
