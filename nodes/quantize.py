"""QuantizeModel, QuantizeTextEncoder, QuantizeControlNet, QuantConfig and QuantRules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..quantizers.choices import LoraMode, OnFailure, OnQuantized
from ..quantizers.compat.modes import Carrier
from ..quantizers.errors import SpecError
from ..quantizers.rules import Rule, RuleSet, parse_rules
from ..quantizers.spec import QuantSpec, canonical
from .common import ALL, CATEGORY, LLM, check_format, format_input, one_line, optional_inputs, with_report

# ComfyUI's names of the encoders that its CLIP objects hold; `per_encoder` takes any name.
ENCODERS = (
    *(ALL, "clip_l", "t5xxl", LLM, "clip_g", "clip_h", "umt5xxl", "mt5xl", "pile_t5xl", "t5base", "t5gemma"),
    *("byt5_small", "hydit_clip", "jina_clip_2", "llama", "gemma", "gemma2_2b", "gemma3_4b", "gemma3_12b", "gemma4"),
    *("gpt_oss", "ministral3_3b", "mistral3_24b", "qwen25_3b", "qwen25_7b", "qwen3_06b", "qwen3_2b", "qwen3_4b"),
    *("qwen3_8b", "qwen3vl_4b", "qwen3vl_8b", "qwen3vl_32b"),
)


def _on_quantized() -> tuple[list[str], dict[str, Any]]:
    tooltip = (
        "What to do with layers that are quantized already. refuse: stop and say what they are. dequantize first: read "
        "them back and quantize again, where no full-precision model is to be had; the errors of both add up."
    )
    return ([q.value for q in OnQuantized], {"default": OnQuantized.REFUSE.value, "tooltip": tooltip})


class QuantizeModel:
    DESCRIPTION = (
        "Quantizes the linear layers of a model. Embedders, norms, small modulation layers and the final layer stay at "
        "full precision, by rules for each model family. The input model is not changed: another branch of the graph "
        "can use it as it is."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("MODEL", "REPORT")
    RETURN_NAMES = ("model", "report")
    OUTPUT_TOOLTIPS = ("The quantized model.", "What became of each layer, its size and its error.")
    FUNCTION = "quantize"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        model = ("MODEL", {"tooltip": "A full-precision model."})
        return {
            "required": {"model": model, "format": format_input(auto=True)},
            "optional": {**optional_inputs(), "on_quantized": _on_quantized()},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, format: str | None = None) -> bool | str:
        return check_format(format, auto=True)

    def quantize(
        self,
        model: Any,
        format: str,
        carrier: str = Carrier.QUANTWIRE.value,
        config: QuantSpec | RuleSet | None = None,
        keep_layers: str = "",
        lora: str = LoraMode.EXACT.value,
        on_failure: str = OnFailure.ERROR.value,
        on_quantized: str = OnQuantized.REFUSE.value,
    ) -> dict[str, Any]:
        from .request import Request, quantize

        asked = Request(format, carrier, config, keep_layers, lora, on_failure, on_quantized)
        quantized, report = quantize(model, asked)
        return with_report(report, quantized, report)


class QuantizeTextEncoder:
    DESCRIPTION = (
        "Quantizes the linear layers of text encoders, each in a format of its own if you like. Embeddings, norms and "
        "T5's wo stay at full precision. "
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
        formats = (
            "Formats of single encoders, one a line: t5xxl = bnb-nf4, llm = bnb;bits=8, clip_l = keep. The others get "
            "the format above."
        )
        per_encoder = ("STRING", {"default": "", "multiline": True, "tooltip": formats})
        clip = ("CLIP", {"tooltip": "Full-precision text encoders."})
        return {
            "required": {"clip": clip, "format": format_input(auto=True), "encoders": which},
            "optional": {**optional_inputs(), "on_quantized": _on_quantized(), "per_encoder": per_encoder},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, per_encoder: str | None = None, format: str | None = None) -> bool | str:
        from .request import check_encoders

        try:
            check_encoders(per_encoder or "")  # None is a link: the text is not known yet
        except SpecError as err:
            return one_line(err)
        return check_format(format, auto=True)

    def quantize(
        self,
        clip: Any,
        format: str,
        encoders: str = ALL,
        carrier: str = Carrier.QUANTWIRE.value,
        config: QuantSpec | RuleSet | None = None,
        keep_layers: str = "",
        lora: str = LoraMode.EXACT.value,
        on_failure: str = OnFailure.ERROR.value,
        on_quantized: str = OnQuantized.REFUSE.value,
        per_encoder: str = "",
    ) -> dict[str, Any]:
        from .request import Request, quantize

        asked = Request(format, carrier, config, keep_layers, lora, on_failure, on_quantized, encoders, per_encoder)
        quantized, report = quantize(clip, asked)
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
        return {
            "required": {"control_net": net, "format": format_input(auto=True)},
            "optional": {**optional_inputs(), "on_quantized": _on_quantized()},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, format: str | None = None) -> bool | str:
        return check_format(format, auto=True)

    def quantize(
        self,
        control_net: Any,
        format: str,
        carrier: str = Carrier.QUANTWIRE.value,
        config: QuantSpec | RuleSet | None = None,
        keep_layers: str = "",
        lora: str = LoraMode.EXACT.value,
        on_failure: str = OnFailure.ERROR.value,
        on_quantized: str = OnQuantized.REFUSE.value,
    ) -> dict[str, Any]:
        from .request import Request, quantize

        asked = Request(format, carrier, config, keep_layers, lora, on_failure, on_quantized)
        quantized, report = quantize(control_net, asked)
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
            return one_line(err)
        return True

    def parse(self, uri: str) -> tuple[QuantSpec]:
        return (QuantSpec.from_uri(uri),)


class QuantRules:
    DESCRIPTION = (
        "Formats of single layers, for the config input of the Quantize nodes. The rules extend the built-in lists of "
        "layers to keep; two that contradict each other are refused."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("QUANT_CONFIG",)
    RETURN_NAMES = ("config",)
    OUTPUT_TOOLTIPS = ("For the input config of the Quantize nodes.",)
    FUNCTION = "parse"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tooltip = (
            "One rule a line: a layer pattern, =, and a format id, a URI or keep. A pattern is a glob such as "
            "*.attn.*, a part of the name such as img_attn, or re: and a regular expression. # starts a comment. "
            "JSON is read too."
        )
        base = (
            "Options for all other layers, from QuantConfig, or more rules. Without one, the node's format is theirs."
        )
        text = {"default": "*.attn.* = bnb-int8", "multiline": True, "tooltip": tooltip}
        return {
            "required": {"rules": ("STRING", text)},
            "optional": {"config": ("QUANT_CONFIG", {"tooltip": base})},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, rules: str | None) -> bool | str:
        if rules is None:  # a link: the text is not known yet
            return True
        try:
            _rule_set(rules)
        except SpecError as err:
            return one_line(err)
        return True

    def parse(self, rules: str, config: QuantSpec | RuleSet | None = None) -> tuple[QuantSpec | RuleSet]:
        found = _rule_set(rules)
        if config is None:
            return (RuleSet(found),)
        return (replace(config, rules=(*config.rules, *found)),)


def _rule_set(text: str) -> tuple[Rule, ...]:
    return tuple(map(canonical, parse_rules(text)))
