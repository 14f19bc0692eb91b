"""What families of models are usually sampled with, as far as it counts for memory."""

from __future__ import annotations

# Of ComfyUI's own example graphs. Above 1 a negative prompt is sampled too, in one batch with the prompt where there is
# room; models that were distilled to do without are at 1.
USUAL_CFG = {
    **{"flux": 1.0, "z-image": 1.0, "sd3": 4.5, "lumina2": 4.0, "qwen-image": 2.5, "hidream": 5.0},
    **{"sdxl": 7.0, "sd1.5": 7.0, "wan": 6.0, "ltxv": 3.0, "hyvid": 1.0, "pixart": 4.5, "aura": 3.5},
}


def usual_cfg(family: str) -> float:
    """1 for a family that is not listed."""
    return USUAL_CFG.get(family, 1.0)
