"""What a shipped workflow is before it is a file: nodes with inputs, in titled groups, and a note.

A node's place follows from its group: groups stand side by side in bands, a group's nodes in columns.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

PAGES = "https://huggingface.co"


@dataclass(frozen=True)
class File:
    """A model file that a workflow needs.

    Attributes:
        folder: of the model folders, such as `vae`.
        page: repository at Hugging Face that publishes it.
        inside: folder in that repository.
    """

    folder: str
    name: str
    page: str
    inside: str = ""

    @property
    def url(self) -> str:
        return f"{PAGES}/{self.page}/resolve/main/{self.inside}{self.name}"

    @property
    def line(self) -> str:
        return f"- `{self.folder}/{self.name}` from [{self.page}]({PAGES}/{self.page})"

    @property
    def listed(self) -> dict[str, str]:
        """As the editor's dialog for missing models wants it."""
        return {"name": self.name, "url": self.url, "directory": self.folder}


@dataclass(frozen=True)
class Node:
    """A node: class, title and inputs; a tuple is a link (node id, output), and inputs left out have their defaults."""

    kind: str
    title: str
    inputs: dict[str, Any] = field(default_factory=lambda: dict[str, Any]())
    files: tuple[File, ...] = ()


@dataclass(frozen=True)
class Group:
    """Nodes under one title, in columns from left to right and in each from top to bottom."""

    title: str
    columns: tuple[tuple[str, ...], ...]
    colour: str = "#3f789e"


@dataclass(frozen=True)
class Workflow:
    """A graph, its groups in bands from top to bottom, and a note in Markdown.

    Attributes:
        aside: groups left of all bands, one below the other: what every band takes something from.
    """

    name: str
    note: str
    nodes: dict[str, Node]
    bands: tuple[tuple[Group, ...], ...]
    aside: tuple[Group, ...] = ()

    @property
    def files(self) -> list[File]:
        """Every model file that its nodes name, once."""
        return list(dict.fromkeys(f for node in self.nodes.values() for f in node.files))


BLUE, GREEN, PURPLE, BROWN, RED = "#3f789e", "#3f8f5f", "#7a5fa3", "#8a6d3b", "#a3564f"
