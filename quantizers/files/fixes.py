"""Which faults have a certain fix: one that follows from the file itself, and changes no number.

What a packed layer is follows from its tensors only where one format fits: nvfp4, mxfp8 and fp8 are told by dtypes and
shapes; int8 may be rotated or not, so there the other layers of the file must agree on what they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

from ..errors import FileError
from .bounded_json import loads
from .edits import Edit, Form, New
from .faults import Fault
from .model_file import Entry, ModelFile
from .schemes.broken import FLOATS, Broken
from .schemes.comfy import METADATA, PREFIXES, SUFFIX
from .schemes.comfy_parts import guess, look
from .schemes.scan import Scan

UNAMBIGUOUS = ("nvfp4", "mxfp8", "float8_e4m3fn", "float8_e5m2")
FP8 = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
MARKER = "scaled_fp8"
FORMAT = {"format": "pt"}
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
        if fault.code in REWRITTEN:
            return self._rewrite(fault)
        if fault.code == "comfy-quant-missing":
            return self._name_layer(fault)
        if fault.code in ("comfy-quant-json", "format-unknown", "comfy-quant", "tensor-dtype"):
            return self._cast(fault) or self._relabel(fault)
        if fault.code == "scale-shape":
            return self._reshape(fault) or self._relabel(fault)
        if fault.code == "scaled-fp8-missing":
            return self._marker()
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
            return cast("dict[str, Any]", dict(value["layers"]))
        except (ValueError, TypeError, KeyError):
            return {}

    @cached_property
    def _sound(self) -> Mapping[str, set[str]]:
        """Format -> the JSON of the layers that are in it, without doubt."""
        found: dict[str, set[str]] = {}
        for name, layer in self.scan.layers.items():
            module = name.removesuffix(".weight")
            if layer.scheme != "comfy" or not layer.format_id:
                continue
            conf: Any = self._metadata_layers.get(module)
            if conf is None and f"{module}.{SUFFIX}" in self.file.entries:
                try:
                    conf = self.file.json(f"{module}.{SUFFIX}")
                except FileError:
                    continue
            if isinstance(conf, dict):
                found.setdefault(layer.type, set()).add(json.dumps(conf, sort_keys=True))
        return found

    def _conf(self, module: str) -> dict[str, Any] | None:
        """The JSON that a layer must have, where only one is possible."""
        weight = self.file.entries.get(f"{module}.weight")
        if weight is None:
            return None
        conf = guess(self.file, module)
        scale = self.file.entries.get(f"{module}.weight_scale")
        if conf is None and weight.dtype in FP8 and scale is not None and scale.dtype in FLOATS:
            conf = {"format": FP8[weight.dtype]}
        if conf is None:
            return None
        if conf["format"] not in UNAMBIGUOUS:
            others = self._sound.get(conf["format"], set())
            if len(others) != 1:
                return None
            conf = cast("dict[str, Any]", json.loads(next(iter(others))))
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
        module = self._module(fault.tensor)
        layer = self.scan.layers.get(f"{module}.weight")
        if layer is None or layer.scheme != "comfy" or layer.format_id:
            return None
        conf = self._conf(module)
        return self._named(module, conf) if conf is not None and conf["format"] != layer.type else None

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
        if entry is None or entry.dtype != "F64" or "scale" not in entry.name.rpartition(".")[2]:
            return None
        return "the scale becomes F32", Edit(form={entry.name: Form("F32", entry.shape)})

    def _reshape(self, fault: Fault) -> tuple[str, Edit] | None:
        scale = self.file.entries.get(fault.tensor)
        module = fault.tensor.rpartition(".")[0]  # a broken layer may not own its scales
        layer = self.scan.layers.get(f"{module}.weight")
        weight = self.file.entries.get(f"{module}.weight")  # not what quanto and others call theirs
        if scale is None or layer is None or weight is None or len(weight.shape) != 2:
            return None
        if layer.type in ("int8_tensorwise", *FP8.values(), "scaled fp8") and scale.numel == weight.shape[0]:
            return f"the scales become [{scale.numel}, 1]", Edit(form={scale.name: Form(scale.dtype, (scale.numel, 1))})
        return self._tiled(layer.type, weight, scale)

    def _tiled(self, kind: str, weight: Entry, scale: Entry) -> tuple[str, Edit] | None:
        """Block scales that were left as a matrix; where they are no whole tiles, their size tells that."""
        columns = {"nvfp4": weight.shape[1] // 8, "mxfp8": weight.shape[1] // 32}.get(kind)
        if columns is None or scale.shape != (weight.shape[0], columns):
            return None
        shape = (-(-scale.shape[0] // 128) * 128, -(-columns // 4) * 4)
        return "the block scales are put into tiles of 128 x 4", Edit(
            form={scale.name: Form(scale.dtype, shape, tiles=True)}
        )

    def _marker(self) -> tuple[str, Edit] | None:
        layers = [name for name, lasts in self.file.groups.items() if "scale_weight" in lasts]
        prefixes = {next((p for p in PREFIXES if name.startswith(p)), "") for name in layers}
        if len(prefixes) != 1 or not all(self.file.has(f"{name}.weight", "F8_E4M3") for name in layers):
            return None
        # Two values ask for products in full precision: right whatever the scales were made for.
        with_input = any("scale_input" in lasts for lasts in self.file.groups.values())
        count = 1 if with_input else 2
        name = f"{prefixes.pop()}{MARKER}"
        return f"'{name}' is added", Edit(add={name: New("F8_E4M3", (count,), bytes(count))})

    # Names in the metadata

    def _metadata_names(self, fault: Fault) -> tuple[str, Edit] | None:
        if fault.code == "layer-missing":
            return "the layer is left out of the metadata", Edit(layers={fault.tensor: None})
        layers: dict[str, Mapping[str, Any] | None] = {}
        for key, conf in self._metadata_layers.items():
            if f"{key}.weight" in self.file.entries or not isinstance(conf, dict):
                continue
            place = relocated(self.file, key, "weight")
            if place is not None:
                layers |= {key: None, place: cast("dict[str, Any]", conf)}
        return ("the metadata get the names that the tensors have", Edit(layers=layers)) if layers else None


def relocated(file: ModelFile, module: str, part: str) -> str | None:
    """The name of a layer with a prefix more or less, under which the file has a tensor; None without one."""
    for prefix in PREFIXES:
        if f"{prefix}{module}.{part}" in file.entries:
            return prefix + module
        if module.startswith(prefix) and f"{module.removeprefix(prefix)}.{part}" in file.entries:
            return module.removeprefix(prefix)
    return None
