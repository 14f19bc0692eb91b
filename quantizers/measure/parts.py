"""The components of a model as forecasts, advice and recipes see them: from file headers, or from loaded modules.

A part holds slots (names, shapes and dtypes at full precision), so that a plan tells to the byte what each format makes
of it, and what the part takes as it is now.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from torch import nn

from ..apply import planning_slots
from ..choices import OnQuantized
from ..dequantize import quantized_layers, stored_nbytes
from ..errors import FileError
from ..families import find_family
from ..files.components import Component, find_parts, is_in
from ..files.components import Part as FilePart
from ..files.model_file import open_model
from ..files.schemes.scan import Scan, scan
from ..files.whole_model import model_of
from ..meta import Shaped
from ..plan import QuantPlan, Slot, make_plan
from ..registry import get_quantizer
from ..spec import QuantSpec

# Tables that are looked up, not multiplied with: 2-D, and no linear layer.
_TABLES = ("embed_tokens", "shared", "token_embedding", "position_embedding", "embeddings", "pos_embed", "wte")


class Role(str, Enum):
    """What a part is for; the stages of a run are told apart by it."""

    DIFFUSION = "diffusion model"
    TEXT = "text encoder"
    VAE = "VAE"
    CONTROLNET = "ControlNet"
    LORA = "LoRA"


_ROLES = {
    Component.DIFFUSION: Role.DIFFUSION,
    Component.TEXT: Role.TEXT,
    Component.VAE: Role.VAE,
    Component.CONTROLNET: Role.CONTROLNET,
    Component.LORA: Role.LORA,
}


@dataclass(frozen=True)
class ModelPart:
    """One component of a model.

    Attributes:
        name: `transformer`, `t5xxl`, `vae`; the stem of the file where nothing else names it.
        role: what it is for.
        family: of `families.FAMILIES` for diffusion models and language models, else as `files.components` names it.
        slots: every tensor at full precision, with its logical shape, in the order of the file or module.
        held_nbytes: what it takes as it is.
        source: file or model object that this was read from; for a published size, whose it is.
        formats: format -> layers that are quantized already; empty for a plain part.
        assumed: the size is that of a published model, since no file was given.
    """

    name: str
    role: Role
    family: str
    slots: tuple[Slot, ...]
    held_nbytes: int
    source: str
    formats: Mapping[str, int] = field(default_factory=lambda: dict[str, int]())
    assumed: bool = False

    @property
    def parameters(self) -> int:
        return sum(s.meta.numel for s in self.slots)

    @property
    def full_nbytes(self) -> int:
        """At full precision, in the dtypes of the slots."""
        return sum(s.meta.nbytes for s in self.slots)

    def plan(self, spec: QuantSpec) -> QuantPlan:
        """What a format makes of it, from names and shapes alone.

        Raises:
            SpecError: a pattern matches no layer, or two contradict each other.
        """
        return make_plan(self.slots, spec, get_quantizer(spec.format_id))

    def nbytes(self, spec: QuantSpec | None) -> int:
        """Bytes of its weights in a format, or as it is for None."""
        return self.held_nbytes if spec is None else self.plan(spec).nbytes_out


def parts_of_file(path: Path) -> tuple[ModelPart, ...]:
    """The components of a model file, the index of several, or a folder, from headers alone; no tensor is read.

    Raises:
        FileError: it cannot be read, or holds no model that is known here.
    """
    whole = path if path.is_dir() else model_of(path)
    found = scan(open_model(whole))
    metas = found.metas()
    sizes = {name: entry.nbytes for name, entry in found.file.entries.items()}
    shapes: dict[str, Shaped] = {name: found.file.entries[name] for name in found.plain}
    cut = find_parts(shapes | dict(found.layers), sizes)
    roles = [part for part in cut if part.component in _ROLES]
    if not roles:
        told = ", ".join(part.detail or part.component.value for part in cut) or "no tensors"
        raise FileError(
            f"{path.name}: no component of a generation model is in it ({told}).\n"
            f"`quantwire inspect {path}` tells what it holds."
        )
    taken: set[str] = set()
    parts: list[ModelPart] = []
    for part in roles:
        names = [name for name in metas if is_in(name, part, cut)]
        slots = tuple(Slot(metas[name], _is_linear(name, metas[name].shape)) for name in names)
        name = _name(part, path, len(roles) > 1, taken)
        taken.add(name)
        family = find_family(s.meta for s in slots).name or part.family
        formats = _formats(found, names)
        parts.append(ModelPart(name, _ROLES[part.component], family, slots, part.nbytes, path.name, formats))
    return tuple(parts)


def parts_of_modules(components: Mapping[str, nn.Module], role: Role, source: str) -> tuple[ModelPart, ...]:
    """The components of a model object, as `Host.components` gives them; quantized layers count as they are held.

    Args:
        role: of all of them; a MODEL has diffusion models, a CLIP text encoders.
        source: what the object is, for messages.
    """
    parts: list[ModelPart] = []
    for name, module in components.items():
        slots = tuple(planning_slots(module, OnQuantized.DEQUANTIZE))
        formats: dict[str, int] = {}
        for layer in quantized_layers(module).values():
            formats[layer.format_id] = formats.get(layer.format_id, 0) + 1
        family = find_family(s.meta for s in slots).name
        parts.append(ModelPart(name, role, family, slots, stored_nbytes(module), source, formats))
    return tuple(parts)


def total(parts: Iterable[ModelPart], specs: Mapping[str, QuantSpec] | None = None) -> int:
    """Bytes of the weights of parts together, each in the format that `specs` gives its name, else as it is."""
    specs = specs or {}
    return sum(part.nbytes(specs.get(part.name)) for part in parts)


def _is_linear(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor of a file is the weight of a linear layer, as far as its name and shape tell."""
    if len(shape) != 2 or not name.endswith(".weight"):
        return False
    layer = name.removesuffix(".weight").split(".")
    return not any(word in _TABLES for word in layer[-2:])


def _formats(found: Scan, names: Iterable[str]) -> dict[str, int]:
    formats: dict[str, int] = {}
    for name in names:
        layer = found.layers.get(name)
        if layer is not None:
            key = layer.format_id or layer.type
            formats[key] = formats.get(key, 0) + 1
    return formats


def _name(part: FilePart, path: Path, several: bool, taken: set[str]) -> str:
    """Unique in its file: `transformer`, `vae`, the family of a text encoder, and the file's stem where that is all."""
    if part.component is Component.DIFFUSION:
        name = "transformer"
    elif part.component is Component.VAE:
        name = "vae"
    elif several:
        name = part.family or part.component.value
    else:
        name = path.stem
    number = 2
    base = name
    while name in taken:
        name, number = f"{base} {number}", number + 1
    return name
