"""What writers have in common: the answers of a layout that needs nothing beside the tensors of its weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from ...weight import QuantizedWeight
from .base import Writer


class Layout:
    """Base of the writers of libraries' layouts: a note is the format of the weight, and nothing else is written."""

    id: str
    title: str
    formats: tuple[str, ...]
    # What a layer may have beside its weight, `LayerRows.beside` -> the last part of its name in the file.
    beside_layers: Mapping[str, str] = MappingProxyType({})
    in_folders = False  # whether loaders of components' folders read it

    def refuse(self, weight_format: str, options: Mapping[str, Any]) -> str | None:
        return None if weight_format in self.formats else f"the layout `{self.id}` does not hold {weight_format}"

    def refuse_together(self, formats: Collection[str]) -> str | None:
        """Why weights of these formats cannot stand in one component's folder, or None; single files hold any."""
        return None

    def clashes(self, quantized: Collection[str], plain: Collection[str]) -> list[str]:
        """Modules that loaders of a folder cannot be told to leave plain, beside what is quantized; all are weights."""
        return []

    def tensors(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        raise NotImplementedError

    def note(self, name: str, weight: QuantizedWeight) -> Any:
        return weight.format_id

    def once(self, notes: Mapping[str, Any]) -> dict[str, Tensor]:
        return {}

    def metadata(self, notes: Mapping[str, Any]) -> dict[str, str]:
        return {}

    def config(self, notes: Mapping[str, Any], plain: tuple[str, ...]) -> dict[str, Any] | None:
        return None

    def beside(self, notes: Mapping[str, Any]) -> dict[str, Any]:
        """File name -> JSON of what stands in the folder beside `config.json`."""
        return {}


def module_of(name: str) -> str:
    """`blocks.0.to_q` of `blocks.0.to_q.weight`."""
    return name.removesuffix(".weight")


def modules(names: Collection[str]) -> list[str]:
    return sorted(module_of(name) for name in names if name.endswith(".weight"))


@runtime_checkable
class NamesPlain(Protocol):
    """A layout whose metadata names the tensors that are not quantized too."""

    def metadata_of_all(self, notes: Mapping[str, Any], plain: Collection[str]) -> dict[str, str]:
        """`Writer.metadata`, with those.

        Args:
            plain: names of all tensors that belong to no quantized layer.
        """
        ...


def metadata_of(writer: Writer, notes: Mapping[str, Any], plain: Collection[str]) -> dict[str, str]:
    """The strings that a layout has in a file's metadata; `plain` as for `NamesPlain`."""
    return writer.metadata_of_all(notes, plain) if isinstance(writer, NamesPlain) else writer.metadata(notes)
