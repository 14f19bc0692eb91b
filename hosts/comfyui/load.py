"""A full-precision diffusion model file as a quantized model, through the host's own detection, layers and patcher."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...quantizers.apply import FLOAT_DTYPES, make_layer, own_forward
from ...quantizers.choices import OnFailure
from ...quantizers.compat.modes import Carrier
from ...quantizers.errors import FileError
from ...quantizers.files.cache import default_cache
from ...quantizers.files.checkpoint import Checkpoint
from ...quantizers.files.on_load import Request, quantize_file
from ...quantizers.files.stream import Part, TensorFile
from ...quantizers.report import QuantReport
from ...quantizers.spec import QuantSpec
from ...quantizers.weight import QuantizedWeight
from .detection import check_loaded
from .layouts import to_quantized_tensor
from .linear import attach_exact_patches, operations
from .patchers import replace_layers

# The host's detection reads values of a few small tensors (norms), beside the shapes of all.
SMALL_NUMEL = 1 << 16


def load_and_quantize(
    path: Path,
    spec: QuantSpec,
    carrier: Carrier = Carrier.QUANTWIRE,
    on_failure: OnFailure = OnFailure.ERROR,
    cached: bool = True,
    progress: Any = None,
    disable_dynamic: bool = False,
) -> tuple[Any, QuantReport]:
    """Open a diffusion model with its linear layers quantized.

    Raises:
        FileError: damaged, already quantized, or a model that the host does not detect.
        BackendUnavailable, SpecError, WeightError: as for QuantizeModel.
    """
    import comfy.model_management as mm
    import comfyui_version

    start = time.perf_counter()
    file = TensorFile(path)
    names = _names(file)
    config, shapes, dtype = _detect(file, names)

    def parts() -> list[Part]:
        linear = _linear_weights(config, shapes, dtype)
        return [_part(file, name, source, linear, dtype) for name, source in names.items()]

    layout = f"ComfyUI {comfyui_version.__version__}, {dtype}"
    request = Request(file, layout, parts, spec, carrier, on_failure, mm.get_torch_device())
    cache = default_cache() if cached else None
    checkpoint, report = quantize_file(
        request, cache, progress=progress, poll=mm.throw_exception_if_processing_interrupted
    )
    patcher = _patcher(checkpoint, file, dtype, disable_dynamic)
    patcher.cached_patcher_init = (load_patcher, (str(path), spec, on_failure, cached))
    if carrier is Carrier.LIBRARY:
        patcher = replace_layers(patcher, _native_layers(checkpoint, dtype))
    report.seconds = time.perf_counter() - start
    return patcher, report


def load_patcher(path: str, spec: QuantSpec, on_failure: OnFailure, cached: bool, disable_dynamic: bool = False) -> Any:
    """For `cached_patcher_init`."""
    return load_and_quantize(Path(path), spec, on_failure=on_failure, cached=cached, disable_dynamic=disable_dynamic)[0]


def held_as(file: TensorFile) -> tuple[dict[str, str], torch.dtype]:
    """Name in the diffusion model -> name in the file, and the dtype in which the host holds it at full precision.

    Raises:
        FileError: a model that the host does not detect.
    """
    names = _names(file)
    return names, _detect(file, names)[2]


def _names(file: TensorFile) -> dict[str, str]:
    """Name in the diffusion model -> name in the file, which may be a whole checkpoint."""
    import comfy.model_detection

    prefix = comfy.model_detection.unet_prefix_from_state_dict(file.shapes)
    inside = {n.removeprefix(prefix): n for n in file.shapes if n.startswith(prefix)}
    return inside or {n: n for n in file.shapes}


def _detect(file: TensorFile, names: dict[str, str]) -> tuple[Any, dict[str, Tensor], torch.dtype]:
    """The host's model configuration, the shapes that it was read off, and the dtype in which it would hold them."""
    import comfy.model_management as mm
    from comfy.model_detection import model_config_from_unet

    shapes = {name: _shape_or_values(file, source) for name, source in names.items()}
    config = model_config_from_unet(shapes, "", metadata=dict(file.metadata))
    if config is None:
        raise FileError(
            f"{file.path.name}: ComfyUI does not detect a diffusion model in its own key layout in it (tensors such as "
            f"{', '.join(list(names)[:3])}).\nOpen it with the Load Diffusion Model node, and link QuantizeModel."
        )
    dtypes = Counter[torch.dtype]()
    for t in shapes.values():
        dtypes[t.dtype] += t.numel()
    dtype = mm.unet_dtype(
        model_params=sum(dtypes.values()),
        supported_dtypes=list(config.supported_inference_dtypes),
        weight_dtype=max(dtypes, key=lambda d: dtypes[d]),
    )
    if dtype not in FLOAT_DTYPES:
        raise FileError(f"{file.path.name}: its weights are {dtype}.\nGive the full-precision file.")
    return config, shapes, dtype


def _linear_weights(config: Any, shapes: dict[str, Tensor], dtype: torch.dtype) -> set[str]:
    """Names of the weights of the linear layers that a quantized layer can stand for."""
    import comfy.ops

    config.set_inference_dtype(dtype, None)
    config.custom_operations = comfy.ops.disable_weight_init
    model = config.get_model(shapes, "", device=torch.device("meta")).diffusion_model
    linear = ((name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear))
    return {f"{name}.weight" for name, m in linear if not own_forward(m)}


def _shape_or_values(file: TensorFile, source: str) -> Tensor:
    shape = file.shapes[source]
    return file.read(source) if shape.ndim < 2 and shape.numel() <= SMALL_NUMEL else shape


def _part(file: TensorFile, name: str, source: str, linear: set[str], dtype: torch.dtype) -> Part:
    t = file.shapes[source]
    is_linear = name in linear and t.ndim == 2
    return Part(name, source, tuple(t.shape), dtype if is_linear and t.dtype in FLOAT_DTYPES else t.dtype, is_linear)


def _patcher(checkpoint: Checkpoint, file: TensorFile, dtype: torch.dtype, disable_dynamic: bool) -> Any:
    import comfy.sd
    from comfy.patcher_extension import CallbacksMP

    state: dict[str, Tensor] = {}
    for name, value in checkpoint.tensors.items():
        if isinstance(value, QuantizedWeight):
            tensor = to_quantized_tensor(value)
            tensor.quantwire_weight = value  # tells our layer the format where the host's own layout does not
            value = tensor
        state[name] = value
    options = {"dtype": dtype, "custom_operations": operations(dtype)}
    patcher = comfy.sd.load_diffusion_model_state_dict(
        state, model_options=options, metadata=dict(file.metadata), disable_dynamic=disable_dynamic
    )
    patcher.add_callback_with_key(CallbacksMP.ON_LOAD, "quantwire", attach_exact_patches)
    check_loaded(patcher.model, file.path)
    return patcher


def _native_layers(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, nn.Module]:
    layers: dict[str, nn.Module] = {}
    for name, value in checkpoint.tensors.items():
        if isinstance(value, QuantizedWeight):
            layer = name.removesuffix(".weight")
            bias = checkpoint.tensors.get(f"{layer}.bias")
            bias = bias.to(dtype) if isinstance(bias, Tensor) else None
            layers[f"diffusion_model.{layer}"] = make_layer(value, bias, Carrier.LIBRARY)
    return layers
