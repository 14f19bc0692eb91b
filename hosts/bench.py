"""The course of a benchmark, the same for a node and for the command line: order of the runs, clocks, devices."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch

from ..quantizers.measure.results import Difference
from .base import Host
from .standalone.progress import Interrupted


class Order(str, Enum):
    """In which order several formats run."""

    INTERLEAVED = "interleaved"
    ONE_BY_ONE = "one by one"


@dataclass(frozen=True)
class Turn:
    """One run of the benchmark.

    Attributes:
        variant: index of what runs.
        measured: False to warm up.
        first: the first measured run of its variant, whose output is kept.
        last: the last run of its variant.
    """

    variant: int
    measured: bool
    first: bool
    last: bool


def turns(variants: int, warmup: int, repeats: int, order: Order) -> list[Turn]:
    """Every run in order. Interleaved: whatever slows the machine for a while slows every variant."""
    rounds = range(warmup + repeats)
    pairs = itertools.product(rounds, range(variants))
    if order is Order.ONE_BY_ONE:
        pairs = ((r, v) for v in range(variants) for r in rounds)
    return [Turn(v, r >= warmup, r == warmup, r == warmup + repeats - 1) for r, v in pairs]


@dataclass
class Clock:
    """Times of one generation: `start`, a `tick` after each step, `stop`."""

    started: float = 0.0
    stopped: float = 0.0
    ticks: list[float] = field(default_factory=list)

    def start(self) -> None:
        self.started = time.perf_counter()

    def tick(self) -> None:
        self.ticks.append(time.perf_counter())

    def stop(self) -> None:
        self.stopped = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self.stopped - self.started

    def steps(self) -> list[float]:
        """Seconds of each step but the first, which moves weights too; of the only one, from the start."""
        if len(self.ticks) == 1:
            return [self.ticks[0] - self.started]
        return [after - before for before, after in itertools.pairwise(self.ticks)]


def device_of(host: Host, model: Any) -> torch.device:
    """Where a MODEL computes when it is sampled with."""
    device = host.compute_device(model)
    if device is None and getattr(model, "offload", None) is not None:
        from .standalone.offload.device import execution_device

        device = execution_device()
    if device is None:
        device = next(p.device for module in host.components(model).values() for p in module.parameters())
    return device


def device_dict(host: Host, model: Any) -> dict[str, Any]:
    """The device of a MODEL, for the results."""
    facts = host.memory(model)
    found: dict[str, Any] = {"kind": facts.kind, "name": facts.name, "total_nbytes": facts.total_nbytes}
    if facts.capability is not None:
        found["compute_capability"] = ".".join(map(str, facts.capability))
    return found


def weights(host: Host, objects: Sequence[Any]) -> dict[str, int]:
    """Component -> bytes of its weights as they are held, of several objects of a graph; shared modules once."""
    from ..quantizers.dequantize import stored_nbytes

    found: dict[str, int] = {}
    seen: set[int] = set()
    for obj in objects:
        for name, module in host.components(obj).items():
            if id(module) not in seen:
                seen.add(id(module))
                number = 2
                key = name
                while key in found:
                    key, number = f"{name} {number}", number + 1
                found[key] = stored_nbytes(module)
    return found


def formats(host: Host, model: Any) -> dict[str, int]:
    """Format -> layers of a model object that hold it already."""
    from ..quantizers.compat.find import find_carriers

    found: dict[str, int] = {}
    for module in host.components(model).values():
        for group in find_carriers(module):
            found[group.format_id] = found.get(group.format_id, 0) + group.layers
    return found


def difference(output: Any, first: Any) -> Difference | None:
    """An output against another; None where they cannot be compared: other sizes, nan or inf in either.

    Args:
        output, first: IMAGE (B, H, W, 3), AUDIO or LATENT.
    """
    mine, of = _values(output)
    its, _ = _values(first)
    if mine.shape != its.shape:
        return None
    noise, signal = float((mine - its).norm()), float(its.norm())
    if not signal or not (math.isfinite(noise) and math.isfinite(signal)):
        return None
    psnr = None
    if of == "image" and noise:
        psnr = -10 * float(torch.log10((mine - its).square().mean()))
    return Difference(noise / signal, psnr, of)


def _values(output: Any) -> tuple[torch.Tensor, str]:
    """All values in a row as float64, and what they are."""
    if isinstance(output, torch.Tensor):
        return output.detach().to("cpu", torch.float64).flatten(), "image"
    data: Mapping[str, Any] = output
    if "waveform" in data:
        return data["waveform"].detach().to("cpu", torch.float64).flatten(), "audio"
    samples = data["samples"]
    parts = samples.unbind() if getattr(samples, "is_nested", False) else [samples]
    return torch.cat([p.detach().to("cpu", torch.float64).flatten() for p in parts]), "latent"


def is_interrupt(err: BaseException) -> bool:
    """Whether the user stopped the graph. ComfyUI 0.33's is no Exception; older ones were."""
    return isinstance(err, Interrupted) or type(err).__name__ == "InterruptProcessingException"


def is_finite(output: Any) -> bool:
    """Whether an output holds neither nan nor inf."""
    return bool(torch.isfinite(_values(output)[0]).all())
