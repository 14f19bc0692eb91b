"""What AdviseFormat does when it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..hosts.base import Host
from ..hosts.eta import with_eta
from ..hosts.fit import device_of
from ..quantizers.auto import DeviceFacts
from ..quantizers.compat.modes import HostName
from ..quantizers.measure.activations import RunShape
from ..quantizers.measure.advise import Advice, advise
from ..quantizers.measure.advise_plot import scatter
from ..quantizers.measure.native import parse_device
from ..quantizers.measure.parts import Role, parts_of_modules
from ..quantizers.measure.plots import to_image
from ..quantizers.measure.tiers import THIS_DEVICE, with_memory
from ..quantizers.measure.units import parse_size, parse_vram
from ..quantizers.spec import QuantSpec


@dataclass(frozen=True)
class Advised:
    """The outputs of the node; `spec` is None where no format fits."""

    advice: Advice
    spec: QuantSpec | None
    image: Tensor


def advise_model(host: Host, model: Any, clip: Any, shape: RunShape, device: str, vram: str, budget: str) -> Advised:
    """Rank the formats for a model object, the text encoders beside it counted.

    Raises:
        SpecError: a device or size that is none.
        BackendUnavailable: matplotlib is not installed.
    """
    parts = parts_of_modules(host.components(model), Role.DIFFUSION, "the linked model")
    if clip is not None:
        parts += parts_of_modules(host.components(clip), Role.TEXT, "the linked text encoders")
    found = advise(
        parts,
        _device(host, device, vram),
        HostName(host.name),
        shape,
        role=Role.DIFFUSION,
        budget=parse_size(budget, "GB") if budget.strip() else 0,
        tiers=True,
        progress=lambda formats: with_eta(host, formats, "formats"),
    )
    best = found.best_format
    return Advised(found, None if best is None else QuantSpec(best.format_id), to_image(scatter(found)))


def _device(host: Host, device: str, vram: str) -> DeviceFacts:
    if device == THIS_DEVICE:
        return with_memory(device_of(host), vram)
    return with_memory(parse_device(device, parse_vram(vram)), vram)
