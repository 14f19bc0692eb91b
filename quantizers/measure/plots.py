"""Figures through matplotlib, drawn without a display: as PNG files and as images of a graph.

matplotlib is optional: it is imported at the first figure. Colours are the Okabe-Ito set, which people with any kind of
colour vision tell apart.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from ..errors import BackendUnavailable

if TYPE_CHECKING:
    from torch import Tensor

# Source: Okabe and Ito, "Color Universal Design", 2008.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#666666")
GOOD, WARN, BAD = "#009E73", "#E69F00", "#D55E00"


def new_figure(width: float = 8.0, height: float = 4.5) -> Any:
    """An empty matplotlib Figure with its own canvas; no pyplot, so no global state and no leak.

    Args:
        width, height: inches, at 100 dots each.
    Raises:
        BackendUnavailable: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as err:
        raise BackendUnavailable(
            f"Plots need matplotlib, which cannot be imported ({err}).\nRun `pip install matplotlib`."
        ) from err
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def to_png(figure: Any) -> bytes:
    """The figure as a PNG file."""
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def to_image(figure: Any) -> Tensor:
    """The figure as an IMAGE of a graph: (1, H, W, 3) float32 in [0, 1]."""
    import torch

    canvas = figure.canvas
    canvas.draw()
    width, height = canvas.get_width_height()
    pixels = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8).reshape(1, height, width, 4)
    return pixels[..., :3].to(torch.float32) / 255
