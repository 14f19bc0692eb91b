"""What quantizing each layer of a model does to the model's output, for every format that the layer could get.

    e_u(f)^2 = gain_u * noise_u(f)

`noise_u(f)` is the relative squared error of the layer's own output in format f, on inputs that it had in a run:
cheap, and measured for every format. `gain_u` says how much of it arrives at the model's output: the output's relative
squared error while this one unit is quantized, divided by the unit's noise, measured with one coarse format, whose
effect stands well above the rounding of bfloat16 that blurs those of 8-bit formats. Errors of different units are
uncorrelated, so their squares add up; a recipe says how well that holds, by measuring itself.

A unit is what one weight of the model's file is: diffusers keeps as three layers (q, k, v) what is one `qkv` there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import FileError, SpecError
from ..families import find_family
from ..files.architectures import comfyui_targets, recognise
from ..files.model_file import open_model
from ..files.schemes.scan import scan
from ..files.whole_model import model_of
from ..meta import TensorMeta
from ..plan import Slot, built_in, refusal_of
from ..registry import availability, get_quantizer, is_format, require
from ..rules import KEEP, layer_name
from ..spec import QuantSpec
from .parts import ModelPart, Role, parts_of_file

# Every size of one backend, so that one GGUF file can hold any mixture; the second of a size takes rows that are not a
# multiple of 256. Those below 2.6 bits and the slow IQ types are left to who asks for them.
DEFAULT_FORMATS = (
    *("gguf-q8-0", "gguf-q6-k", "gguf-q5-k", "gguf-q5-0", "gguf-q4-k", "gguf-q4-0", "gguf-iq4-nl", "gguf-q3-k"),
    "gguf-q2-k",
)
# Coarse enough for its effect to be seen, fine enough to be in proportion; the first that holds a unit is used.
PROBES = ("gguf-q3-k", "gguf-q4-0", "quanto-qint4", "bnb-nf4", "sdnq-int4", "quanto-qint8")
SAMPLED_ROWS = 256
EXACT = 1e-8  # relative squared error; what formats of 3 and 4 bits lose is 10,000 times that and more


@dataclass(frozen=True)
class Unit:
    """What is quantized together.

    Attributes:
        name: of the weight in the model's file, without `.weight`.
        layers: of the model as it is loaded; the same name where it keeps the weight as the file does.
        metas: of the weights of these layers.
        kept: why it stays at full precision by the rules of its family; empty where it does not.
    """

    name: str
    layers: tuple[str, ...]
    metas: tuple[TensorMeta, ...]
    kept: str = ""

    @property
    def full_nbytes(self) -> int:
        return sum(meta.nbytes for meta in self.metas)

    def nbytes(self, target: str) -> int | None:
        """Bytes in a format, or `keep`; None where the format cannot hold one of its layers."""
        if target == KEEP:
            return self.full_nbytes
        spec = QuantSpec.from_uri(target)
        quantizer = get_quantizer(spec.format_id)
        if any(refusal_of(quantizer, spec, meta) for meta in self.metas):
            return None
        return sum(quantizer.predict_nbytes(spec, meta) for meta in self.metas)


@dataclass(frozen=True)
class Effect:
    """One unit in one format: its bytes, and the relative squared error of the model's output that it makes."""

    nbytes: int
    error2: float


