"""Checks of the paths on a command line, made before any work, and reports written under them after it."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from pathlib import Path
from typing import Any

from ..quantizers.errors import FileError

STANDARD_OUTPUT = Path("-")


def add_json(parser: argparse.ArgumentParser, what: str = "everything") -> None:
    """`--json [FILE]`, for commands whose result is data."""
    parser.add_argument(
        "--json", type=Path, nargs="?", const=STANDARD_OUTPUT, metavar="FILE",
        help=f"{what} as JSON, to standard output without FILE",
    )  # fmt: skip


def json_to_output(args: argparse.Namespace) -> bool:
    """Whether `add_json`'s option asks for JSON in place of text. The report of the run is then not written too.

    Raises:
        FileError: it names a file that cannot be written.
    """
    if args.json == STANDARD_OUTPUT:
        args.json = None
        return True
    if args.json is not None:
        require_file(args.json, "--json")
    return False


def require_writable(folder: Path, option: str) -> None:
    """Find out before the work, not after it, that results cannot be written.

    Raises:
        FileError: names the option and the folder.
    """
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not existing.is_dir() or not _takes_files(existing):
        raise FileError(f"{option}: cannot write in '{folder}' ('{existing}' is not a writable folder).")


def _takes_files(folder: Path) -> bool:
    """Whether a file can be made there; the permissions alone say yes to root, in /proc too."""
    if not os.access(folder, os.W_OK):
        return False
    import tempfile  # costs a command that writes nothing a few milliseconds

    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def require_file(path: Path, option: str) -> None:
    """For results that go into one file. An empty name on a command line is the folder where it was given.

    Raises:
        FileError: the path is a folder, or its folder cannot be written in.
    """
    if path.is_dir():
        example = path / ("plot.png" if option == "--plot" else "report.json")
        raise FileError(f"{option}: '{path}' is a folder.\nName a file, such as '{example}'.")
    require_writable(path.parent, option)


def write_json(path: Path, data: Any, option: str) -> None:
    """Write as `write_file` does.

    Raises:
        FileError: the path is a folder, or cannot be written.
    """
    write_file(path, (json.dumps(data, indent=2) + "\n").encode(), option)


def write_file(path: Path, data: bytes, option: str) -> None:
    """Write beside it and rename, so that no half of a file is left, nor another file beside it.

    Raises:
        FileError: the path is a folder, or cannot be written.
    """
    require_file(path, option)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as err:
        raise FileError(f"{option}: {path} cannot be written: {err.strerror or err}.") from err
    finally:
        with contextlib.suppress(OSError):  # it is gone where it was renamed, and may never have been there
            temporary.unlink()
