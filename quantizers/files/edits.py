"""Changes to a safetensors file that a repair makes, as plain values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class New(NamedTuple):
    """A small tensor that is added."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


class Form(NamedTuple):
    """What a tensor becomes: the same values in another dtype or shape.

    Attributes:
        tiles: its values are a matrix that goes into tiles of 128 x 4, as tensor cores read block scales.
    """

    dtype: str
    shape: tuple[int, ...]
    tiles: bool = False


@dataclass(frozen=True)
class Edit:
    """One change; an empty one writes the file anew, which puts its header in order.

    Attributes:
        rename: name in the file -> new name.
        form: name in the file -> what it becomes.
        add: name -> tensor; one that is there is replaced.
        metadata: strings that are set.
        layers: layer -> its JSON in `_quantization_metadata`; None removes it.
        drop: names of tensors that are left out.
    """

    rename: Mapping[str, str] = field(default_factory=lambda: dict[str, str]())
    form: Mapping[str, Form] = field(default_factory=lambda: dict[str, Form]())
    add: Mapping[str, New] = field(default_factory=lambda: dict[str, New]())
    metadata: Mapping[str, str] = field(default_factory=lambda: dict[str, str]())
    layers: Mapping[str, Mapping[str, Any] | None] = field(default_factory=lambda: dict[str, Any]())
    drop: frozenset[str] = frozenset()


def merged(edits: Iterable[Edit]) -> Edit:
    """All of them; of two that set the same thing, the later one."""
    rename: dict[str, str] = {}
    form: dict[str, Form] = {}
    add: dict[str, New] = {}
    metadata: dict[str, str] = {}
    layers: dict[str, Mapping[str, Any] | None] = {}
    drop: set[str] = set()
    for edit in edits:
        rename.update(edit.rename)
        form.update(edit.form)
        add.update(edit.add)
        metadata.update(edit.metadata)
        layers.update(edit.layers)
        drop.update(edit.drop)
    return Edit(rename, form, add, metadata, layers, frozenset(drop))
