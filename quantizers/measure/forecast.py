"""Will it fit: what a generation takes of a device's memory, stage by stage, under each offload mode of a host.

Weights are exact: from the plan of each format, or as the file holds them. Activations are a measured model with a
stated error (`activations`), unpacked layers follow the kernels (`buffers`), and who is on the device when follows the
hosts (`stages`). A mode in which the quantized weights would break is never offered (`compat`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..auto import DeviceFacts
from ..compat.matrix import answer
from ..compat.modes import Carrier, HostName, OffloadMode, VerdictLevel
from ..errors import SpecError
from ..spec import QuantSpec
from .activations import RunShape, is_of_images
from .assumed import with_assumed
from .parts import ModelPart, Role
from .stages import SHARED, STAGES, Held, Setting, Stage, hold, stages
from .units import show_size

FITS, DOES_NOT_FIT = "fits", "does not fit"
# Fastest first. ComfyUI's own choice comes first there: its other modes are asked for when it starts.
_MODES: Mapping[HostName, tuple[OffloadMode, ...]] = {
    HostName.STANDALONE: (
        OffloadMode.NONE,
        OffloadMode.MODEL,
        OffloadMode.BALANCED,
        OffloadMode.GROUP,
        OffloadMode.SEQUENTIAL,
    ),
    HostName.COMFYUI: (OffloadMode.DYNAMIC, OffloadMode.PARTIAL, OffloadMode.NOVRAM, OffloadMode.NONE),
}
_FILLING = (OffloadMode.DYNAMIC, OffloadMode.PARTIAL)
CLIP_TOKENS = 77
_UNCOUNTED = (Role.CONTROLNET,)
BATCH_ROOM = 1.5  # ComfyUI runs both prompts at once where 1.5 times what that takes is free (comfy/samplers.py)
DYNAMIC_KINDS = ("cuda", "rocm")  # where ComfyUI has dynamic VRAM
# Of each mode, how the embedded host and the nodes carry it out by default.
_VARIANTS = {OffloadMode.SEQUENTIAL: "memory", OffloadMode.GROUP: "block"}
_WORST = (VerdictLevel.BLOCK, VerdictLevel.WARN, VerdictLevel.UNKNOWN, VerdictLevel.OK)


@dataclass(frozen=True)
class ModeForecast:
    """One offload mode.

    Attributes:
        level: of the compatibility table, the worst of all parts; a mode that blocks is not offered.
        cause: why, where it is not ok.
        fits: the peak is within the room, and the mode is offered.
        streams: weights of the diffusion model are copied to the device at every step.
    """

    mode: OffloadMode
    variant: str
    stages: tuple[Stage, ...]
    level: VerdictLevel
    cause: str
    fits: bool

    @property
    def offered(self) -> bool:
        return self.level is not VerdictLevel.BLOCK

    @property
    def worst(self) -> Stage:
        return max(self.stages, key=lambda s: s.peak)

    @property
    def peak(self) -> int:
        return self.worst.peak

    @property
    def error_nbytes(self) -> int:
        """By how much the peak may be wrong: the error of its activations."""
        return round(self.worst.activations * self.worst.error_percent / 100)

    @property
    def streamed(self) -> int:
        """Bytes of weights that are copied to the device at each step."""
        return max((s.streamed for s in self.stages if s.name == "sampling"), default=0)

    @property
    def streams(self) -> bool:
        return self.streamed > 0

    def to_dict(self) -> dict[str, Any]:
        return {
            "mode": self.mode.value,
            "variant": self.variant,
            "fits": self.fits,
            "offered": self.offered,
            "level": self.level.value,
            "cause": self.cause,
            "peak_nbytes": self.peak,
            "error_nbytes": self.error_nbytes,
            "streamed_nbytes_a_step": self.streamed,
            "worst_stage": self.worst.name,
            "stages": [_stage_dict(s) for s in self.stages],
        }


@dataclass(frozen=True)
class Forecast:
    """What a generation takes.

    Attributes:
        held: every part in its format.
        modes: of the host on this device, in the order in which they are preferred.
        room: bytes that a run may take: what is free, less a reserve.
        notes: what was not counted, and what to know.
    """

    device: DeviceFacts
    host: HostName
    shape: RunShape
    held: tuple[Held, ...]
    modes: tuple[ModeForecast, ...]
    room: int
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> ModeForecast | None:
        """The mode to use: the first that fits without streaming weights, else the first that fits."""
        fitting = [m for m in self.modes if m.fits]
        return next((m for m in fitting if not m.streams), fitting[0] if fitting else None)

    @property
    def nearest(self) -> ModeForecast:
        """The best mode, or the one that needs least where none fits."""
        offered = [m for m in self.modes if m.offered] or list(self.modes)
        return self.best or min(offered, key=lambda m: m.peak)

    @property
    def fits(self) -> bool:
        return self.best is not None

    @property
    def tight(self) -> bool:
        """It fits, and would not if the activations were as large as their error allows.

        A mode that fills what is free would keep fewer weights there instead.
        """
        if self.best is None:
            return False
        worst = self.best.worst
        spare = worst.weights if self.best.mode in _FILLING and worst.streamed else 0
        return self.best.peak + self.best.error_nbytes > self.room + spare

    @property
    def verdict(self) -> str:
        """`fits`, `fits with mode X` or `does not fit`."""
        best = self.best
        if best is None:
            return DOES_NOT_FIT
        return FITS if best is self.modes[0] and not best.streams else f"{FITS} with mode {best.mode.value}"

    @property
    def headline(self) -> str:
        m = self.nearest
        error = f" +- {show_size(m.error_nbytes)}" if m.error_nbytes else ""
        took = f"{show_size(m.peak)}{error} while {m.worst.name}"
        of = f"{show_size(self.room)} usable of {show_size(self.device.total_nbytes)}"
        if not self.fits:
            over = show_size(m.peak - self.room)
            return f"{self.verdict}: mode {m.mode.value} needs least, {took}, {over} more than {of}"
        more = f"; {show_size(m.streamed)} of weights copied at every step" if m.streams else ""
        tight = "; tight: within the error of the activations" if self.tight else ""
        return f"{self.verdict}: {took}, {of}{more}{tight}"

    @property
    def nbytes(self) -> int:
        """Weights of all parts together."""
        return sum(h.nbytes for h in self.held)

    def to_dict(self) -> dict[str, Any]:
        d, s = self.device, self.shape
        best = self.best
        return {
            "verdict": self.verdict,
            "headline": self.headline,
            "fits": self.fits,
            "tight": self.tight,
            "mode": best.mode.value if best else None,
            "host": self.host.value,
            "device": {
                "kind": d.kind,
                "name": d.name,
                "free_nbytes": d.free_nbytes,
                "total_nbytes": d.total_nbytes,
                "usable_nbytes": self.room,
                "capability": list(d.capability) if d.capability else None,
            },
            "shape": {
                "width": s.width,
                "height": s.height,
                "frames": s.frames,
                "batch": s.batch,
                "text_tokens": s.text_tokens,
                "cfg": s.cfg,
            },
            "weights_nbytes": self.nbytes,
            "parts": [_held_dict(h) for h in self.held],
            "modes": [m.to_dict() for m in self.modes],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        from .forecast_text import text

        return text(self)


def forecast(
    parts: Sequence[ModelPart],
    specs: Mapping[str, QuantSpec],
    shape: RunShape,
    device: DeviceFacts,
    host: HostName,
    loras_nbytes: int = 0,
    *,
    carrier: Carrier = Carrier.QUANTWIRE,
    assume: bool = True,
    dtype_nbytes: int | None = None,
    own_memory: bool | None = None,
    notes: Iterable[str] = (),
) -> Forecast:
    """What a generation takes of a device's memory.

    Args:
        parts: components; LoRAs among them count as `loras_nbytes`.
        specs: name of a part -> its format; parts without one stay as they are.
        carrier: of the quantized weights, by which modes are judged.
        assume: count the usual text encoders and VAE of the diffusion model's family where none is among the parts.
        dtype_nbytes: of a value of the activations; default: of the part's weights at full precision.
        own_memory: whether the device has memory of its own; default: by its kind.
    Raises:
        SpecError: no component, a format for a part that is not there, or a pattern that matches no layer.
    """
    loras = [p for p in parts if p.role is Role.LORA]
    loras_nbytes += sum(p.held_nbytes for p in loras)
    parts = [p for p in parts if p.role is not Role.LORA]
    if loras and not parts:
        raise SpecError(
            f"{loras[0].source} is a LoRA, which runs on a model.\nGive the model's file, and this one as its LoRA."
        )
    notes = list(notes)
    if assume:
        parts, said = with_assumed(parts)
        notes += said
    if not parts:
        raise SpecError("There is no component to forecast.\nGive a diffusion model, a text encoder or a VAE.")
    names = [p.name for p in parts]
    unknown = [name for name in specs if name not in names]
    if unknown:
        raise SpecError(f"There is no part '{unknown[0]}' to give a format to.\nThe parts: {', '.join(names)}.")
    run = _as_run(shape, parts, host)

    def held_for(shape: RunShape) -> tuple[Held, ...]:
        return tuple(hold(p, specs.get(p.name), shape, host, loras_nbytes, dtype_nbytes) for p in parts)

    held = held_for(run)
    notes += [
        f"{p.name}: activations of a ControlNet are not known here: not counted" for p in parts if p.role in _UNCOUNTED
    ]
    if shape.frames > 1 and any(h.part.role is Role.DIFFUSION and is_of_images(h.run.formula) for h in held):
        notes.append(f"frames: this is a model of images, so {shape.frames} frames count as so many images at once")
    batched = max((h.run.nbytes for h in held if h.part.role is Role.DIFFUSION), default=0)
    if run.cfg > 1 and batched * BATCH_ROOM > device.usable_nbytes:
        held = held_for(replace(run, cfg=1.0))
        notes.append("prompt and negative prompt run one after the other: ComfyUI has no room for both at once")
    own = device.kind not in SHARED if own_memory is None else own_memory
    setting = Setting(host, device.kind, device.usable_nbytes, device.free_nbytes, own, device.capability)
    modes = tuple(_mode(mode, held, specs, setting, carrier) for mode in modes_of(host, device.kind, own))
    worst = min((m.worst for m in modes), key=lambda s: s.peak)
    if host is HostName.COMFYUI and worst.name == STAGES[2] and worst.peak > setting.room:
        notes.append("ComfyUI decodes in tiles what does not fit in one piece; VAEDecodeTiled does so from the start.")
    if not own:
        notes.append("On a CPU every mode takes the same: weights wait in the memory that computes.")
    return Forecast(device, host, shape, held, modes, setting.room, tuple(notes))


def on_device(found: Forecast, device: DeviceFacts, specs: Mapping[str, QuantSpec]) -> Forecast:
    """The same generation on a device of the same kind with other memory, without planning the weights again.

    Args:
        specs: those that it was made with; the carrier is quantwire.
    """
    own = device.kind not in SHARED
    setting = Setting(found.host, device.kind, device.usable_nbytes, device.free_nbytes, own, device.capability)
    kinds = modes_of(found.host, device.kind, own)
    modes = tuple(_mode(mode, found.held, specs, setting, Carrier.QUANTWIRE) for mode in kinds)
    return replace(found, device=device, modes=modes, room=setting.room)


def _as_run(shape: RunShape, parts: Sequence[ModelPart], host: HostName) -> RunShape:
    """The shape as the host runs it: the embedded one takes prompt and negative prompt one after the other, and a model
    that reads nothing but CLIP gets prompts of its length."""
    if host is HostName.STANDALONE:
        shape = replace(shape, cfg=1.0)
    encoders = [p.family.lower() for p in parts if p.role is Role.TEXT]
    if not shape.text_tokens and encoders and all(family.startswith("clip") for family in encoders):
        shape = replace(shape, text_tokens=CLIP_TOKENS)
    return shape


def modes_of(host: HostName, kind: str, own_memory: bool = True) -> tuple[OffloadMode, ...]:
    """The modes of a host on a kind of device, the one that it has by itself first."""
    if not own_memory:
        return (OffloadMode.NONE,)
    return tuple(m for m in _MODES[host] if m is not OffloadMode.DYNAMIC or kind in DYNAMIC_KINDS)


def _mode(
    mode: OffloadMode, held: Sequence[Held], specs: Mapping[str, QuantSpec], setting: Setting, carrier: Carrier
) -> ModeForecast:
    found = stages(mode, held, setting)
    variant = _VARIANTS.get(mode, "")
    if mode in (OffloadMode.BALANCED, OffloadMode.PARTIAL):
        variant = "split" if any(s.streamed for s in found) else "whole"
    level, cause = VerdictLevel.OK, ""
    for h in held:
        for key in _formats(h, specs.get(h.part.name)):
            said = answer(carrier, key, mode, host=setting.host, variant=variant)
            if _WORST.index(said.level) < _WORST.index(level):
                level, cause = said.level, f"{h.part.name} in {key}: {said.cause}"
    fits = level is not VerdictLevel.BLOCK and max(s.peak for s in found) <= setting.room
    return ModeForecast(mode, variant, found, level, cause, fits)


def _formats(h: Held, spec: QuantSpec | None) -> Iterable[str]:
    return {layer.format_id for layer in h.layers if layer.format_id} if spec else h.part.formats


def _stage_dict(s: Stage) -> dict[str, Any]:
    return {
        "name": s.name,
        "component": s.component,
        "weights_nbytes": s.weights,
        "buffer_nbytes": s.buffer,
        "loras_nbytes": s.loras,
        "activations_nbytes": s.activations,
        "peak_nbytes": s.peak,
        "streamed_nbytes": s.streamed,
        "error_percent": s.error_percent,
        "how": s.how,
    }


def _held_dict(h: Held) -> dict[str, Any]:
    return {
        "name": h.part.name,
        "role": h.part.role.value,
        "family": h.part.family,
        "format": h.format_id or None,
        "nbytes": h.nbytes,
        "full_nbytes": h.part.full_nbytes,
        "parameters": h.part.parameters,
        "assumed": h.part.assumed,
        "source": h.part.source,
    }
