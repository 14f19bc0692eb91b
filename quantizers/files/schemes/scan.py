"""All quantized layers of a file, whichever schemes it mixes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from ...meta import TensorMeta
from ..model_file import ModelFile
from .base import Fault, Layer, Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from ...weight import QuantizedWeight


@dataclass(frozen=True)
class Scan:
    """What the schemes find in a file.

    Attributes:
        layers: name of the weight (`X.weight`, with the file's prefix) -> layer, in the file's order.
        faults: what contradicts a scheme.
    """

    file: ModelFile
    layers: Mapping[str, Layer]
    faults: tuple[Fault, ...]

    @cached_property
    def owner(self) -> Mapping[str, str]:
        """Tensor of the file -> the layer that it belongs to."""
        return {name: layer.name for layer in self.layers.values() for name in layer.tensors.values()}

    @cached_property
    def plain(self) -> tuple[str, ...]:
        """Tensors that belong to no quantized layer, in the file's order."""
        return tuple(name for name in self.file.entries if name not in self.owner)

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape as a full-precision file would have them: what a model is recognised by."""
        plain = {name: self.file.entries[name].shape for name in self.plain}
        return plain | {name: layer.shape for name, layer in self.layers.items()}

    def metas(self) -> dict[str, TensorMeta]:
        """Name -> shape and dtype as a full-precision file would have them; imports torch.

        Raises:
            FileError: a plain tensor in a dtype that torch cannot hold.
        """
        import torch

        from ...errors import FileError
        from ..quantized_file import DTYPES

        found: dict[str, TensorMeta] = {}
        for name in self.plain:
            dtype = self.file.entries[name].torch_dtype
            if dtype is None:
                raise FileError(
                    f"{self.file.path.name}: '{name}' has dtype {self.file.entries[name].dtype}, which torch cannot "
                    "hold."
                )
            found[name] = TensorMeta(name, self.file.entries[name].shape, dtype)
        for name, layer in self.layers.items():
            found[name] = TensorMeta(name, layer.shape, DTYPES.get(layer.dtype, torch.bfloat16))
        first = _places(self.file, self.layers)
        return dict(sorted(found.items(), key=lambda item: first[item[0]]))

    def scheme(self, layer: Layer) -> Scheme:
        from . import SCHEMES, UNCLAIMED

        return next(s for s in (*SCHEMES, UNCLAIMED) if s.id == layer.scheme)

    def read(self, name: str) -> Tensor | QuantizedWeight:
        """A plain tensor, or a quantized layer by the name of its weight.

        Raises:
            FileError: the layer is not loaded here, or its values contradict the header.
        """
        from ...errors import FileError

        layer = self.layers.get(name)
        if layer is None:
            return self.file.read(name)
        if not layer.format_id:
            raise FileError(f"{self.file.path.name}: '{name}' is {layer.type}: {layer.why}")
        return self.scheme(layer).weight(layer, self.file.read)


def scan(file: ModelFile) -> Scan:
    """Find the quantized layers of a file; never raises for what it holds."""
    from . import SCHEMES, UNCLAIMED

    layers: dict[str, Layer] = {}
    faults: list[Fault] = []
    for scheme in SCHEMES:
        for found in scheme.find(file):
            if isinstance(found, Fault):
                faults.append(found)
            else:
                layers.setdefault(found.name, found)
    for found in list(UNCLAIMED.rest(file, layers)):
        if isinstance(found, Fault):
            faults.append(found)
        else:
            layers[found.name] = found
    first = _places(file, layers)
    return Scan(file, dict(sorted(layers.items(), key=lambda item: first[item[0]])), tuple(faults))


def _places(file: ModelFile, layers: Mapping[str, Layer]) -> dict[str, int]:
    """Name of a tensor or layer -> its place in the file, a layer's that of its first tensor."""
    order = {name: i for i, name in enumerate(file.entries)}
    return order | {name: min((order.get(t, 0) for t in x.tensors.values()), default=0) for name, x in layers.items()}
