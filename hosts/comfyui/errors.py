"""What libraries raise while ComfyUI samples with their layers, explained; on models that the pack quantized."""

from __future__ import annotations

from typing import Any

KEY = "quantwire_errors"


def explain_sampling(patcher: Any) -> None:
    """Wrap loading and sampling of this ModelPatcher and of its clones; the patcher is changed.

    Text encoders have no wrappers in the host, so that their raw errors stay as they are.
    """
    from comfy.patcher_extension import WrappersMP

    patcher.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _outer_sample)


def _outer_sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return executor(*args, **kwargs)
    except Exception as err:
        import comfy.model_management as mm

        from ...quantizers.compat.find import find_carriers
        from ...quantizers.compat.modes import HostName
        from ...quantizers.compat.translate import raise_translated
        from . import memory

        if mm.is_oom(err):
            raise
        patcher = executor.class_obj.model_patcher
        found = find_carriers(patcher.model.diffusion_model)
        mode, variant = memory.done(patcher)
        raise_translated(err, host=HostName.COMFYUI, mode=mode, variant=variant, found=found)
        raise
