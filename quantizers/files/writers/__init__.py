"""Layouts of quantized weights in new files, by their ids."""

from __future__ import annotations

from ...errors import SpecError, near
from .base import Writer
from .bnb import Bnb
from .comfy import ComfyMetadataWriter, ComfyWriter
from .own import Own, PlainFloat8
from .quanto import Quanto
from .scaled_fp8 import ScaledFp8Writer
from .sdnq import SdnqWriter
from .torchao import TorchaoWriter

# The first that holds a format is the one that is taken unless another is asked for; the last holds every format.
WRITERS: dict[str, Writer] = {
    writer.id: writer
    for writer in (
        *(ComfyWriter(), ComfyMetadataWriter(), ScaledFp8Writer(), Bnb(), Quanto(), SdnqWriter(), TorchaoWriter()),
        *(PlainFloat8(), Own()),
    )
}


def writer_for(format_id: str, layout: str = "") -> Writer:
    """The layout that weights of a format are written in.

    Args:
        layout: id of the one that is asked for; empty for the usual one.
    Raises:
        SpecError: there is no such layout, or it cannot hold the format.
    """
    if not layout:
        return next(writer for writer in WRITERS.values() if format_id in writer.formats)
    if layout not in WRITERS:
        raise SpecError(f"Unknown layout '{layout}'.{near(layout, WRITERS)}\nLayouts: {', '.join(WRITERS)}.")
    writer = WRITERS[layout]
    if format_id not in writer.formats:
        fit = ", ".join(w.id for w in WRITERS.values() if format_id in w.formats)
        raise SpecError(f"The layout {layout} cannot hold {format_id}.\nLayouts that can: {fit}.")
    return writer
