"""From a plan to layers: quantize linear layers one at a time, measured, with every failure named or reported."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from .choices import OnFailure, OnQuantized
from .compat.modes import Carrier
from .dequantize import quantized_layers
from .errors import QuantwireError, SpecError, WeightError
from .kernels.compare import finite
from .plan import Action, Decision, QuantPlan, Slot, make_plan, refusal_of
from .provenance import remember
from .registry import require, require_reader
from .report import Entry, QuantReport, measure
from .spec import QuantSpec
from .weight import QuantizedLinear, QuantizedWeight, TensorMeta

log = logging.getLogger(__name__)

LayerMaker = Callable[[QuantizedWeight, "Tensor | None", Carrier], nn.Module]
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WORST_NOISE = 2.0  # times the signal
SMALL_VALUE = 30_000.0
SUMMED_NUMEL = 1 << 22
REPORTED_TOKENS = 1024  # for which the report names a layer's kernel
T = TypeVar("T")


class Progress(Protocol):
    """Iterates over a work list and shows how far it is, as tqdm does."""

    def __call__(self, items: Sequence[T], total: int, /) -> Iterable[T]: ...


def slots_of(model: nn.Module) -> list[Slot]:
    """Every parameter of a module as a planning slot, in definition order; shared parameters once."""
    return [
        # A weight that an embedding shares cannot be replaced there, so it stays whole for both.
        Slot(
            TensorMeta(name, tuple(p.shape), p.dtype),
            all(isinstance(m, nn.Linear) and leaf == "weight" for _, m, leaf in users),
            next((own for _, m, leaf in users if leaf == "weight" and (own := own_forward(m))), ""),
        )
        for name, (p, users) in _parameters(model).items()
    ]


# Classes that compute what nn.Linear does in a `forward` of their own, or the modules they come from: ComfyUI's cast
# their weights to the dtype of the input, and so do our layers for it; diffusers' adds a LoRA that its models no longer
# set; transformers' differs in how it rounds.
_SAME_PRODUCT = (
    "comfy.ops.",
    f"{__name__.removesuffix('quantizers.apply')}hosts.",
    "diffusers.models.lora.LoRACompatibleLinear.",
    "transformers.models.falcon.modeling_falcon.FalconLinear.",
)


def own_forward(layer: nn.Module) -> str:
    """Why a linear layer cannot be replaced by one that multiplies with its weight alone; empty where it can."""
    if not isinstance(layer, nn.Linear) or type(layer).forward is nn.Linear.forward:
        return ""
    by = next(c for c in type(layer).__mro__ if "forward" in vars(c))
    if f"{by.__module__}.{by.__qualname__}.".startswith(_SAME_PRODUCT):
        return ""
    return f"{by.__name__} is a subclass of nn.Linear with a forward of its own, which a quantized layer would lose"


def planning_slots(model: nn.Module, on_quantized: OnQuantized) -> list[Slot]:
    """`slots_of`, with the weights of quantized layers as what they were before.

    Raises:
        WeightError: the model holds quantized layers, and is refused or holds some that cannot be read.
    """
    return [source.slot for source in _sources(model, on_quantized).values()]


_User = tuple[str, nn.Module, str]


@dataclasses.dataclass(frozen=True)
class _Source:
    """A tensor of the model: a parameter, or the weight of a layer that is quantized already.

    Attributes:
        users: (module name, module, parameter name) of everything that holds it.
        read: gives the tensor, detached.
        was: format of a quantized layer.
        nbytes: as it is stored.
    """

    slot: Slot
    users: list[_User]
    read: Callable[[], Tensor]
    nbytes: int
    was: str = ""


def _parameters(model: nn.Module) -> dict[str, tuple[Tensor, list[_User]]]:
    """First name of each parameter -> it, and every (module name, module, parameter name) that holds it."""
    found: dict[int, tuple[str, Tensor, list[_User]]] = {}
    for module_name, module in cast("Iterator[tuple[str, nn.Module]]", model.named_modules()):
        for leaf, p in module.named_parameters(recurse=False, remove_duplicate=False):
            name = f"{module_name}.{leaf}" if module_name else leaf
            if isinstance(p, nn.parameter.UninitializedParameter):
                raise WeightError(
                    f"'{name}': {type(module).__name__} has no values yet; its shape is known after the first input.\n"
                    "Run the model once, or load its weights, and quantize it then."
                )
            found.setdefault(id(p), (name, p, []))[2].append((module_name, module, leaf))
    return {name: (p, users) for name, p, users in found.values()}


def _sources(model: nn.Module, on_quantized: OnQuantized) -> dict[str, _Source]:
    """Name -> tensor, in definition order.

    Raises:
        WeightError: the model holds quantized layers, and is refused or holds some that cannot be read; or it holds
            parameters without a shape.
    """
    parameters = _parameters(model)
    if on_quantized is OnQuantized.REFUSE:
        refuse_quantized(model)
    layers = quantized_layers(model) if on_quantized is OnQuantized.DEQUANTIZE else {}
    slots = {slot.meta.name: slot for slot in slots_of(model)}
    sources: dict[str, _Source] = {}
    for name, (p, users) in parameters.items():
        module_name, module, leaf = users[0]
        layer = layers.get(module_name)
        if layer is None or leaf == "bias":
            sources[name] = _Source(slots[name], users, p.detach, slots[name].meta.nbytes)
            continue
        weight = f"{module_name}.weight"
        meta = TensorMeta(weight, layer.shape, layer.dtype)
        slot = Slot(meta, linear=True)
        sources[weight] = _Source(slot, [(module_name, module, "weight")], layer.read, layer.nbytes, layer.format_id)
    return sources


def refuse_quantized(model: nn.Module) -> None:
    """Refuse a model that already holds quantized weights.

    Raises:
        WeightError: names the first such layer and what it holds.
    """
    from .compat.find import find_carriers

    found = find_carriers(model)
    if found:
        first = found[0]
        name = first.name or type(model).__name__
        raise WeightError(
            f"'{name}': already quantized ({first.format_id}, {first.carrier.value} carrier).\n"
            "Quantize the full-precision model instead: quantizing twice adds both errors. "
            f"Where there is none, set on_quantized to '{OnQuantized.DEQUANTIZE.value}'."
        )


def quantize_linears(
    model: nn.Module,
    spec: QuantSpec,
    *,
    carrier: Carrier = Carrier.QUANTWIRE,
    on_failure: OnFailure = OnFailure.ERROR,
    make_layer: LayerMaker | None = None,
    device: torch.device | None = None,
    progress: Progress | None = None,
    title: str = "model",
    on_quantized: OnQuantized = OnQuantized.REFUSE,
) -> tuple[dict[str, nn.Module], QuantReport]:
    """Make quantized replacements for the linear layers of a model. The model itself is not touched.

    Args:
        model: full-precision module.
        spec: format, options, layers to include and exclude.
        carrier: what holds the weights.
        on_failure: ERROR stops at the first layer that cannot be quantized (before any work where the plan can tell);
            FULL_PRECISION leaves it as it is, with a warning in the log and in the report. Nan and inf in any parameter
            stop in both modes: the source is damaged, and full precision would run on them.
        make_layer: makes the new layer, for hosts that have layers of their own; default: `make_layer`.
        device: where to quantize, one layer at a time; default: where the weight lies. The result goes back there.
        progress: wraps the work list.
        title: component name for messages.
        on_quantized: REFUSE stops at a model that holds quantized layers; DEQUANTIZE reads them back one at a time and
            quantizes them again, with a warning. Those that stay keep the format they have.
    Returns:
        layer name -> new module (in eval mode), and the report. Layers that share a weight share the new one too, and
        the whole new layer where their biases are the same.
    Raises:
        BackendUnavailable, SpecError, WeightError: as described.
    """
    sources = _sources(model, on_quantized)
    quantizer = require(spec.format_id)
    plan = make_plan((source.slot for source in sources.values()), spec, quantizer)
    for format_id in plan.format_ids:
        require(format_id)
    start = time.perf_counter()  # after `require`, which may spend seconds on importing a library
    if on_failure is OnFailure.ERROR:
        plan.raise_on_refusal()
    if not plan.to_quantize and not plan.refused:
        raise SpecError(f"{title}: no linear layer is left to quantize with these patterns.")
    _refuse_meta(plan, sources)
    _check_kept(plan, sources)
    report = QuantReport(title, spec.format_id, carrier.value, spec.to_uri())
    report.family, report.notes = plan.family, list(plan.notes)
    layers: dict[str, nn.Module] = {}
    _report_others(plan, report, sources)
    _warn_of_both_errors(plan, report, sources)
    work = plan.to_quantize
    for decision in progress(work, len(work)) if progress else work:
        source = sources[decision.meta.name]
        w = source.read()
        check_finite(decision.meta.name, w)  # not among the failures that may be left at full precision
        try:
            made, entry = _quantize_source(decision, source, w, spec, carrier, make_layer, device)
        except QuantwireError as err:
            if on_failure is OnFailure.ERROR:
                raise
            _warn_full_precision(report, decision.meta.name, str(err).splitlines()[0], source.nbytes)
            continue
        layers |= made
        report.entries.append(entry)
    report.seconds = time.perf_counter() - start
    return layers, report


def _refuse_meta(plan: QuantPlan, sources: Mapping[str, _Source]) -> None:
    for decision in plan.to_quantize:
        for _, module, _ in sources[decision.meta.name].users:
            if any(p.is_meta for p in module.parameters(recurse=False)):
                raise WeightError(
                    f"'{decision.meta.name}': is on the device meta, where a tensor has a shape but no values.\n"
                    "Load the model's weights to a device with memory (cpu will do), and quantize it then."
                )


def _check_kept(plan: QuantPlan, sources: Mapping[str, _Source]) -> None:
    for decision in plan.decisions:
        source = sources[decision.meta.name]
        if decision.action is not Action.QUANTIZE and not source.was:
            w = source.read()
            if w.is_floating_point() and not w.is_meta:
                check_finite(decision.meta.name, w)


def _quantize_source(
    decision: Decision,
    source: _Source,
    w: Tensor,
    spec: QuantSpec,
    carrier: Carrier,
    maker: LayerMaker | None,
    device: torch.device | None,
) -> tuple[dict[str, nn.Module], Entry]:
    """New layers for every user of one weight, and the report's entry."""
    name = decision.meta.name
    weight, entry = quantize_tensor(name, w.to(device or w.device), decision.spec or spec)
    weight = weight.with_tensors({n: t.to(w.device) for n, t in weight.tensors.items()})
    made: dict[int, nn.Module] = {}
    for user, module, _ in source.users:
        bias = cast(nn.Linear, module).bias
        if id(bias) not in made:
            made[id(bias)] = _make_layer(f"{user}.weight", weight, bias, carrier, maker)
    others = ", ".join(user for user, _, _ in source.users[1:])
    others = f", shared with {others}" if others else ""
    was = f", was {source.was}" if source.was else ""
    kernel = entry.kernel if carrier is Carrier.QUANTWIRE else "the library's own layer"
    entry = dataclasses.replace(entry, reason=f"{decision.reason}{others}{was}", nbytes_in=source.nbytes, kernel=kernel)
    return {user: made[id(cast(nn.Linear, module).bias)] for user, module, _ in source.users}, entry


