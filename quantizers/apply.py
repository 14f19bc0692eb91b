"""From a plan to layers: quantize linear layers one at a time, measured, with every failure named or reported."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum
from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from .compat.modes import Carrier
from .errors import QuantwireError, SpecError, WeightError
from .plan import Action, QuantPlan, Slot, make_plan
from .registry import require
from .report import Entry, QuantReport, measure
from .spec import QuantSpec
from .weight import QuantizedLinear, QuantizedWeight, TensorMeta

log = logging.getLogger(__name__)

LayerMaker = Callable[[QuantizedWeight, "Tensor | None", Carrier], nn.Module]
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
T = TypeVar("T")


class Progress(Protocol):
    """Iterates over a work list and shows how far it is, as tqdm does."""

    def __call__(self, items: Sequence[T], total: int, /) -> Iterable[T]: ...


class OnFailure(str, Enum):
    """What to do with a layer that cannot be quantized."""

    ERROR = "error"
    FULL_PRECISION = "full precision"


class LoraMode(str, Enum):
    """How a LoRA on quantized layers is applied."""

    EXACT = "exact"
    REQUANTIZE = "requantize"


def slots_of(model: nn.Module) -> list[Slot]:
    """Every parameter of a module as a planning slot, in definition order; shared parameters once."""
    modules = cast("Iterator[tuple[str, nn.Module]]", model.named_modules())
    linear = {f"{name}.weight" for name, module in modules if isinstance(module, nn.Linear)}
    return [Slot(TensorMeta(name, tuple(p.shape), p.dtype), name in linear) for name, p in model.named_parameters()]


def refuse_quantized(model: nn.Module) -> None:
    """Refuse a model that already holds quantized weights.

    Raises:
        WeightError: names the first such layer and what it holds.
    """
    from .compat.rules import find_carriers

    found = find_carriers(model)
    if found:
        first = found[0]
        name = first.name or type(model).__name__
        raise WeightError(
            f"'{name}': already quantized ({first.format_id}, {first.carrier.value} carrier).\n"
            "Quantize the full-precision model instead; quantizing twice adds both errors."
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
) -> tuple[dict[str, nn.Module], QuantReport]:
    """Make quantized replacements for the linear layers of a model. The model itself is not touched.

    Args:
        model: full-precision module.
        spec: format, options, layers to include and exclude.
        carrier: what holds the weights.
        on_failure: ERROR stops at the first layer that cannot be quantized (before any work where the plan can tell);
            FULL_PRECISION leaves it as it is, with a warning in the log and in the report.
        make_layer: makes the new layer, for hosts that have layers of their own; default: `make_layer`.
        device: where to quantize, one layer at a time; default: where the weight lies. The result goes back there.
        progress: wraps the work list.
        title: component name for messages.
    Returns:
        layer name -> new module (in eval mode), and the report.
    Raises:
        BackendUnavailable, SpecError, WeightError: as described.
    """
    refuse_quantized(model)
    quantizer = require(spec.format_id)
    start = time.perf_counter()  # after `require`, which may spend seconds on importing the library
    plan = make_plan(slots_of(model), spec, quantizer)
    if on_failure is OnFailure.ERROR:
        plan.raise_on_refusal()
    if not plan.to_quantize and not plan.refused:
        raise SpecError(f"{title}: no linear layer is left to quantize with these patterns.")
    report = QuantReport(title, spec.format_id, carrier.value, spec.to_uri())
    layers: dict[str, nn.Module] = {}
    _report_others(plan, report)
    work = plan.to_quantize
    for decision in progress(work, len(work)) if progress else work:
        name = decision.meta.name
        layer = name.removesuffix(".weight")
        linear = cast(nn.Linear, model.get_submodule(layer))
        try:
            w = linear.weight.data
            weight, entry = quantize_tensor(name, w.to(device or w.device), spec)
            weight = weight.with_tensors({n: t.to(w.device) for n, t in weight.tensors.items()})
            layers[layer] = _make_layer(name, weight, linear.bias, carrier, make_layer)
            report.entries.append(entry)
        except QuantwireError as err:
            if on_failure is OnFailure.ERROR:
                raise
            _keep_full_precision(report, name, linear.weight.data, str(err).splitlines()[0])
    report.seconds = time.perf_counter() - start
    return layers, report


def quantize_tensor(name: str, w: Tensor, spec: QuantSpec) -> tuple[QuantizedWeight, Entry]:
    """Quantize one weight and measure what it cost.

    Args:
        name: for messages.
        w: (N, K) float32, float16 or bfloat16; not modified.
    Raises:
        WeightError: nan or inf in the weight, another dtype, or a result that is not finite.
        SpecError: the format cannot hold this shape.
    """
    quantizer = require(spec.format_id)
    meta = TensorMeta(name, tuple(w.shape), w.dtype)
    if w.dtype not in FLOAT_DTYPES:
        raise WeightError(f"'{name}': dtype is {w.dtype}, expected float32, float16 or bfloat16.")
    refusal = quantizer.refuse(spec, meta)
    if refusal:
        raise SpecError(f"'{name}': {spec.format_id}: {refusal}.")
    check_finite(name, w)
    weight = quantizer.quantize(w, spec)
    restored = quantizer.dequantize(weight, torch.float32)
    if not bool(torch.isfinite(restored).all()):
        raise WeightError(f"'{name}': {spec.format_id} gives non-finite values; the weight exceeds its range.")
    return weight, measure(name, "linear weight", w, restored, weight.nbytes)


def check_finite(name: str, w: Tensor) -> None:
    """Refuse nan and inf.

    Raises:
        WeightError: names the tensor and how many there are.
    """
    bad = int((~torch.isfinite(w)).sum())
    if bad:
        raise WeightError(f"'{name}': {bad} of {w.numel()} values are nan or inf.\nThe source file is damaged.")


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


def _report_others(plan: QuantPlan, report: QuantReport) -> None:
    for d in plan.decisions:
        if d.action is Action.KEEP:
            report.entries.append(Entry(d.meta.name, "keep", d.reason, d.meta.nbytes, d.meta.nbytes))
        elif d.action is Action.REFUSE:
            _warn_full_precision(report, d.meta.name, d.reason, d.meta.nbytes)


def _keep_full_precision(report: QuantReport, name: str, w: Tensor, reason: str) -> None:
    _warn_full_precision(report, name, reason, w.numel() * w.element_size())


def _warn_full_precision(report: QuantReport, name: str, reason: str, nbytes: int) -> None:
    report.entries.append(Entry(name, "full precision", reason, nbytes, nbytes))
    report.warnings.append(f"{name} stays at full precision: {reason}")
    log.warning("%s: %s stays at full precision: %s", report.title, name, reason)
