"""Checks of the paths on a command line, made before any work."""

from __future__ import annotations

import os
from pathlib import Path

from ..quantizers.errors import FileError


def require_writable(folder: Path, option: str) -> None:
    """Find out before the work, not after it, that results cannot be written.

    Raises:
        FileError: names the option and the folder.
    """
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise FileError(f"{option}: cannot write in '{folder}' ('{existing}' is not a writable folder).")
