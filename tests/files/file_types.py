"""Every type of model file that is known: how a real one is made, what it must be seen as, and what is done with it.

The rows of the table in docs/files.md, tried one by one by `test_file_types.py` and `tests/comfyui/test_file_types.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import file_makers as made
import quantized_files as files
import torch
from quantwire.quantizers.files.components import Component
from quantwire.quantizers.files.locate import Container
from scheme_files import edited
from torch import Tensor

# Relative error of one model call, rounded up from what was measured with the demo model and one of random weights:
# 0.02, 0.18 (all of its tensors are cast) and 0.09.
EIGHT, CAST, FOUR = 0.03, 0.25, 0.13
DIFFUSERS, PACKAGE, LAYOUT = "diffusers", "the package", "by the published layout"
FILE, FOLDER = "model.safetensors", "model"
SHARD_NBYTES = 4_000_000
Change = Callable[[dict[str, Tensor], dict[str, str]], None]


@dataclass(frozen=True)
class Damage:
    """Something that breaks a sound file.

    Attributes:
        code: by which the doctor must find it; empty where it must refuse the file as a whole.
        mends: whether a repair must bring back a file that reads the same.
        loads: whether the broken file is loaded as it is.
    """

    code: str
    apply: Callable[[Path, Path], Any]
    mends: bool
    loads: bool = False


@dataclass(frozen=True)
class Written:
    """How `quantwire convert` writes the type.

    Attributes:
        targets: a file, a folder of diffusers, or both.
    """

    uri: str
    layout: str = ""
    targets: tuple[str, ...] = (FILE,)
    shard_nbytes: int = 0

    def __str__(self) -> str:
        uri = f"'{self.uri}'" if ";" in self.uri else self.uri
        layout = f" --layout {self.layout}" if self.layout else ""
        shards = f" --shard-size {self.shard_nbytes // 1_000_000}MB" if self.shard_nbytes else ""
        return f"`--type {uri}{layout}{shards}`" + (", file or folder" if FOLDER in self.targets else "")


@dataclass(frozen=True)
class FileType:
    """A row.

    Attributes:
        by: what wrote the file, for the table.
        scheme: id of the one that finds its layers; empty without any.
        type: of its quantized layers, or the dtype of a plain file.
        format_id: that they are loaded in; empty where they are named and not loaded.
        off: largest relative error of a pass, against the full-precision model.
        options: of every layer, among others.
        node: that opens the file in the embedded host; empty where none does.
        refusal: part of what LoadQuantized says, where it refuses.
        known: errors and warnings of the doctor about the sound file.
    """

    id: str
    title: str
    by: str
    make: made.Maker
    scheme: str
    type: str
    format_id: str = ""
    off: float = 0.0
    written: Written | None = None
    damages: tuple[Damage, ...] = ()
    options: Mapping[str, Any] = field(default_factory=lambda: dict[str, Any]())
    container: Container = Container.SAFETENSORS
    components: tuple[Component, ...] = (Component.DIFFUSION,)
    node: str = "LoadQuantized"
    refusal: str = ""
    known: tuple[str, ...] = ()


def _append(source: Path, target: Path) -> None:
    target.write_bytes(source.read_bytes() + b"more")


def _cut(source: Path, target: Path) -> None:
    target.write_bytes(source.read_bytes()[:-1000])


def _tensors(change: Change) -> Callable[[Path, Path], Any]:
    return lambda source, target: edited(source, target, change)


def lost(part: str, code: str = "tensor-missing", mends: bool = False, loads: bool = False) -> Damage:
    """Without the first tensor whose name ends so."""
    return Damage(code, _tensors(lambda tensors, _: _drop(tensors, part)), mends, loads)


def _drop(tensors: dict[str, Tensor], part: str) -> None:
    del tensors[min(name for name in tensors if name.endswith(part))]


def _longer_names(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """The metadata name the layers as a checkpoint does, the tensors do not."""
    told = json.loads(metadata[files.METADATA])
    layers = {made.PREFIX + name: conf for name, conf in told["layers"].items()}
    metadata[files.METADATA] = json.dumps({**told, "layers": layers})


TRAILING, CUT = Damage("header-trailing", _append, True), Damage("header-truncated", _cut, False)
OWN_TRAILING = Damage("header-trailing", _append, False)  # its checksum says that it is not what was written
UNNAMED = lost(".comfy_quant", "comfy-quant-missing", mends=True)
UNNAMED_ROTATED = lost(".comfy_quant", "comfy-quant-missing")  # perhaps: nothing else in the file tells
ALL_IN_ONE = (Component.VAE, Component.DIFFUSION)  # in the order of their names
GGUF: dict[str, Any] = {"container": Container.GGUF, "damages": (Damage("", _cut, False),), "node": "LoadGGUF"}


def _plain(cast: str, dtype: torch.dtype) -> FileType:
    return FileType(
        f"plain-fp8-{cast}", f"fp8 {cast}, plain cast", "torch", made.single(files.plain_fp8(dtype)), "plain-fp8",
        f"float8_{cast}", f"layerwise-fp8-{cast}", CAST, Written(f"layerwise-fp8-{cast}"), (TRAILING, CUT),
    )  # fmt: skip


def _bnb(kind: str, nested: bool = False) -> FileType:
    double = ";bits4-use-double-quant=true" if nested else ""
    uri = f"bnb;bits=4;bits4-quant-type={kind}{double}" if double else f"bnb-{kind}"
    damage = lost(".SCB") if kind == "int8" else lost(".absmax")
    return FileType(
        f"bnb-{kind}{'-double' * nested}", f"bitsandbytes {kind}{', double quant' * nested}", DIFFUSERS,
        made.bnb(kind, nested), "bnb", kind, f"bnb-{kind}", EIGHT if kind == "int8" else FOUR,
        Written(uri, targets=(FILE, FOLDER)), (TRAILING, CUT, damage),
        {} if kind == "int8" else {"double_quant": nested},
    )  # fmt: skip


def _quanto(kind: str, title: str, make: made.Maker, by: str, off: float = EIGHT) -> FileType:
    shown = {"qint4": "qint4, groups of 128", "qfloat8": "qfloat8_e4m3fn"}.get(kind, kind)
    format_id = "quanto-qfloat8-e4m3fn" if kind == "qfloat8" else f"quanto-{kind}"
    return FileType(
        f"quanto-{kind}{'-config' * (by == DIFFUSERS)}", title, by, make, "quanto", shown, format_id, off,
        Written(format_id, targets=(FILE, FOLDER)), (TRAILING, CUT, lost("._scale")),
    )  # fmt: skip


def _sdnq(kind: str, off: float) -> FileType:
    return FileType(
        f"sdnq-{kind}", f"SDNQ {kind}", PACKAGE, made.sdnq(kind), "sdnq", kind, f"sdnq-{kind}", off,
        Written(f"sdnq-{kind}", targets=(FILE, FOLDER)), (TRAILING, CUT, lost(".scale")),
    )  # fmt: skip


def _torchao(kind: str, config: str) -> FileType:
    return FileType(
        f"torchao-{kind}", f"torchao {kind}", DIFFUSERS, made.diffusers_config(made.torchao_config(config)), "torchao",
        kind, f"torchao-{kind}", EIGHT, Written(f"torchao-{kind}", targets=(FILE, FOLDER)),
        (TRAILING, CUT, lost("_weight_scale")),
    )  # fmt: skip


def _compressed(name: str, shown: str, format_id: str, off: float, layout: str, **settings: Any) -> FileType:
    return FileType(
        f"compressed-tensors-{name}", f"compressed-tensors {name}", PACKAGE, made.compressed(layout, **settings),
        "compressed-tensors", shown, format_id, off, None, (TRAILING, CUT, lost(".weight_scale")),
    )  # fmt: skip


def _named(scheme: str, title: str, shown: str, packed: made.Packed, scales: str, todo: str) -> FileType:
    return FileType(
        scheme, title, LAYOUT, made.as_published(packed), scheme, shown, damages=(TRAILING, CUT, lost(scales)),
        node="", refusal=f"Open it with {todo}",
    )  # fmt: skip


def _comfy(format_id: str, kind: str, off: float, scale: str = ".weight_scale", **changes: Any) -> FileType:
    name = format_id.removeprefix("comfy-")
    row: dict[str, Any] = {
        "id": format_id, "title": f"ComfyUI {name}", "by": "comfy-kitchen", "make": made.single(files.comfy(format_id)),
        "written": Written(format_id),
    } | changes  # fmt: skip
    return FileType(
        scheme="comfy", type=kind, format_id=format_id, off=off,
        damages=(TRAILING, CUT, lost(scale), UNNAMED if "fp" in format_id else UNNAMED_ROTATED), **row,
    )  # fmt: skip


TYPES: tuple[FileType, ...] = (
    FileType(
        "plain", "BF16", "torch", made.plain, "", "BF16", written=Written("BF16"), damages=(TRAILING, CUT),
        node="UNETLoader", refusal="Open a full-precision file with UNETLoader",
    ),
    _plain("e4m3fn", torch.float8_e4m3fn),
    _plain("e5m2", torch.float8_e5m2),
    _bnb("nf4"),
    _bnb("nf4", nested=True),
    _bnb("fp4"),
    _bnb("int8"),
    FileType(
        "sharded", "bitsandbytes nf4, in shards", DIFFUSERS, made.bnb("nf4", max_shard_size=made.SHARD), "bnb", "nf4",
        "bnb-nf4", FOUR, Written("bnb-nf4", shard_nbytes=SHARD_NBYTES, targets=(FILE, FOLDER)), (CUT, lost(".absmax")),
        container=Container.SHARDED,
    ),
    _quanto("qint8", "quanto qint8", made.quanto("qint8"), PACKAGE),
    _quanto("qint8", "quanto qint8, by QuantoConfig", made.diffusers_config(made.quanto_config), DIFFUSERS),
    _quanto("qint4", "quanto qint4", made.quanto("qint4"), PACKAGE, FOUR),
    _quanto("qfloat8", "quanto qfloat8", made.quanto("qfloat8"), PACKAGE),
    _sdnq("int8", EIGHT),
    _sdnq("uint4", FOUR),
    _torchao("int8wo", "Int8WeightOnlyConfig"),
    _torchao("float8wo", "Float8WeightOnlyConfig"),
    FileType(
        "nncf-int8-asym", "NNCF int8-asym", PACKAGE, made.nncf("int8_asym"), "nncf", "int8-asym", "nncf-int8-asym",
        EIGHT, None, (TRAILING, CUT, lost("._zero_point")),
    ),
    _compressed("int8", "int8", "quanto-qint8", EIGHT, "int-quantized", type="int", strategy="channel"),
    _compressed(
        "w4a16", "int4, groups of 32", "torchao-int4wo", FOUR, "pack-quantized",
        type="int", num_bits=4, strategy="group", group_size=32,
    ),
    _compressed(
        "nvfp4", "nvfp4", "comfy-nvfp4", FOUR, "nvfp4-pack-quantized",
        type="float", num_bits=4, strategy="tensor_group", group_size=16,
    ),
    _named("gptq", "GPTQ", "GPTQ, 4 bits", made.gptq, ".scales", "GPTQModel"),
    _named("awq", "AWQ", "AWQ, 4 bits", made.awq, ".qzeros", "transformers or vLLM"),
    _named("awq-tinychat", "AWQ of TinyChat and nunchaku", "AWQ, 4 bits", made.tinychat, ".scales", "nunchaku's nodes"),
    _named("svdquant", "nunchaku SVDQuant", "SVDQuant, int4", made.svdquant, ".wscales", "nunchaku's nodes"),
    FileType(
        "fp8-scale", "fp8 with `X.scale`, no config", LAYOUT, made.as_published(made.fp8_with_scale), "fp8-scale",
        "float8_e4m3fn with a scale", damages=(TRAILING, CUT), node="", refusal="nothing says whether its scale",
    ),
    FileType(
        "scaled-fp8", "scaled fp8, old (`scaled_fp8`)", LAYOUT, made.single(files.scaled_fp8()), "scaled-fp8",
        "scaled float8_e4m3fn", "comfy-fp8-e4m3fn", EIGHT, Written("comfy-fp8-e4m3fn", "scaled-fp8"),
        (
            TRAILING, CUT, lost("scaled_fp8", "scaled-fp8-missing", mends=True),
            lost(".scale_weight", "scale-missing"),
        ),
    ),
    FileType(
        "scaled-fp8-new", "scaled fp8, new (`weight_scale`)", LAYOUT, made.single(files.scaled_fp8(new=True)),
        "scaled-fp8", "scaled float8_e4m3fn", "comfy-fp8-e4m3fn", EIGHT, None,
        (TRAILING, CUT, Damage("comfy-quant-missing", _tensors(lambda tensors, _: None), True)),
        known=("comfy-quant-missing",),
    ),
    _comfy("comfy-fp8-e4m3fn", "float8_e4m3fn", EIGHT),
    _comfy("comfy-fp8-e5m2", "float8_e5m2", EIGHT),
    _comfy("comfy-nvfp4", "nvfp4", FOUR),
    _comfy("comfy-mxfp8", "mxfp8", EIGHT),
    _comfy("comfy-int8", "int8_tensorwise", EIGHT),
    _comfy(
        "comfy-int8", "int8_tensorwise", EIGHT, id="comfy-int8-tensor", title="ComfyUI int8, one scale a tensor",
        make=made.single(made.int8_one_scale), written=Written("comfy-int8;scale=tensor"),
    ),
    _comfy("comfy-int8-convrot", "int8_tensorwise", EIGHT),
    _comfy("comfy-w4a4-convrot", "convrot_w4a4", FOUR),
    _comfy("comfy-w4a8", "asym_w4a8_int8", FOUR, ".weight_s_rel"),
    FileType(
        "comfy-metadata", "ComfyUI nvfp4, named in the metadata", "comfy-kitchen",
        made.single(made.named_in_metadata), "comfy", "nvfp4", "comfy-nvfp4", FOUR,
        Written("comfy-nvfp4", "comfy-metadata"),
        (TRAILING, CUT, lost(".weight_scale"), Damage("metadata-prefix", _tensors(_longer_names), True)),
    ),
    _comfy(
        "comfy-fp8-e4m3fn", "float8_e4m3fn", EIGHT, id="all-in-one", title="all-in-one checkpoint, ComfyUI fp8-e4m3fn",
        make=made.single(files.comfy("comfy-fp8-e4m3fn"), made.PREFIX), written=None, components=ALL_IN_ONE,
    ),
    FileType(
        "gguf-q8-0", "GGUF Q8_0", "gguf", made.gguf_file("Q8_0"), "gguf", "Q8_0", "gguf-q8-0", EIGHT,
        Written("Q8_0", targets=("model.gguf",)), **GGUF,
    ),
    FileType(
        "gguf-q4-k", "GGUF Q4_K", "gguf and ggml", made.gguf_file("Q4_K"), "gguf", "Q4_K", "gguf-q4-k", FOUR,
        Written("gguf-q4-k", targets=("model.gguf",)), **GGUF,
    ),
    FileType("gguf-parts", "GGUF Q8_0, in parts", "gguf", made.gguf_parts, "gguf", "Q8_0", "gguf-q8-0", EIGHT, **GGUF),
    FileType(
        "quantwire", "quantwire, here bnb-nf4", "quantwire", made.own("bnb-nf4"), "quantwire", "bnb-nf4", "bnb-nf4",
        FOUR, Written("bnb-nf4", "quantwire"), (OWN_TRAILING, CUT, lost(".absmax")),
    ),
)  # fmt: skip