@dataclass(frozen=True)
class Sensitivities:
    """Of one component of a model.

    Attributes:
        part: its name.
        family: of the model.
        units: everything that can be quantized.
        effects: unit -> `keep`, format id or URI -> effect.
        fixed_nbytes: of what no recipe changes: biases, norms, embeddings.
        layers: the names of all linear layers as the model has them, those that cannot be replaced among them.
        formats: the candidates.
        measured: whether effects are on the model's output; else on weights alone.
        how: what was measured, for people.
        gains: unit -> gain; empty where the output was not measured.
        floor: relative error of the output by rounding alone.
    """

    part: str
    family: str
    units: tuple[Unit, ...]
    effects: Mapping[str, Mapping[str, Effect]]
    fixed_nbytes: int
    layers: tuple[str, ...]
    formats: tuple[str, ...]
    measured: bool
    how: str
    gains: Mapping[str, float] = field(default_factory=lambda: dict[str, float]())
    floor: float = 0.0

    @property
    def full_nbytes(self) -> int:
        return self.fixed_nbytes + sum(unit.full_nbytes for unit in self.units)

    def single(self, target: str) -> Effect | None:
        """The whole part in one format by the default rules; None where the format cannot hold all of it."""
        picks = {name: self.effects[name].get(t) for name, t in self.mixture(target).items()}
        found = [e for e in picks.values() if e is not None]
        if len(found) < len(picks):
            return None
        return Effect(self.fixed_nbytes + sum(e.nbytes for e in found), sum(e.error2 for e in found))

    def mixture(self, target: str) -> dict[str, str]:
        """Unit -> target for one format by the default rules."""
        return {unit.name: KEEP if unit.kept else target for unit in self.units}

    def ranked(self) -> list[tuple[str, float]]:
        """(unit, gain), what matters most first."""
        return sorted(self.gains.items(), key=lambda pair: -pair[1])

    def to_dict(self) -> dict[str, Any]:
        return {
            "part": self.part,
            "family": self.family,
            "measured": self.measured,
            "how": self.how,
            "floor": self.floor,
            "fixed_nbytes": self.fixed_nbytes,
            "formats": list(self.formats),
            "units": {
                unit.name: {
                    "layers": list(unit.layers),
                    "kept_by_default": unit.kept,
                    "gain": self.gains.get(unit.name),
                    "error": {t: math.sqrt(e.error2) for t, e in self.effects[unit.name].items()},
                    "nbytes": {t: e.nbytes for t, e in self.effects[unit.name].items()},
                }
                for unit in self.units
            },
        }


def check_formats(formats: Iterable[str] | None) -> tuple[str, ...]:
    """Candidates in canonical form, those that run here; `DEFAULT_FORMATS` for None.

    Raises:
        SpecError: no such format, one with layer patterns, or none is left.
        BackendUnavailable: one that was asked for by name does not run here.
    """
    if formats is None:
        found = tuple(f for f in DEFAULT_FORMATS if is_format(f) and availability(f).works)
        if not found:
            raise SpecError(
                f"None of the usual formats of a recipe runs here ({', '.join(DEFAULT_FORMATS)}).\n"
                "Name others; `quantwire formats` tells which run."
            )
        return found
    found: tuple[str, ...] = ()
    for text in formats:
        spec = QuantSpec.from_uri(text.strip())
        if spec.include or spec.exclude or spec.rules:
            raise SpecError(f"'{text}': a candidate of a recipe has no layer patterns of its own.\nLeave them out.")
        require(spec.format_id)
        found = (*found, spec.to_uri() if spec.options else spec.format_id)
    if not found:
        raise SpecError("No formats were given to choose from.\nName some, or leave them out for the usual ones.")
    return tuple(dict.fromkeys(found))


def units_of(slots: Sequence[Slot]) -> tuple[Unit, ...]:
    """The linear weights of a model that can be replaced, those that are one weight in the model's file together."""
    linear = {s.meta.name: s.meta for s in slots if s.linear and not s.stays}
    metas = {s.meta.name: s.meta for s in slots}
    of_file = _file_names(metas)
    groups: dict[str, list[str]] = {}
    for name in linear:
        groups.setdefault(of_file.get(name, name), []).append(name)
    names = {layer_name(name): meta for name, meta in linear.items()}
    kept, _ = built_in(find_family(metas.values()), names, set())
    units: list[Unit] = []
    for name, members in groups.items():
        layers = tuple(map(layer_name, members))
        reason = next((kept[layer] for layer in layers if layer in kept), "")
        units.append(Unit(layer_name(name), layers, tuple(linear[m] for m in members), reason))
    return tuple(units)


