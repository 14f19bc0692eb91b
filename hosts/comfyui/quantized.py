"""Quantized files of any scheme through the host's own model detection, layers and patcher.

Weights stay as the file has them, on a map of the file where the host lets them. Files in diffusers' layout are turned
into ComfyUI's first, which moves rows and changes no value. The host is shown the shapes that the weights had before
they were quantized, so it detects a model whose packed weights have others.

ComfyUI's own formats come into its own layers with everything that its loader puts there: `input_scale`,
`pre_quant_scale` and the options of `comfy_quant`. So a file gives what UNETLoader gives, and LoRAs stay exact.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...quantizers.apply import FLOAT_DTYPES, REPORTED_TOKENS, make_layer
from ...quantizers.compat.modes import Carrier
from ...quantizers.errors import FileError, SpecError, WeightError
from ...quantizers.files.gguf_model import Value, dequantized
from ...quantizers.files.layouts.target import Target, assemble
from ...quantizers.files.locate import Container
from ...quantizers.files.model_file import open_model
from ...quantizers.files.numbers import check_codes, check_scales
from ...quantizers.files.schemes.base import Layer
from ...quantizers.plan import sensitive_reason
from ...quantizers.registry import get_entry, get_quantizer, require, require_reader
from ...quantizers.report import MIB, Entry, QuantReport
from ...quantizers.weight import QuantizedWeight
from .detection import Plan, check_loaded, first_of, in_shape, plan_model
from .gguf import load_gguf
from .layouts import NATIVE, algorithm_of, to_quantized_tensor
from .linear import INPUT_SCALES, attach_exact_patches, operations
from .patchers import replace_layers
from .quantized_source import Source, find_source, unloadable_layer

log = logging.getLogger(__name__)
SMALL_NUMEL = 1 << 16  # the host's detection reads values of small tensors
PADDED = {"comfy-nvfp4": 16, "comfy-mxfp8": 32}  # format -> of what rows and columns become multiples
NATIVE_SCHEMES = ("comfy", "scaled-fp8")  # those of which the host's own loader reads files


def load_quantized(
    path: Path, carrier: Carrier = Carrier.QUANTWIRE, progress: Any = None, disable_dynamic: bool = False
) -> tuple[Any, QuantReport]:
    """Open a diffusion model whose weights are quantized in the file.

    Args:
        path: a file, an index, or a component's folder.
        progress: wraps the work list.
    Raises:
        FileError: damaged, not quantized, or a model or a scheme that is not loaded here.
        SpecError, BackendUnavailable: the carrier or a library cannot hold the weights here.
        WeightError: rows that the model needs together and the format does not keep so; nan or inf.
    """
    start = time.perf_counter()
    file = open_model(path)
    if file.container is Container.GGUF:
        return load_gguf(path, carrier)
    source = find_source(file)
    _require_all(source, carrier)
    plan = _plan(source)
    made = _Made({}, {}, [], [])
    targets = list(source.targets.values())
    try:
        for target in progress(targets, len(targets)) if progress else targets:
            _take(source, plan, target, made)
    except WeightError as err:
        raise WeightError(f"{source.name}: {err}") from err
    file.check_unchanged()
    options = {"dtype": plan.dtype, "custom_operations": operations(plan.compute)}
    patcher = _patcher(made.state, options, source, disable_dynamic)
    if carrier is Carrier.LIBRARY:
        patcher = replace_layers(patcher, _native_layers(source, plan, made))
    report = _report(source, plan, made, carrier)
    report.seconds = time.perf_counter() - start
    return patcher, report


def load_patcher(path: str, disable_dynamic: bool = False) -> Any:
    """For `cached_patcher_init`."""
    return load_quantized(Path(path), disable_dynamic=disable_dynamic)[0]


def _require_all(source: Source, carrier: Carrier) -> None:
    """Before any work: what computes with each format is there, and the carrier can hold it.

    Raises:
        BackendUnavailable, SpecError: it is not, or cannot.
    """
    for format_id in {layer.format_id: None for layer in source.layers.values()}:
        if carrier is Carrier.LIBRARY:
            require(format_id)
        else:
            require_reader(format_id)
    scaled = next((x for x in source.layers.values() if _scales(x)), None)
    if carrier is Carrier.LIBRARY and scaled is not None:
        raise SpecError(
            f"{source.name}: '{scaled.name}' has scales for its input, which the library's layers do not apply.\n"
            "Use carrier quantwire."
        )


def _plan(source: Source) -> Plan:
    """Ask the host what the model is.

    Raises:
        FileError: the host does not know the model.
    """
    probe = {name: _probe(source, target) for name, target in source.targets.items()}
    native = any(_is_native(layer.format_id) for layer in source.layers.values())
    plan = plan_model(probe, source.file.metadata, None if native else _weight_dtype(source), native)
    if plan is None:
        # Layouts of their own have names of their own.
        unloadable = unloadable_layer(source.file.path, source.scan.layers)
        if unloadable is not None:
            raise unloadable
        what = f"{source.found.family}, {source.found.layout} layout" if source.found else "unknown architecture"
        raise FileError(
            f"{source.name}: this ComfyUI does not detect a diffusion model in it ({what}; tensors such as "
            f"{', '.join(list(source.scan.shapes)[:3])}).\nUpdate ComfyUI, if the model is newer than it."
        )
    return plan


def _probe(source: Source, target: Target) -> Tensor:
    """What the host's detection looks at: shapes, and the values of small plain tensors."""
    if len(target.shape) < 2 and target.meta.numel <= SMALL_NUMEL:
        return _plain(assemble(target, source.scan.read), torch.float32)
    return torch.empty(target.shape, dtype=target.dtype, device="meta")