def quantize_tensor(
    name: str,
    w: Tensor,
    spec: QuantSpec,
    importance: Tensor | None = None,
    every: int = 1,
    quantize: Callable[[Tensor, QuantSpec], QuantizedWeight] | None = None,
) -> tuple[QuantizedWeight, Entry]:
    """Quantize one weight and measure what it cost.

    Args:
        name: for messages.
        w: (N, K) float32, float16 or bfloat16; not modified.
        importance: (K,) float32, how much the error of a column counts.
        every: measure one row in so many; all of them where a value is so large that a result may not be finite.
        quantize: in place of the format's own `quantize`, with the same result.
    Raises:
        WeightError: nan or inf in the weight, another dtype, or a result that is not finite or worse than zeros.
        SpecError: the format cannot hold this shape, or takes no importance matrix.
    """
    quantizer = require(spec.format_id)
    meta = TensorMeta(name, tuple(w.shape), w.dtype)
    if w.dtype not in FLOAT_DTYPES:
        raise WeightError(f"'{name}': dtype is {w.dtype}, expected float32, float16 or bfloat16.")
    refusal = refusal_of(quantizer, spec, meta)
    if refusal:
        raise SpecError(f"'{name}': {spec.format_id}: {refusal}.")
    check_finite(name, w)
    try:
        if importance is None:
            weight = remember((quantize or quantizer.quantize)(w, spec), spec)
        else:
            weight = remember(quantizer.quantize_weighted(w, spec, importance), spec)
    except WeightError as err:
        raise WeightError(f"'{name}': {spec.format_id}: {err}") from err
    restored = quantizer.form(weight) or quantizer.dequantize(weight, torch.float32)
    every = every if every == 1 or _is_small(w) else 1
    entry = measure(name, "linear weight", w, restored, weight.nbytes, every)
    # Wider qdata may be a container of codes (bitsandbytes packs 4 bits into bfloat16) whose bits spell nan; where it
    # holds values, the noise tells. Float8 is looked at because its expansion takes nan for a number.
    values = [t for n, t in weight.tensors.items() if n != "qdata" or t.dtype.itemsize == 1]
    if not math.isfinite(entry.noise) or not all(finite(t) for t in values):
        raise WeightError(f"'{name}': {spec.format_id} gives non-finite values; the weight exceeds its range.")
    if entry.noise > WORST_NOISE * entry.signal:
        # Zeros have 0 dB. The margin is for formats of one or two bits, and for rounding of values near the limits.
        sqnr = f"{entry.sqnr_db:.1f} dB" if entry.sqnr_db is not None else "below every number"
        raise WeightError(
            f"'{name}': {spec.format_id} gives SQNR {sqnr}: the result is worse than a layer of zeros.\n"
            "Keep this layer at full precision (`exclude`), or choose another format for it."
        )
    kernel = quantizer.kernel(weight, w.device, w.dtype, REPORTED_TOKENS)
    return weight, dataclasses.replace(entry, format_id=spec.format_id, kernel=f"{kernel.name}: {kernel.reason}")


