"""A file system that takes no more bytes: the old file stays, and no temporary one."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from quantwire.quantizers.errors import FileError
from quantwire.quantizers.files.checkpoint import read_safetensors, replace_file, write_safetensors

resource = pytest.importorskip("resource")
CAPACITY = 1 << 20
BIG = {"a": torch.arange(CAPACITY, dtype=torch.float32)}
SMALL = {"a": torch.arange(100.0)}


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a file system needs Linux and root")
    command = ["mount", "-t", "tmpfs", "-o", f"size={CAPACITY}", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """The kernel refuses more bytes in one file, as a quota does; needs no rights."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fill(path: Path) -> None:
    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            for _ in range(2 * CAPACITY // 4096):
                file.write(bytes(4096))

    replace_file(path, write)


WRITERS = pytest.mark.parametrize(
    "write", [lambda path: write_safetensors(path, BIG), fill], ids=["safetensors", "plain"]
)


def check(path: Path, write: Callable[[Path], None], reason: str) -> None:
    with pytest.raises(FileError) as failure:
        write(path)
    message = str(failure.value)
    assert message.startswith(f"{path}: cannot be written: ")
    assert reason in message
    assert torch.equal(torch.as_tensor(read_safetensors(path).tensors["a"]), SMALL["a"])
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@WRITERS
def test_a_full_file_system(full_disk: Path, write: Callable[[Path], None]) -> None:
    path = full_disk / "a.safetensors"
    write_safetensors(path, SMALL)
    check(path, write, "No space left on device")
    path.unlink()
    with pytest.raises(FileError, match="No space left on device"):
        write(path)
    assert list(full_disk.iterdir()) == []
    write_safetensors(path, SMALL)  # the space came back


@WRITERS
def test_a_limit_of_the_file_size(tmp_path: Path, write: Callable[[Path], None]) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, SMALL)
    with largest_file(CAPACITY):
        check(path, write, "File too large")


def test_a_written_file_has_the_usual_mode(tmp_path: Path) -> None:
    """The safetensors library makes files that only their owner may read."""
    (tmp_path / "plain").touch()
    write_safetensors(tmp_path / "a.safetensors", SMALL)
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
