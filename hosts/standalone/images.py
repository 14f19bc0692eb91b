"""SaveImage and PreviewImage of the embedded host: PNG files with the workflow inside."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ...quantizers.errors import FileError, WorkflowError
from .. import current

UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


class SaveImage:
    DESCRIPTION = "Saves images as PNG, with the workflow inside."
    CATEGORY = "image"
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("images",)
    FUNCTION = "save_images"
    OUTPUT_NODE = True
    COMPRESS_LEVEL = 4

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tooltip = "Start of the file names, subfolders allowed; %width%, %height%, %year%, %month%, %day%, %hour%, "
        prefix = {"default": "ComfyUI", "tooltip": tooltip + "%minute% and %second% are filled in."}
        return {
            "required": {
                "images": ("IMAGE", {"tooltip": "The images to save."}),
                "filename_prefix": ("STRING", prefix),
            },
            "hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"},
        }

    def save_images(
        self, images: Any, filename_prefix: str = "ComfyUI", prompt: Any = None, extra_pnginfo: Any = None
    ) -> dict[str, Any]:
        saved = save_pngs(images, current().output, filename_prefix, self.COMPRESS_LEVEL, prompt, extra_pnginfo)
        entries = [{"filename": p.name, "subfolder": sub, "type": "output"} for p, sub in saved]
        return {"ui": {"images": entries}, "result": (images,)}


class PreviewImage:
    DESCRIPTION = "Saves images in the folder temp of the output folder."
    CATEGORY = "image"
    RETURN_TYPES = ()
    FUNCTION = "save_images"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"images": ("IMAGE", {"tooltip": "The images to look at."})},
            "hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"},
        }

    def save_images(self, images: Any, prompt: Any = None, extra_pnginfo: Any = None) -> dict[str, Any]:
        saved = save_pngs(images, current().output / "temp", "preview", 1, prompt, extra_pnginfo)
        return {"ui": {"images": [{"filename": p.name, "subfolder": sub, "type": "temp"} for p, sub in saved]}}


def save_pngs(
    images: Any, folder: Path, prefix: str, compress_level: int, prompt: Any, extra_pnginfo: Any
) -> list[tuple[Path, str]]:
    """Write (B, H, W, 3) images in [0, 1] as `PREFIX_00001_.png` and on, after the highest number in the folder.

    Returns:
        path and subfolder of each file.
    Raises:
        WorkflowError: the prefix leads out of the folder, is empty or is no file name.
        FileError: the folder cannot be written to.
    """
    import numpy as np
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    height, width = images.shape[1:3]
    target = folder / _file_prefix(prefix, width, height)
    if not target.resolve().is_relative_to(folder.resolve()):
        raise WorkflowError(f"filename_prefix '{prefix}' leads out of the output folder.")
    if target.resolve() == folder.resolve():
        raise WorkflowError(f"filename_prefix '{prefix}' holds no file name.")
    text = PngInfo()
    if prompt is not None:
        text.add_text("prompt", json.dumps(prompt))
    for key, value in (extra_pnginfo or {}).items():
        text.add_text(key, json.dumps(value))
    subfolder = target.parent.resolve().relative_to(folder.resolve()).as_posix()
    saved: list[tuple[Path, str]] = []
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        number = _next_number(target)
        for batch_number, image in enumerate(images):
            pixels = np.clip(image.cpu().float().numpy() * 255.0, 0, 255).astype(np.uint8)
            name = target.name.replace("%batch_num%", str(batch_number))
            path = target.with_name(f"{name}_{number + batch_number:05}_.png")
            temporary = path.with_name(path.name + ".tmp")
            try:
                Image.fromarray(pixels).save(temporary, format="PNG", pnginfo=text, compress_level=compress_level)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
            saved.append((path, "" if subfolder == "." else subfolder))
    except OSError as err:
        raise FileError(f"Images cannot be written to {target.parent}: {err.strerror or err}.") from err
    return saved


def _next_number(target: Path) -> int:
    """One more than the highest number among the files of this prefix; as in ComfyUI, gaps are not filled."""
    pattern = re.compile(re.escape(target.name) + r"_(\d+)_?\.\w+")
    return 1 + max((int(m[1]) for p in target.parent.iterdir() if (m := pattern.fullmatch(p.name))), default=0)


def _file_prefix(prefix: str, width: int, height: int) -> str:
    """The prefix with its values, as a path: workflows made on Windows have `folder\\image`.

    Raises:
        WorkflowError: it holds what no file name can.
    """
    filled = _fill_in(prefix, width, height).replace("\\", "/")
    if found := UNPRINTABLE.search(filled):
        raise WorkflowError(
            f"filename_prefix {prefix!a} holds the character {found[0]!a}, which no file name can.\nWrite it without."
        )
    return filled


def _fill_in(prefix: str, width: int, height: int) -> str:
    import time

    now = time.localtime()
    values = {
        "width": str(width),
        "height": str(height),
        "year": f"{now.tm_year}",
        "month": f"{now.tm_mon:02}",
        "day": f"{now.tm_mday:02}",
        "hour": f"{now.tm_hour:02}",
        "minute": f"{now.tm_min:02}",
        "second": f"{now.tm_sec:02}",
    }
    return re.sub(r"%(\w+)%", lambda m: values.get(m[1], m[0]), prefix)
