"""Layers whose tensors contradict each other: a fault for the user, and a named layer that is not loaded.

Without the layer its packed bytes would pass for a plain tensor of another shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from ..model_file import Entry, ModelFile
from .base import Fault, Layer

FLOATS = ("F32", "F16", "BF16")


class Broken(Exception):
    """Raised while the tensors of one layer are looked at; never leaves a scheme's `find`."""

    def __init__(self, code: str, tensor: str, text: str, effect: str) -> None:
        super().__init__(text)
        self.fault = Fault(code, tensor, text, effect)


def attempt(
    make: Callable[[], Layer],
    name: str,
    scheme: str,
    type_name: str,
    tensors: Mapping[str, str],
    shape: tuple[int, ...],
) -> Iterator[Layer | Fault]:
    """The layer, or its fault and the layer by name only.

    Args:
        make: raises `Broken` for what is wrong.
        name: of the weight.
        tensors, shape: as far as they are known without `make`.
    """
    try:
        yield make()
    except Broken as err:
        yield err.fault
        yield Layer(name, scheme, type_name, "", tensors, shape, why=err.fault.text)


def need(file: ModelFile, name: str, effect: str, *dtypes: str, cast: str = "") -> Entry:
    """A tensor that a layer cannot do without.

    Args:
        effect: what a loader makes of it where it is missing.
        cast: what of another dtype, if that is something else.
    Raises:
        Broken: it is missing, or in another dtype.
    """
    entry = file.entries.get(name)
    if entry is None:
        raise Broken("tensor-missing", name, f"'{name}' is missing.", effect)
    if dtypes and entry.dtype not in dtypes:
        raise Broken(
            "tensor-dtype", name, f"'{name}' is {entry.dtype}, expected {' or '.join(dtypes)}.", cast or effect
        )
    return entry


def need_numel(entry: Entry, wanted: int, effect: str) -> None:
    """Raises:
    Broken: another number of values.
    """
    if entry.numel != wanted:
        text = f"'{entry.name}' has {entry.numel} values (shape {list(entry.shape)}), expected {wanted}."
        raise Broken("tensor-shape", entry.name, text, effect)
