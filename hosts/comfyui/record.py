"""Record the inputs of a model's linear layers while ComfyUI samples with it.

A wrapper around `BaseModel.apply_model`, which every model goes through, puts the hooks on for the length of a call, so
that neither the model nor another clone of it keeps any. ComfyUI's modules are named as its files are.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..record import Recorder, Watcher

_KEY = "quantwire_record"


def recording(patcher: Any) -> tuple[Any, Recorder]:
    """A clone of a ModelPatcher that records whenever it is sampled with, and where to.

    Args:
        patcher: not changed.
    """
    recorder = Recorder()
    return watched(patcher, recorder), recorder


def watched(patcher: Any, recorder: Watcher) -> Any:
    """A clone of a ModelPatcher that tells a watcher of every call of its model.

    Args:
        patcher: not changed.
    """
    from comfy.patcher_extension import WrappersMP

    def record(executor: Any, *args: Any, **kwargs: Any) -> Any:
        model: nn.Module = executor.class_obj.diffusion_model
        with recorder.watch(model, linear_layers(model)):
            return executor(*args, **kwargs)

    clone = patcher.clone()
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, _KEY, record)
    return clone


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name of each linear weight -> layer."""
    return {f"{name}.weight": m for name, m in model.named_modules() if hasattr(m, "in_features")}
