"""Layouts that are known and named, but not loaded: GPTQ, AWQ, nunchaku's SVDQuant, fp8 with a scale of its own.

    GPTQ        X.qweight int32 (K * bits / 32, N), X.qzeros, X.scales (G, N), X.g_idx
    AWQ         X.qweight int32 (K, N * bits / 32), X.qzeros, X.scales (G, N), values of a word interleaved
    TinyChat    X.qweight of 4-bit values, four rows interleaved, X.scales (G, N), X.scaled_zeros; nunchaku's T5 too
    SVDQuant    X.qweight int8 (N, K/2), X.wscales (K/64 or K/16, N), X.proj_down and X.proj_up (older: lora_down,
                lora_up), X.smooth_factor; of its AWQ layers X.qweight int32 (N/4, K/2), X.wscales, X.wzeros
    fp8         X.weight fp8 with X.scale or X.weight.scale, and no config that says what the scale is

Their values are packed for the kernels that read them, and no format here holds the same numbers.

Source: GPTQModel and AutoAWQ's `pack` as published; diffusers/quantizers/nunchaku/utils.py at 0.42.1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

from ...errors import FileError
from ..model_file import ModelFile
from .base import Fault, Layer
from .broken import FLOATS
from .configs import as_object, quantization_config

if TYPE_CHECKING:
    from ...weight import QuantizedWeight
    from .base import Read

INTEGER_PARTS = ("qweight", "qzeros", "scales")
DEFAULT_BITS = 4  # of GPTQ without a config, as nearly all have
SVDQ_SCALES = "wscales"
TINYCHAT_ZEROS = "scaled_zeros"
FP8 = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
SVDQ_PARTS = {SVDQ_SCALES, "wzeros", "lora_down", "lora_up", "proj_down", "proj_up", "smooth_factor"}
_FAILS = "Every loader of this layout stops with an error about missing keys."


class _Named:
    """A layout that is not loaded.

    Attributes:
        why: what opens it, and what to use here.
    """

    id: str
    title: str
    library: str
    why: str

    def weight(self, layer: Layer, read: Read) -> QuantizedWeight:
        raise FileError(f"'{layer.name}' is {layer.type}: {layer.why}")

    def named(self, file: ModelFile, module: str, lasts: Iterable[str], kind: str, shape: tuple[int, ...]) -> Layer:
        tensors = {"qdata" if last == "qweight" else last: f"{module}.{last}" for last in lasts if last != "bias"}
        found = (file.entries.get(f"{module}.{last}") for last in ("scales", SVDQ_SCALES, "proj_up"))
        dtype = next((e.dtype for e in found if e is not None and e.dtype in FLOATS), "BF16")
        return Layer(f"{module}.weight", self.id, kind, "", tensors, shape, dtype, why=self.why)


class GptqScheme(_Named):
    id = "gptq"
    title = "GPTQ"
    library = "GPTQModel, AutoGPTQ"
    why = (
        "packed for GPTQ's kernels.\nOpen it with GPTQModel, transformers or vLLM; here, convert the full-precision "
        "model, for example to a GGUF type or nncf-int4-asym."
    )

    def find(self, file: ModelFile) -> Iterable[Layer | Fault]:
        bits = 0
        for module, lasts in _integers(file):
            absent = [part for part in INTEGER_PARTS if part not in lasts]
            if absent:  # said here for AWQ too
                there = next(part for part in INTEGER_PARTS if part in lasts)
                name = f"{module}.{absent[0]}"
                yield Fault("tensor-missing", name, f"'{name}' is missing, but '{module}.{there}' is there.", _FAILS)
                yield self.named(file, module, lasts, "GPTQ or AWQ", file.entries[f"{module}.{there}"].shape)
            elif _is_gptq(file, module, lasts):
                bits = bits or _bits(file)
                qweight, scales = (file.entries[f"{module}.{part}"].shape for part in ("qweight", "scales"))
                two = len(qweight) == len(scales) == 2
                shape = (scales[1], qweight[0] * 32 // bits) if two else qweight
                yield self.named(file, module, lasts, f"GPTQ, {bits} bits", shape)


class AwqScheme(_Named):
    id = "awq"
    title = "AWQ"
    library = "AutoAWQ"
    why = (
        "packed for AWQ's kernels.\nOpen it with transformers or vLLM; here, convert the full-precision model, for "
        "example to a GGUF type or nncf-int4-asym."
    )

    def find(self, file: ModelFile) -> Iterable[Layer | Fault]:
        for module, lasts in _integers(file):
            if not set(INTEGER_PARTS) <= set(lasts) or _is_gptq(file, module, lasts):
                continue
            qweight, scales = (file.entries[f"{module}.{part}"].shape for part in ("qweight", "scales"))
            two = len(qweight) == len(scales) == 2 and scales[1] > 0
            bits = 32 * qweight[1] // scales[1] if two else 0
            shape = (scales[1], qweight[0]) if two else qweight
            yield self.named(file, module, lasts, f"AWQ, {bits} bits" if bits else "AWQ", shape)


class TinyChatScheme(_Named):
    id = "awq-tinychat"
    title = "AWQ"
    library = "llm-awq (TinyChat), nunchaku"
    why = (
        "packed for TinyChat's kernels.\nOpen it with nunchaku's nodes, if it is a text encoder for them; here, use "
        "the full-precision or a GGUF file."
    )

    def find(self, file: ModelFile) -> Iterable[Layer | Fault]:
        for module, lasts in file.groups.items():
            if not {"qweight", TINYCHAT_ZEROS} <= set(lasts):
                continue
            if "scales" not in lasts:
                text = f"'{module}.scales' is missing, but '{module}.qweight' is there."
                yield Fault("tensor-missing", f"{module}.scales", text, _FAILS)
            zeros = file.entries[f"{module}.{TINYCHAT_ZEROS}"]
            qweight, scales = file.entries[f"{module}.qweight"], file.entries.get(f"{module}.scales", zeros).shape
            n = scales[-1] if len(scales) == 2 else 0
            yield self.named(file, module, lasts, "AWQ, 4 bits", (n, 2 * qweight.nbytes // n) if n else qweight.shape)


def _integers(file: ModelFile) -> Iterator[tuple[str, tuple[str, ...]]]:
    for module, lasts in file.groups.items():
        integer = "qweight" in lasts and SVDQ_PARTS.isdisjoint(lasts) and TINYCHAT_ZEROS not in lasts
        if integer or "qzeros" in lasts:
            yield module, lasts


def _is_gptq(file: ModelFile, module: str, lasts: tuple[str, ...]) -> bool:
    """GPTQ packs along K and AWQ along N: a row of GPTQ's words is as long as one of scales, AWQ's is shorter."""
    if "g_idx" in lasts or quantization_config(file, "gptq"):
        return True
    if quantization_config(file, "awq"):
        return False
    return file.entries[f"{module}.scales"].shape[-1:] == file.entries[f"{module}.qweight"].shape[-1:]


def _bits(file: ModelFile) -> int:
    places: list[Mapping[str, Any]] = [
        quantization_config(file, "gptq"),
        file.configs.get("quantize_config.json", {}),
        as_object(file.metadata.get("quantize_config")),
    ]
    told = next((place["bits"] for place in places if isinstance(place.get("bits"), int)), DEFAULT_BITS)
    return told if told in (2, 3, 4, 8) else DEFAULT_BITS


class SvdQuantScheme(_Named):
    id = "svdquant"
    title = "nunchaku"
    library = "nunchaku (deepcompressor)"
    why = (
        "4-bit weights packed for nunchaku's kernels, with low-rank factors in 16 bits.\nOpen it with nunchaku's nodes "
        "or diffusers; here, convert the full-precision model, for example to comfy-nvfp4 or sdnq-uint4."
    )

    def find(self, file: ModelFile) -> Iterable[Layer | Fault]:
        for module, lasts in file.groups.items():
            if "qweight" not in lasts or SVDQ_PARTS.isdisjoint(lasts):
                continue
            if SVDQ_SCALES not in lasts:
                text = f"'{module}.{SVDQ_SCALES}' is missing, but '{module}.qweight' is there."
                yield Fault("tensor-missing", f"{module}.{SVDQ_SCALES}", text, _FAILS)
            shape = file.entries[f"{module}.qweight"].shape
            awq = "wzeros" in lasts
            if len(shape) == 2:
                shape = (4 * shape[0], 2 * shape[1]) if awq else (shape[0], 2 * shape[1])
            kind = "AWQ, 4 bits" if awq else _svdq_type(file, module)
            yield self.named(file, module, lasts, kind, shape)


class Fp8ScaleScheme(_Named):
    id = "fp8-scale"
    title = "fp8"
    library = "a program that the file does not name"
    why = (
        "nothing says whether its scale is multiplied or divided by, or what else was done.\nSDNQ says so in the "
        "config.json of its folder: give the folder if the file is of SDNQ. Else convert the full-precision model."
    )

    def find(self, file: ModelFile) -> Iterable[Layer | Fault]:
        for name, entry in file.entries.items():
            if entry.dtype not in FP8 or len(entry.shape) < 2 or not name.endswith(".weight"):
                continue
            places = (f"{name}.scale", f"{name.removesuffix('weight')}scale")
            scale = next((x for x in places if file.has(x, *FLOATS)), None)
            if scale is not None:
                kind, roles = f"{FP8[entry.dtype]} with a scale", {"qdata": name, "scale": scale}
                yield Layer(name, self.id, kind, "", roles, entry.shape, why=self.why)


def _svdq_type(file: ModelFile, module: str) -> str:
    """By the metadata, else by the dtype of the scales."""
    told: object = as_object(file.metadata.get("quantization_config")).get("weight")
    word: object = cast("dict[str, Any]", told).get("dtype") if isinstance(told, dict) else None
    if not isinstance(word, str):
        word = "nvfp4" if file.has(f"{module}.{SVDQ_SCALES}", "F8_E4M3") else "int4"
    return f"SVDQuant, {word}"
