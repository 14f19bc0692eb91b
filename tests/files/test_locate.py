"""Paths that lead nowhere good: links, pipes, and indexes that name what is not theirs."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from damaged_files import write
from quantwire.quantizers.errors import FileError
from quantwire.quantizers.files.locate import Container, locate
from quantwire.quantizers.files.model_file import open_model

INDEX = "model.safetensors.index.json"


def refused(path: Path) -> str:
    start = time.monotonic()
    with pytest.raises(FileError) as err:
        open_model(path)
    assert time.monotonic() - start < 5
    return str(err.value)


def indexed(folder: Path, where: Any) -> Path:
    path = folder / INDEX
    path.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return path


def part(folder: Path, name: str, tensor: str = "a") -> Path:
    return write(folder / name, {tensor: ("F32", [4])})


def test_a_link_that_leads_to_itself(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").symlink_to("b.safetensors")
    (tmp_path / "b.safetensors").symlink_to("a.safetensors")
    message = refused(tmp_path / "a.safetensors")
    assert "cannot be read: Too many levels of symbolic links" in message
    assert message.endswith("It is a link that leads back to itself: delete it.")
    assert "is a link to nothing" in refused(indexed(tmp_path, {"a": "a.safetensors"}))


def test_a_folder_inside_itself(tmp_path: Path) -> None:
    (tmp_path / "again").symlink_to(tmp_path)
    assert "no weights of one model" in refused(tmp_path / "again" / "again" / "again")


def test_a_link_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").symlink_to("gone")
    assert "cannot be read: No such file" in refused(tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["a.safetensors", "a.gguf", INDEX])
def test_pipes_are_refused_without_waiting(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    assert "cannot be read: a pipe, expected a file" in refused(tmp_path / name)


def test_a_pipe_in_a_folder_and_in_an_index(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    assert "no weights of one model" in refused(tmp_path)
    os.mkfifo(tmp_path / "part")
    assert "the file 'part' is a link to nothing, or not a file" in refused(indexed(tmp_path, {"a": "part"}))


def test_a_pipe_as_config_is_passed_over(tmp_path: Path) -> None:
    part(tmp_path, "model.safetensors")
    os.mkfifo(tmp_path / "config.json")
    assert open_model(tmp_path).configs == {}


def test_devices(tmp_path: Path) -> None:
    assert "a device, expected a file" in refused(Path("/dev/zero"))


@pytest.mark.parametrize("path", ["a\0b.safetensors", "x" * 5000, "x" * 300 + ".safetensors"])
def test_paths_that_no_system_takes(path: str) -> None:
    assert "cannot be read" in refused(Path(path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read(tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir()
    folder.chmod(0)
    try:
        assert "Permission denied" in refused(folder)
    finally:
        folder.chmod(0o700)


NAMES = [
    "../a.safetensors",
    "/etc/hostname",
    "sub/a.safetensors",
    "..",
    ".",
    "",
    "sub\\a",
    "C:\\a",
    "C:a",
    "a\0",
    "a\nb",
]


@pytest.mark.parametrize("name", NAMES)
def test_an_index_may_only_name_files_beside_it(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    for place in (tmp_path, tmp_path / "folder" / "sub"):
        part(place, "a.safetensors")
    message = refused(indexed(tmp_path / "folder", {"a": name}))
    assert message.startswith(f"{INDEX}: names the file ")
    assert "which is not beside it" in message


def test_links_of_a_cache_are_followed(tmp_path: Path) -> None:
    """As huggingface_hub lays its cache out: files are links into a folder of blobs."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for name, tensor in (("m-00001-of-00002.safetensors", "a"), ("m-00002-of-00002.safetensors", "b")):
        part(blobs, tensor * 64, tensor)
        (snapshot / name).symlink_to(f"../../blobs/{tensor * 64}")
    where = {"a": "m-00001-of-00002.safetensors", "b": "m-00002-of-00002.safetensors"}
    index = indexed(blobs, where).rename(blobs / ("c" * 64))
    (snapshot / INDEX).symlink_to(f"../../blobs/{index.name}")
    file = open_model(snapshot)
    assert file.container is Container.SHARDED
    assert sorted(file.entries) == ["a", "b"]


@pytest.mark.parametrize("link", [os.link, os.symlink], ids=["hard", "symbolic"])
def test_one_file_under_two_names(tmp_path: Path, link: Any) -> None:
    one = part(tmp_path, "one.safetensors")
    link(one, tmp_path / "two.safetensors")
    message = refused(indexed(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"}))
    assert "'one.safetensors' and 'two.safetensors' are one file under two names" in message


INDEXES: dict[str, tuple[bytes, str]] = {
    "deep": (b'{"weight_map":' * 100_000, "nested too deep"),
    "bomb": (b'{"weight_map":{"a":[' + b"[]," * 3_000_000 + b"0]}}", "would take"),
    "twice": (b'{"weight_map":{"a":"x","a":"y"}}', "the key 'a' stands twice"),
    "list": (b"[]", "no 'weight_map'"),
    "numbers": (b'{"weight_map":{"a":1}}', "does not map tensors to names"),
    "nested": (b'{"weight_map":{"a":{"b":"c"}}}', "does not map tensors to names"),
    "text": (b"<html>", "not JSON"),
    "bytes": (b"\xff\xfe", "not UTF-8"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_indexes_that_are_none(tmp_path: Path, case: str) -> None:
    content, message = INDEXES[case]
    (tmp_path / INDEX).write_bytes(content)
    text = refused(tmp_path / INDEX)
    assert text.startswith(f"{INDEX}: not an index of safetensors files")
    assert message in text


def test_a_huge_index_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / INDEX, "wb") as file:
        file.truncate(1 << 40)
    assert f"{1 << 40} bytes, expected at most" in refused(tmp_path / INDEX)


def test_an_index_that_names_an_index(tmp_path: Path) -> None:
    inner = tmp_path / "inner.safetensors.index.json"
    inner.write_text(json.dumps({"weight_map": {"a": INDEX}}))
    indexed(tmp_path, {"a": inner.name})
    assert "not a safetensors file" in refused(tmp_path / INDEX)


def test_an_empty_index(tmp_path: Path) -> None:
    assert locate(indexed(tmp_path, {})).files == ()
