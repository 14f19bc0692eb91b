"""Pictures opened by Pillow for the editor, with a limit on what one may unfold to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING

from .answers import Refused
from .confine import shown

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 80_000_000  # 320 MB as RGBA; the size stands in the header, so nothing is unpacked to learn it
PREVIEW_PIXELS = 2048
"""Of the longer side: more than a node shows on any screen, and quick to pack."""
# Pillow has readers that start programs (EPS: Ghostscript) or that hardly anybody ever looked at.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "ICO")


@contextmanager
def opened(source: Path | IO[bytes], name: str = "") -> Iterator[Image]:
    """A picture, its pixels not read yet.

    Raises:
        Refused: 400 for what is no picture, a damaged one, or one with more pixels than are taken.
    """
    from PIL import Image, UnidentifiedImageError

    name = name or (source.name if isinstance(source, Path) else "the upload")
    try:
        with Image.open(source, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Refused(400, f"'{shown(name)}' has {image.width} x {image.height} pixels, more than are opened.")
            yield image
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as err:
        raise Refused(400, f"'{shown(name)}' cannot be opened as a picture.") from err


def smaller(path: Path, form: str, quality: int, rgb: bool) -> tuple[bytes, str]:
    """A picture as WebP or JPEG, at most PREVIEW_PIXELS wide and high, for the editor's thumbnails."""
    with opened(path) as image:
        if max(image.size) > PREVIEW_PIXELS:
            image.thumbnail((PREVIEW_PIXELS, PREVIEW_PIXELS))
        made = image.convert("RGB") if rgb or form == "jpeg" else image
        return _saved(made, form, quality=quality), f"image/{form}"


def channel(path: Path, which: str) -> bytes:
    """`rgb` without the transparency, or `a`: the transparency alone, as a PNG whose alpha it is."""
    from PIL import Image

    with opened(path) as image:
        if which == "rgb":
            return _saved(image.convert("RGBA").convert("RGB") if image.mode == "RGBA" else image.convert("RGB"), "png")
        alpha = image.getchannel("A") if image.mode == "RGBA" else Image.new("L", image.size, 255)
        made = Image.new("RGBA", image.size)
        made.putalpha(alpha)
        return _saved(made, "png")


def masked(path: Path, mask: IO[bytes]) -> bytes:
    """The picture with the transparency of another, its texts kept, as PNG."""
    from PIL.PngImagePlugin import PngInfo

    with opened(path) as image, opened(mask) as alpha:
        text = PngInfo()
        for key, value in getattr(image, "text", {}).items():
            text.add_text(key, value)
        made = image.convert("RGBA")
        if alpha.size != made.size:
            raise Refused(400, f"The mask has the size {alpha.size}, the picture {made.size}.")
        made.putalpha(alpha.convert("RGBA").getchannel("A"))
        return _saved(made, "png", pnginfo=text, compress_level=4)


def _saved(image: Image, form: str, **how: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, form.upper(), **how)
    return buffer.getvalue()