def _file_names(metas: Mapping[str, TensorMeta]) -> dict[str, str]:
    """Tensor -> the one of ComfyUI's layout that it is a part of; empty where that is not known."""
    try:
        found = recognise(metas)
        targets = [] if found is None else comfyui_targets(found, metas)
    except FileError:  # of no family that is known, or other names: units are the layers as they are
        return {}
    return {piece.source: target.name for target in targets for piece in target.pieces}


def probe_of(unit: Unit, formats: Sequence[str]) -> str:
    """The format that a unit's gain is measured with.

    Raises:
        SpecError: no format that runs here can hold the unit.
    """
    for target in (*PROBES, *formats):
        format_id = QuantSpec.from_uri(target).format_id
        if is_format(format_id) and availability(format_id).works and unit.nbytes(target) is not None:
            return target
    raise SpecError(f"'{unit.name}': no candidate can hold it, so its effect cannot be measured.\nName other formats.")


@dataclass(frozen=True)
class Inputs:
    """Some of what a layer was given in one call.

    Attributes:
        x: (M, K), in the dtype that the layer computes in.
        tokens: how many rows there were; the kernel depends on it.
    """

    x: Tensor
    tokens: int


def output_noise(w: Tensor, calls: Sequence[Inputs], target: str) -> float:
    """Relative squared error of a layer's output beyond its own rounding; nan and inf count as 1.

    With the kernel and the dtype of the run: a kernel for few tokens may round its inputs too, and weights that come
    back in bfloat16 are rounded once more, which at 8 bits is as much as the format itself loses.

    Args:
        w: (N, K); at most `SAMPLED_ROWS` of its rows, evenly spaced, are looked at.
    """
    spec = QuantSpec.from_uri(target)
    quantizer = require(spec.format_id)
    w = sampled(w.detach())
    q = quantizer.quantize(w, spec)
    noise: list[float] = []
    for call in calls:
        x = call.x.to(w.device)
        exact = F.linear(x.to(torch.float32), w.to(torch.float32))
        made = quantizer.kernel(q, x.device, x.dtype, call.tokens).run(x, q, None)
        plain = F.linear(x, w.to(x.dtype))
        noise.append(max(0.0, _relative2(made.float(), exact) - _relative2(plain.float(), exact)))
    return sum(noise) / len(noise)


def weight_noise(w: Tensor, target: str) -> float:
    """Relative squared error of a weight (N, K), by at most `SAMPLED_ROWS` of its rows."""
    spec = QuantSpec.from_uri(target)
    quantizer = require(spec.format_id)
    w = sampled(w.detach())
    return _relative2(quantizer.dequantize(quantizer.quantize(w, spec), torch.float32), w.to(torch.float32))


