"""Names that clients send, kept inside a folder.

A name is refused for what it says (`..`, an absolute path, control characters) and for where it leads once links are
followed; both, because a link inside the folder may point anywhere. The folder itself may be a link.
"""

from __future__ import annotations

import contextlib
import mimetypes
import os
import re
import uuid
from pathlib import Path

from .answers import Refused

MAX_NAME_NBYTES = 255
MAX_DEPTH = 32
# What Windows takes for a device or another stream, and what no shell or file manager shows as it is.
ILLEGAL = re.compile(r"[\x00-\x1f\x7f\\]" if os.name != "nt" else r'[\x00-\x1f\x7f\\:*?"<>|]')
# Shown in the page by a browser; everything else is downloaded. No SVG, HTML or XML, which can hold scripts.
SHOWN = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".gif": "image/gif",
    ".bmp": "image/bmp",
    ".avif": "image/avif",
    ".mp4": "video/mp4",
    ".webm": "video/webm",
    ".mov": "video/quicktime",
    ".mkv": "video/x-matroska",
    ".mp3": "audio/mpeg",
    ".wav": "audio/wav",
    ".flac": "audio/flac",
    ".ogg": "audio/ogg",
    ".opus": "audio/ogg",
    ".m4a": "audio/mp4",
    ".glb": "model/gltf-binary",
    ".json": "application/json",
    ".txt": "text/plain; charset=utf-8",
}
# Files of the front end and of the extension, which are programs on purpose. Not from the system's table, where .js may
# be text/plain and the browser then refuses the module.
PROGRAMS = SHOWN | {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".md": "text/markdown; charset=utf-8",
    ".wasm": "application/wasm",
    ".woff": "font/woff",
    ".woff2": "font/woff2",
    ".ico": "image/x-icon",
    ".map": "application/json",
    ".cur": "image/x-icon",
}


def inside(root: Path, name: str, *, empty: bool = False) -> Path:
    """The path of a name below a folder, whether it is there or not.

    Args:
        name: with `/` between folders.
        empty: whether the folder itself may be meant, by an empty name.
    Raises:
        Refused: 400 for a name that no file can have, 403 for one that leads out.
    """
    if not name and empty:
        return root
    parts = name.split("/")
    if ILLEGAL.search(name) or len(parts) > MAX_DEPTH:
        raise Refused(400, f"'{shown(name)}' is no name of a file here.")
    if ".." in parts or name.startswith("/") or Path(name).is_absolute() or Path(name).drive:
        raise Refused(403, f"'{shown(name)}' leads out of its folder.")
    if any(part in ("", ".") for part in parts):
        raise Refused(400, f"'{shown(name)}' has an empty part.")
    try:
        long = any(len(part.encode()) > MAX_NAME_NBYTES for part in parts)
    except UnicodeEncodeError as err:
        raise Refused(400, f"'{shown(name)}' is no name of a file here.") from err
    if long:
        raise Refused(400, f"'{shown(name)}' is longer than {MAX_NAME_NBYTES} bytes.")
    path = root / name
    try:
        real = path.resolve()
    except (OSError, RuntimeError) as err:  # links in a circle
        raise Refused(403, f"'{shown(name)}' cannot be followed.") from err
    if not real.is_relative_to(root.resolve()):
        raise Refused(403, f"'{shown(name)}' leads out of its folder.")
    return path


def existing(root: Path, name: str) -> Path:
    """The path of a file below a folder.

    Raises:
        Refused: as `inside`; 404 where there is no such file.
    """
    path = inside(root, name)
    if not os.path.isfile(path):
        raise Refused(404, f"There is no '{shown(name)}'.")
    return path


def shown(name: str) -> str:
    """A name as an error may repeat it."""
    return name[:100].encode("utf-8", "backslashreplace").decode()


def content_type(path: Path, table: dict[str, str]) -> str:
    return table.get(path.suffix.lower(), "application/octet-stream")


def is_image(path: Path) -> bool:
    return (mimetypes.guess_type(path.name)[0] or "").startswith("image/")


def stat_of(path: Path) -> os.stat_result | None:
    """None where the file is gone: between a listing and its reading, others delete."""
    try:
        return path.stat()
    except OSError:
        return None


def temporary_beside(path: Path) -> Path:
    """A name that nobody else has, hidden, in the same folder. Not tempfile's: its files are for their owner alone."""
    return path.with_name(f".{uuid.uuid4().hex}.tmp")


def write_atomically(path: Path, data: bytes) -> None:
    """Beside it, then renamed: a reader sees the old file or the new one.

    Raises:
        Refused: 400, the system does not take it.
    """
    temporary = temporary_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as err:
        raise Refused(400, f"'{shown(path.name)}' cannot be written: {err.strerror or err}.") from err
    finally:
        with contextlib.suppress(OSError):  # it is gone where it was renamed, and may never have been there
            temporary.unlink()
