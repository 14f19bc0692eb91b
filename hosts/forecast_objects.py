"""The memory forecast of model objects of either host: their components as parts, their LoRAs, and the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..quantizers.auto import DeviceFacts
from ..quantizers.compat.find import find_carriers
from ..quantizers.compat.modes import Carrier, HostName
from ..quantizers.errors import SpecError
from ..quantizers.measure.activations import RunShape
from ..quantizers.measure.assumed import with_assumed
from ..quantizers.measure.forecast import Forecast, forecast
from ..quantizers.measure.parts import ModelPart, Role, parts_of_modules
from ..quantizers.measure.units import GIB
from ..quantizers.spec import QuantSpec
from .base import Host

_MOST = 100_000  # things inside the patches of a model


@dataclass(frozen=True)
class Objects:
    """MODEL, and CLIP and VAE where there are any."""

    model: Any
    clip: Any = None
    vae: Any = None


def forecast_objects(
    host: Host,
    objects: Objects,
    spec: QuantSpec | None,
    text_spec: QuantSpec | None,
    shape: RunShape,
    vram_gib: float = 0.0,
    assume: bool = True,
) -> Forecast:
    """What running model objects takes.

    Args:
        spec, text_spec: what the diffusion model and all text encoders would become; None: as they are.
        vram_gib: memory of the device; 0: what is free on the one that the model computes on.
    Raises:
        SpecError: no modules in an object, or the device does not tell its memory.
    """
    parts = list(parts_of_objects(host, objects))
    named = with_assumed(parts)[0] if assume else parts
    wanted = {Role.DIFFUSION: spec, Role.TEXT: text_spec}
    specs = {p.name: s for p in named if (s := wanted.get(p.role)) is not None}
    return forecast(
        parts,
        specs,
        shape,
        device_of(host, objects.model, vram_gib),
        HostName.COMFYUI if host.name == HostName.COMFYUI.value else HostName.STANDALONE,
        patches_nbytes(objects.model),
        carrier=Carrier.QUANTWIRE if spec is not None else carrier_of(host, objects.model),
        assume=assume,
    )


def parts_of_objects(host: Host, objects: Objects) -> Iterator[ModelPart]:
    """The components of model objects, with names that no two of them share."""
    taken: set[str] = set()
    given = ((objects.model, Role.DIFFUSION), (objects.clip, Role.TEXT), (objects.vae, Role.VAE))
    for obj, role in given:
        for part in parts_of_modules(host.components(obj), role, role.value) if obj is not None else ():
            name = "vae" if role is Role.VAE else part.name
            while name in taken:
                name += " 2"
            taken.add(name)
            yield _as_file(replace(part, name=name))


def _as_file(part: ModelPart) -> ModelPart:
    """With the names that files of it have: the embedded host's VAE is the decoder of a TAESD alone."""
    if part.role is not Role.VAE or any(".".join(s.meta.name.split(".")[:1]) != "layers" for s in part.slots):
        return part
    slots = tuple(replace(s, meta=replace(s.meta, name=f"decoder.{s.meta.name}")) for s in part.slots)
    return replace(part, slots=slots)


def carrier_of(host: Host, model: Any) -> Carrier:
    """Of the quantized weights of a model object; the pack's own where it has none."""
    found = [f.carrier for module in host.components(model).values() for f in find_carriers(module)]
    return found[0] if found else Carrier.QUANTWIRE


def device_of(host: Host, model: Any, vram_gib: float) -> DeviceFacts:
    """The device of the model, or one with so much memory: of the same kind, or CUDA where models compute on a CPU."""
    here = None
    if vram_gib <= 0:
        return host.memory(model)
    try:
        here = host.memory(model)
    except SpecError:  # how much is free is not asked for
        here = None
    nbytes = int(vram_gib * GIB)
    if here is None or here.kind == "cpu":
        return DeviceFacts("cuda", f"a GPU with {vram_gib:g} GiB", nbytes, nbytes)
    return replace(here, free_nbytes=nbytes, total_nbytes=nbytes)


def patches_nbytes(model: Any) -> int:
    """Bytes of the LoRAs and the like on a MODEL of ComfyUI, which holds them beside its weights."""
    patches = getattr(model, "patches", None)
    return sum(_distinct(patches).values()) if isinstance(patches, Mapping) else 0


def _distinct(value: Any) -> dict[int, int]:
    found: dict[int, int] = {}
    rest: list[Any] = [value]
    for _ in range(_MOST):
        if not rest:
            break
        each: Any = rest.pop()
        if isinstance(each, Tensor):
            found[each.data_ptr() or id(each)] = each.numel() * each.element_size()
        elif isinstance(each, Mapping):
            rest.extend(each.values())
        elif isinstance(each, (list, tuple)):
            rest.extend(each)
        elif hasattr(each, "weights"):  # an adapter: LoRA, LoHa, LoKr, ...
            rest.append(each.weights)
    return found
