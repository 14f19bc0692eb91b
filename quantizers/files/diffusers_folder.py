"""A component's folder as diffusers and transformers read it: weights, `config.json`, and what a library wants beside.

Made of such a folder, whose names and configuration stay, or of FLUX in ComfyUI's layout: its matrices are cut into
diffusers' by rows, and its configuration follows from the shapes. Other families in ComfyUI's layout would need a table
of their own in that direction.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import FileError, SpecError
from ..meta import TensorMeta
from ..plan import QuantPlan
from ..spec import QuantSpec
from .architectures import DROPPABLE, OTHER_PARTS, Found
from .layouts.flux import FLUX
from .layouts.table import Rule
from .layouts.target import Piece, Target, target
from .locate import PICKLES, locate
from .model_file import CONFIG_NBYTES
from .writers.layout import Layout

if TYPE_CHECKING:
    from .convert_plan import Request
    from .writers.base import Writer

CONFIG = "config.json"
DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model", "model"
STALE = ("quantization_config", "_name_or_path")
HEAD_DIM = 128
FILES = (".gguf", ".safetensors", ".sft", *PICKLES, ".json")  # what a target ends in that is meant as a file
NAME_NBYTES = 255  # of most file systems
PARTIAL_NBYTES = len(".partial.jsonl")
SEVERAL_NBYTES = len("-00001-of-00002.partial")
AXES_DIMS_ROPE = (16, 56, 56)
_NUMBER = re.compile(r"\d+")
_QK_NORM = re.compile(r"\.norm\.(query_norm|key_norm)\.weight$")


def into_folder(request: Request) -> Request:
    """The request with the file of the weights as its target, where that is a folder; else as it is.

    Raises:
        FileError: the target is a file of that name.
    """
    out = request.target
    refuse_long(out, request.shard_nbytes > 0)
    if _names_file(out) and not out.is_dir():
        return request
    if out.is_file():
        raise FileError(f"{out}: is a file, and a target without .gguf or .safetensors is a folder.")
    held = locate(request.source).folder
    if held is not None and out.is_dir() and out.samefile(held):
        raise FileError(f"{out}: is the folder that is converted; nothing is done in place.\nGive another one.")
    config = _config_of(request.source)
    stem = TRANSFORMERS if config and "_class_name" not in config else DIFFUSERS
    return dataclasses.replace(request, target=out / f"{stem}.safetensors", folder=True)


def _names_file(out: Path) -> bool:
    """Whether a name ends as files do, or nearly so; `FLUX.1-dev-nf4` has a dot and does not."""
    return bool(out.suffix) and bool(get_close_matches(out.suffix.lower(), FILES, cutoff=0.8))


def refuse_long(out: Path, several: bool) -> None:
    """Raises:
    FileError: a name that leaves no room for the endings of the files that it is written through.
    """
    size, most = len(os.fsencode(out.name)), NAME_NBYTES - (SEVERAL_NBYTES if several else PARTIAL_NBYTES)
    if size > most:
        raise FileError(f"{out.name[:40]}...: the name has {size} bytes, at most {most} can be.\nGive a shorter one.")


@dataclass(frozen=True)
class Folder:
    """What is written beside the weights.

    Attributes:
        writer: of the weights.
        config: of the component, without quantization.
    """

    writer: Layout
    config: Mapping[str, Any]

    @property
    def names(self) -> tuple[str, ...]:
        return (CONFIG, *self.writer.beside({}))

    def texts(self, notes: Mapping[str, Any], plain: Sequence[str]) -> dict[str, str]:
        """File name -> content.

        Args:
            notes: of the writer, for the quantized weights.
            plain: names of the matrices that were kept.
        """
        config = dict(self.config)
        quantization = self.writer.config(notes, tuple(plain))
        if quantization is not None:
            config["quantization_config"] = quantization
        found: dict[str, Any] = {CONFIG: config, **self.writer.beside(notes)}
        return {name: json.dumps(value, indent=2) + "\n" for name, value in found.items()}


def folder_of(request: Request, found: Found, metas: Mapping[str, TensorMeta], writer: Writer) -> Folder:
    """What is to stand beside the weights.

    Args:
        metas: of the source.
    Raises:
        SpecError: a layout that no loader of folders reads.
        FileError: a source without configuration that none follows from.
    """
    if not isinstance(writer, Layout) or not writer.in_folders:
        raise SpecError(
            f"A folder is for diffusers and transformers, which do not read the layout {writer.id}.\n"
            "Choose a format of bnb, quanto, sdnq or torchao, or name the target *.safetensors."
        )
    config = _config_of(request.source)
    if not config:
        if (found.family or found.architecture) != "flux" or found.layout != "comfyui":
            raise _cannot(found)
        config = flux_config(_names(found, metas), request.source.name)
    return Folder(writer, {k: v for k, v in config.items() if k not in STALE})


def without_clashes(folder: Folder, plan: QuantPlan, remake: Callable[[QuantSpec], QuantPlan]) -> QuantPlan:
    """The plan with those layers quantized, too, that loaders of a folder cannot be told to leave plain.

    Args:
        remake: makes the plan of another spec.
    Raises:
        SpecError: the user wants such a layer plain.
    """
    clashes = folder.writer.clashes(*_divided(plan))
    if not clashes:
        return plan
    spec = plan.spec
    plan = remake(dataclasses.replace(spec, include=(*spec.include, *(f"re:^{re.escape(m)}$" for m in clashes))))
    left = folder.writer.clashes(*_divided(plan))
    if left:
        raise SpecError(
            f"'{left[0]}' is to stay plain, and loaders of this folder cannot be told so: they go by the last part of "
            "a name, which quantized layers have too.\nName the target *.safetensors."
        )
    note = f"quantized too: {', '.join(clashes)}; diffusers takes the name as that of layers in blocks as well"
    return dataclasses.replace(plan, notes=(*plan.notes, note))


def _divided(plan: QuantPlan) -> tuple[list[str], list[str]]:
    """Names of the weights that are quantized, and of the other matrices."""
    done = {d.meta.name for d in plan.to_quantize}
    return list(done), [d.meta.name for d in plan.decisions if len(d.meta.shape) == 2 and d.meta.name not in done]


def folder_targets(found: Found, metas: Mapping[str, TensorMeta]) -> list[Target]:
    """The tensors of a folder: under their names where those are diffusers' or transformers' already.

    Raises:
        FileError: another layout than these and ComfyUI's of FLUX, or a tensor that has no place.
    """
    names = _names(found, metas)
    if found.layout in ("diffusers", "transformers"):
        whole = {name: found.prefix + name for name in names}
        return [target(n, (Piece(source),), {source: names[n]}) for n, source in whole.items()]
    if (found.family or found.architecture) == "flux" and found.layout == "comfyui":
        return flux_targets(names, found.prefix)
    raise _cannot(found)


def _cannot(found: Found) -> FileError:
    return FileError(
        f"{found.family or found.architecture} in {found.layout} layout cannot be written as a folder of diffusers, "
        "only FLUX can.\nConvert the folder that diffusers publishes, or name the target *.safetensors."
    )


def _names(found: Found, metas: Mapping[str, TensorMeta]) -> dict[str, TensorMeta]:
    inside = {n.removeprefix(found.prefix): m for n, m in metas.items() if n.startswith(found.prefix)}
    return {n: m for n, m in inside.items() if not DROPPABLE.search(n) and (found.prefix or not OTHER_PARTS.match(n))}


def flux_targets(metas: Mapping[str, TensorMeta], prefix: str = "") -> list[Target]:
    """diffusers' tensors of FLUX out of ComfyUI's: the table of the other direction, read backwards.

    Args:
        metas: by name without prefix.
        prefix: of the names in the file.
    Raises:
        FileError: a tensor that is none of FLUX, or has too few rows.
    """
    rules = [(rule, _pattern(rule.target)) for rule in FLUX.rules]
    hidden = _shape(metas, "img_in.weight")[0]
    found: list[Target] = []
    for name, meta in metas.items():
        canonical = _QK_NORM.sub(r".norm.\1.scale", name)
        hit = next(((r, m) for r, pattern in rules if (m := pattern.fullmatch(canonical))), None)
        if hit is None:
            raise FileError(f"'{name}' {meta.shape}: has no place in diffusers' layout of FLUX.")
        rule, marks = hit
        sources = {prefix + name: meta}
        for source, piece in zip(rule.sources, _pieces(rule, prefix + name, hidden), strict=True):
            found.append(target(_fill(source, marks), (piece,), sources))
    return found


def _pieces(rule: Rule, source: str, hidden: int) -> list[Piece]:
    """Rows of what `rule` joins: each but the last is as wide as the model."""
    last = len(rule.sources) - 1
    if not last:
        return [Piece(source, swap=rule.swap)]
    whole = len(rule.sources) == 3  # q, k and v; a fourth one takes what is left
    return [
        Piece(source, i * hidden, (i + 1) * hidden if whole or i < last else None) for i in range(len(rule.sources))
    ]


def _pattern(name: str) -> re.Pattern[str]:
    text = re.escape(name).replace(r"\#", r"(?P<number>\d+)").replace(r"\*", r"(?P<leaf>weight|bias)")
    return re.compile(text)


def _fill(name: str, match: re.Match[str]) -> str:
    marks = match.groupdict()
    return name.replace("#", str(marks.get("number"))).replace("*", str(marks.get("leaf")))


def flux_config(metas: Mapping[str, TensorMeta], label: str) -> dict[str, Any]:
    """`config.json` of diffusers' FluxTransformer2DModel, by the shapes of ComfyUI's tensors.

    Raises:
        FileError: a tensor that fixes a size is missing.
    """
    hidden, in_channels = _shape(metas, "img_in.weight")
    if hidden % HEAD_DIM:
        raise FileError(f"{label}: hidden size {hidden} is not a multiple of FLUX's head size {HEAD_DIM}.")
    out_channels = _shape(metas, "final_layer.linear.weight")[0]
    return {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": in_channels,
        "out_channels": None if out_channels == in_channels else out_channels,
        "num_layers": _count(metas, "double_blocks"),
        "num_single_layers": _count(metas, "single_blocks"),
        "attention_head_dim": HEAD_DIM,
        "num_attention_heads": hidden // HEAD_DIM,
        "joint_attention_dim": _shape(metas, "txt_in.weight")[1],
        "pooled_projection_dim": _shape(metas, "vector_in.in_layer.weight")[1],
        "guidance_embeds": "guidance_in.in_layer.weight" in metas,
        "axes_dims_rope": list(AXES_DIMS_ROPE),
    }


def _shape(metas: Mapping[str, TensorMeta], name: str) -> tuple[int, int]:
    meta = metas.get(name)
    if meta is None or len(meta.shape) != 2:
        raise FileError(f"'{name}': {'missing' if meta is None else f'shape {meta.shape}'}, expected a matrix of FLUX.")
    return meta.shape[0], meta.shape[1]


def _count(metas: Mapping[str, TensorMeta], prefix: str) -> int:
    return len({m[0] for n in metas if n.startswith(f"{prefix}.") and (m := _NUMBER.match(n, len(prefix) + 1))})


def _config_of(source: Path) -> dict[str, Any]:
    """`config.json` beside the weights of a folder; empty where there is none."""
    folder = locate(source).folder
    path = None if folder is None else folder / CONFIG
    if path is None or not path.is_file():
        return {}
    try:
        if path.stat().st_size > CONFIG_NBYTES:
            raise FileError(f"{path}: has {path.stat().st_size} bytes, too many for a configuration.")
        value: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as err:
        raise FileError(f"{path}: cannot be read as JSON: {err}.") from err
    if not isinstance(value, dict):
        raise FileError(f"{path}: is no JSON object.")
    return cast("dict[str, Any]", value)
