"""LoadGGUF."""

from __future__ import annotations

from typing import Any

from ..hosts import current
from ..quantizers.compat.modes import Carrier
from ..quantizers.errors import QuantwireError
from .common import CATEGORY, carrier_input, with_report

FOLDER = "diffusion_models"


class LoadGGUF:
    DESCRIPTION = "Opens a diffusion model in a GGUF file. Its weights stay quantized in memory."
    CATEGORY = CATEGORY
    RETURN_TYPES = ("MODEL", "REPORT")
    RETURN_NAMES = ("model", "report")
    OUTPUT_TOOLTIPS = ("The model.", "Types and sizes of its layers.")
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        files = current().list_files(FOLDER, (".gguf",))
        name = (files, {"tooltip": "A .gguf file of the folder diffusion_models."})
        return {"required": {"gguf_name": name}, "optional": {"carrier": carrier_input()}}

    @classmethod
    def VALIDATE_INPUTS(cls, gguf_name: str | None) -> bool | str:
        if gguf_name is None:  # a link: the name is not known yet
            return True
        try:
            current().resolve(FOLDER, gguf_name)
        except QuantwireError as err:
            return " ".join(str(err).splitlines())
        return True

    @classmethod
    def IS_CHANGED(cls, gguf_name: str, carrier: str = "") -> str:
        stat = current().resolve(FOLDER, gguf_name).stat()
        return f"{stat.st_mtime_ns}:{stat.st_size}"

    def load(self, gguf_name: str, carrier: str = Carrier.QUANTWIRE.value) -> dict[str, Any]:
        host = current()
        model, report = host.load_gguf(host.resolve(FOLDER, gguf_name), Carrier(carrier))
        return with_report(report, model, report)
