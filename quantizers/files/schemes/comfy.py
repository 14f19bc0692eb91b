"""ComfyUI's own quantized files.

Per layer `X.weight`, its scales, and what it is: `X.comfy_quant`, JSON in bytes (`{"format": "nvfp4"}`), or the same
JSON under X in `layers` of the file's metadata `_quantization_metadata`, which wins where both stand. See `comfy_parts`
for the tensors of each format.

nvfp4 and mxfp8 are stored padded to multiples of 16 and 32. The host knows (N, K) from its model; a file of others
tells N by the length of the bias at most, and K not at all. So `Layer.shape` is (N by the bias, K as stored), unless
the JSON has an `orig_shape`, which this pack writes for padded weights. Who knows the model's shape gives
`dataclasses.replace(layer, shape=(n, k))` to `weight`.

`input_scale` (of the activations) and `pre_quant_scale` (K factors of the activations, which AWQ moved out of the
weight) are attributes of ComfyUI's layer, not of the weight: they are roles of the layer and named in its options. A
product without `pre_quant_scale` is wrong, one without `input_scale` is the same up to how activations are rounded.

Source: Comfy-Org/ComfyUI comfy/ops.py `_load_quantized_module`, comfy/utils.py `convert_old_quants`,
comfy/quant_ops.py at 0.33.0.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

from ...errors import FileError
from ..faults import STOCK_LOADERS
from ..model_file import ModelFile
from .base import Fault, Layer
from .broken import Broken, attempt
from .comfy_parts import FORMATS, Conf, guess, look
from .comfy_weight import make_weight

if TYPE_CHECKING:
    from ...weight import QuantizedWeight
    from .base import Read

METADATA = "_quantization_metadata"
SUFFIX = "comfy_quant"
PREFIXES = ("model.diffusion_model.", "model.model.", "net.", "model.", "diffusion_model.")
_STOPS = "ComfyUI stops with an error while it loads the file."
DEFAULTS: Mapping[str, Any] = {
    **{"full_precision_matrix_mult": False, "convrot": False, "convrot_groupsize": 256, "group_size": 16},
    **{"linear_dtype": "int4", "params": {}},
}


class ComfyScheme:
    id = "comfy"
    title = "ComfyUI native"
    library = "ComfyUI"

    def find(self, file: ModelFile) -> Iterable[Layer | Fault]:
        layers, faults = _layers(file)
        yield from faults
        for name, conf in layers.items():
            yield from self._layer(file, name, conf)
        if not any("quant_method" in _config(c) for c in file.configs.values()):  # others call scales the same
            yield from self._unmarked(file, layers)

    def _layer(self, file: ModelFile, name: str, conf: Conf) -> Iterator[Layer | Fault]:
        weight = file.entries.get(f"{name}.weight")
        if weight is None:
            text = f"'{name}.weight' is missing, but the file says what format it is in."
            yield Fault("weight-missing", f"{name}.weight", text, "ComfyUI leaves the layer empty and fails there.")
            return
        tensors = _known(file, name)
        doubts: list[Fault] = []
        named = str(conf.get("format"))

        def make() -> Layer:
            if conf.get("format") not in FORMATS:
                text = f"'{name}': unknown format {conf.get('format')!r}, expected one of {', '.join(FORMATS)}."
                raise Broken("format-unknown", f"{name}.weight", text, _STOPS)
            seen = look(file, name, conf)
            doubts.extend(seen.doubts)
            roles = {"qdata": weight.name, **seen.roles, **tensors}
            return Layer(
                weight.name, self.id, named, seen.format_id, roles, seen.shape, options=seen.options, why=seen.why
            )

        scales = {last: f"{name}.{last}" for last in file.groups.get(name, ()) if last.startswith("weight_")}
        roles = {"qdata": weight.name, **scales, **tensors}
        yield from attempt(make, weight.name, self.id, named, roles, weight.shape)
        yield from doubts

    def _unmarked(self, file: ModelFile, layers: Mapping[str, Conf]) -> Iterator[Layer | Fault]:
        """Layers with the tensors of a format, of which neither a tensor nor the metadata says that it is one."""
        for name, lasts in file.groups.items():
            if name in layers or "weight" not in lasts or not any(x.startswith("weight_s") for x in lasts):
                continue
            conf = guess(file, name)
            if conf is None:
                continue
            weight = file.entries[f"{name}.weight"]
            text = (
                f"'{name}' has the tensors of {conf['format']}, but neither '{name}.{SUFFIX}' nor the file's metadata "
                "says so."
            )
            effect = "ComfyUI takes the packed values for the weight: an error about its shape, or noise."
            yield Fault("comfy-quant-missing", weight.name, text, effect)
            tensors = {last: f"{name}.{last}" for last in lasts if last != "bias"}
            options = {"guess": conf}
            yield Layer(weight.name, self.id, conf["format"], "", tensors, weight.shape, options=options, why=text)

    def weight(self, layer: Layer, read: Read) -> QuantizedWeight:
        return make_weight(layer, read)


def marked(file: ModelFile) -> set[str]:
    """Layers, without `.weight`, that a tensor or the metadata names as ComfyUI's; whatever is wrong with them."""
    found = {name for name, lasts in file.groups.items() if SUFFIX in lasts}
    return found | set(_from_metadata(file)[0])


