"""What a header tells of a tensor before it is read. Importing this does not import torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class Shaped(Protocol):
    """Anything with a shape: a tensor, its meta, or an entry of a header."""

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class TensorMeta:
    """What a file header or a module tells of a tensor before it is read.

    Attributes:
        name: full dotted name, ending in `.weight`.
        shape: logical shape; (N, K) for a linear weight.
        dtype: dtype of the stored values.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize
