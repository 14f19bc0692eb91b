"""Which faults have a certain fix: one that follows from the file itself, and changes no number.

What an unnamed layer is follows from its tensors only where one format fits. fp8 with one scale is told by dtypes.
nvfp4 and mxfp8 are told by dtypes too, but other programs write their block scales as a plain matrix, which often has
as many values as the tiles: there a scale that was padded to whole tiles must tell, of that layer or of another one, or
a layer of the file that is named so. int8 and the 4-bit formats may be rotated or not, and the layers of one file may
differ in that, so nothing names those.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

from ..errors import FileError
from .bounded_json import loads
from .edits import Edit, Form, New
from .faults import Fault
from .model_file import SMALL_NBYTES, Entry, ModelFile
from .schemes.broken import FLOATS, Broken
from .schemes.comfy import METADATA, PREFIXES, SUFFIX
from .schemes.comfy_parts import FORMATS, guess, look
from .schemes.own import KEY
from .schemes.scaled_fp8 import SURPLUS, surplus_scales
from .schemes.scan import Scan

BLOCKS = {"nvfp4": 8, "mxfp8": 32}  # columns of the stored weight for each scale
# What the JSON of a layer may say whatever its format is.
COMMON = {"full_precision_matrix_mult", "orig_shape"}
FP8 = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
MARKER = "scaled_fp8"
FORMAT = {"format": "pt"}
# Behind these, ComfyUI looks for a diffusion model in whatever file; behind others only in some.
MODEL_PREFIXES = ("model.diffusion_model.", "net.")
IN_CHECKPOINT = ("text_encoders.", "cond_stage_model.", "conditioner.", "text_encoder.", "text_encoder_2.")
# What a header with these faults still says of every tensor is enough to write it anew.
REWRITTEN = ("header-hole", "header-trailing", "header-metadata")


@dataclass(frozen=True)
class Fixer:
    """Finds the fixes for the faults of one file.

    Attributes:
        raw_metadata: of a header whose metadata are not all strings.
        codes: all faults of the header; where tensors are lost, nothing about the header is certain.
    """

    file: ModelFile
    scan: Scan
    raw_metadata: Any = None
    codes: frozenset[str] = frozenset()

    def fix(self, fault: Fault) -> tuple[str, Edit] | None:
        """What would be done, in words, and as a change; None where nothing is certain."""
        if KEY in self.file.metadata:  # a file of this pack, with a checksum over all of it
            return None
        if fault.code in REWRITTEN:
            return self._rewrite(fault)
        if fault.code == "comfy-quant-missing":
            return self._name_layer(fault)
        if fault.code == "scale-dtype":
            return self._cast(fault)
        if fault.code in ("comfy-quant-json", "format-unknown", "tensor-dtype"):
            return self._cast(fault) or self._relabel(fault)
        if fault.code == "scale-shape":
            return self._reshape(fault)
        if fault.code == "scaled-fp8-missing":
            return self._marker()
        if fault.code == SURPLUS:
            return "scales of 1 that scale nothing are left out", Edit(drop=frozenset(surplus_scales(self.file)))
        if fault.code in ("metadata-prefix", "layer-missing"):
            return self._metadata_names(fault)
        return None

    # The header

    def _rewrite(self, fault: Fault) -> tuple[str, Edit] | None:
        if not self.codes <= {*REWRITTEN, "header-path"}:
            return None
        if fault.code == "header-hole":
            return "the tensors are written without holes between them", Edit()
        if fault.code == "header-trailing":
            return "what stands behind the last tensor is left out", Edit()
        raw: object = self.raw_metadata
        if not isinstance(raw, dict):
            return "the metadata are left out, as they name nothing", Edit()
        values = cast("dict[str, Any]", raw)
        return "values that are no strings become JSON", Edit(
            metadata={key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
        )

    # Which format a layer has

    @cached_property
    def _metadata_layers(self) -> Mapping[str, Any]:
        try:
            value = cast("Any", loads(self.file.metadata.get(METADATA, "").encode()))
            return cast("dict[str, Any]", dict(value["layers"].items()))
        except (ValueError, TypeError, KeyError, AttributeError):
            return {}

    def _told(self, module: str) -> tuple[dict[str, Any], bool]:
        """(the JSON that a layer has, whether it can be read); where there is none at all, that can be read."""
        told: Any = self._metadata_layers.get(module)
        if told is None and f"{module}.{SUFFIX}" in self.file.entries:
            try:
                return self.file.json(f"{module}.{SUFFIX}"), True
            except FileError:
                return {}, False
        return (cast("dict[str, Any]", told), True) if isinstance(told, dict) else ({}, told is None)

    @cached_property
    def _in_tiles(self) -> frozenset[str]:
        """Formats of which a layer shows that the file has their scales in tiles, and none that it has not."""
        found: set[str] = set()
        matrices: set[str] = set()
        for name, layer in self.scan.layers.items():
            if layer.scheme != "comfy" or layer.type not in BLOCKS:
                continue
            weight, scale = self.file.entries.get(name), self.file.entries.get(f"{name}_scale")
            if layer.format_id:
                found.add(layer.type)
            elif (
                weight is not None
                and scale is not None
                and (guess(self.file, _module(name)) or {}).get("format") == layer.type
            ):
                rows, columns = weight.shape[0], weight.shape[1] // BLOCKS[layer.type]
                if scale.numel == tiled(rows, columns) != rows * columns:
                    found.add(layer.type)
                elif scale.numel == rows * columns != tiled(rows, columns):
                    matrices.add(layer.type)
        return frozenset(found - matrices)

    def _conf(self, module: str) -> dict[str, Any] | None:
        """The JSON that a layer must have, where only one is possible."""
        weight = self.file.entries.get(f"{module}.weight")
        if weight is None:
            return None
        conf = guess(self.file, module)
        scale = self.file.entries.get(f"{module}.weight_scale")
        if conf is None and weight.dtype in FP8 and scale is not None and scale.dtype in FLOATS and scale.numel == 1:
            conf = {"format": FP8[weight.dtype]}
        if conf is None or not (conf["format"] in FP8.values() or conf["format"] in self._in_tiles):
            return None
        try:
            return conf if look(self.file, module, conf).format_id else None
        except Broken:
            return None

    def _named(self, module: str, conf: Mapping[str, Any]) -> tuple[str, Edit]:
        raw = json.dumps(conf).encode()
        layers = {module: conf} if module in self._metadata_layers else {}
        add = {f"{module}.{SUFFIX}": New("U8", (len(raw),), raw)}
        return f"the layer is named as {json.dumps(conf)}, the only format that its tensors fit", Edit(
            add=add, layers=layers
        )

    def _relabel(self, fault: Fault) -> tuple[str, Edit] | None:
        """A layer whose JSON cannot be read, or names a format that its dtypes are not.

        A name that is not known is not wrong, it may be of a later ComfyUI; nor are options of another format, which
        may say what the tensors do not.
        """
        module = self._module(fault.tensor)
        layer = self.scan.layers.get(f"{module}.weight")
        if layer is None or layer.scheme != "comfy" or layer.format_id:
            return None
        told, readable = self._told(module)
        rest = {key: value for key, value in told.items() if key != "format"}
        if readable and (told.get("format") not in FORMATS or not rest.keys() <= COMMON):
            return None
        conf = self._conf(module)
        return self._named(module, {**conf, **rest}) if conf is not None and conf["format"] != layer.type else None

    def _name_layer(self, fault: Fault) -> tuple[str, Edit] | None:
        """One layer of `comfy`, or all of those that `scaled-fp8` speaks of at once."""
        layer = self.scan.layers.get(fault.tensor)
        if layer is not None and layer.scheme == "comfy":
            conf = self._conf(self._module(fault.tensor))
            return self._named(self._module(fault.tensor), conf) if conf is not None else None
        add: dict[str, New] = {}
        for name, each in self.scan.layers.items():
            if each.scheme == "scaled-fp8" and each.options.get("style") == "new" and each.format_id:
                module = name.removesuffix(".weight")
                conf = self._conf(module)
                if conf is None:
                    return None
                add |= self._named(module, conf)[1].add
        return (f"{len(add)} layers are named as fp8 by comfy_quant", Edit(add=add)) if add else None

    def _module(self, tensor: str) -> str:
        owner = self.scan.owner.get(tensor, tensor)
        return owner.removesuffix(f".{SUFFIX}").removesuffix(".weight")

    # Scales

    def _cast(self, fault: Fault) -> tuple[str, Edit] | None:
        entry = self.file.entries.get(fault.tensor)
        last = entry.name.rpartition(".")[2] if entry is not None else ""
        if entry is None or entry.dtype not in (*FLOATS, "F64") or not ("scale" in last or last == "weight_s_channel"):
            return None
        if entry.dtype != "F64":
            return (
                ("the scale becomes F32", Edit(form={entry.name: Form("F32", entry.shape)}))
                if fault.code == "scale-dtype"
                else None
            )
        if entry.nbytes > SMALL_NBYTES or not is_exact_in_f32(self.file.small(entry.name)):
            return None
        return "the scale becomes F32", Edit(form={entry.name: Form("F32", entry.shape)})

    def _reshape(self, fault: Fault) -> tuple[str, Edit] | None:
        scale = self.file.entries.get(fault.tensor)
        module = fault.tensor.rpartition(".")[0]  # a broken layer may not own its scales
        layer = self.scan.layers.get(f"{module}.weight")
        weight = self.file.entries.get(f"{module}.weight")  # not what quanto and others call theirs
        if scale is None or layer is None or weight is None or len(weight.shape) != 2:
            return None
        n, k = weight.shape
        # One for each column may be meant by (1, N), where the weight is square. fp8 cannot have one a row.
        flat = scale.shape == (n,) or (scale.shape == (1, n) and n != k)
        if layer.type == "int8_tensorwise" and flat:
            return f"the scales become [{n}, 1]", Edit(form={scale.name: Form(scale.dtype, (n, 1))})
        return self._tiled(layer.type, weight, scale)

    def _tiled(self, kind: str, weight: Entry, scale: Entry) -> tuple[str, Edit] | None:
        """Block scales that were left as a matrix; where they are no whole tiles, their size tells that."""
        columns = weight.shape[1] // BLOCKS[kind] if kind in BLOCKS else 0
        if not columns or scale.shape != (weight.shape[0], columns):
            return None
        shape = (-(-scale.shape[0] // 128) * 128, -(-columns // 4) * 4)
        return "the block scales are put into tiles of 128 x 4", Edit(
            form={scale.name: Form(scale.dtype, shape, tiles=True)}
        )

    def _marker(self) -> tuple[str, Edit] | None:
        layers = [name for name, lasts in self.file.groups.items() if "scale_weight" in lasts]
        prefixes = {next((p for p in MODEL_PREFIXES if name.startswith(p)), "") for name in layers}
        if len(prefixes) != 1 or not all(self.file.has(f"{name}.weight", "F8_E4M3") for name in layers):
            return None
        # What ComfyUI takes for the prefix of a model differs between these and what a checkpoint has beside it.
        if any(name.startswith(("model.model.", *IN_CHECKPOINT)) for name in layers):
            return None
        # Two values ask for products in full precision: right whatever the scales were made for.
        with_input = any("scale_input" in lasts for lasts in self.file.groups.values())
        count = 1 if with_input else 2
        name = f"{prefixes.pop()}{MARKER}"
        return f"'{name}' is added", Edit(add={name: New("F8_E4M3", (count,), bytes(count))})

    # Names in the metadata

    def _metadata_names(self, fault: Fault) -> tuple[str, Edit] | None:
        if fault.code == "layer-missing":
            return self._layer_gone(fault.tensor)
        layers: dict[str, Mapping[str, Any] | None] = {}
        for key, conf in self._metadata_layers.items():
            if f"{key}.weight" in self.file.entries or not isinstance(conf, dict):
                continue
            place = relocated(self.file, key, "weight")
            if place is not None:
                layers |= {key: None, place: cast("dict[str, Any]", conf)}
        return ("the metadata get the names that the tensors have", Edit(layers=layers)) if layers else None

    def _layer_gone(self, key: str) -> tuple[str, Edit] | None:
        if self._moved:
            conf = self._metadata_layers[key]
            return "the metadata get the names that the tensors have", Edit(layers={key: None, self._moved[key]: conf})
        # It may be the name of a layer that nothing else says the format of.
        if any(fault.fatal or fault.code == "comfy-quant-missing" for fault in self.scan.faults):
            return None
        return "the layer is left out of the metadata", Edit(layers={key: None})

    @cached_property
    def _moved(self) -> Mapping[str, str]:
        """Names in the metadata -> layers of the file, where all that are missing stand behind one other prefix.

        Empty unless the tensors there are what the metadata say.
        """
        keys = [f.tensor for f in self.scan.faults if f.code == "layer-missing"]
        ends = [name for name in self.file.groups if keys and name.endswith(f".{keys[0]}")]
        if len(ends) != 1:
            return {}
        prefix = ends[0].removesuffix(keys[0])
        return {key: prefix + key for key in keys} if all(self._fits(prefix + k, k) for k in keys) else {}

    def _fits(self, module: str, key: str) -> bool:
        conf: Any = self._metadata_layers.get(key)
        if f"{module}.weight" not in self.file.entries or not isinstance(conf, dict):
            return False
        told = cast("dict[str, Any]", conf)
        try:
            return told.get("format") in FORMATS and bool(look(self.file, module, told).format_id)
        except Broken:
            return False


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def tiled(rows: int, columns: int) -> int:
    """How many values block scales of (rows, columns) are in tiles of 128 x 4."""
    return -(-rows // 128) * 128 * (-(-columns // 4) * 4)


def is_exact_in_f32(data: bytes) -> bool:
    """Whether float64 values are float32 values too."""
    values = [value for (value,) in struct.iter_unpack("<d", data)]
    try:
        return all(struct.unpack("<f", struct.pack("<f", value))[0] == value for value in values)
    except OverflowError:
        return False


def relocated(file: ModelFile, module: str, part: str) -> str | None:
    """The name of a layer with a prefix more or less, under which the file has a tensor; None without one."""
    for prefix in PREFIXES:
        if f"{prefix}{module}.{part}" in file.entries:
            return prefix + module
        if module.startswith(prefix) and f"{module.removeprefix(prefix)}.{part}" in file.entries:
            return module.removeprefix(prefix)
    return None