def _known(file: ModelFile, name: str) -> dict[str, str]:
    parts = (SUFFIX, "input_scale", "pre_quant_scale")
    return {part: f"{name}.{part}" for part in parts if f"{name}.{part}" in file.entries}


def _config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of a folder: `quantization_config` of its `config.json`, or the file of that name itself."""
    inner: object = config.get("quantization_config", config)
    return cast("Mapping[str, Any]", inner) if isinstance(inner, Mapping) else {}


def _layers(file: ModelFile) -> tuple[dict[str, Conf], list[Fault]]:
    """Layer, without `.weight` -> its JSON; in the order of the tensors, those of the metadata last."""
    faults: list[Fault] = []
    found: dict[str, Conf] = {}
    for name, lasts in file.groups.items():
        if SUFFIX not in lasts:
            continue
        try:
            found[name] = file.json(f"{name}.{SUFFIX}")
        except FileError:
            text = f"'{name}.{SUFFIX}' does not hold a JSON object."
            faults.append(Fault("comfy-quant-json", f"{name}.{SUFFIX}", text, _STOPS))
            found[name] = {}
    named, more = _from_metadata(file)
    for name, conf in named.items():
        if found.get(name) and _meant(found[name]) != _meant(conf):
            text = f"'{name}.{SUFFIX}' says {found[name]}, and {METADATA} says {conf}."
            faults.append(Fault("metadata-disagrees", name, text, f"ComfyUI takes what {METADATA} says.", fatal=False))
        found[name] = conf
    return found, faults + more


def _meant(conf: Conf) -> dict[str, Any]:
    """Without what says no more than its absence."""
    return {key: value for key, value in conf.items() if key not in DEFAULTS or value != DEFAULTS[key]}


def _from_metadata(file: ModelFile) -> tuple[dict[str, Conf], list[Fault]]:
    """What `_quantization_metadata` says, by the names that the tensors have."""
    raw = file.metadata.get(METADATA)
    if raw is None:
        return {}, []
    try:
        value: Any = json.loads(raw)
        layers = dict(value["layers"].items())
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        text = f"{METADATA} is not a JSON object with 'layers'."
        return {}, [Fault("metadata-json", METADATA, text, _STOPS)]
    found: dict[str, Conf] = {}
    faults: list[Fault] = []
    other: dict[str, list[str]] = {"missing": [], "surplus": []}
    for key, conf in layers.items():
        name, kind = _in_file(file, str(key))
        if name is None:
            text = f"{METADATA} names the layer '{key}', of which the file has no weight."
            faults.append(Fault("layer-missing", str(key), text, "ComfyUI passes over it.", fatal=False))
            continue
        if kind:
            other[kind].append(str(key))
        found[name] = cast("Conf", conf) if isinstance(conf, dict) else {}
    return found, [*faults, *_prefix_faults(other)]


def _in_file(file: ModelFile, key: str) -> tuple[str | None, str]:
    """(name of the layer in the file or None, whether the metadata's name misses its prefix or has one too many)."""
    if f"{key}.weight" in file.entries or key in file.groups:
        return key, ""
    for prefix in PREFIXES:
        if f"{prefix}{key}.weight" in file.entries:
            return prefix + key, "missing"
        if key.startswith(prefix) and f"{key.removeprefix(prefix)}.weight" in file.entries:
            return key.removeprefix(prefix), "surplus"
    return None, ""


def _prefix_faults(other: Mapping[str, list[str]]) -> Iterator[Fault]:
    if names := other["missing"]:
        yield Fault(
            "metadata-prefix",
            names[0],
            f"{METADATA} names {len(names)} layers without the prefix that their tensors have, such as '{names[0]}'.",
            "UNETLoader finds them; CheckpointLoaderSimple takes the packed values for weights: an error, or noise.",
            fatal=False,
            misread_by=("CheckpointLoaderSimple",),
        )
    if names := other["surplus"]:
        yield Fault(
            "metadata-prefix",
            names[0],
            f"{METADATA} names {len(names)} layers with a prefix that their tensors lack, such as '{names[0]}'.",
            "ComfyUI looks for the model behind that prefix, finds no tensors there and stops with an error.",
            fatal=False,
            misread_by=STOCK_LOADERS,
        )
