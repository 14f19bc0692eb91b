"""What FitModel does when it runs: choose, load so, and report what came out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..hosts import current
from ..hosts.base import Host
from ..hosts.eta import with_eta
from ..hosts.fit import as_loaded, device_of, load_full
from ..quantizers.auto import DeviceFacts
from ..quantizers.choices import LoraMode, OnFailure, OnQuantized
from ..quantizers.compat.modes import Carrier, HostName, OffloadMode
from ..quantizers.dequantize import stored_nbytes
from ..quantizers.measure.activations import RunShape
from ..quantizers.measure.fit import Pick, Prefer
from ..quantizers.measure.fitted import Fit, fit
from ..quantizers.measure.meter import PeakMeter
from ..quantizers.measure.parts import ModelPart, Role, parts_of_file, parts_of_modules
from ..quantizers.measure.sensitivity import Sensitivities, by_weights, check_formats
from ..quantizers.measure.units import show_size
from ..quantizers.report import QuantReport
from ..quantizers.rules import RuleSet
from ..quantizers.spec import QuantSpec
from .common import FROM_CONFIG
from .request import Request, quantize

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """The widgets of FitModel.

    Attributes:
        vram_nbytes: 0 is what the device has free.
    """

    path: Path
    vram_nbytes: int
    shape: RunShape
    prefer: str
    config: QuantSpec | RuleSet | None
    cache: bool
    mixed: bool


@dataclass
class FitReport:
    """What FitModel chose, and what came out.

    Attributes:
        measured: part -> bytes of its weights as they are held.
        loaded: what became of each layer, by part.
        peak_nbytes: the most that was in use while the model ran; 0 before it has.
        method: how that was taken.
    """

    fit: Fit
    measured: dict[str, int] = field(default_factory=lambda: dict[str, int]())
    loaded: dict[str, QuantReport] = field(default_factory=lambda: dict[str, QuantReport]())
    notes: list[str] = field(default_factory=lambda: list[str]())
    peak_nbytes: int = 0
    method: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.fit.to_dict(),
            "measured_nbytes": dict(self.measured),
            "measured_peak_nbytes": self.peak_nbytes or None,
            "peak_method": self.method,
            "loaded": {name: report.to_dict() for name, report in self.loaded.items()},
            "notes": [*self.fit.notes, *self.notes],
        }

    def __str__(self) -> str:
        came = ", ".join(f"{name} {show_size(nbytes)}" for name, nbytes in self.measured.items())
        lines = [str(self.fit), f"came out: {came}", *self.notes]
        if self.peak_nbytes:
            lines.append(f"most in use while sampling: {show_size(self.peak_nbytes)} ({self.method})")
        for name, report in self.loaded.items():
            lines += [f"{name}: {line}" for line in (*report.notes, *(f"WARNING: {w}" for w in report.warnings))]
        return "\n".join(lines)


def fit_model(wanted: Wanted, clip: Any) -> tuple[Any, Any, FitReport]:
    """The model and text encoders as chosen, and the report.

    Raises:
        QuantwireError: nothing fits, which is said before anything is loaded, or the file cannot be loaded.
    """
    host = current()
    device = _device(host, wanted.vram_nbytes)
    files, sensitivities = _parts(host, wanted)
    encoders = parts_of_modules(host.components(clip), Role.TEXT, "the linked CLIP") if clip is not None else ()
    found = fit(
        [*files, *encoders],
        device,
        HostName(host.name),
        wanted.shape,
        Prefer(wanted.prefer),
        config=wanted.config,
        assume=(Role.VAE,),
        sensitivities=sensitivities,
    )
    report = FitReport(found)
    if clip is None:
        report.notes.append("Text encoders: none linked to clip, so they were not counted and stay as they are loaded.")
    model, loaded = _load(host, wanted, found.choice.model)
    if loaded is not None:
        report.loaded[found.choice.model.part.name] = loaded
    report.measured[found.choice.model.part.name] = _held(host, model)
    clip = _encoders(host, clip, found, report)
    model, clip = _in_mode(host, model, clip, found, report)
    report.notes += _told(host, wanted, found)
    watcher = _Watcher(report, torch.device("cuda" if device.kind == "rocm" else device.kind))
    return host.watched(model, watcher), clip, report


def _parts(host: Host, wanted: Wanted) -> tuple[list[ModelPart], Callable[[ModelPart, str], Sensitivities] | None]:
    """What the file holds, its layers named as the host names them, and what measures them for a mixed recipe."""
    parts = [p for p in parts_of_file(wanted.path) if p.role in (Role.DIFFUSION, Role.VAE)]
    plain = next((p for p in parts if p.role is Role.DIFFUSION and not p.formats), None)
    if plain is None:
        return parts, None
    loaded, read = as_loaded(host, wanted.path, plain)

    def measure(part: ModelPart, format_id: str) -> Sensitivities:
        formats = dict.fromkeys((*check_formats(None), format_id))
        return by_weights(part, read, formats, lambda units: with_eta(host, units, "layers"))

    return [loaded if p is plain else p for p in parts], measure if wanted.mixed else None


def _device(host: Host, vram_nbytes: int) -> DeviceFacts:
    """The host's device, with the memory that the user gives it."""
    here = device_of(host)
    if not vram_nbytes:
        return here
    given = min(vram_nbytes, here.total_nbytes)
    return replace(here, free_nbytes=given, total_nbytes=given)


