"""The modules inside any object of a graph: models, text encoders, decoders and pipelines of any host or pack.

Objects are recognised by what they hold, never by their class, so nothing is imported. Only what an object stores is
read: properties may load, move or dequantize weights, and a lazy mapping may open files. For the same reason kinds are
told by `type`: `isinstance` asks an object for its class, which dead weak references answer with an error.
"""

from __future__ import annotations

import gc
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any, cast

from torch import nn

# How deep objects and containers are followed, and how many: a list of a million strings has no model in it. Longer
# containers, such as the patches of a LoRA, wait until the others were looked at.
_DEPTH, _MOST, _LONG = 6, 10_000, 256
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
    later: deque[tuple[tuple[str, ...], Any]] = deque()
    while queue or later:
        path, value = (queue or later).popleft()
        is_module = _is(value, nn.Module)
        if is_module and _has_weights(value):
            found[id(value)] = path, value
            continue
        if len(seen) >= _MOST and not is_module:  # modules that were reached by then are still listed
            continue
        for name, inner in _inside(path, value):
            if id(inner) not in seen:
                seen.add(id(inner))
                kept.append(inner)
                (later if _length(inner) > _LONG else queue).append(((*path, name), inner))
    return _named(_outermost(list(found.values())))


def _inside(path: tuple[str, ...], value: Any) -> Iterator[tuple[str, Any]]:
    """What an object or container holds that may be a model or lead to one."""
    if len(path) >= _DEPTH or value is None or _is(value, str, bytes, int, float, type):
        return
    value = _unwrapped(value)
    if _is(value, dict):
        pairs = [(_key(k, i), v) for i, (k, v) in enumerate(dict.items(cast("dict[Any, Any]", value)))]
    elif _is(value, list, tuple):
        items = (list if _is(value, list) else tuple).__iter__(value)
        pairs = [(str(i), v) for i, v in enumerate(cast("Iterator[Any]", items))]
    else:
        yield from _attributes(path, value)
        return
    yield from ((name, inner) for name, inner in pairs if _is_container(inner) or not _is_barren(inner))


def _key(key: object, index: int) -> str:
    """Of other keys the index: text of theirs may be long, or cost something."""
    return str.__str__(cast(str, key)) if _is(key, str) else str(key) if type(key) is int else str(index)


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
        if _is(inner, nn.Module) or ((telling or public) and (_is_container(inner) or not _is_barren(inner))):
            yield name, inner


def _host_object(stored: Mapping[str, Any]) -> list[tuple[str, Any]] | None:
    """What to look at in ComfyUI's own objects, which also hold patches, backups, and the objects they came from."""
    if _is(clip := stored.get("cond_stage_model"), nn.Module):
        return list(cast(nn.Module, clip).named_children()) or [("cond_stage_model", clip)]
    if _is(vae := stored.get("first_stage_model"), nn.Module):
        return [("vae", vae)]
    if "control_model" in stored:
        return [("control_model", stored["control_model"]), ("previous", stored.get("previous_controlnet"))]
    if _is(stored.get("model"), nn.Module) and "offload_device" in stored:  # ModelPatcher
        patched = [(name, v) for name, v in _dict(stored, "object_patches").items() if _is(v, nn.Module)]
        return [("model", stored["model"]), ("additional_models", stored.get("additional_models")), *patched]
    if _is(model := _dict(stored, "_modules").get("diffusion_model"), nn.Module):  # BaseModel
        return [("diffusion_model", model)]
    return None


def _dict(stored: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A plain dictionary of a host's object; other objects may have anything under the same name."""
    value = stored.get(name)
    return cast("dict[str, Any]", value) if _is(value, dict) else {}


def _has_weights(module: nn.Module) -> bool:
    """Whether to list a module: not one that only wraps something, nor ComfyUI's BaseModel around the model."""
    if "_modules" not in _stored(module) or "diffusion_model" in module._modules:  # the first: still being made
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
    return _is(value, dict, list, tuple, MappingProxyType)


def _is(value: Any, *kinds: type) -> bool:
    """`isinstance` without a question to the object."""
    return issubclass(type(value), kinds)


def _unwrapped(value: Any) -> Any:
    """The mapping behind a MappingProxyType, which may be of any class; other values as they are."""
    return gc.get_referents(value)[0] if type(value) is MappingProxyType else value


def _length(value: Any) -> int:
    value = _unwrapped(value)
    kind = next((kind for kind in (dict, list, tuple) if _is(value, kind)), None)
    return kind.__len__(value) if kind is not None else 0


def _is_barren(value: Any) -> bool:
    if _is(value, nn.Module, SimpleNamespace):
        return False
    return _is(value, type) or str(type(value).__module__).partition(".")[0] in _BARREN


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
