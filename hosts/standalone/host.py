"""The embedded host: folders, model objects on diffusers modules, no offloading."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...quantizers.apply import make_layer
from ...quantizers.auto import DeviceFacts
from ...quantizers.choices import LoraMode, OnFailure
from ...quantizers.compat.modes import Carrier, OffloadMode
from ...quantizers.errors import SpecError
from ...quantizers.memory import device_facts
from ...quantizers.report import QuantReport
from ...quantizers.spec import QuantSpec
from ...quantizers.weight import QuantizedWeight
from ..base import path_inside
from ..modules import with_layers
from ..objects import components_of
from ..record import Recorder, Watcher
from .folders import ModelFolders

if TYPE_CHECKING:
    from ...quantizers.compat.guard import Guard
    from ...quantizers.compat.remedies import Space
    from ...quantizers.files.model_saving import ModelTensors
    from ..offload import OffloadSettings
    from ..sampling import Generation


class StandaloneHost(ModelFolders):
    """The host of `quantwire run`.

    Args:
        models: folders laid out as ComfyUI's `models` folder, searched in order; default: `QUANTWIRE_MODELS` (several
            paths separated as in PATH), `./models`, and the demo models of a source checkout.
        output: where SaveImage and PreviewImage write.
    """

    def __init__(self, models: Sequence[Path] | None = None, output: Path = Path("out")) -> None:
        super().__init__(models)
        self.output = output

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

    def load_quantized(self, path: Path, carrier: Carrier) -> tuple[Any, QuantReport]:
        from .quantized import load_quantized

        return load_quantized(path, carrier, self.make_layer, self.progress)

    def saved_tensors(self, model: Any) -> ModelTensors:
        from .saving import saved_tensors

        return saved_tensors(model)

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

    def sampling_choices(self) -> tuple[Sequence[str], Sequence[str]]:
        from .core_nodes import SAMPLERS, SCHEDULERS

        return SAMPLERS, SCHEDULERS

    def sample(self, model: Any, how: Generation, after_step: Callable[[], None]) -> Any:
        from .sampling import sample

        settings = (how.seed, how.steps, how.cfg, how.scheduler, how.positive, how.negative)
        return {"samples": sample(model, *settings, how.latent["samples"], how.denoise, after_step)}

    def decode(self, vae: Any, latent: Any) -> Any:
        return vae.decode(latent["samples"])

    def watched(self, model: Any, watcher: Watcher) -> Any:
        return dataclasses.replace(model, recorder=watcher)

    def output_path(self, name: str) -> Path:
        return path_inside(self.output, name)

    def offload_now(self, model: Any) -> tuple[OffloadMode, str | None]:
        from .guard import offload_now

        return offload_now(model)

    def components_now(self, model: Any) -> dict[str, tuple[OffloadMode, str | None]]:
        from .guard import components_now

        return components_now(model)

    def offload_space(self, model: Any) -> Space | None:
        from .guard import offload_space

        return offload_space(model)

    def guarded(self, model: Any, guard: Guard) -> Any:
        from .guard import guarded

        return guarded(model, guard)

    def check_offload(self, mode: OffloadMode, settings: OffloadSettings | None = None) -> None:
        super().check_offload(mode, settings)
        if settings is not None:
            from .offload.device import check_device, execution_device

            check_device(settings, execution_device())

    def set_offload(self, model: Any, settings: OffloadSettings) -> Any:
        from .offload import set_offload

        return set_offload(model, settings)

    def show_text(self, text: str) -> None:
        # To the editor, if one listens; the command line prints a node's text when the run is over.
        from .progress import show_text

        show_text(text)

    def progress(self, items: Iterable[Any], total: int) -> Iterable[Any]:
        from .progress import progress

        with progress(total, "") as bar:
            for item in items:
                yield item
                bar.update(1)
