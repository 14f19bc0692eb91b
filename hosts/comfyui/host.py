"""The real ComfyUI as a host: its folders, patchers, memory modes and progress. Imports nothing of it at import."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...quantizers.apply import make_layer
from ...quantizers.auto import DeviceFacts
from ...quantizers.choices import LoraMode, OnFailure
from ...quantizers.compat.modes import Carrier, OffloadMode
from ...quantizers.errors import FileError, SpecError
from ...quantizers.memory import describe
from ...quantizers.report import QuantReport
from ...quantizers.spec import QuantSpec
from ...quantizers.weight import QuantizedWeight
from ..base import missing, path_inside
from ..objects import components_of
from ..record import Recorder, Watcher
from . import patchers
from .linear import make_linear

if TYPE_CHECKING:
    from ...quantizers.compat.guard import Guard
    from ...quantizers.compat.remedies import Space
    from ...quantizers.files.model_saving import ModelTensors
    from ..offload import OffloadSettings
    from ..sampling import Generation

# Folder names under which other packs list GGUF files; read when they exist, never created.
GGUF_FOLDERS = {"diffusion_models": ("unet_gguf",), "text_encoders": ("clip_gguf",)}


class ComfyHost:
    name = "comfyui"

    def list_files(self, folder: str, suffixes: tuple[str, ...] = ()) -> list[str]:
        import folder_paths

        found: set[str] = set()
        for root in self.roots(folder):
            files, _ = folder_paths.recursive_search(str(root), excluded_dir_names=[".git"])
            found |= {f for f in files if not suffixes or Path(f).suffix.lower() in suffixes}
        return sorted(found)

    def resolve(self, folder: str, name: str, suffixes: tuple[str, ...] = ()) -> Path:
        for root in self.roots(folder):
            # By the path as written: a link inside the folder may lead to another disk, `..` may not lead anywhere.
            path = Path(os.path.normpath(root / name))
            if path.is_relative_to(os.path.normpath(root)) and path.is_file():
                return path
        files = self.list_files(folder, suffixes or ((Path(name).suffix.lower(),) if Path(name).suffix else ()))
        searched = ", ".join(str(root) for root in self.roots(folder))
        raise FileError(missing(name, searched, files, suffixes))

    def components(self, model: Any) -> dict[str, nn.Module]:
        if hasattr(model, "cond_stage_model"):
            return dict(patchers.unpatched(model.patcher).model.named_children())
        if hasattr(model, "control_model"):
            return {"control_model": patchers.unpatched(model.control_model_wrapped).model}
        if hasattr(model, "model") and hasattr(model.model, "diffusion_model"):
            return {"diffusion_model": patchers.unpatched(model).model.diffusion_model}
        if found := components_of(model):
            return found
        raise SpecError(
            f"This node takes a model, text encoders or a ControlNet of ComfyUI, got {type(model).__name__}, in which "
            "no module with weights was found."
        )

    def with_layers(self, model: Any, layers: Mapping[str, Mapping[str, nn.Module]]) -> Any:
        if hasattr(model, "control_model"):
            clone = model.copy()
            clone.control_model_wrapped = patchers.replace_layers(model.control_model_wrapped, layers["control_model"])
            clone.control_model = clone.control_model_wrapped.model
            return clone
        flat = {f"{component}.{name}": layer for component, part in layers.items() for name, layer in part.items()}
        if hasattr(model, "cond_stage_model"):
            clone = copy.copy(model.clone())
            clone.patcher = patchers.replace_layers(model.patcher, flat)
            clone.cond_stage_model = clone.patcher.model
            return clone
        if not hasattr(getattr(model, "model", None), "diffusion_model"):
            raise SpecError(
                f"Layers can be replaced in a model, text encoders or a ControlNet of ComfyUI, not in a "
                f"{type(model).__name__} of another pack.\nQuantize it with the nodes of that pack."
            )
        return patchers.replace_layers(model, flat)

    def make_layer(
        self, weight: QuantizedWeight, bias: Tensor | None, carrier: Carrier, lora: LoraMode = LoraMode.EXACT
    ) -> nn.Module:
        return make_linear(weight, bias, lora) if carrier is Carrier.QUANTWIRE else make_layer(weight, bias, carrier)

    def prepare_lora(self, model: Any, carrier: Carrier, lora: LoraMode) -> Any:
        return model  # patches are merged when the model is loaded, by the layers made with LoraMode.REQUANTIZE

    def compute_device(self, model: Any) -> torch.device | None:
        return _patcher(model).load_device

    def load_gguf(self, path: Path, carrier: Carrier, cache_mib: int = 0) -> tuple[Any, QuantReport]:
        from .gguf import load_gguf

        return load_gguf(path, carrier, cache_mib)

    def saved_tensors(self, model: Any) -> ModelTensors:
        from .saving import saved_tensors

        return saved_tensors(model)

    def text_encoder_types(self) -> Mapping[int, Sequence[str]]:
        from .gguf_text import types_by_count

        return types_by_count()

    def load_text_encoder(self, paths: Sequence[Path], kind: str, carrier: Carrier) -> tuple[Any, QuantReport]:
        from .gguf_text import load_text_encoder

        return load_text_encoder(paths, kind, carrier)

    def load_and_quantize(
        self, path: Path, spec: QuantSpec, carrier: Carrier, on_failure: OnFailure, cached: bool
    ) -> tuple[Any, QuantReport]:
        from .load import load_and_quantize

        return load_and_quantize(path, spec, carrier, on_failure, cached, self.progress)

    def load_quantized(self, path: Path, carrier: Carrier) -> tuple[Any, QuantReport]:
        from .quantized import load_quantized

        return load_quantized(path, carrier, self.progress)

    def memory(self, model: Any) -> DeviceFacts:
        import comfy.model_management as mm

        device = _patcher(model).load_device
        # What other models take counts as free: the host unloads them when this one is loaded.
        others = sum(loaded.model_loaded_memory() for loaded in mm.current_loaded_models if loaded.device == device)
        total = mm.get_total_memory(device)
        return describe(device, min(mm.get_free_memory(device) + others, total), total)

    def record(self, model: Any) -> tuple[Any, Recorder]:
        from .record import recording

        return recording(model)

    def sampling_choices(self) -> tuple[Sequence[str], Sequence[str]]:
        from .sampling import choices

        return choices()

    def sample(self, model: Any, how: Generation, after_step: Callable[[], None]) -> Any:
        from .sampling import sample

        return sample(model, how, after_step)

    def decode(self, vae: Any, latent: Any) -> Any:
        from .sampling import decode

        return decode(vae, latent)

    def watched(self, model: Any, watcher: Watcher) -> Any:
        from .record import watched

        return watched(model, watcher)

    def output_path(self, name: str) -> Path:
        import folder_paths

        return path_inside(Path(folder_paths.get_output_directory()), name)

    def offload_now(self, model: Any) -> tuple[OffloadMode, str | None]:
        from .memory import forecast, memory_state

        patcher = _patcher(model)
        if not hasattr(patcher, "load_device"):  # another pack's object: what the host does with models in general
            return memory_state().mode, None
        return forecast(patcher)

    def components_now(self, model: Any) -> dict[str, tuple[OffloadMode, str | None]]:
        return dict.fromkeys(components_of(model), self.offload_now(model))  # the host loads an object as a whole

    def offload_space(self, model: Any) -> Space | None:
        from .memory import space_for

        patcher = _patcher(model)
        return space_for(patcher) if hasattr(patcher, "load_device") else None

    def guarded(self, model: Any, guard: Guard) -> Any:
        from .guard import guarded

        return guarded(model, guard)

    def check_offload(self, mode: OffloadMode, settings: OffloadSettings | None = None) -> None:
        from .memory import how_to_set

        raise SpecError(how_to_set(mode))

    def set_offload(self, model: Any, settings: OffloadSettings) -> Any:
        return self.check_offload(settings.mode)

    def progress(self, items: Iterable[Any], total: int) -> Iterable[Any]:
        import comfy.model_management
        import comfy.utils

        bar = comfy.utils.ProgressBar(total)
        for item in items:
            comfy.model_management.throw_exception_if_processing_interrupted()
            yield item
            bar.update(1)

    def show_text(self, text: str) -> None:
        """Text on the node that runs now."""
        from server import PromptServer

        server = PromptServer.instance
        node_id = getattr(server, "last_node_id", None)
        if node_id is not None:
            server.send_progress_text(text, node_id)

    def roots(self, folder: str) -> list[Path]:
        import folder_paths

        roots: list[Path] = []
        for name in (folder, *GGUF_FOLDERS.get(folder, ())):
            if name in folder_paths.folder_names_and_paths:
                roots += [Path(p) for p in folder_paths.get_folder_paths(name) if Path(p).is_dir()]
        return list(dict.fromkeys(roots))


def _patcher(model: Any) -> Any:
    """The ModelPatcher of a MODEL, CLIP or CONTROL_NET."""
    return getattr(model, "patcher", None) or getattr(model, "control_model_wrapped", None) or model
