"""LoadGGUF and LoadAndQuantize."""

from __future__ import annotations

from typing import Any

from ..hosts import current
from ..quantizers.choices import OnFailure
from ..quantizers.compat.modes import Carrier
from ..quantizers.errors import QuantwireError
from ..quantizers.spec import QuantSpec
from .common import (
    CATEGORY,
    carrier_input,
    check_format,
    format_input,
    optional_inputs,
    spec_from_inputs,
    stamp,
    with_report,
)

FOLDER = "diffusion_models"
SAFETENSORS = (".safetensors", ".sft")
MAKE_ONE = "`quantwire convert MODEL.safetensors MODEL.gguf --type Q8_0` makes one."


class LoadGGUF:
    DESCRIPTION = (
        "Opens a diffusion model in a GGUF file: FLUX, SD 1 to 3.5, Wan, Qwen-Image, Lumina 2, Z-Image, LTX-Video and "
        "what else ComfyUI knows; quantwire run without a server opens FLUX. The weights of its linear layers stay "
        "quantized in memory; what cannot is dequantized at load, and named in the report."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("MODEL", "REPORT")
    RETURN_NAMES = ("model", "report")
    OUTPUT_TOOLTIPS = ("The model.", "Types and sizes of its layers.")
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        files = current().list_files(FOLDER, (".gguf",))
        tooltip = (
            "A .gguf file of the folders diffusion_models, unet or unet_gguf that holds a diffusion model alone. Of a "
            "model in several files, any of them. Text encoders are for LoadGGUFTextEncoder."
        )
        name = (files, {"tooltip": tooltip})
        cache = (
            "MiB of dequantized weights that are kept between steps, where so much memory is free beside the model: "
            "layers whose weight is kept compute as fast as at full precision. 0 keeps none."
        )
        mib = ("INT", {"default": 0, "min": 0, "max": 1 << 20, "step": 64, "tooltip": cache})
        return {"required": {"gguf_name": name}, "optional": {"carrier": carrier_input(), "cache_mib": mib}}

    @classmethod
    def VALIDATE_INPUTS(cls, gguf_name: str | None) -> bool | str:
        answer = _validated(gguf_name, (".gguf",))
        return answer if answer is True else f"{answer} {MAKE_ONE}"

    @classmethod
    def IS_CHANGED(cls, gguf_name: str, **_: Any) -> str:
        return _state(gguf_name)

    def load(self, gguf_name: str, carrier: str = Carrier.QUANTWIRE.value, cache_mib: int = 0) -> dict[str, Any]:
        host = current()
        model, report = host.load_gguf(host.resolve(FOLDER, gguf_name), Carrier(carrier), cache_mib)
        return with_report(report, model, report)


class LoadAndQuantize:
    DESCRIPTION = (
        "Opens a full-precision diffusion model and quantizes it tensor by tensor while it is read, so that the whole "
        "model is never in memory. The result is kept on disk, and the next load takes it from there. "
        "Formats are chosen by name here; auto is for the Quantize nodes, which have the model's layers by then."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("MODEL", "REPORT")
    RETURN_NAMES = ("model", "report")
    OUTPUT_TOOLTIPS = ("The quantized model.", "What became of each layer, and whether it came from the cache.")
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        files = current().list_files(FOLDER, SAFETENSORS)
        name = (files, {"tooltip": "A full-precision safetensors file of the folder diffusion_models."})
        cache = (
            "Keep the quantized model on disk and take it from there next time. The environment variables "
            "QUANTWIRE_CACHE and QUANTWIRE_CACHE_GIB name the folder and its size (32 by default)."
        )
        shared = optional_inputs()
        optional = {n: shared[n] for n in ("carrier", "config", "keep_layers", "on_failure")}
        optional["cache"] = ("BOOLEAN", {"default": True, "tooltip": cache})
        return {"required": {"model_name": name, "format": format_input()}, "optional": optional}

    @classmethod
    def VALIDATE_INPUTS(cls, model_name: str | None, format: str | None = None) -> bool | str:
        answer = _validated(model_name, SAFETENSORS)
        return check_format(format) if answer is True else answer

    @classmethod
    def IS_CHANGED(cls, model_name: str, **_: Any) -> str:
        return _state(model_name)

    def load(
        self,
        model_name: str,
        format: str,
        carrier: str = Carrier.QUANTWIRE.value,
        config: QuantSpec | None = None,
        keep_layers: str = "",
        on_failure: str = OnFailure.ERROR.value,
        cache: bool = True,
    ) -> dict[str, Any]:
        host = current()
        spec = spec_from_inputs(format, config, keep_layers)
        path = host.resolve(FOLDER, model_name)
        model, report = host.load_and_quantize(path, spec, Carrier(carrier), OnFailure(on_failure), cache)
        return with_report(report, model, report)


def _validated(name: str | None, suffixes: tuple[str, ...]) -> bool | str:
    if name is None:  # a link: the name is not known yet
        return True
    try:
        current().resolve(FOLDER, name, suffixes)
    except QuantwireError as err:
        return " ".join(str(err).splitlines())
    return True


def _state(name: str) -> str:
    from ..quantizers.files.gguf_parts import named_parts

    return stamp(named_parts(current().resolve(FOLDER, name)))