def _plain(value: Value, dtype: torch.dtype) -> Tensor:
    tensor = value if isinstance(value, Tensor) else _dequantized(value, dtype)
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def _dequantized(value: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    if get_entry(value.format_id).backend == "gguf":
        return dequantized(value, dtype)
    return get_quantizer(value.format_id).dequantize(value, dtype)


def _weight_dtype(source: Source) -> torch.dtype | None:
    """What most values were in before they were quantized."""
    count: Counter[torch.dtype] = Counter()
    for target in source.targets.values():
        if target.dtype in FLOAT_DTYPES:
            count[target.dtype] += target.meta.numel
    return count.most_common(1)[0][0] if count else None


def _scales(layer: Layer) -> dict[str, str]:
    """What the host's own layers multiply a layer's input with: role -> name in the file."""
    if layer.scheme not in NATIVE_SCHEMES or not _is_native(layer.format_id):
        return {}  # others call scales so that mean something else, and are left out of products at full precision
    return {role: n for role, n in layer.tensors.items() if role in INPUT_SCALES}


def _is_native(format_id: str) -> bool:
    return bool(format_id) and get_entry(format_id).backend == NATIVE


@dataclass
class _Made:
    """What was made of the targets.

    Attributes:
        state: for the host.
        weights: name in ComfyUI's layout -> weight that stays quantized.
    """

    state: dict[str, Tensor]
    weights: dict[str, QuantizedWeight]
    entries: list[Entry]
    notes: list[str]


def _take(source: Source, plan: Plan, target: Target, made: _Made) -> None:
    """Make a target, as the host gets it, and its line in the report."""
    name, path = target.name, source.file.path
    layers = source.layers_of(target)
    place = plan.places.get(name, "")
    shape = plan.shapes.get(place)
    mixed = _mixed(source, target)
    read = _checked(source, plan.dtype if mixed else None)
    value = _unpadded(source, target, shape) or assemble(target, read)
    reason = f"its parts in the file are {mixed}, which cannot be one weight" if mixed else ""
    if mixed:
        _refuse_scaled_input(source, name, reason, layers)
    if isinstance(value, QuantizedWeight):
        kind = f"{source.scan.scheme(layers[0]).title}: {layers[0].type}"
        why = _why_plain(value, place in plan.linear, shape)
        if not why:
            held = QuantizedWeight(value.format_id, value.tensors, value.orig_shape, plan.compute, value.meta)
            _hold(source, name, held, layers, made)
            entry = Entry(name, "quantize", kind, value.numel * 2, value.nbytes, format_id=value.format_id)
            made.entries.append(entry)
            return
        _refuse_scaled_input(source, name, f"{kind} is {why}", layers)
        reason = f"{kind} in the file: {why}"
    tensor = in_shape(path, name, _plain(value, plan.dtype), shape)
    made.state[name] = tensor
    if reason:
        made.entries.append(Entry(name, "dequantize", reason, tensor.numel() * 2, tensor.nbytes))
        return
    kept = sensitive_reason(name.removesuffix(".weight")) or "plain in the file"
    made.entries.append(Entry(name, "keep", kept, tensor.nbytes, tensor.nbytes))


def _mixed(source: Source, target: Target) -> str:
    """The formats of the parts of a target, where they are several: no weight can be in more than one."""
    if len(target.pieces) == 1:
        return ""
    layers = [source.layers.get(piece.source) for piece in target.pieces]
    kinds = dict.fromkeys(layer.format_id if layer is not None else "plain" for layer in layers)
    return ", ".join(kinds) if len(kinds) > 1 else ""


def _checked(source: Source, dtype: torch.dtype | None) -> Callable[[str], Value]:
    """Reads sources; with a dtype, quantized ones dequantized to it.

    Raises:
        WeightError: nan or inf.
    """

    def read(name: str) -> Value:
        value = source.scan.read(name)
        if not isinstance(value, QuantizedWeight):
            return value
        _check(source, source.layers[name], value)
        return value if dtype is None else _plain(value, dtype)

    return read


def _refuse_scaled_input(source: Source, name: str, what: str, layers: list[Layer]) -> None:
    """Raises:
    FileError: layers that are dequantized, and whose input is scaled by columns.
    """
    if any("pre_quant_scale" in _scales(layer) for layer in layers):
        raise FileError(f"{source.name}: '{name}': {what}, and its input is scaled, which only quantized linear can.")


def _unpadded(source: Source, target: Target, shape: tuple[int, ...] | None) -> QuantizedWeight | None:
    """A weight of a format that is stored with more rows and columns than it has: only the model tells how many."""
    layer = source.layers.get(target.pieces[0].source)
    if layer is None or shape is None or layer.format_id not in PADDED or layer.shape == shape:
        return None
    if len(target.pieces) > 1 or not target.pieces[0].whole or len(shape) != 2:
        return None
    step = PADDED[layer.format_id]
    if any(-(-n // step) * step != -(-held // step) * step for n, held in zip(shape, layer.shape, strict=True)):
        return None
    value = source.scan.scheme(layer).weight(dataclasses.replace(layer, shape=shape), source.file.read)
    _check(source, layer, value)
    return value


def _check(source: Source, layer: Layer, value: QuantizedWeight) -> None:
    """Raises:
    WeightError: nan or inf in scales, or in codes that are 8-bit floats.
    """
    check_scales(layer.name, value, codes=False)
    for name in layer.tensors.values():
        check_codes(layer.name, source.file.entries[name])


def _why_plain(value: QuantizedWeight, linear: bool, shape: tuple[int, ...] | None) -> str:
    if not linear:
        return "not a linear weight"
    return "" if value.orig_shape == shape else f"stored in another shape than {shape}"


def _hold(source: Source, name: str, weight: QuantizedWeight, layers: list[Layer], made: _Made) -> None:
    """Put a quantized weight into the state, and beside it what the host's own layers take from a file."""
    made.weights[name] = weight
    tensor = to_quantized_tensor(weight)
    tensor.quantwire_weight = weight  # tells our layer the format where the host's own layout does not
    made.state[name] = tensor
    layer = name.removesuffix(".weight")
    if _is_native(weight.format_id):
        conf: dict[str, Any] = {"format": algorithm_of(weight)}
        if any(x.options.get("full_precision_matrix_mult") for x in layers):
            conf["full_precision_matrix_mult"] = True
        made.state[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(conf).encode()), dtype=torch.uint8)
    for role in INPUT_SCALES:
        scale = _input_scale(source, name, role, layers, made)
        if scale is not None:
            made.state[f"{layer}.{role}"] = scale


def _input_scale(source: Source, name: str, role: str, layers: list[Layer], made: _Made) -> Tensor | None:
    """A scale of a layer's input, which all rows of its weight share.

    Raises:
        FileError: layers that become one were made for inputs that are scaled differently by columns.
    """
    from comfy.quant_ops import QUANT_ALGOS

    named = [_scales(layer)[role] for layer in layers if role in _scales(layer)]
    if not named:
        return None
    algorithm = str(layers[0].options.get("format", "")) or algorithm_of(made.weights[name])
    if role not in QUANT_ALGOS.get(algorithm, {}).get("parameters", ()):
        made.notes.append(f"'{named[0]}' is left out: ComfyUI takes none for {algorithm}.")
        return None
    scales = [source.file.read(n) for n in named]
    if len(scales) == len(layers) and all(torch.equal(scales[0], s) for s in scales[1:]):
        return scales[0]
    if role == "input_scale":
        made.notes.append(f"'{name}': the input scales of its parts differ; its input is scaled as it comes.")
        return None
    raise FileError(f"{source.name}: '{name}': its parts {', '.join(named)} differ, and they become one layer.")


def _patcher(state: dict[str, Tensor], options: dict[str, Any], source: Source, disable_dynamic: bool) -> Any:
    import comfy.sd
    from comfy.patcher_extension import CallbacksMP

    patcher = comfy.sd.load_diffusion_model_state_dict(
        dict(state), model_options=options, metadata=dict(source.file.metadata), disable_dynamic=disable_dynamic
    )
    patcher.cached_patcher_init = (load_patcher, (str(source.file.path),))
    patcher.add_callback_with_key(CallbacksMP.ON_LOAD, "quantwire", attach_exact_patches)
    check_loaded(patcher.model, source.file.path)
    return patcher


def _native_layers(source: Source, plan: Plan, made: _Made) -> dict[str, nn.Module]:
    layers: dict[str, nn.Module] = {}
    for name, weight in made.weights.items():
        bias = made.state.get(f"{name.removesuffix('.weight')}.bias")
        bias = bias.to(plan.compute) if bias is not None else None
        place = plan.places.get(name, name).removesuffix(".weight")
        layers[f"diffusion_model.{place}"] = make_layer(weight, bias, Carrier.LIBRARY)
    return layers


def _report(source: Source, plan: Plan, made: _Made, carrier: Carrier) -> QuantReport:
    formats = sorted({w.format_id for w in made.weights.values()})
    report = QuantReport(source.name, ", ".join(formats), carrier.value, entries=_with_kernels(made, carrier))
    schemes = Counter(f"{source.scan.scheme(x).title}, {x.type}" for x in source.layers.values())
    report.notes.append("in the file: " + "; ".join(f"{n} layers of {kind}" for kind, n in schemes.most_common()))
    if source.found is None:
        report.warnings.append("architecture not known here, detected by ComfyUI")
    else:
        report.family = source.found.family
        report.notes.append(f"architecture {source.found.architecture}")
        if source.found.layout == "diffusers":
            report.notes.append("tensor names of diffusers were turned into ComfyUI's")
    if source.left:
        nbytes = sum(source.file.entries[name].nbytes for name in source.left)
        parts = sorted({name.partition(".")[0] for name in source.left})
        report.notes.append(
            f"{len(source.left)} tensors of other parts ({first_of(parts)}; {nbytes / MIB:.1f} MiB) are left in the "
            "file: load them with Load CLIP, Load VAE or Load Checkpoint"
        )
    report.notes += made.notes
    plain = [e for e in made.entries if e.action == "dequantize"]
    if plain:
        more = sum(e.nbytes_out for e in plain) / MIB
        names = first_of([e.name for e in plain])
        report.notes.append(f"{len(plain)} tensors were dequantized at load, {more:.1f} MiB: {names}")
    report.warnings += plan.warnings()
    report.warnings += [f"'{f.tensor}': {f.text}" for f in source.scan.faults if not f.fatal]
    for warning in report.warnings:
        log.warning("%s: %s", source.name, warning)
    return report


def _with_kernels(made: _Made, carrier: Carrier) -> list[Entry]:
    """The entries with what multiplies with each weight."""
    import comfy.model_management as mm

    device, names = mm.get_torch_device(), dict[tuple[Any, ...], str]()
    entries: list[Entry] = []
    for entry in made.entries:
        weight = made.weights.get(entry.name)
        if weight is None:
            entries.append(entry)
            continue
        alike = (weight.format_id, weight.orig_shape, *weight.tensors, repr(dict(weight.meta)))
        if carrier is Carrier.LIBRARY:
            names[alike] = "the library's own layer"
        elif _is_native(weight.format_id):
            names[alike] = "ComfyUI's own"
        elif alike not in names:
            kernel = get_quantizer(weight.format_id).kernel(weight, device, weight.orig_dtype, REPORTED_TOKENS)
            names[alike] = f"{kernel.name}: {kernel.reason}"
        entries.append(dataclasses.replace(entry, kernel=names[alike]))
    return entries
