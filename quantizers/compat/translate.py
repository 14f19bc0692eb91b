"""Raw errors of the libraries under offload -> `OffloadConflict` with cause and ways out, the original chained.

An error is told by its type and by where it was raised: whose frame is the innermost one that is not torch's, which
libraries are on the way, and which quantized layer was being called. Its text comes last. So a `KeyError: None` of a
user's own code, or a device mismatch in another pack, stays what it is; out-of-memory errors always do, because hosts
recognise them by type.

A traceback holds every tensor of the calls below it. What is read here leaves as strings only, and nothing is kept.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from ..errors import OffloadConflict, QuantwireError
from .devices import devices_of
from .find import Found, find_carriers
from .installed import installed
from .matrix import answer
from .modes import HOST_MODES, Carrier, HostName, OffloadMode, VerdictLevel
from .raw_errors import COMFYUI, SIGNATURES, Place, Signature
from .remedies import RemedyKind, remedies_for
from .rules import described

if TYPE_CHECKING:
    from torch import nn

# Frames that say nothing of who called: torch's own, and the hooks that NNCF puts around every function of a model.
_TORCH = ("torch.", "torch:", "nncf.torch.function_hook.")
_STATED = {
    "accelerate.big_modeling:cpu_offload": (OffloadMode.SEQUENTIAL, "memory"),
    "accelerate.big_modeling:disk_offload": (OffloadMode.SEQUENTIAL, "disk"),
    "accelerate.big_modeling:dispatch_model": (OffloadMode.BALANCED, None),
    "accelerate.big_modeling:cpu_offload_with_hook": (OffloadMode.MODEL, ""),
    "diffusers.hooks.group_offloading:_apply_group_offloading_leaf_level": (OffloadMode.GROUP, "leaf"),
    "diffusers.hooks.group_offloading:_apply_group_offloading_block_level": (OffloadMode.GROUP, "block"),
}
_TO_DISK = ("accelerate.utils.offload:offload_weight", "diffusers.hooks.group_offloading:_offload_to_disk")
_MODULES = ("self", "module", "model", "x")  # locals under which torch, accelerate, diffusers and copy pass it on
_QUOTED = 200  # characters of a raw error; dispatch errors list whole tensors


@dataclass(frozen=True)
class _Scene:
    """Where an error was raised, without a reference to any object of it.

    Attributes:
        frames: `module:function`, outermost first.
        stop: the innermost one that is not torch's.
        layer: dotted name of the innermost module that was being called or moved; empty where it cannot be told.
        layer_class: its class.
        leaf: it has no modules of its own.
        own_call: nothing but the layer's own code and torch's is below its call.
        torn: that layer, or one inside it, has its own tensors on more than one device.
        in_layer, in_model: the quantized weights of that layer, and of the outermost module.
        mode, variant: how that module is offloaded, by its hooks or by the call that installs them.
    """

    frames: tuple[str, ...]
    stop: str = ""
    layer: str = ""
    layer_class: str = ""
    leaf: bool = False
    own_call: bool = False
    torn: bool = False
    in_layer: tuple[Found, ...] = ()
    in_model: tuple[Found, ...] = ()
    mode: OffloadMode | None = None
    variant: str | None = None


def translate(
    err: BaseException,
    *,
    host: HostName | None = None,
    mode: OffloadMode | None = None,
    variant: str | None = None,
    found: Sequence[Found] = (),
) -> QuantwireError | None:
    """What a raw error of a library means, or None when it is not one of those that offload brings about.

    Args:
        host, mode, variant: in force when it was raised; told from the traceback where they are None. Hooks of
            offloading on the model that the traceback shows go before `mode`: a host sees what they did to the
            weights, and takes it for its own doing.
        found: quantized layers of the model; told from the traceback where there are none.
    Returns:
        an OffloadConflict, or a SpecError for what quantized layers cannot do in any mode; to be raised `from err`.
    """
    candidates = [s for s in SIGNATURES if isinstance(err, s.types) and _says(s, err)]
    if not candidates or _is_oom(err):
        return None
    scene = _scene(err)
    if scene.mode is not None and (mode is not scene.mode or variant is None):
        mode, variant = scene.mode, scene.variant
    for signature in candidates:
        if signature.devices and not (scene.torn or _offloads(mode, variant)):
            continue
        if any(_is_at(place, scene, found) for place in signature.places):
            host = host or (HostName.COMFYUI if _any(scene.frames, (COMFYUI,)) else HostName.STANDALONE)
            return _conflict(signature, err, scene, host, mode, variant, found)
    return None


@dataclass
class translated(contextlib.ContextDecorator):
    """Around a call that may raise raw errors, or on a function: what is recognised is raised as its translation.

    Args:
        found: quantized layers of the model, or a function that finds them when they are needed.
    """

    host: HostName | None = None
    mode: OffloadMode | None = None
    variant: str | None = None
    found: Sequence[Found] | Callable[[], Sequence[Found]] = field(default=())

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, traceback: TracebackType | None
    ) -> None:
        del kind, traceback
        try:
            if err is not None:
                found = self.found() if callable(self.found) else self.found
                raise_translated(err, host=self.host, mode=self.mode, variant=self.variant, found=found)
        finally:
            # What is raised here keeps this frame; without this the frame would keep the error, and with it every
            # tensor of its traceback, until the next collection of cycles.
            del err


def raise_translated(
    err: BaseException,
    *,
    host: HostName | None = None,
    mode: OffloadMode | None = None,
    variant: str | None = None,
    found: Sequence[Found] = (),
) -> None:
    """For an `except` block: raise the translation from the error, or return if there is none.

    Raises:
        QuantwireError: as `translate` returns it.
    """
    translation = translate(err, host=host, mode=mode, variant=variant, found=found)
    try:
        if translation is not None:
            raise translation from err
    finally:
        del translation, err


# --- what it is ---


def _says(signature: Signature, err: BaseException) -> bool:
    return any(re.search(text, str(err)) for text in signature.texts)


def _is_oom(err: BaseException) -> bool:
    import torch

    return isinstance(err, (MemoryError, torch.OutOfMemoryError))


def _is_at(place: Place, scene: _Scene, found: Sequence[Found]) -> bool:
    if place.stop and not _any((scene.stop,), place.stop):
        return False
    if place.via and not _any(scene.frames, place.via):
        return False
    if place.holds and not _select((*scene.in_layer, *found, *scene.in_model), place.holds):
        return False
    # Layers of ours are left out: that they are on two devices would be a bug, not a conflict.
    return not place.own_call or (
        scene.own_call and scene.leaf and any(f.carrier is not Carrier.QUANTWIRE for f in scene.in_layer)
    )


def _offloads(mode: OffloadMode | None, variant: str | None) -> bool:
    """Whether a mode moves weights; `whole` is a mode under which everything stays on the device."""
    return mode not in (None, OffloadMode.NONE) and variant != "whole"


def _any(frames: Iterable[str], prefixes: tuple[str, ...]) -> bool:
    return any(frame.startswith(prefixes) for frame in frames)


def _select(found: Iterable[Found], patterns: Iterable[str]) -> list[Found]:
    return [f for f in found if any(fnmatchcase(f.key, p) or fnmatchcase(f.format_id, p) for p in patterns)]


# --- where it was raised ---


def _scene(err: BaseException) -> _Scene:
    frames: list[str] = []
    modules: list[tuple[int, nn.Module]] = []
    try:
        for name, module in _walk(err):
            if module is not None:
                modules.append((len(frames), module))
            frames.append(name)
        stop = next((i for i in reversed(range(len(frames))) if not frames[i].startswith(_TORCH)), -1)
        told = _told(frames, modules, stop) if modules else {}
        return _Scene(tuple(frames), frames[stop] if stop >= 0 else "", **{**_mode(frames, None), **told})
    finally:
        modules.clear()


def _walk(err: BaseException) -> Iterator[tuple[str, nn.Module | None]]:
    """(`module:function`, the module that the call is about) of each frame, outermost first."""
    from torch import nn

    step = err.__traceback__
    while step is not None:
        frame = step.tb_frame
        held = frame.f_locals
        passed = (held.get(name) for name in _MODULES)
        module = next((value for value in passed if isinstance(value, nn.Module)), None)
        yield f"{frame.f_globals.get('__name__', '')}:{frame.f_code.co_name}", module
        step = step.tb_next


def _told(frames: list[str], modules: list[tuple[int, nn.Module]], stop: int) -> dict[str, Any]:
    layer = modules[-1][1]
    first_call = next(i for i, module in modules if module is layer)
    # The outermost module that it is part of: a host may work on a copy of the one that it was given.
    name, root = next(
        (inner, outer)
        for _, outer in modules
        for inner, module in cast("Iterator[tuple[str, nn.Module]]", outer.named_modules())
        if module is layer
    )
    below = [frame for frame in frames[first_call:] if not frame.startswith(_TORCH)]
    return {
        "layer": _plain(name),
        "layer_class": type(layer).__name__,
        "leaf": next(layer.children(), None) is None,
        "own_call": stop < first_call or all(f.partition(":")[0] == type(layer).__module__ for f in below),
        "torn": any(len(devices_of(part)) > 1 for part in layer.modules()),
        "in_layer": tuple(find_carriers(layer)),
        "in_model": tuple(find_carriers(root)),
        **_mode(frames, root),
    }


def _plain(name: str) -> str:
    """The weight's name for NNCF's decompressor of it, which lies under `__nncf_hooks.post_hooks.a:b:weight__0`."""
    hook = re.search(r"__nncf_hooks\.\w+\.(.+?)__\d+", name)
    return hook[1].replace(":", ".") if hook else name


def _mode(frames: list[str], root: nn.Module | None) -> dict[str, Any]:
    """Mode and variant: by the call that was installing them, else by the hooks that are there."""
    stated = next((_STATED[frame] for frame in frames if frame in _STATED), None)
    mode, variant = stated or (installed([root]) if root is not None else None) or (None, None)
    if mode is OffloadMode.BALANCED and stated is not None:
        variant = "split-disk" if _any(frames, _TO_DISK) else None
    elif mode is OffloadMode.GROUP and variant in ("leaf", "block") and _any(frames, _TO_DISK):
        variant += "-disk"
    return {"mode": mode, "variant": variant}


# --- what to say ---


def _conflict(
    signature: Signature,
    err: BaseException,
    scene: _Scene,
    host: HostName,
    mode: OffloadMode | None,
    variant: str | None,
    found: Sequence[Found],
) -> QuantwireError:
    one = _concerned(signature, scene, found)
    how = f" {described(mode, variant)}" if mode is not None else ""
    lines = [
        f"{_who(one, signature)} stopped{how}: {signature.cause}.",
        f"{_where(scene)} with `{_quoted(err)}`.",
        *_ways_out(one, signature, host, mode, variant),
    ]
    offloads = mode is not None and mode is not OffloadMode.NONE
    return (OffloadConflict if offloads else signature.kind)("\n".join(lines))


def _concerned(signature: Signature, scene: _Scene, found: Sequence[Found]) -> Found | None:
    """The layers that it is about: of the kind that it stopped at, counted in the whole model where that is known."""
    # A quanto layer whose weight is being replaced looks as if it had none yet.
    known = [f for f in (*found, *scene.in_model) if f.frozen] or list(scene.in_layer)
    wanted = _select(known, signature.formats)
    there = {f.key for f in scene.in_layer}
    return next((f for f in wanted if f.key in there), wanted[0] if wanted else None)


def _who(found: Found | None, signature: Signature) -> str:
    if found is None:
        return signature.who
    layers = "layer" if found.layers == 1 else "layers"
    return f"{found.format_id} ({found.layers} {layers}{f' of {found.kind}' if found.kind else ''})"


def _where(scene: _Scene) -> str:
    code = scene.stop.replace(":", ".")
    if not scene.layer_class:
        return f"It stopped in {code}"
    name = f"'{scene.layer}' ({scene.layer_class})" if scene.layer else scene.layer_class
    return f"It stopped at {name}, in {code},"


def _quoted(err: BaseException) -> str:
    text = (str(err).strip().splitlines() or [""])[0]
    short = text if len(text) <= _QUOTED else text[:_QUOTED].rstrip() + "..."
    return f"{type(err).__name__}: {short}".removesuffix(": ").rstrip(".")


def _ways_out(
    found: Found | None, signature: Signature, host: HostName, mode: OffloadMode | None, variant: str | None
) -> list[str]:
    texts: list[str] = []
    if found is not None and mode is not None:
        foreign = mode not in HOST_MODES[host]  # accelerate's hooks in a program that has modes of its own
        owner = HostName.STANDALONE if foreign else host
        remedies = remedies_for(found, mode, host=owner, variant=variant)
        # OffloadCompat and the options of the host cannot change what it does not do.
        texts = [r.text for r in remedies if not foreign or r.kind in (RemedyKind.CARRIER, RemedyKind.FORMAT)]
        if answer(found.carrier, found.key, mode, host=owner, variant=variant).level is VerdictLevel.OK:
            texts.append("The table has this combination as one that runs: please report the traceback.")
    return ["Ways out:", *(f"- {text}" for text in texts or [_general(found, signature, host)])]


def _general(found: Found | None, signature: Signature, host: HostName) -> str:
    """The carrier that the table proves, with the modes in which it does."""
    key = found.format_id if found is not None else signature.formats[0]
    modes = [
        mode.value
        for mode in HOST_MODES[host]
        if answer(Carrier.QUANTWIRE, key or "bnb-nf4", mode, host=host).level is VerdictLevel.OK
    ]
    return (
        "Set `carrier` to quantwire in the node that quantizes or loads the model: it holds the same numbers in plain "
        f"tensors, which run with offload mode {', '.join(modes)}."
    )
