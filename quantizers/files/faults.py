"""What is wrong in a model file. In a module of its own, because headers and schemes both find faults."""

from __future__ import annotations

from dataclasses import dataclass

# Nodes of ComfyUI that open weights: most files that one of them misreads, all of them do.
STOCK_LOADERS = ("UNETLoader", "CheckpointLoaderSimple", "CLIPLoader")


@dataclass(frozen=True)
class Fault:
    """Something in a file that contradicts its format or its scheme.

    Attributes:
        code: kebab-case, permanent: `scale-missing`.
        tensor: which tensor, or layer, it is about; empty for the whole file.
        text: what is wrong: got and expected.
        effect: what a loader makes of it.
        fatal: whether the layer, or a file with such a header, cannot be used.
        misread_by: nodes of ComfyUI's own that stop with an error at it, or make noise of it, where this pack does not.
    """

    code: str
    tensor: str
    text: str
    effect: str = ""
    fatal: bool = True
    misread_by: tuple[str, ...] = ()
