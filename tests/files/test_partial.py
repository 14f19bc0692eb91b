"""Files that take their name when they are complete: whose they are, and what appears meanwhile."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from quantwire.quantizers.errors import FileError
from quantwire.quantizers.files.journal import partial, remains

HEAD = {"type": "new"}


class _Stop(Exception):
    """What a host raises to interrupt."""


def names_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def put(target: Path, data: bytes = b"new", meanwhile: Callable[[], object] = lambda: None, **options: Any) -> None:
    with partial(target, len(data), {"type": data.decode()}, **options) as file:
        file.write(data, 0)
        file.finished("tensor", len(data), {})
        meanwhile()


def stop() -> None:
    raise _Stop


def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.parametrize("resumable", [True, False])
@pytest.mark.parametrize(
    ("name", "content"),
    [("a.partial", b"mine"), ("a.partial", b""), ("a.partial.jsonl", b"{}"), ("a.partial.lock", b"mine")],
)
def test_a_foreign_file_is_refused_by_name(tmp_path: Path, name: str, content: bytes, resumable: bool) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileError) as caught:
        put(tmp_path / "a", resumable=resumable)
    assert str(caught.value).startswith(f"{tmp_path / name}: is no file of an interrupted conversion of ours")
    assert "Move or delete it" in str(caught.value)
    assert (tmp_path / name).read_bytes() == content
    assert names_in(tmp_path) == [name]


def test_folders_and_links_at_our_names(tmp_path: Path) -> None:
    (tmp_path / "a.partial.jsonl").mkdir()
    (tmp_path / "b.partial").symlink_to("nowhere")
    for name in ("a", "b"):
        with pytest.raises(FileError, match="is no file of an interrupted conversion of ours"):
            put(tmp_path / name)
    assert names_in(tmp_path) == ["a.partial.jsonl", "b.partial"]


def test_a_journal_that_was_killed_in_its_first_line(tmp_path: Path) -> None:
    (tmp_path / "a.partial.jsonl").write_bytes(b'{"jour')
    put(tmp_path / "a")
    assert names_in(tmp_path) == ["a"]


def test_what_another_conversion_did_is_not_thrown_away(tmp_path: Path) -> None:
    target = tmp_path / "a"
    with pytest.raises(_Stop):
        put(target, meanwhile=stop)
    other, same = {"type": "old"}, {"type": "new"}
    assert remains(target, 3, same, True, False).endswith("with 1 tensors done: it would continue")
    assert "type new there, old here; this one would be refused" in remains(target, 3, other, True, False)
    assert remains(target, 3, other, True, True).endswith("it would start over: as asked for")
    with pytest.raises(FileError, match=r"with 1 tensors done: type new there, old here\.\n.*--restart"):
        put(target, b"old")
    with pytest.raises(FileError, match="--restart"):
        put(target, b"old", resumable=False)
    with pytest.raises(_Stop):
        put(target, meanwhile=stop)
    put(target, b"old", restart=True)
    assert target.read_bytes() == b"old"
    assert not remains(target, 3, same, True, False)


def test_a_partial_file_that_became_a_link_starts_over(tmp_path: Path) -> None:
    with pytest.raises(_Stop):
        put(tmp_path / "a", meanwhile=stop)
    (tmp_path / "other").write_bytes(b"own")
    (tmp_path / "a.partial").unlink()
    (tmp_path / "a.partial").symlink_to("other")
    put(tmp_path / "a")
    assert ((tmp_path / "a").read_bytes(), (tmp_path / "other").read_bytes()) == (b"new", b"own")
    assert not (tmp_path / "a").is_symlink()


@pytest.mark.parametrize("hard_links", [True, False])
@pytest.mark.parametrize("link", [True, False])
@pytest.mark.parametrize("resumable", [True, False])
def test_what_appears_meanwhile_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hard_links: bool, link: bool, resumable: bool
) -> None:
    target = tmp_path / "a"

    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    if not hard_links:
        monkeypatch.setattr(os, "link", refuse)
    appear = (lambda: target.symlink_to("nowhere")) if link else (lambda: target.write_bytes(b"other"))
    with pytest.raises(FileError, match="came to be while it was converted"):
        put(target, resumable=resumable, meanwhile=appear)
    assert (target.is_symlink() and not target.exists()) if link else target.read_bytes() == b"other"
    assert names_in(tmp_path) == ["a", *(["a.partial", "a.partial.jsonl"] if resumable else [])]
    with pytest.raises(FileError, match="is there already"):
        put(target, resumable=resumable)
    with partial(target, 3, HEAD, resumable, overwrite=True) as file:
        assert list(file.done) == (["tensor"] if resumable else [])
        if not resumable:
            file.write(b"new", 0)
    assert target.read_bytes() == b"new"
    assert names_in(tmp_path) == ["a"]


def test_without_hard_links_the_file_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    put(tmp_path / "a")
    assert names_in(tmp_path) == ["a"]


def test_a_kill_between_link_and_removal(tmp_path: Path) -> None:
    """Two names of one file: a rename of one to the other would leave both."""
    with pytest.raises(_Stop):
        put(tmp_path / "a", meanwhile=stop)
    os.link(tmp_path / "a.partial", tmp_path / "a")
    with partial(tmp_path / "a", 3, HEAD, overwrite=True) as file:
        assert list(file.done) == ["tensor"]
    assert (tmp_path / "a").read_bytes() == b"new"
    assert names_in(tmp_path) == ["a"]


def test_two_threads_without_file_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_locks(monkeypatch)
    target, opened = tmp_path / "a", threading.Barrier(2)
    said: list[str] = []

    def write(data: bytes) -> None:
        try:
            with partial(target, len(data), {"type": data.decode()}) as file:
                opened.wait(10)
                file.write(data, 0)
                said.append(file.note)
        except FileError as err:
            said.append(str(err))

    threads = [threading.Thread(target=write, args=(data,)) for data in (b"one", b"two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert target.read_bytes() in (b"one", b"two")
    assert sum("no file locks in this folder" in text for text in said) == 2
    assert sum("came to be while it was converted" in text for text in said) == 1
    assert [n for n in names_in(tmp_path) if not n.endswith(".lock")] == ["a"]


def test_without_file_locks_nothing_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(_Stop):
        put(tmp_path / "a", meanwhile=stop)
    no_locks(monkeypatch)
    with partial(tmp_path / "a", 3, HEAD) as file:
        assert not file.done
        assert file.path.name != "a.partial"
        assert file.path.name in file.note
        file.write(b"new", 0)
    assert [n for n in names_in(tmp_path) if not n.endswith(".lock")] == ["a", "a.partial", "a.partial.jsonl"]


def test_locks_that_lock_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As between two machines, where each knows its own locks only: the first one sees that its file was replaced."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)  # pyright: ignore
    target = tmp_path / "a"
    with pytest.raises(FileError, match="another program removed or replaced this file"):
        put(target, overwrite=True, meanwhile=lambda: put(target, b"two", overwrite=True))
    assert target.read_bytes() == b"two"
    assert names_in(tmp_path) == ["a"]
    with pytest.raises(_Stop):
        put(target, b"two", overwrite=True, meanwhile=lambda: interrupted_by(target))
    assert names_in(tmp_path) == ["a", "a.partial", "a.partial.jsonl"]


def interrupted_by(target: Path) -> None:
    """Another one begins, is interrupted, and so is the first: what the other one left is not the first one's."""
    with pytest.raises(_Stop):
        put(target, overwrite=True, meanwhile=stop)
    raise _Stop
