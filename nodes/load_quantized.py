"""LoadQuantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..hosts import current
from ..hosts.base import missing
from ..quantizers.compat.modes import Carrier
from ..quantizers.errors import FileError, QuantwireError
from .common import CATEGORY, carrier_input, stamp, with_report

FOLDERS = ("diffusion_models", "checkpoints")
SUFFIXES = (".safetensors", ".sft", ".gguf")


class LoadQuantized:
    DESCRIPTION = (
        "Opens a diffusion model whose weights are quantized in its file: bitsandbytes, quanto, SDNQ, torchao, NNCF, "
        "compressed-tensors, fp8 with and without scales, ComfyUI's own formats, GGUF, and files of this pack, in "
        "ComfyUI's or diffusers' layout. Weights stay as they are in the file, never at full size. quantwire run "
        "without a server opens FLUX."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("MODEL", "REPORT")
    RETURN_NAMES = ("model", "report")
    OUTPUT_TOOLTIPS = ("The model.", "Types and sizes of its layers, and what wrote them.")
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tooltip = (
            "A file of the folders diffusion_models or checkpoints. Of a model in several files, any of them; of a "
            "diffusers folder, its weights file. Of an all-in-one checkpoint the diffusion model is taken."
        )
        return {
            "required": {"model_name": (_names(), {"tooltip": tooltip})},
            "optional": {"carrier": carrier_input()},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, model_name: str | None) -> bool | str:
        if model_name is None:  # a link: the name is not known yet
            return True
        try:
            find_model(model_name)
        except QuantwireError as err:
            return " ".join(str(err).splitlines())
        return True

    @classmethod
    def IS_CHANGED(cls, model_name: str, **_: Any) -> str:
        from ..quantizers.files.gguf_parts import named_parts
        from ..quantizers.files.locate import locate

        path = find_model(model_name)
        try:
            files = locate(path).files
        except FileError:  # what is wrong is said when it is loaded
            files = (path,)
        return stamp([*(part for file in files for part in named_parts(file)), *_beside(path)])

    def load(self, model_name: str, carrier: str = Carrier.QUANTWIRE.value) -> dict[str, Any]:
        model, report = current().load_quantized(find_model(model_name), Carrier(carrier))
        return with_report(report, model, report)


def find_model(name: str) -> Path:
    """What a name of the list stands for: a file, the index of a part, or the folder of a component.

    Raises:
        FileError: it is in none of the folders.
    """
    from ..quantizers.files.whole_model import model_of

    host = current()
    for folder in FOLDERS:
        try:
            return model_of(host.resolve(folder, name, SUFFIXES))
        except FileError:
            continue
    raise FileError(missing(name, f"the folders {' and '.join(FOLDERS)}", _names(), SUFFIXES))


def _names() -> list[str]:
    host = current()
    return sorted({name for folder in FOLDERS for name in host.list_files(folder, SUFFIXES)})


def _beside(path: Path) -> list[Path]:
    return sorted(path.glob("*.json")) if path.is_dir() else []
