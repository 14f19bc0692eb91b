"""What FitModel needs of a host beyond its protocol: the device without a model, and a file at full precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..quantizers.auto import DeviceFacts
from .base import Host

if TYPE_CHECKING:
    from torch import Tensor

    from ..quantizers.measure.parts import ModelPart
    from ..quantizers.plan import Slot


EMBEDDED_FAMILY = "flux"  # the only one that `standalone.models` opens


def device_of(host: Host) -> DeviceFacts:
    """The device that models compute on, and what is free there for a graph.

    What other models take counts as free in ComfyUI, which unloads them.

    Raises:
        SpecError: the device does not tell.
    """
    if host.name == "comfyui":
        import comfy.model_management as mm

        from ..quantizers.memory import describe

        device = mm.get_torch_device()
        others = sum(loaded.model_loaded_memory() for loaded in mm.current_loaded_models if loaded.device == device)
        total = mm.get_total_memory(device)
        return describe(device, min(mm.get_free_memory(device) + others, total), total)
    from ..quantizers.memory import device_facts
    from .standalone.offload.device import execution_device

    return device_facts(execution_device())


def refusal(host: str, parts: Iterable[ModelPart]) -> str:
    """Why a host cannot open a diffusion model, by its family; empty where it can."""
    family = next((p.family or "unknown" for p in parts if p.role.value == "diffusion model"), EMBEDDED_FAMILY)
    if host == "comfyui" or family == EMBEDDED_FAMILY:
        return ""
    return (
        f"`quantwire run` opens models of FLUX's layout only, and this one is of the family {family}; ComfyUI runs it."
    )


def load_full(host: Host, path: Path) -> Any:
    """A MODEL from a full-precision file, as UNETLoader makes it.

    Raises:
        FileError: not such a file.
    """
    if host.name == "comfyui":
        import comfy.sd

        return comfy.sd.load_diffusion_model(str(path))
    from .standalone.models import load_diffusion_model

    return load_diffusion_model(path)


def as_loaded(host: Host, path: Path, part: ModelPart) -> tuple[ModelPart, Callable[[str], Tensor]]:
    """A full-precision diffusion model under the names, and in the shapes and dtypes, in which the host holds its
    layers, and what reads a tensor of it.

    Rules of a graph name layers as the host has them: diffusers cuts the fused projections of a FLUX file. ComfyUI
    holds bfloat16 files in float32 on a CPU, and in float16 on GPUs without bfloat16.

    Raises:
        FileError: the host does not know the model.
    """
    from ..quantizers.files.stream import TensorFile
    from ..quantizers.plan import Slot
    from ..quantizers.weight import TensorMeta

    if host.name == "comfyui":
        from .comfyui.load import FLOAT_DTYPES, held_as

        file = TensorFile(path)
        source, dtype = held_as(file)
        here = {of_file: name for name, of_file in source.items()}
        metas = ((s, here.get(s.meta.name, s.meta.name)) for s in part.slots)
        slots = tuple(
            replace(s, meta=TensorMeta(name, s.meta.shape, dtype if s.meta.dtype in FLOAT_DTYPES else s.meta.dtype))
            for s, name in metas
        )
        return _part_of(part, slots), lambda name: file.read(source[name]).to(dtype)
    from .standalone import flux
    from .standalone.load import flux_parts
    from .standalone.models import dtype_of, flux_tensors

    file = TensorFile(path)
    tensors = flux_tensors(file.shapes, path)
    parts, _ = flux_parts(file, flux.config_of(tensors, path.name), dtype_of(tensors, path))
    slots = tuple(Slot(TensorMeta(p.name, p.shape, p.dtype), p.linear) for p in parts)
    by_name = {p.name: p for p in parts}
    return _part_of(part, slots), lambda name: by_name[name].cut(file.read(by_name[name].source))


def _part_of(part: ModelPart, slots: tuple[Slot, ...]) -> ModelPart:
    return replace(part, slots=slots, held_nbytes=sum(s.meta.nbytes for s in slots))
