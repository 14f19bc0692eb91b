"""The block types of GGUF files: each tensor says itself what it is, and stays in the blocks of the file."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ...ggml_types import TYPES, format_id
from ..locate import Container
from ..model_file import ModelFile
from .base import Fault, Layer

if TYPE_CHECKING:
    from ...weight import QuantizedWeight
    from .base import Read


class GgufScheme:
    id = "gguf"
    title = "GGUF"
    library = "llama.cpp, ComfyUI-GGUF and others"

    def find(self, file: ModelFile) -> Iterable[Layer | Fault]:
        if file.container is not Container.GGUF:
            return
        for name, e in file.entries.items():
            if e.dtype in TYPES:
                # Rows of the weight where they are whole blocks, else the rows in which the file has them.
                rows = e.shape if not e.stored or e.shape[-1] % TYPES[e.dtype].block == 0 else e.stored
                options = {"block_size": TYPES[e.dtype].block, "rows": math.prod(rows[:-1])}
                yield Layer(name, self.id, e.dtype, format_id(e.dtype), {"qdata": name}, e.shape, options=options)

    def weight(self, layer: Layer, read: Read) -> QuantizedWeight:
        import torch

        from ...weight import QuantizedWeight

        raw = read(layer.tensors["qdata"])
        rows = int(layer.options["rows"])
        blocks = raw.reshape(rows, -1) if raw.numel() else raw
        return QuantizedWeight(layer.format_id, {"qdata": blocks}, layer.shape, torch.bfloat16)
