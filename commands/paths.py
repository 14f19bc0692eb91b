"""Checks of the paths on a command line, made before any work, and reports written under them after it."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from ..quantizers.errors import FileError


def require_writable(folder: Path, option: str) -> None:
    """Find out before the work, not after it, that results cannot be written.

    Raises:
        FileError: names the option and the folder.
    """
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise FileError(f"{option}: cannot write in '{folder}' ('{existing}' is not a writable folder).")


def require_file(path: Path, option: str) -> None:
    """For results that go into one file. An empty name on a command line is the folder where it was given.

    Raises:
        FileError: the path is a folder, or its folder cannot be written in.
    """
    if path.is_dir():
        raise FileError(f"{option}: '{path}' is a folder.\nName a file, such as '{path / 'report.json'}'.")
    require_writable(path.parent, option)


def write_json(path: Path, data: Any, option: str) -> None:
    """Write beside it and rename, so that no half of a file is left, nor another file beside it.

    Raises:
        FileError: the path is a folder, or cannot be written.
    """
    require_file(path, option)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as err:
        raise FileError(f"{option}: {path} cannot be written: {err.strerror}.") from err
    finally:
        with contextlib.suppress(OSError):  # it is gone where it was renamed, and may never have been there
            temporary.unlink()
