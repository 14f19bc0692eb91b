"""diffusers' layout to ComfyUI's, for every family that is known here."""

from __future__ import annotations

from collections.abc import Mapping

from ...errors import FileError
from ...meta import TensorMeta
from .flux import CHROMA, FLUX, FLUX2, HUNYUAN_VIDEO
from .lumina import LUMINA2, Z_IMAGE
from .mmdit import AURA, PIXART, SD3
from .table import Table, convert
from .target import Target
from .unet import unet
from .video import COSMOS1, COSMOS2, LTXV, WAN

TABLES: Mapping[str, Table] = {
    "flux": FLUX,
    "flux2": FLUX2,
    "chroma": CHROMA,
    "hyvid": HUNYUAN_VIDEO,
    "sd3": SD3,
    "aura": AURA,
    "pixart": PIXART,
    "lumina2": LUMINA2,
    "z-image": Z_IMAGE,
    "wan": WAN,
    "ltxv": LTXV,
    "cosmos1": COSMOS1,
    "cosmos2": COSMOS2,
}
UNETS = ("sd1", "sdxl")


def diffusers_to_comfyui(family: str, metas: Mapping[str, TensorMeta], prefix: str = "") -> list[Target]:
    """Args:
        family: of `architectures.detect`.
        metas: by name without prefix.
        prefix: of the names in the file.
    Raises:
        FileError: the family has no table, a tensor has no place in it, or the file is not complete.
    """
    if family in UNETS:
        return convert(unet(metas), metas, family, prefix)
    if family not in TABLES:
        raise FileError(
            f"'{family}': diffusers' layout of it cannot be converted, only {', '.join((*TABLES, *UNETS))}.\n"
            "Use the single-file checkpoint in ComfyUI's layout."
        )
    return convert(TABLES[family], metas, family, prefix)
