"""Measure, while a model is sampled with, what quantizing each of its layers does to its output.

The probe watches the diffusion model as a `Recorder` does. At a few calls of a run (noise levels) it calls the model
again with the same inputs, once for each unit, with the rounding error of that unit in a coarse format added to the
outputs of its layers, and compares. The run itself goes on with the outputs of full precision, so every comparison is
on inputs that the model really has. Nothing in the model is replaced: a hook adds `x (W' - W)^T`, which holds with
LoRAs, offloading and the host's own casts as well.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..quantizers.apply import planning_slots
from ..quantizers.choices import OnQuantized
from ..quantizers.errors import WorkflowError
from ..quantizers.measure.recipe import Recipe, check_possible
from ..quantizers.measure.sensitivity import (
    Inputs,
    Sensitivities,
    Unit,
    check_formats,
    combine,
    output_noise,
    probe_of,
    units_of,
)
from ..quantizers.plan import Slot
from ..quantizers.registry import require
from ..quantizers.rules import KEEP
from ..quantizers.spec import QuantSpec
from ..quantizers.weight import QuantizedWeight
from .base import Host
from .eta import with_eta

KEPT_TOKENS = 48  # inputs of a layer that are kept of each call, to measure its own error in every format
COMPARED = 64  # values of each weight by which a model that is watched is told from another
REPEATABLE = 0.02  # a call that is repeated may differ by so much, relative; more, and nothing can be measured
Change = Callable[[Tensor, Tensor], Tensor]  # (input, output) of a layer -> its output


def spread(total: int, wanted: int) -> frozenset[int]:
    """Indices of `wanted` calls of `total`, evenly spaced, the middle of each part."""
    wanted = max(1, min(total, wanted))
    return frozenset(int((i + 0.5) * total / wanted) for i in range(wanted))


class Replay:
    """A watcher that calls the model again at chosen calls; what then happens is said by `look`.

    Attributes:
        chosen: indices of the calls.
        looked: how many of them there were so far.
    """

    def __init__(
        self, host: Host, chosen: frozenset[int], formats: Sequence[str] | None = None, budget: int | None = None
    ) -> None:
        """
        Args:
            chosen: indices of the calls to look at.
            formats: candidates of a recipe; default: `sensitivity.DEFAULT_FORMATS`.
            budget: refuse a model that no mixture of them brings below it, or that needs none, before it runs.
        """
        self.host, self.chosen = host, chosen
        self.formats, self.budget = check_formats(formats), budget
        self.looked = 0
        self._calls = 0
        self._busy = False
        self._first: weakref.ref[nn.Module] | None = None
        self._marks: dict[str, Tensor] = {}
        self.units: tuple[Unit, ...] = ()
        self.slots: list[Slot] = []

    def restart(self) -> None:
        """Before another run: its calls are counted from 0, and what was measured is kept."""
        self._calls = 0

    @contextmanager
    def watch(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        self.adopt(model)
        handle = model.register_forward_hook(self._see, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def adopt(self, model: nn.Module) -> None:
        """Look at a model before it runs.

        Raises:
            WorkflowError: another model than before, or one without linear layers.
            WeightError: it is quantized already.
            SpecError: the budget is too small for any mixture, or holds the model as it is.
        """
        slots = planning_slots(model, OnQuantized.REFUSE)
        if self._first is not None:
            self._require_same(model, slots)
            return
        units = units_of(slots)
        if not units:
            raise WorkflowError(f"{type(model).__name__} has no linear layer that could be quantized.")
        if self.budget is not None:
            check_possible(type(model).__name__, slots, units, self.formats, self.budget, measured=True)
        self.slots, self.units = slots, units
        self._first, self._marks = weakref.ref(model), _marks(model, units)

    def _require_same(self, model: nn.Module, slots: Sequence[Slot]) -> None:
        """One model may be sampled with again, or have been loaded twice; one of other weights may not follow it."""
        if self._first is not None and self._first() is model:
            return
        same = [slot.meta for slot in slots] == [slot.meta for slot in self.slots]
        if same:
            marks = _marks(model, self.units)
            same = marks.keys() == self._marks.keys() and all(torch.equal(m, self._marks[n]) for n, m in marks.items())
        if not same:
            raise WorkflowError(
                "The workflow samples with two different models, and a recipe is for one.\n"
                "Make a workflow for each of them."
            )

    def _see(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if self._busy:
            return
        index, self._calls = self._calls, self._calls + 1
        if index not in self.chosen:
            return
        self._busy = True
        try:
            # Inside the host's own hooks and patches of this call, which a later replay would lack.
            self.look(module, lambda: _tensor(module.forward(*args, **kwargs)), _tensor(output).detach().float())
        finally:
            self._busy = False
        self.looked += 1

    def look(self, module: nn.Module, call: Callable[[], Tensor], exact: Tensor) -> None:
        """What a subclass does with a call that is chosen.

        Args:
            call: runs the model again, as it is then.
            exact: float32, what it gave.
        """
        raise NotImplementedError  # every subclass has its own


class Calls(Replay):
    """A watcher that counts the calls of a model, and refuses one that could not be measured before it runs."""

    def __init__(self, host: Host, formats: Sequence[str] | None = None, budget: int | None = None) -> None:
        super().__init__(host, frozenset(), formats, budget)

    @property
    def count(self) -> int:
        return self._calls


class Probe(Replay):
    """Measures every unit; `result` gives the sensitivities when the run is over."""

    def __init__(
        self, host: Host, chosen: frozenset[int], formats: Sequence[str] | None = None, budget: int | None = None
    ) -> None:
        super().__init__(host, chosen, formats, budget)
        self._probes: dict[str, str] = {}
        self._quantized: dict[str, QuantizedWeight] = {}
        self._inputs: dict[str, list[Inputs]] = {}
        self._effect2: dict[str, list[float]] = {}
        self._floor2: list[float] = []
        self._weights: dict[str, Tensor] = {}

    def look(self, module: nn.Module, call: Callable[[], Tensor], exact: Tensor) -> None:
        if not self._probes:
            self._probes = {unit.name: probe_of(unit, self.formats) for unit in self.units}
        for unit in self.units:
            for layer in unit.layers:
                self._weights[layer] = _weight(module, layer)
        self._record(module, call, exact)
        first = self.units[0].layers[0]
        with changed(module, {first: _nudge}):
            floor2 = relative2(call(), exact)
        self._floor2.append(floor2)
        for unit in with_eta(self.host, self.units, "layers"):
            with changed(module, {layer: self._error(unit, layer) for layer in unit.layers}):
                error2 = relative2(call(), exact)
            # Of an effect in the noise of rounding only its size is known, not that it is nothing.
            self._effect2.setdefault(unit.name, []).append(max(error2 - floor2, floor2 / 100, 1e-16))

    def _record(self, module: nn.Module, call: Callable[[], Tensor], exact: Tensor) -> None:
        """Run once more as it was, keep inputs of every unit, and see that the model repeats itself."""

        def keep(name: str) -> Change:
            def see(x: Tensor, out: Tensor) -> Tensor:
                rows = x.detach().reshape(-1, x.shape[-1])
                step = max(1, rows.shape[0] // KEPT_TOKENS)
                kept = rows[::step][:KEPT_TOKENS].clone()
                self._inputs.setdefault(name, []).append(Inputs(kept, rows.shape[0]))
                return out

            return see

        with changed(module, {unit.layers[0]: keep(unit.name) for unit in self.units}):
            again = math.sqrt(relative2(call(), exact))
        if again > REPEATABLE:
            raise WorkflowError(
                f"The model's output differs by {100 * again:.1f} % when it is called again with the same inputs, so "
                "the effect of a layer cannot be measured.\nTake caches and other patches off the model."
            )

    def _error(self, unit: Unit, layer: str) -> Change:
        def add(x: Tensor, out: Tensor) -> Tensor:
            target = self._probes[unit.name]
            spec = QuantSpec.from_uri(target)
            quantizer = require(spec.format_id)
            w = self._weights[layer].detach()
            if layer not in self._quantized:
                # Not beside the model on its device: all of them together are a fifth of its weights.
                self._quantized[layer] = _moved(quantizer.quantize(w, spec), torch.device("cpu"))
            q = _moved(self._quantized[layer], w.device)
            error = quantizer.dequantize(q, torch.float32) - w.to(torch.float32)
            return out + F.linear(x, error.to(x.device, x.dtype)).to(out.dtype)

        return add

    def result(self, name: str) -> Sensitivities:
        """Args:
            name: of the component.

        Raises:
            WorkflowError: nothing was measured.
        """
        if not self.looked:
            raise WorkflowError(
                "No sampler ran the model, so nothing was measured.\nThe workflow needs a KSampler that uses it."
            )
        noise: dict[str, dict[str, float]] = {}
        for unit in with_eta(self.host, self.units, "layers in every format"):
            # A layer that no input reached (a branch that is not used) has no effect to weigh.
            inputs = self._inputs.get(unit.name)
            noise[unit.name] = {}
            for target in dict.fromkeys((*self.formats, self._probes[unit.name])):
                if unit.nbytes(target) is None:
                    continue
                values = [output_noise(self._weights[m], inputs, target) for m in unit.layers] if inputs else []
                noise[unit.name][target] = sum(values) / len(values) if values else 1.0
        effect2 = {name: sum(values) / len(values) for name, values in self._effect2.items()}
        floor = math.sqrt(sum(self._floor2) / len(self._floor2))
        how = (
            f"the model's own output: {len(self.units)} weights, each at {self.looked} "
            f"noise level{'s' if self.looked > 1 else ''} of a run"
        )
        return combine(name, self.slots, self.units, self.formats, effect2, noise, self._probes, floor, how)


class Check(Replay):
    """Measures mixtures as a whole: the relative error of the model's output, with every layer quantized.

    Attributes:
        mixtures: name -> unit -> target; units that it does not name stay.
    """

    def __init__(self, host: Host, chosen: frozenset[int], mixtures: Mapping[str, Mapping[str, str]]) -> None:
        super().__init__(host, chosen)
        self.mixtures = mixtures
        self._error2: dict[str, list[float]] = {name: [] for name in mixtures}

    def look(self, module: nn.Module, call: Callable[[], Tensor], exact: Tensor) -> None:
        for name in with_eta(self.host, list(self.mixtures), "mixtures"):
            targets = self.mixtures[name]
            changes = {
                layer: _replaced(module, layer, targets[unit.name])
                for unit in self.units
                if targets.get(unit.name, KEEP) != KEEP
                for layer in unit.layers
            }
            with changed(module, changes):
                self._error2[name].append(relative2(call(), exact))

    def errors(self) -> dict[str, float]:
        """Mixture -> relative error over all calls; raises WorkflowError where nothing ran."""
        if not self.looked:
            raise WorkflowError("No sampler ran the model, so the recipe could not be checked.")
        return {name: math.sqrt(sum(values) / len(values)) for name, values in self._error2.items()}


def check_mixtures(recipe: Recipe, found: Sensitivities) -> dict[str, Mapping[str, str]]:
    """What a recipe is compared with: the single formats among its candidates that fit into its budget."""
    singles = {s.format: found.mixture(s.format) for s in recipe.singles if s.nbytes <= recipe.budget}
    return {"recipe": recipe.targets, **singles}


def _replaced(module: nn.Module, layer: str, target: str) -> Change:
    """What the layer gives in a format, by its own kernel, with whatever is added to its product left as it is.

    Quantized when the layer runs, and dropped after it: a whole mixture would lie beside the model at full precision.
    """
    spec = QuantSpec.from_uri(target)
    quantizer = require(spec.format_id)

    def change(x: Tensor, out: Tensor) -> Tensor:
        w = _weight(module, layer).detach()
        q = quantizer.quantize(w, spec)
        made = quantizer.linear(x.to(w.device), q, None).to(out.device)
        return out + (made - F.linear(x, w.to(x.device, x.dtype))).to(out.dtype)

    return change


@contextmanager
def changed(module: nn.Module, changes: Mapping[str, Change]) -> Iterator[None]:
    """Change the outputs of layers inside the block."""

    def hook(change: Change) -> Any:
        def see(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
            return change(args[0] if args else next(iter(kwargs.values())), out)

        return see

    with ExitStack() as stack:
        for name, change in changes.items():
            handle = module.get_submodule(name).register_forward_hook(hook(change), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _moved(q: QuantizedWeight, device: torch.device) -> QuantizedWeight:
    return q.with_tensors({name: t.to(device) for name, t in q.tensors.items()})


def _marks(model: nn.Module, units: Sequence[Unit]) -> dict[str, Tensor]:
    """Layer -> some values of its weight, float32 on the CPU, evenly spaced; none of weights that are not in memory."""
    found: dict[str, Tensor] = {}
    for layer in (layer for unit in units for layer in unit.layers):
        w = model.get_submodule(layer).weight
        if isinstance(w, Tensor) and not w.is_meta:
            at = torch.linspace(0, 1, COMPARED, dtype=torch.float64)
            rows, columns = (at * (w.shape[0] - 1)).long(), (at * 7 % 1 * w.shape[1]).long()
            found[layer] = w.detach()[rows.to(w.device), columns.to(w.device)].to("cpu", torch.float32)
    return found


def _weight(module: nn.Module, layer: str) -> Tensor:
    w = module.get_submodule(layer).weight
    if not isinstance(w, Tensor) or w.is_meta:
        raise WorkflowError(
            f"'{layer}': its weight is not in memory while the model runs (offloaded).\n"
            "Measure with the offload mode none or model."
        )
    return w


def _nudge(x: Tensor, out: Tensor) -> Tensor:
    """One rounding of the output's own dtype: all that follows is rounded anew."""
    noise = torch.rand(out.shape, generator=torch.Generator().manual_seed(0)).to(out.device, torch.float32)
    return (out.float() * (1 + torch.finfo(out.dtype).eps * (noise - 0.5))).to(out.dtype)


def relative2(made: Tensor, exact: Tensor) -> float:
    """Relative squared error; what is not finite counts as 1."""
    error = float((made.detach().float() - exact).pow(2).sum())
    power = float(exact.pow(2).sum())
    return error / power if math.isfinite(error) and power else 1.0


def _tensor(output: Any) -> Tensor:
    """The first tensor of what a model gave."""
    if isinstance(output, Tensor):
        return output
    found = (
        next((value for value in output if isinstance(value, Tensor)), None)
        if isinstance(output, (tuple, list))
        else getattr(output, "sample", None)
    )
    if not isinstance(found, Tensor):
        raise WorkflowError(f"The model gives a {type(output).__name__}, and a tensor was expected.")
    return found
