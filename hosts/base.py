"""What the pack's nodes need from a host: open files, look into model objects, put quantized layers into a copy."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..quantizers.choices import LoraMode
from ..quantizers.errors import FileError, near

if TYPE_CHECKING:  # a host that starts imports this for the pack's nodes
    import torch
    from torch import Tensor, nn

    from ..quantizers.auto import DeviceFacts
    from ..quantizers.choices import OnFailure
    from ..quantizers.compat.guard import Guard
    from ..quantizers.compat.modes import Carrier, OffloadMode
    from ..quantizers.compat.remedies import Space
    from ..quantizers.files.model_saving import ModelTensors
    from ..quantizers.report import QuantReport
    from ..quantizers.spec import QuantSpec
    from ..quantizers.weight import QuantizedWeight
    from .offload import OffloadSettings
    from .record import Recorder, Watcher
    from .sampling import Generation


class Host(Protocol):
    """A model object (MODEL, CLIP) is opaque to nodes; only its host looks inside."""

    name: str

    def list_files(self, folder: str, suffixes: tuple[str, ...] = ()) -> list[str]:
        """Names of the files in a model folder such as `diffusion_models`, all search paths together, sorted."""
        ...

    def resolve(self, folder: str, name: str, suffixes: tuple[str, ...] = ()) -> Path:
        """Path of a file in a model folder.

        Args:
            suffixes: of the files that may be named instead; all by default.
        Raises:
            FileError: names the folders searched and the files there.
        """
        ...

    def components(self, model: Any) -> dict[str, nn.Module]:
        """The modules that hold the weights of a model object: `transformer`, or `clip_l`, `t5xxl`, ..."""
        ...

    def with_layers(self, model: Any, layers: Mapping[str, Mapping[str, nn.Module]]) -> Any:
        """A new model object in which the named layers of the named components are replaced.

        The input keeps its layers; unchanged weights are shared.
        """
        ...

    def load_gguf(self, path: Path, carrier: Carrier, cache_mib: int = 0) -> tuple[Any, QuantReport]:
        """A MODEL from a GGUF file, its quantized tensors left as they are in the file.

        Args:
            cache_mib: MiB of dequantized weights that may be kept between products; 0 keeps none.
        """
        ...

    def load_quantized(self, path: Path, carrier: Carrier) -> tuple[Any, QuantReport]:
        """A MODEL from a file of any scheme of `quantizers.files.schemes`, its weights quantized as in the file.

        Args:
            path: a file, the index of several, or the folder of a component.
        Raises:
            FileError: damaged, not quantized, no diffusion model, or a scheme that is not loaded.
        """
        ...

    def saved_tensors(self, model: Any) -> ModelTensors:
        """What a file of a MODEL would hold: its weights as they are, LoRAs merged.

        Raises:
            SpecError: no model, LoRAs that cannot be merged, or layers that are not read.
        """
        ...

    def text_encoder_types(self) -> Mapping[int, Sequence[str]]:
        """Number of files -> the types of CLIP that so many text encoder files make here."""
        ...

    def load_text_encoder(self, paths: Sequence[Path], kind: str, carrier: Carrier) -> tuple[Any, QuantReport]:
        """A CLIP from GGUF and safetensors files, quantized tensors of GGUF files left as they are in the file.

        Args:
            kind: a type of `text_encoder_types` for so many files.
        """
        ...

    def load_and_quantize(
        self, path: Path, spec: QuantSpec, carrier: Carrier, on_failure: OnFailure, cached: bool
    ) -> tuple[Any, QuantReport]:
        """A MODEL from a full-precision file, quantized tensor by tensor as it is read.

        Args:
            cached: keep the result on disk, and take it from there next time.
        """
        ...

    def make_layer(
        self, weight: QuantizedWeight, bias: Tensor | None, carrier: Carrier, lora: LoraMode = LoraMode.EXACT
    ) -> nn.Module:
        """A linear layer as this host wants it.

        Raises:
            SpecError: the carrier cannot hold this weight here.
        """
        ...

    def prepare_lora(self, model: Any, carrier: Carrier, lora: LoraMode) -> Any:
        """The model as it is to be quantized: for `requantize` with the LoRAs on it merged into full-precision weights,
        unless the host merges them itself when it loads a model.

        Raises:
            SpecError: layers of this carrier cannot take LoRAs in this way here.
        """
        ...

    def compute_device(self, model: Any) -> torch.device | None:
        """Where to quantize the weights of a model object; None is where they lie."""
        ...

    def memory(self, model: Any) -> DeviceFacts:
        """The device that a model object computes on, and what is free there for it.

        Raises:
            SpecError: the device does not tell.
        """
        ...

    def record(self, model: Any) -> tuple[Any, Recorder]:
        """A model object that records the inputs of its linear layers whenever it is sampled with, and where to."""
        ...

    def sampling_choices(self) -> tuple[Sequence[str], Sequence[str]]:
        """Names of the samplers and of the schedulers that KSampler has here."""
        ...

    def sample(self, model: Any, how: Generation, after_step: Callable[[], None]) -> Any:
        """The LATENT that the host's KSampler gives.

        Args:
            model: MODEL; not changed.
            after_step: called when a step is done.
        """
        ...

    def decode(self, vae: Any, latent: Any) -> Any:
        """What the host's decoder makes of a LATENT: an IMAGE (B, H, W, 3), or an AUDIO."""
        ...

    def watched(self, model: Any, watcher: Watcher) -> Any:
        """A model object that a watcher is told of whenever it is sampled with."""
        ...

    def output_path(self, name: str) -> Path:
        """Where a file in the output folder goes.

        Raises:
            FileError: `name` leads out of that folder.
        """
        ...

    def offload_now(self, model: Any) -> tuple[OffloadMode, str | None]:
        """What the host does with this model object: the mode in force, and how it would be carried out now.

        Returns:
            The mode, and one of its `VARIANTS`; None where that cannot be told before the model is loaded.
        """
        ...

    def components_now(self, model: Any) -> dict[str, tuple[OffloadMode, str | None]]:
        """`offload_now` of each of an object's components, by their names in `components_of`."""
        ...

    def offload_space(self, model: Any) -> Space | None:
        """Bytes of a model object's weights and what the device has free for them, where the host decides by it now."""
        ...

    def guarded(self, model: Any, guard: Guard) -> Any:
        """A new model object whose modules are shown to the guard right before they run, with the mode of then.

        A guard that the model object has is replaced.

        Raises:
            SpecError: no model object of this host.
        """
        ...

    def check_offload(self, mode: OffloadMode, settings: OffloadSettings | None = None) -> None:
        """Whether `set_offload` can set a mode, and carry it out with these settings on this machine.

        Raises:
            SpecError: it cannot, with the way to it.
        """
        ...

    def set_offload(self, model: Any, settings: OffloadSettings) -> Any:
        """A new model object that runs with these offload settings.

        Raises:
            SpecError: the host cannot do this, with the way to it.
        """
        ...

    def show_text(self, text: str) -> None:
        """Show text on the node that runs now."""
        ...

    def progress(self, items: Iterable[Any], total: int) -> Iterable[Any]:
        """Iterate with a progress bar; raises the host's interruption exception when cancelled."""
        ...


def missing(name: str, searched: str, files: list[str], suffixes: tuple[str, ...]) -> str:
    """The message of `Host.resolve`."""
    kind = f"{' and '.join(suffixes)} files" if suffixes else "Files"
    return f"'{name}' is not in {searched}.{near(name, files)}\n{kind} there: {', '.join(files[:20]) or 'none'}."


def path_inside(folder: Path, name: str) -> Path:
    """The path of a file below a folder.

    Raises:
        FileError: the name is empty, absolute or leads out of the folder.
    """
    path = Path(os.path.normpath(folder / name))
    if path == Path(os.path.normpath(folder)) or not path.is_relative_to(os.path.normpath(folder)):
        raise FileError(f"filename '{name}' leads out of the output folder.\nGive a name inside it, such as 'a/b'.")
    return path
