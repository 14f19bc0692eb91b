"""InspectModel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..hosts import current
from ..quantizers.errors import FileError, QuantwireError
from .common import CATEGORY, stamp, with_report

FOLDERS = ("diffusion_models", "text_encoders", "checkpoints", "vae", "loras", "controlnet", "clip_vision")
SUFFIXES = (".safetensors", ".sft", ".gguf")


class InspectModel:
    DESCRIPTION = (
        "Tells what a model file is: component and model, how each group of layers is quantized, what wrote it, what "
        "loads it here and how much memory it takes. Only its header is read, so this takes no time on large files."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("REPORT", "STRING")
    RETURN_NAMES = ("report", "text")
    OUTPUT_TOOLTIPS = ("What the file is, as data.", "The same as text, warnings first.")
    FUNCTION = "inspect"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        host = current()
        files = [f"{folder}/{name}" for folder in FOLDERS for name in host.list_files(folder, SUFFIXES)]
        name = "A safetensors or GGUF file. Of a model in several files any of them; of a diffusers folder its weights."
        layers = (
            "List layers too, a line each: * for all, a pattern such as *.img_attn.*, or a part of a name. Empty: none."
        )
        return {
            "required": {"model_name": (files, {"tooltip": name})},
            "optional": {"layers": ("STRING", {"default": "", "tooltip": layers})},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, model_name: str | None) -> bool | str:
        if model_name is None:  # a link: the name is not known yet
            return True
        try:
            _resolve(model_name)
        except QuantwireError as err:
            return " ".join(str(err).splitlines())
        return True

    @classmethod
    def IS_CHANGED(cls, model_name: str, **_: Any) -> str:
        return stamp(_files(_resolve(model_name)))

    def inspect(self, model_name: str, layers: str = "") -> dict[str, Any]:
        from ..quantizers.files.inspect import inspect

        found = inspect(_resolve(model_name), layers.strip() or None)
        return with_report(found, found, str(found))


def _resolve(model_name: str) -> Path:
    folder, _, name = model_name.partition("/")
    if folder not in FOLDERS or not name:
        raise FileError(f"'{model_name}' is not of the form FOLDER/NAME.\nFolders: {', '.join(FOLDERS)}.")
    return current().resolve(folder, name, SUFFIXES)


def _files(path: Path) -> list[Path]:
    """Everything that is read when a file is inspected: its other parts, and the JSON files beside it."""
    from ..quantizers.files.gguf_parts import named_parts
    from ..quantizers.files.locate import locate
    from ..quantizers.files.whole_model import model_of

    whole = model_of(path)
    try:
        files = [part for file in locate(whole).files for part in named_parts(file)]
    except FileError:  # what is wrong is said when it is inspected
        files = [path]
    return [*files, *(sorted(whole.glob("*.json")) if whole.is_dir() else [])]