def _row_parts(w: Tensor) -> tuple[Tensor, ...]:
    """Rows at a time where torch would make a whole copy in a wider dtype to form a sum, which it does on the CPU."""
    if w.device.type != "cpu" or w.dim() < 2 or w.numel() <= SUMMED_NUMEL:
        return (w,)
    return cast("tuple[Tensor, ...]", cast(Any, w).split(max(1, SUMMED_NUMEL * w.shape[0] // w.numel())))


def _is_small(w: Tensor) -> bool:
    """Whether no value is near the limits of float16, the narrowest dtype that a format computes in."""
    low, high = torch.aminmax(w.detach()) if w.numel() else (w.sum(), w.sum())
    return max(-float(low), float(high)) < SMALL_VALUE


def check_finite(name: str, w: Tensor | QuantizedWeight) -> None:
    """Refuse nan and inf.

    Raises:
        WeightError: names the tensor and how many there are.
    """
    count = w.numel if isinstance(w, QuantizedWeight) else w.numel()
    if isinstance(w, QuantizedWeight):
        bad = require_reader(w.format_id).non_finite(w)
    elif not w.is_floating_point():
        return
    else:
        w = w.detach()
        w = w.to(torch.float32) if w.dtype.itemsize == 1 else w
        # A finite sum has finite terms, and needs neither a mask nor a second pass.
        wide = torch.float64 if w.dtype is torch.float64 else torch.float32
        if all(bool(torch.isfinite(part.sum(dtype=wide))) for part in _row_parts(w)):
            return
        bad = int((~torch.isfinite(w)).sum())
    if bad:
        raise WeightError(f"'{name}': {bad} of {count} values are nan or inf.\nThe source file is damaged.")


def make_layer(weight: QuantizedWeight, bias: Tensor | None, carrier: Carrier) -> nn.Module:
    """Our own layer, or the library's, in eval mode.

    Raises:
        SpecError: the library has no layer for this weight.
    """
    if carrier is Carrier.QUANTWIRE:
        return QuantizedLinear(weight, bias).eval()
    return require(weight.format_id).to_native(weight, bias)


def _make_layer(
    name: str, weight: QuantizedWeight, bias: Tensor | None, carrier: Carrier, maker: LayerMaker | None
) -> nn.Module:
    try:
        return (maker or make_layer)(weight, bias, carrier)
    except SpecError as err:
        raise SpecError(f"'{name}': {err}") from err


def _report_others(plan: QuantPlan, report: QuantReport, sources: Mapping[str, _Source]) -> None:
    for d in plan.decisions:
        source = sources[d.meta.name]
        if d.action is Action.KEEP:
            stays = f", stays in {source.was}" if source.was else ""
            report.entries.append(Entry(d.meta.name, "keep", f"{d.reason}{stays}", source.nbytes, source.nbytes))
        elif d.action is Action.REFUSE:
            _warn_full_precision(report, d.meta.name, d.reason, source.nbytes)


def _warn_of_both_errors(plan: QuantPlan, report: QuantReport, sources: Mapping[str, _Source]) -> None:
    was = [sources[d.meta.name].was for d in plan.to_quantize if sources[d.meta.name].was]
    if was:
        message = (
            f"{len(was)} layers were quantized already ({', '.join(dict.fromkeys(was))}) and were dequantized first: "
            "the errors of both quantizations add up, and the SQNR shown is only that of the second"
        )
        report.warnings.append(message)
        log.warning("%s: %s", report.title, message)


def _warn_full_precision(report: QuantReport, name: str, reason: str, nbytes: int) -> None:
    report.entries.append(Entry(name, "full precision", reason, nbytes, nbytes))
    report.warnings.append(f"{name} stays at full precision: {reason}")
    log.warning("%s: %s stays at full precision: %s", report.title, name, reason)
