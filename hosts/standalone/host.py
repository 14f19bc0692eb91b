"""The embedded host: folders, model objects on diffusers modules, no offloading."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...quantizers.apply import make_layer
from ...quantizers.auto import DeviceFacts
from ...quantizers.choices import LoraMode, OnFailure
from ...quantizers.compat.modes import Carrier, OffloadMode
from ...quantizers.errors import FileError, SpecError
from ...quantizers.memory import device_facts
from ...quantizers.report import QuantReport
from ...quantizers.spec import QuantSpec
from ...quantizers.weight import QuantizedWeight
from ..base import missing, path_inside
from ..modules import with_layers
from ..objects import components_of
from ..record import Recorder

if TYPE_CHECKING:
    from ...quantizers.compat.guard import Guard
    from ...quantizers.compat.remedies import Space
    from ..offload import OffloadSettings

PACK_ROOT = Path(__file__).resolve().parents[2]
# ComfyUI's folder names, and the older names that it still searches.
ALIASES = {"diffusion_models": ("diffusion_models", "unet"), "text_encoders": ("text_encoders", "clip")}


class StandaloneHost:
    """The host of `quantwire run`.

    Args:
        models: folders laid out as ComfyUI's `models` folder, searched in order; default: `QUANTWIRE_MODELS` (several
            paths separated as in PATH), `./models`, and the demo models of a source checkout.
        output: where SaveImage and PreviewImage write.
    """

    name = "standalone"

    def __init__(self, models: Sequence[Path] | None = None, output: Path = Path("out")) -> None:
        self.models = list(models) if models else default_model_folders()
        self.output = output

    def list_files(self, folder: str, suffixes: tuple[str, ...] = ()) -> list[str]:
        found = {name for root in self._roots(folder) for name in _files_below(root)}
        return sorted(n for n in found if not suffixes or n.lower().endswith(suffixes))

    def resolve(self, folder: str, name: str, suffixes: tuple[str, ...] = ()) -> Path:
        for root in self._roots(folder):
            # By the path as written: a link inside the folder may lead to another disk, `..` may not lead anywhere.
            path = Path(os.path.normpath(root / name))
            if path.is_relative_to(os.path.normpath(root)) and path.is_file():
                return path
        files = self.list_files(folder, suffixes)
        searched = ", ".join(str(root) for root in self._roots(folder))
        if not searched:
            raise FileError(f"'{name}' cannot be found: there is no folder '{folder}' in {self._shown()}.")
        raise FileError(missing(name, searched, files, suffixes))

    def components(self, model: Any) -> dict[str, nn.Module]:
        from .models import DiffusionModel

        if isinstance(model, DiffusionModel):
            return {"transformer": model.transformer}
        if hasattr(model, "encoders"):
            return {name: encoder.module for name, encoder in model.encoders.items()}
        if found := components_of(model):
            return found
        raise SpecError(
            f"This node takes a model or text encoders, got {type(model).__name__}, in which no module with weights "
            "was found."
        )

    def with_layers(self, model: Any, layers: Mapping[str, Mapping[str, nn.Module]]) -> Any:
        from .models import DiffusionModel

        if isinstance(model, DiffusionModel):
            return model.with_transformer(with_layers(model.transformer, layers["transformer"]))
        if not hasattr(model, "encoders"):
            raise SpecError(f"Layers can be replaced in a model or text encoders, not in a {type(model).__name__}.")
        encoders = {
            name: dataclasses.replace(encoder, module=with_layers(encoder.module, layers.get(name, {})))
            for name, encoder in model.encoders.items()
        }
        return dataclasses.replace(model, encoders=encoders)

    def load_gguf(self, path: Path, carrier: Carrier, cache_mib: int = 0) -> tuple[Any, QuantReport]:
        from .models import load_gguf

        return load_gguf(path, carrier, self.make_layer, self.progress, cache_mib)

    def text_encoder_types(self) -> Mapping[int, Sequence[str]]:
        return {1: ["stable_diffusion"], 2: ["flux"]}

    def load_text_encoder(self, paths: Sequence[Path], kind: str, carrier: Carrier) -> tuple[Any, QuantReport]:
        from .gguf_text import load_text_encoders

        return load_text_encoders(paths, carrier, self.make_layer)

    def load_and_quantize(
        self, path: Path, spec: QuantSpec, carrier: Carrier, on_failure: OnFailure, cached: bool
    ) -> tuple[Any, QuantReport]:
        from .load import load_and_quantize

        return load_and_quantize(path, spec, carrier, on_failure, cached, self.make_layer, self.progress)

    def make_layer(
        self, weight: QuantizedWeight, bias: Tensor | None, carrier: Carrier, lora: LoraMode = LoraMode.EXACT
    ) -> nn.Module:
        if lora is LoraMode.REQUANTIZE:
            from .lora import mergeable

            return mergeable(make_layer(weight, bias, carrier))
        if carrier is Carrier.LIBRARY and weight.format_id.startswith("gguf-"):
            from .native_gguf import make_gguf_linear  # gguf itself has no layer; diffusers has

            return make_gguf_linear(weight, bias)
        return make_layer(weight, bias, carrier)

    def prepare_lora(self, model: Any, carrier: Carrier, lora: LoraMode) -> Any:
        from .lora import merge_loras
        from .models import DiffusionModel

        if lora is LoraMode.EXACT:
            return model
        if carrier is Carrier.LIBRARY:
            raise SpecError(
                "lora is requantize, but a library's own layer cannot be quantized again once it is made.\n"
                "Set lora to exact, which adds LoRAs beside the layer, or use carrier quantwire."
            )
        return merge_loras(model) if isinstance(model, DiffusionModel) else model

    def compute_device(self, model: Any) -> torch.device | None:
        return None

    def memory(self, model: Any) -> DeviceFacts:
        parameters = (p for module in self.components(model).values() for p in module.parameters())
        return device_facts(next(parameters).device)

    def record(self, model: Any) -> tuple[Any, Recorder]:
        recorder = Recorder()
        return dataclasses.replace(model, recorder=recorder), recorder

    def output_path(self, name: str) -> Path:
        return path_inside(self.output, name)

    def offload_now(self, model: Any) -> tuple[OffloadMode, str | None]:
        from .guard import offload_now

        return offload_now(model)

    def offload_space(self, model: Any) -> Space | None:
        return None  # nothing but `balanced` asks, which has a cap of its own

    def guarded(self, model: Any, guard: Guard) -> Any:
        from .guard import guarded

        return guarded(model, guard)

    def check_offload(self, mode: OffloadMode) -> None:
        from ..offload import OffloadSettings

        OffloadSettings(mode)

    def set_offload(self, model: Any, settings: OffloadSettings) -> Any:
        from .offload import set_offload

        return set_offload(model, settings)

    def show_text(self, text: str) -> None:
        """The command line prints a node's text when the run is over."""

    def progress(self, items: Iterable[Any], total: int) -> Iterable[Any]:
        from .progress import progress

        with progress(total, "") as bar:
            for item in items:
                yield item
                bar.update(1)

    def _roots(self, folder: str) -> list[Path]:
        names = ALIASES.get(folder, (folder,))
        return [root / name for root in self.models for name in names if (root / name).is_dir()]

    def _shown(self) -> str:
        return ", ".join(str(m) for m in self.models)


def _files_below(root: Path) -> Iterator[str]:
    """Relative paths of the files below a folder, links to folders followed once each."""
    seen: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = [f for f in folders if not f.startswith(".")]
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(folder, n).relative_to(root).as_posix() for n in names if not n.startswith("."))


def default_model_folders() -> list[Path]:
    """`QUANTWIRE_MODELS`, `./models`, and the demo models when the pack runs from a source checkout."""
    given = [Path(p) for p in os.environ.get("QUANTWIRE_MODELS", "").split(os.pathsep) if p]
    return [*given, Path("models"), PACK_ROOT / "demo" / "models"]