def sampled(w: Tensor) -> Tensor:
    """Runs of neighbouring rows of a weight, evenly spaced: formats pack neighbours, and kinds of rows differ."""
    n = w.shape[0]
    if n <= SAMPLED_ROWS:
        return w
    run = SAMPLED_ROWS // 8
    starts = [i * (n - run) // 7 for i in range(8)]
    return torch.cat([w[start : start + run] for start in starts])


def _relative2(made: Tensor, exact: Tensor) -> float:
    power = float(exact.pow(2).sum())
    error = float((made - exact).pow(2).sum())
    if not math.isfinite(error):
        return 1.0
    return error / power if power else 0.0


def by_weights(
    part: ModelPart,
    read: Callable[[str], Tensor],
    formats: Iterable[str] | None = None,
    progress: Callable[[Sequence[Unit]], Iterable[Unit]] = iter,
) -> Sensitivities:
    """From a file alone, without a run: every unit's relative weight error counts alike.

    The rules of the family keep what they keep, since nothing here tells how much those layers matter.

    Args:
        part: a component at full precision.
        read: name of a tensor -> its values (N, K).
        formats: candidates; default: `DEFAULT_FORMATS`.
        progress: wraps the list of units.
    Raises:
        SpecError: the part is quantized already, or the formats are refused.
    """
    _refuse_quantized(part)
    candidates = check_formats(formats)
    units = units_of(part.slots)
    effects: dict[str, dict[str, Effect]] = {}
    share = 1 / max(1, sum(1 for unit in units if not unit.kept))
    for unit in progress(units):
        effects[unit.name] = {KEEP: Effect(unit.full_nbytes, 0.0)}
        weights = [] if unit.kept else [sampled(read(meta.name)) for meta in unit.metas]
        for target in candidates if weights else ():
            nbytes = unit.nbytes(target)
            if nbytes is not None:
                noise = sum(weight_noise(w, target) for w in weights) / len(weights)
                effects[unit.name][target] = Effect(nbytes, share * noise)
    how = "errors of the weights alone, all layers alike: no run of the model was measured"
    return _sensitivities(part.name, part.family, part.slots, units, effects, candidates, False, how)


def of_file(path: Path) -> tuple[ModelPart, Callable[[str], Tensor]]:
    """The diffusion model of a file, or whatever part it has, and what reads its tensors.

    Raises:
        FileError: it cannot be read, or holds no model.
        SpecError: it is quantized already, or a LoRA.
    """
    parts = parts_of_file(path)
    if all(p.role is Role.LORA for p in parts):
        raise SpecError(
            f"{path.name} is a LoRA, which changes a model and is not quantized by itself.\n"
            "Give the file of the model that it is for."
        )
    part = next((p for p in parts if p.role is Role.DIFFUSION), parts[0])
    _refuse_quantized(part)
    found = scan(open_model(path if path.is_dir() else model_of(path)))

    def read(name: str) -> Tensor:
        value = found.read(name)
        if not isinstance(value, Tensor):
            raise SpecError(f"'{name}': is quantized already ({value.format_id}).\nGive the model at full precision.")
        return value

    return part, read


def _refuse_quantized(part: ModelPart) -> None:
    if part.formats:
        held = ", ".join(part.formats)
        raise SpecError(f"{part.source}: is quantized already ({held}).\nGive the model at full precision.")


def _sensitivities(
    name: str,
    family: str,
    slots: Sequence[Slot],
    units: tuple[Unit, ...],
    effects: Mapping[str, Mapping[str, Effect]],
    formats: tuple[str, ...],
    measured: bool,
    how: str,
    gains: Mapping[str, float] | None = None,
    floor: float = 0.0,
) -> Sensitivities:
    chosen = {meta.name for unit in units for meta in unit.metas}
    fixed = sum(s.meta.nbytes for s in slots if s.meta.name not in chosen)
    layers = tuple(layer_name(s.meta.name) for s in slots if s.linear)
    return Sensitivities(name, family, units, effects, fixed, layers, formats, measured, how, gains or {}, floor)


def combine(
    name: str,
    slots: Sequence[Slot],
    units: tuple[Unit, ...],
    formats: tuple[str, ...],
    effect2: Mapping[str, float],
    noise: Mapping[str, Mapping[str, float]],
    probes: Mapping[str, str],
    floor: float,
    how: str,
) -> Sensitivities:
    """Sensitivities from what a run measured.

    Args:
        effect2: unit -> the output's relative squared error with the unit in its probe format, without the floor.
        noise: unit -> format -> relative squared error of the unit's own output; the probe format among them.
        probes: unit -> format.
    """
    gains: dict[str, float] = {}
    for unit in units:
        loss = noise[unit.name][probes[unit.name]]
        # A weight that the probe format holds exactly, such as zeros, tells nothing; as if all of it arrived.
        gains[unit.name] = effect2[unit.name] / loss if loss > EXACT else 1.0
    effects: dict[str, dict[str, Effect]] = {}
    for unit in units:
        effects[unit.name] = {KEEP: Effect(unit.full_nbytes, 0.0)}
        for target in formats:
            nbytes = unit.nbytes(target)
            if nbytes is not None:
                effects[unit.name][target] = Effect(nbytes, gains[unit.name] * noise[unit.name][target])
    family = find_family(s.meta for s in slots).name
    return _sensitivities(name, family, slots, units, effects, formats, True, how, gains, floor)
