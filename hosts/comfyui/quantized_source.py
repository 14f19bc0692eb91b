"""The diffusion model in a quantized file: what it is made of under ComfyUI's names, or why it is not loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...quantizers.errors import FileError
from ...quantizers.files.architectures import Found, comfyui_targets, recognise
from ...quantizers.files.layouts.target import Piece, Target
from ...quantizers.files.model_file import ModelFile
from ...quantizers.files.schemes.base import Layer
from ...quantizers.files.schemes.scan import Scan, scan
from ...quantizers.files.signatures import IMAGE
from ...quantizers.meta import TensorMeta

MARKERS = ("scaled_fp8",)
TEXT_ENCODERS = "Open it with Load CLIP, or convert it to GGUF and open it with LoadGGUFTextEncoder."
INSTEAD = "Open it with the Load Diffusion Model node and link QuantizeModel, or use LoadAndQuantize."


@dataclass(frozen=True)
class Source:
    """The diffusion model in a file.

    Attributes:
        found: what it was recognised as; None where only the host may know it.
        targets: name in ComfyUI's layout -> the tensor to make.
        layers: those of the file's quantized layers that the targets are made of.
        left: tensors of the file that are other parts'.
    """

    scan: Scan
    found: Found | None
    targets: Mapping[str, Target]
    layers: Mapping[str, Layer]
    left: Sequence[str]

    @property
    def file(self) -> ModelFile:
        return self.scan.file

    @property
    def name(self) -> str:
        return self.scan.file.path.name

    def layers_of(self, target: Target) -> list[Layer]:
        return [self.layers[piece.source] for piece in target.pieces if piece.source in self.layers]


def find_source(file: ModelFile) -> Source:
    """Find the diffusion model of a file, and refuse what is not loaded here.

    Raises:
        FileError: something else, not quantized, or damaged.
    """
    found = scan(file)
    try:
        metas = {name: meta for name, meta in found.metas().items() if not _is_marker(found, name)}
        seen = recognise(metas)
        targets = {t.name: t for t in _targets(metas, seen)}
    except FileError as err:
        raise _refusal(file.path, found, err) from err
    used = {piece.source for target in targets.values() for piece in target.pieces}
    layers = {name: layer for name, layer in found.layers.items() if name in used}
    left = [n for n in file.entries if found.owner.get(n, n) not in used and not _is_marker(found, n)]
    source = Source(found, seen, targets, layers, left)
    _refuse_faults(source)
    if not layers:
        raise FileError(f"{file.path.name}: no weight of the diffusion model in it is quantized.\n{INSTEAD}")
    unloadable = unloadable_layer(file.path, layers)
    if unloadable is not None:
        raise unloadable
    return source


def _targets(metas: Mapping[str, TensorMeta], seen: Found | None) -> Iterable[Target]:
    """Every tensor of the diffusion model under the name that ComfyUI has for it.

    Raises:
        FileError: a text encoder, or tensors that have no place there.
    """
    from comfy.model_detection import unet_prefix_from_state_dict

    if seen is not None and seen.component != IMAGE:
        raise FileError(f"holds a {seen.component} ({seen.architecture}).\n{TEXT_ENCODERS}")
    if seen is not None:
        return comfyui_targets(seen, metas)
    prefix = unet_prefix_from_state_dict(metas)
    inside = {name: meta for name, meta in metas.items() if name.startswith(prefix)} or metas
    return [Target(n.removeprefix(prefix), m.shape, m.dtype, (Piece(n),)) for n, m in inside.items()]


def unloadable_layer(path: Path, layers: Mapping[str, Layer]) -> FileError | None:
    """The first layer that is known and not loaded, with the reason."""
    layer = next((x for x in layers.values() if not x.format_id), None)
    return FileError(f"{path.name}: '{layer.name}' is {layer.type}: {layer.why}") if layer is not None else None


def _refusal(path: Path, found: Scan, err: FileError) -> FileError:
    """Why a file is not opened: where it is no diffusion model, what it is and what opens it."""
    from ...quantizers.files.components import Component
    from ...quantizers.files.detect import detect_file
    from ...quantizers.files.loading import COMFYUI

    facts = detect_file(path)
    if facts.main.component in (Component.DIFFUSION, Component.UNKNOWN):
        return unloadable_layer(path, found.layers) or FileError(
            f"{path.name}: {str(err).removeprefix(f'{path.name}: ')}"
        )
    way = next((x for x in facts.loads if x.host == COMFYUI), None)
    todo = f"Open it with {way.node}." if way is not None and way.node else way.note if way is not None else ""
    return FileError(f"{path.name}: {facts.title}, and LoadQuantized opens a diffusion model.\n{todo}".rstrip())


def _is_marker(found: Scan, name: str) -> bool:
    """Whether a tensor says how a file is to be read, and belongs to no model."""
    return name.rpartition(".")[2] in MARKERS and name not in found.owner


def _refuse_faults(source: Source) -> None:
    """Refuse a file that contradicts its scheme, but for parts that are not loaded.

    Raises:
        FileError: names the first fault.
    """
    for fault in source.scan.faults:
        name = fault.tensor
        other = name in source.left or (name in source.scan.layers and name not in source.layers)
        if fault.fatal and not other and not any(n.startswith(f"{name}.") for n in source.left if name):
            more = sum(f.fatal for f in source.scan.faults) - 1
            where = f"'{name}': " if name and f"'{name}'" not in fault.text else ""
            raise FileError(
                f"{source.name}: {where}{fault.text.rstrip('.')}{f' (and {more} more faults)' if more else ''}.\n"
                f"`quantwire doctor {source.file.path}` tells what is wrong, and mends it where the mend is certain."
            )
