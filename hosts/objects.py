"""The modules inside any object of a graph: models, text encoders, decoders and pipelines of any host or pack.

Objects are recognised by what they hold, never by their class, so nothing is imported. Only what an object stores is
read: properties may load, move or dequantize weights, and a lazy mapping may open files.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator, Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any, cast

from torch import nn

# How deep objects and containers are followed, and how many: a list of a million strings has no model in it.
_DEPTH, _MOST = 6, 10_000
# Words of the names under which other packs keep what holds their models. Further down than the first level only
# these are followed, because anything can be reached from an object in enough steps, other models too.
_WORDS = ("pipe", "model", "transformer", "unet", "encoder", "clip", "vae", "controlnet", "patcher", "component", "dit")
# Packages whose objects hold no models; builtins are followed as containers, and modules before it comes to this.
_BARREN = frozenset(sys.stdlib_module_names) | {"PIL", "numpy", "safetensors", "tokenizers", "torch"}
# Parts of a path that do not say which model it is.
_VAGUE = ("model", "module", "patcher", "control_model_wrapped", "comfy_model", "pipe", "pipeline", "data")


def components_of(obj: Any) -> dict[str, nn.Module]:
    """Name -> module for the outermost modules that hold the weights of an object; empty where there are none.

    MODEL, CLIP, VAE and CONTROL_NET of both hosts, pipelines of diffusers and transformers, modules, and containers or
    wrappers of any of these. A module reached twice is listed once, under the shorter path.

    Names are the last part of the path to a module that says something (`transformer`, `clip_l`), or the whole path
    (`base.transformer`) where two would be the same.
    """
    found: dict[int, tuple[tuple[str, ...], nn.Module]] = {}
    kept: list[Any] = [obj]  # so that no id is used again while they are compared
    seen = {id(obj)}
    queue: deque[tuple[tuple[str, ...], Any]] = deque([((), obj)])
    while queue and len(seen) < _MOST:
        path, value = queue.popleft()
        if isinstance(value, nn.Module) and _has_weights(value):
            found[id(value)] = path, value
            continue
        for name, inner in _inside(path, value):
            if id(inner) not in seen:
                seen.add(id(inner))
                kept.append(inner)
                queue.append(((*path, name), inner))
    return _named(_outermost(list(found.values())))


def _inside(path: tuple[str, ...], value: Any) -> Iterator[tuple[str, Any]]:
    """What an object or container holds that may be a model or lead to one."""
    if len(path) >= _DEPTH or value is None or isinstance(value, (str, bytes, int, float, type)):
        return
    if isinstance(value, dict):
        pairs = [(str(k), v) for k, v in dict.items(cast("dict[Any, Any]", value))]
    elif isinstance(value, MappingProxyType):
        pairs = [(str(k), v) for k, v in cast("Mapping[Any, Any]", value).items()]
    elif isinstance(value, (list, tuple)):
        pairs = [(str(i), v) for i, v in enumerate(cast("list[Any]", value))]
    else:
        yield from _attributes(path, value)
        return
    yield from ((name, inner) for name, inner in pairs if _is_container(inner) or not _is_barren(inner))


def _attributes(path: tuple[str, ...], value: Any) -> Iterator[tuple[str, Any]]:
    """Modules under any name; other objects under any at the first level, and under telling names further down."""
    stored = _stored(value)
    special = _host_object(stored)
    if special is not None:
        yield from special
        return
    for name, inner in stored.items():
        telling = any(word in name.lower() for word in _WORDS)
        public = not path and not name.startswith("_")
        if isinstance(inner, nn.Module) or ((telling or public) and (_is_container(inner) or not _is_barren(inner))):
            yield name, inner


def _host_object(stored: Mapping[str, Any]) -> list[tuple[str, Any]] | None:
    """What to look at in ComfyUI's own objects, which also hold patches, backups, and the objects they came from."""
    if isinstance(clip := stored.get("cond_stage_model"), nn.Module):
        return list(clip.named_children()) or [("cond_stage_model", clip)]
    if isinstance(vae := stored.get("first_stage_model"), nn.Module):
        return [("vae", vae)]
    if "control_model" in stored:
        return [("control_model", stored["control_model"]), ("previous", stored.get("previous_controlnet"))]
    if isinstance(stored.get("model"), nn.Module) and "offload_device" in stored:  # ModelPatcher
        patched = [(name, v) for name, v in (stored.get("object_patches") or {}).items() if isinstance(v, nn.Module)]
        return [("model", stored["model"]), ("additional_models", stored.get("additional_models")), *patched]
    if isinstance(model := stored.get("_modules", {}).get("diffusion_model"), nn.Module):  # BaseModel
        return [("diffusion_model", model)]
    return None


def _has_weights(module: nn.Module) -> bool:
    """Whether to list a module: not one that only wraps something, nor ComfyUI's BaseModel around the model."""
    if "diffusion_model" in module._modules:
        return False
    return next(module.parameters(), None) is not None or next(module.buffers(), None) is not None


def _stored(value: Any) -> dict[str, Any]:
    """Attributes of an instance, those in slots too, without a call of its own code."""
    stored: dict[str, Any] = {}
    for cls in reversed(type(value).__mro__):
        names = cls.__dict__.get("__slots__", ())
        for name in (names,) if isinstance(names, str) else tuple(names):
            member = cls.__dict__.get(name)
            if type(member).__name__ != "member_descriptor":
                continue
            try:
                stored[name] = member.__get__(value)
            except AttributeError:  # declared and not set
                continue
    try:
        state = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return stored
    return {**stored, **state} if isinstance(state, dict) else stored


def _is_container(value: Any) -> bool:
    return isinstance(value, (dict, list, tuple, MappingProxyType))


def _is_barren(value: Any) -> bool:
    if isinstance(value, (nn.Module, SimpleNamespace)):
        return False
    return isinstance(value, type) or type(value).__module__.partition(".")[0] in _BARREN


def _outermost(found: list[tuple[tuple[str, ...], nn.Module]]) -> list[tuple[tuple[str, ...], nn.Module]]:
    """Without those that are inside another."""
    if len(found) < 2:
        return found
    inside = {id(inner) for _, module in found for inner in module.modules() if inner is not module}
    return [(path, module) for path, module in found if id(module) not in inside]


def _named(found: list[tuple[tuple[str, ...], nn.Module]]) -> dict[str, nn.Module]:
    short = [next((p for p in reversed(path) if p not in _VAGUE), path[-1] if path else "model") for path, _ in found]
    names = [s if short.count(s) == 1 else ".".join(path) or s for s, (path, _) in zip(short, found, strict=True)]
    return {name: module for name, (_, module) in zip(names, found, strict=True)}