def _load(host: Host, wanted: Wanted, pick: Pick) -> tuple[Any, QuantReport | None]:
    spec = pick.candidate.spec
    if spec is not None:
        return host.load_and_quantize(wanted.path, spec, Carrier.QUANTWIRE, OnFailure.ERROR, wanted.cache)
    if not pick.part.formats:
        return load_full(host, wanted.path), None
    if wanted.path.suffix.lower() == ".gguf":
        return host.load_gguf(wanted.path, Carrier.QUANTWIRE)
    return host.load_quantized(wanted.path, Carrier.QUANTWIRE)


def _held(host: Host, model: Any) -> int:
    return sum(stored_nbytes(module) for module in host.components(model).values())


def _encoders(host: Host, clip: Any, found: Fit, report: FitReport) -> Any:
    """The linked text encoders, those quantized for which a format was chosen."""
    picks = [p for p in found.choice.picks if p.part.role is Role.TEXT and not p.part.assumed]
    for pick in picks:
        spec = pick.candidate.spec
        if spec is None:
            continue
        asked = Request(
            FROM_CONFIG,
            Carrier.QUANTWIRE.value,
            spec,
            "",
            LoraMode.EXACT.value,
            OnFailure.ERROR.value,
            OnQuantized.REFUSE.value,
            encoders=pick.part.name,
        )
        clip, report.loaded[pick.part.name] = quantize(clip, asked)
    if clip is not None:
        report.measured |= {name: stored_nbytes(module) for name, module in host.components(clip).items()}
    return clip


def _in_mode(host: Host, model: Any, clip: Any, found: Fit, report: FitReport) -> tuple[Any, Any]:
    """The objects under the chosen mode, where the host lets a graph set it."""
    if HostName(host.name) is not HostName.STANDALONE or found.mode == OffloadMode.NONE.value:
        return model, clip
    from ..hosts.offload import OffloadSettings

    settings = OffloadSettings(OffloadMode(found.mode), **found.choice.outcome.setting)
    report.notes.append(f"Set: {settings}. A VAE gets the same from OffloadCompat with set_mode.")
    return host.set_offload(model, settings), host.set_offload(clip, settings) if clip is not None else None


def _told(host: Host, wanted: Wanted, found: Fit) -> Iterator[str]:
    """Where the device or the host is otherwise than was asked for."""
    free = device_of(host).total_nbytes
    if wanted.vram_nbytes > free:
        asked = show_size(wanted.vram_nbytes)
        yield f"WARNING: vram_gib asks for {asked}; {found.device.name} has {show_size(free)}, which was counted."
    if HostName(host.name) is not HostName.COMFYUI:
        return
    if wanted.vram_nbytes and wanted.vram_nbytes < free:
        more = (free - wanted.vram_nbytes) / 2**30
        yield (
            f"ComfyUI uses all of the device's {show_size(free)} where it can; start it with --reserve-vram {more:.1f} "
            f"to hold it to {show_size(wanted.vram_nbytes)}."
        )


class _Watcher:
    """Puts the most memory that was in use since into the report, and into the log where it grew.

    The counter is set back once, not for each call of the model, since others may be reading it.
    """

    def __init__(self, report: FitReport, device: torch.device) -> None:
        self.report, self.meter = report, PeakMeter(device)
        self.meter.start()

    @contextmanager
    def watch(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        yield
        peak = self.meter.read()
        grew = (peak.allocated or 0) > 1.02 * self.report.peak_nbytes
        if peak.allocated is not None and grew:
            self.report.peak_nbytes, self.report.method = peak.allocated, peak.method
            expected = show_size(self.report.fit.choice.outcome.peak_nbytes)
            log.info("FitModel: at most %s in use (%s); expected %s", show_size(peak.allocated), peak.method, expected)
