"""QuantizeModel, QuantizeTextEncoder, QuantizeControlNet and QuantConfig."""

from __future__ import annotations

from typing import Any

from ..hosts import current
from ..quantizers.apply import LoraMode, OnFailure, quantize_linears
from ..quantizers.compat.modes import Carrier
from ..quantizers.errors import SpecError
from ..quantizers.report import QuantReport, merge
from ..quantizers.spec import QuantSpec
from .common import CATEGORY, format_input, optional_inputs, spec_from_inputs, with_report

ALL = "all"
ENCODERS = (ALL, "clip_l", "t5xxl")


class QuantizeModel:
    DESCRIPTION = (
        "Quantizes the linear layers of a model. Embedders, norms, modulation and the final layer stay at full "
        "precision. The input model is not changed: another branch of the graph can use it as it is."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("MODEL", "REPORT")
    RETURN_NAMES = ("model", "report")
    OUTPUT_TOOLTIPS = ("The quantized model.", "What became of each layer, its size and its error.")
    FUNCTION = "quantize"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        model = ("MODEL", {"tooltip": "A full-precision model."})
        return {"required": {"model": model, "format": format_input()}, "optional": optional_inputs()}

    def quantize(
        self,
        model: Any,
        format: str,
        carrier: str = Carrier.QUANTWIRE.value,
        config: QuantSpec | None = None,
        keep_layers: str = "",
        lora: str = LoraMode.EXACT.value,
        on_failure: str = OnFailure.ERROR.value,
    ) -> dict[str, Any]:
        spec = spec_from_inputs(format, config, keep_layers)
        quantized, report = _quantize(model, ALL, spec, carrier, on_failure, lora)
        return with_report(report, quantized, report)


class QuantizeTextEncoder:
    DESCRIPTION = (
        "Quantizes the linear layers of text encoders. Embeddings and norms stay at full precision. "
        "The input is not changed."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("CLIP", "REPORT")
    RETURN_NAMES = ("clip", "report")
    OUTPUT_TOOLTIPS = ("The quantized text encoders.", "What became of each layer, its size and its error.")
    FUNCTION = "quantize"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        which = (list(ENCODERS), {"default": ALL, "tooltip": "Which of the loaded encoders to quantize."})
        clip = ("CLIP", {"tooltip": "Full-precision text encoders."})
        return {
            "required": {"clip": clip, "format": format_input(), "encoders": which},
            "optional": optional_inputs(),
        }

    def quantize(
        self,
        clip: Any,
        format: str,
        encoders: str = ALL,
        carrier: str = Carrier.QUANTWIRE.value,
        config: QuantSpec | None = None,
        keep_layers: str = "",
        lora: str = LoraMode.EXACT.value,
        on_failure: str = OnFailure.ERROR.value,
    ) -> dict[str, Any]:
        spec = spec_from_inputs(format, config, keep_layers)
        quantized, report = _quantize(clip, encoders, spec, carrier, on_failure, lora)
        return with_report(report, quantized, report)


class QuantizeControlNet:
    DESCRIPTION = "Quantizes the linear layers of a ControlNet. The input is not changed."
    CATEGORY = CATEGORY
    RETURN_TYPES = ("CONTROL_NET", "REPORT")
    RETURN_NAMES = ("control_net", "report")
    OUTPUT_TOOLTIPS = ("The quantized ControlNet.", "What became of each layer, its size and its error.")
    FUNCTION = "quantize"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        net = ("CONTROL_NET", {"tooltip": "A full-precision ControlNet."})
        return {"required": {"control_net": net, "format": format_input()}, "optional": optional_inputs()}

    def quantize(
        self,
        control_net: Any,
        format: str,
        carrier: str = Carrier.QUANTWIRE.value,
        config: QuantSpec | None = None,
        keep_layers: str = "",
        lora: str = LoraMode.EXACT.value,
        on_failure: str = OnFailure.ERROR.value,
    ) -> dict[str, Any]:
        spec = spec_from_inputs(format, config, keep_layers)
        quantized, report = _quantize(control_net, ALL, spec, carrier, on_failure, lora)
        return with_report(report, quantized, report)


class QuantConfig:
    DESCRIPTION = "Backend options as a URI, for the config input of the Quantize nodes."
    CATEGORY = CATEGORY
    RETURN_TYPES = ("QUANT_CONFIG",)
    RETURN_NAMES = ("config",)
    OUTPUT_TOOLTIPS = ("For the input config of QuantizeModel and QuantizeTextEncoder.",)
    FUNCTION = "parse"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tooltip = (
            "backend;argument=value;... for example bnb;bits=4;bits4-quant-type=nf4;bits4-use-double-quant=true. "
            "A bare format id is a URI too."
        )
        uri = ("STRING", {"default": "bnb;bits=4;bits4-quant-type=nf4", "tooltip": tooltip})
        return {"required": {"uri": uri}}

    @classmethod
    def VALIDATE_INPUTS(cls, uri: str | None) -> bool | str:
        if uri is None:  # a link: the text is not known yet
            return True
        try:
            QuantSpec.from_uri(uri)
        except SpecError as err:
            return " ".join(str(err).splitlines())
        return True

    def parse(self, uri: str) -> tuple[QuantSpec]:
        return (QuantSpec.from_uri(uri),)


def _quantize(
    model: Any, which: str, spec: QuantSpec, carrier: str, on_failure: str, lora: str
) -> tuple[Any, QuantReport]:
    host = current()
    components = host.components(model)
    if which != ALL:
        if which not in components:
            raise SpecError(f"There is no {which} encoder here, only {', '.join(components)}.")
        components = {which: components[which]}
    layers: dict[str, Any] = {}
    reports: list[QuantReport] = []
    for name, module in components.items():
        layers[name], report = quantize_linears(
            module,
            spec,
            carrier=Carrier(carrier),
            on_failure=OnFailure(on_failure),
            make_layer=lambda weight, bias, kind: host.make_layer(weight, bias, kind, LoraMode(lora)),
            device=host.compute_device(model),
            progress=host.progress,
            title=name,
        )
        reports.append(report)
    return host.with_layers(model, layers), merge(reports)
