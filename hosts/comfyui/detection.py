"""What the host makes of a file's tensors, from their names and shapes alone.

The host's model is made once without weights: its linear layers are what can hold quantized weights, its parameters say
what shape each tensor must have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ...quantizers.errors import FileError
from .linear import operations

SHOWN = 5  # names in a line of a report


@dataclass
class Plan:
    """What the host makes of a file.

    Attributes:
        dtype: in which it holds plain weights.
        compute: in which it multiplies.
        places: name in the file -> name in the model, where the host takes the tensor as it is.
        shapes: name in the model -> shape of the parameter or buffer.
        linear: names in the model of the weights of linear layers.
        missing: parameters for which the file has nothing.
        unknown: tensors for which the model has no place.
    """

    dtype: torch.dtype
    compute: torch.dtype
    places: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    linear: set[str]
    missing: list[str] = field(default_factory=lambda: list[str]())
    unknown: list[str] = field(default_factory=lambda: list[str]())

    def warnings(self) -> list[str]:
        found: list[str] = []
        if self.missing:
            found.append(f"the file has nothing for {len(self.missing)} parameters: {first_of(self.missing)}")
        if self.unknown:
            found.append(f"the model has no place for {len(self.unknown)} tensors: {first_of(self.unknown)}")
        return found


def plan_model(
    probe: Mapping[str, Tensor], metadata: Mapping[str, str], weight_dtype: torch.dtype | None, native: bool = False
) -> Plan | None:
    """Ask the host what the model is, and make it without weights; None where it does not know the model.

    Args:
        probe: name in ComfyUI's layout -> tensor of the logical shape, on the device meta but for small ones, whose
            values the host's detection reads.
        weight_dtype: in which most of the weights are; None lets the host choose.
        native: choose the dtypes as the host does for its own quantized files.
    """
    import comfy.model_management as mm
    from comfy.model_detection import model_config_from_unet

    config = model_config_from_unet(dict(probe), "", metadata=dict(metadata))
    if config is None:
        return None
    supported, device = list(config.supported_inference_dtypes), mm.get_torch_device()
    numel = sum(t.numel() for t in probe.values())
    dtype = mm.unet_dtype(model_params=numel, supported_dtypes=supported, weight_dtype=weight_dtype)
    cast = mm.unet_manual_cast(None if native else dtype, device, supported)
    compute = cast or dtype
    config.set_inference_dtype(dtype, cast, device=device)
    config.custom_operations = operations(compute)
    model = config.get_model(probe, "", device=torch.device("meta")).diffusion_model
    taken = config.process_unet_state_dict(dict(probe))
    names = {id(tensor): name for name, tensor in probe.items()}
    shapes = {name: tuple(t.shape) for name, t in (*model.named_parameters(), *model.named_buffers())}
    # The host's own class and no subclass: one with another forward may use its weight in another way.
    layers = {f"{n}.weight": m for n, m in model.named_modules() if type(m) is operations(compute).Linear}
    shapes |= {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    expected = {*(name for name, _ in model.named_parameters()), *layers}
    return Plan(
        dtype,
        compute,
        {names[id(tensor)]: name for name, tensor in taken.items() if id(tensor) in names},
        shapes,
        set(layers),
        sorted(expected - set(taken)),
        sorted(set(taken) - set(shapes)),
    )


def in_shape(path: Path, name: str, tensor: Tensor, shape: tuple[int, ...] | None) -> Tensor:
    """The tensor in the shape of the model's parameter: ggml drops outer dimensions of 1.

    Raises:
        FileError: another shape.
    """
    found = tuple(tensor.shape)
    if shape is None or found == shape:
        return tensor
    if [n for n in found if n != 1] != [n for n in shape if n != 1]:
        raise FileError(f"{path.name}: '{name}' has shape {found}, the model needs {shape}.")
    return tensor.reshape(shape)


def first_of(names: list[str]) -> str:
    """The first names, for a line of a report; all stand in its entries."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def check_loaded(model: nn.Module, path: Path) -> None:
    """Every layer has got a weight.

    Raises:
        FileError: names the first that has not.
    """
    missing = next((n for n, m in model.named_modules() if "weight" in vars(m) and m.weight is None), None)
    if missing is not None:
        raise FileError(f"{path.name}: nothing for layer '{missing}'.")
