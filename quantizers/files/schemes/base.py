"""How quantized weights are laid out in files: one scheme for each way in use.

A scheme finds its layers in a header, says in which of our formats each of them is, and makes a `QuantizedWeight` of
its tensors: the same numbers, with nothing dequantized. Where no format of ours holds exactly those numbers, the layer
is named and not loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from ..faults import Fault
from ..model_file import ModelFile

if TYPE_CHECKING:  # finding layers does not need torch
    from torch import Tensor

    from ...weight import QuantizedWeight

    Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class Layer:
    """One quantized weight of a file.

    Attributes:
        name: of the weight as a full-precision file would have it, `X.weight`, with the file's own prefix.
        scheme: id of the scheme.
        type: what its users call it: `nf4`, `float8_e4m3fn`, `int4, groups of 128`.
        format_id: the format of ours that holds exactly these numbers; empty where none does.
        tensors: role -> name in the file; every tensor of the file that belongs to this layer, bias not included.
        shape: of the weight that was quantized, (N, K).
        dtype: of the weight that was quantized, by safetensors' name; `BF16` where the file does not tell.
        options: JSON values that say how it was quantized (group size, ...).
        why: why it cannot be loaded, where `format_id` is empty, and what to do.
    """

    name: str
    scheme: str
    type: str
    format_id: str
    tensors: Mapping[str, str]
    shape: tuple[int, ...]
    dtype: str = "BF16"
    options: Mapping[str, Any] = field(default_factory=lambda: dict[str, Any]())
    why: str = ""


class Scheme(Protocol):
    """One way to lay out quantized weights.

    `find` is called for every file, so it must be cheap where its signs are missing, and it never raises for what a
    file holds: it yields a Fault.
    """

    @property
    def id(self) -> str: ...

    @property
    def title(self) -> str:
        """For people: `bitsandbytes 4-bit`."""
        ...

    @property
    def library(self) -> str:
        """The package or program that writes such files."""
        ...

    def find(self, file: ModelFile) -> Iterable[Layer | Fault]:
        """The quantized layers, from the header and small tensors alone, and what contradicts the scheme."""
        ...

    def weight(self, layer: Layer, read: Read) -> QuantizedWeight:
        """The layer as a weight in `layer.format_id`, on the tensors of the file as far as they can stay as they are.

        Raises:
            FileError: values that contradict the header.
        """
        ...
