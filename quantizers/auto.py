"""The format `auto`: chosen from what the device is, what is free on it, and how large the model becomes.

A pure function over data. Each kind of device has an order of formats, best quality first, of which the first one that
runs here, holds every layer and fits is taken. Formats below 4 bits are not among them: they lose too much for a choice
that nobody made. Where nothing fits, the smallest is taken and the reason says by how much it is too large; the host
then offloads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .errors import SpecError
from .plan import Slot, make_plan
from .registry import availability, get_entry, get_quantizer, is_format
from .rules import Rule
from .spec import QuantSpec

GIB = 2**30
RESERVE = 0.05  # of the device's memory, at least MIN_RESERVE: activations, other models' leftovers, fragmentation
MIN_RESERVE = GIB // 4

_INT8 = ("comfy-int8", "torchao-int8wo", "quanto-qint8", "bnb-int8", "sdnq-int8", "gguf-q8-0")
_MIDDLE = ("gguf-q6-k", "sdnq-int6", "gguf-q5-k", "sdnq-int5")
_4BIT = ("bnb-nf4", "quanto-qint4", "sdnq-uint4", "gguf-q4-k", "gguf-q4-0")
# Neither bitsandbytes nor fp8 has kernels on MPS; quanto, sdnq and gguf are plain torch there.
_MPS = (
    *("quanto-qint8", "sdnq-int8", "gguf-q8-0"),
    *_MIDDLE,
    *("sdnq-uint4", "quanto-qint4", "gguf-q4-k", "gguf-q4-0"),
)
_CPU = (*("torchao-int8wo", "quanto-qint8", "bnb-int8", "sdnq-int8", "gguf-q8-0"), *_MIDDLE, *_4BIT)
FP8_CAPABILITY: tuple[int, int] = (8, 9)  # of CUDA: Ada multiplies in fp8
FP4_CAPABILITY: tuple[int, int] = (10, 0)  # Blackwell multiplies in fp4


@dataclass(frozen=True)
class DeviceFacts:
    """A device as a host sees it now.

    Attributes:
        kind: `cuda`, `rocm`, `xpu`, `mps`, `cpu`, ...
        name: for people.
        free_nbytes: what a model may take.
        total_nbytes: of the device.
        capability: CUDA compute capability.
    """

    kind: str
    name: str
    free_nbytes: int
    total_nbytes: int
    capability: tuple[int, int] | None = None

    @property
    def usable_nbytes(self) -> int:
        """Free memory less the reserve."""
        return max(0, self.free_nbytes - max(MIN_RESERVE, int(self.total_nbytes * RESERVE)))


@dataclass(frozen=True)
class ModelFacts:
    """A full-precision model: parameters and bytes."""

    parameters: int
    nbytes: int


@dataclass(frozen=True)
class Choice:
    """The format, and why, in one sentence.

    Attributes:
        fits: False where even this one is larger than what is free.
    """

    format_id: str
    why: str
    fits: bool = True


def candidates(device: DeviceFacts) -> tuple[str, ...]:
    """Formats for a device, best first; some may not be registered or not run here."""
    if device.kind == "cpu":
        return _CPU
    if device.kind == "mps":
        return _MPS
    capability: tuple[int, int] = device.capability or (0, 0)
    fp8 = ("comfy-fp8-e4m3fn",) if capability >= FP8_CAPABILITY else ()
    fp4 = ("comfy-nvfp4",) if capability >= FP4_CAPABILITY else ()
    return (*fp8, *_INT8, *_MIDDLE, *fp4, *_4BIT)


def choose_format(
    device: DeviceFacts, model: ModelFacts, sizes: Mapping[str, int], beside: Mapping[str, int] | None = None
) -> Choice:
    """The best format that fits.

    Args:
        sizes: predicted bytes of the model in each format that runs here and holds every layer.
        beside: name -> bytes of what shares the memory with it and is not to be chosen here.
    Raises:
        SpecError: `sizes` has none of the device's formats.
    """
    ranked = [f for f in candidates(device) if f in sizes]
    if not ranked:
        raise SpecError(
            f"auto: no format for {device.name} runs here and holds every layer of this model.\n"
            "Choose a format by name; `quantwire formats` tells what runs."
        )
    beside = beside or {}
    usable = device.usable_nbytes - sum(beside.values())
    head = f"auto: {_device_text(device)}, {_count(model.parameters)} parameters ({_size(model.nbytes)})"
    free = f"{_size(device.free_nbytes)} free"
    if beside:
        free += f", of which {' and '.join(f'{name} takes {_size(n)}' for name, n in beside.items())}"
    fit = next((f for f in ranked if sizes[f] <= usable), None)
    if fit is None:
        smallest = min(ranked, key=lambda f: sizes[f])
        over = f"the smallest choice takes {_size(sizes[smallest])} of {free}, so part of it must be offloaded"
        return Choice(smallest, f"{head}: {smallest}: {over}", fits=False)
    taken = f"{fit} takes {_size(sizes[fit])} of {free}"
    if model.nbytes <= usable:
        taken += "; it would fit at full precision too"
    elif fit != ranked[0]:
        taken += f", {ranked[0]} would take {_size(sizes[ranked[0]])}"
    return Choice(fit, f"{head}: {taken}")


def _size(nbytes: int) -> str:
    return f"{nbytes / GIB:.1f} GiB" if nbytes >= GIB else f"{nbytes / 2**20:.1f} MiB"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.1f} B" if parameters >= 10**9 else f"{parameters / 1e6:.1f} M"


def _device_text(device: DeviceFacts) -> str:
    capability = f", compute capability {device.capability[0]}.{device.capability[1]}" if device.capability else ""
    return f"{device.name} with {device.total_nbytes / GIB:.0f} GiB{capability}"


def predict_sizes(
    parts: Iterable[tuple[Sequence[Slot], tuple[Rule, ...], tuple[str, ...]]], formats: Sequence[str]
) -> tuple[ModelFacts, dict[str, int]]:
    """What a model's parts are, and how large they become together in each format.

    Args:
        parts: slots, rules and patterns to exclude of each component.
        formats: ids; those that cannot be made, do not run here or cannot hold a layer are left out.
    Raises:
        SpecError: a rule or pattern is refused.
    """
    parts = list(parts)
    metas = [slot.meta for slots, _, _ in parts for slot in slots]
    facts = ModelFacts(sum(m.numel for m in metas), sum(m.nbytes for m in metas))
    sizes: dict[str, int] = {}
    for format_id in formats:
        if not is_format(format_id) or not get_entry(format_id).writes or not availability(format_id).works:
            continue
        quantizer = get_quantizer(format_id)
        plans = [
            make_plan(slots, QuantSpec(format_id, rules=rules, exclude=exclude), quantizer)
            for slots, rules, exclude in parts
        ]
        if not any(plan.refused for plan in plans):
            sizes[format_id] = sum(plan.nbytes_out for plan in plans)
    return facts, sizes
