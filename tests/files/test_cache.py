"""The cache of quantized files: found by content, within its size, whole under several processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from quantwire.quantizers.errors import FileError, SpecError
from quantwire.quantizers.files import cache as module
from quantwire.quantizers.files.cache import GIB, Cache, CacheUnwritable, cache_key, default_cache
from quantwire.quantizers.files.locks import locked
from quantwire.quantizers.files.quantized_file import write_quantized

SIZE = 1 << 20


def make(path: Path) -> None:
    write_quantized(path, [("t", torch.ones(SIZE // 4))], {})


def unexpected(path: Path) -> None:
    raise AssertionError(f"{path} is made again")


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", 10 * SIZE)


def test_made_once(cache: Cache) -> None:
    _, made = cache.get_or_make("a", make, SIZE)
    found, again = cache.get_or_make("a", unexpected, SIZE)
    assert (made, again) == (True, False)
    assert torch.equal(found.tensors["t"], torch.ones(SIZE // 4))  # type: ignore[arg-type]
    assert [p.name for p in cache.folder.iterdir()] == ["a.safetensors"]  # no locks, no temporary files


@pytest.mark.parametrize("damage", ["empty", "truncated", "garbage"])
def test_a_damaged_entry_is_made_again(cache: Cache, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    cache.get_or_make("a", make, SIZE)
    path = cache.folder / "a.safetensors"
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "truncated": whole[:-9], "garbage": b"\1" * 5000}[damage])
    found, made = cache.get_or_make("a", make, SIZE)
    assert made
    assert torch.equal(found.tensors["t"], torch.ones(SIZE // 4))  # type: ignore[arg-type]
    assert "removed from the cache" in caplog.text


def test_what_was_not_used_for_longest_goes_first(cache: Cache) -> None:
    names = list("abcdefgh")
    for i, name in enumerate(names):
        cache.get_or_make(name, make, SIZE)
        os.utime(cache.folder / f"{name}.safetensors", (1000 + i, 1000 + i))
    cache.get_or_make("a", unexpected, SIZE)  # now the last used
    for name in ("i", "j", "k"):
        cache.get_or_make(name, make, SIZE)
    left = {p.stem for p in cache.folder.glob("*.safetensors")}
    assert left == {"a", "e", "f", "g", "h", "i", "j", "k"} | ({"d"} & left)
    assert not {"b", "c"} & left
    assert sum(p.stat().st_size for p in cache.folder.iterdir()) <= cache.limit_nbytes


def test_an_entry_in_use_keeps_its_data_when_it_is_evicted(cache: Cache) -> None:
    held, _ = cache.get_or_make("a", make, SIZE)
    os.utime(cache.folder / "a.safetensors", (1000, 1000))
    Cache(cache.folder, 2 * SIZE).get_or_make("b", make, SIZE)
    assert not (cache.folder / "a.safetensors").exists()
    assert torch.equal(held.tensors["t"], torch.ones(SIZE // 4))  # type: ignore[arg-type]


def test_the_file_just_made_stays(cache: Cache) -> None:
    """Even where it came out larger than foretold."""
    small = Cache(cache.folder, SIZE // 2)
    _, made = small.get_or_make("a", make, SIZE // 4)
    assert made
    assert (cache.folder / "a.safetensors").exists()


@pytest.mark.parametrize("nbytes", [11 * SIZE, 1 << 60], ids=["over the limit", "more than the disk"])
def test_no_room(tmp_path: Path, nbytes: int) -> None:
    limit = 10 * SIZE if nbytes == 11 * SIZE else 1 << 62
    with pytest.raises(CacheUnwritable, match="no room"):
        Cache(tmp_path, limit).get_or_make("a", unexpected, nbytes)


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CacheUnwritable, match="cannot be written"):
        Cache(tmp_path / "file" / "cache", 10 * SIZE).get_or_make("a", unexpected, SIZE)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_fills_up_while_writing(cache: Cache) -> None:
    """The kernel's own full device stands for the disk: writes to it fail as on one that filled up."""

    def fill_up(path: Path) -> None:
        def write(temporary: Path) -> None:
            with open("/dev/full", "wb", buffering=0) as file:
                file.write(b"x")

        module.replace_file(path, write)

    with pytest.raises(CacheUnwritable, match="No space left"):
        cache.get_or_make("a", fill_up, SIZE)
    assert list(cache.folder.iterdir()) == []


def test_errors_of_the_source_come_through(cache: Cache) -> None:
    def fail(path: Path) -> None:
        raise FileError("source.safetensors: truncated.")

    with pytest.raises(FileError, match="truncated") as caught:
        cache.get_or_make("a", fail, SIZE)
    assert not isinstance(caught.value, CacheUnwritable)
    assert list(cache.folder.iterdir()) == []


CHILD = """
import sys, time, torch
from pathlib import Path
from quantwire.quantizers.files.cache import Cache
from quantwire.quantizers.files.quantized_file import write_quantized
folder, go = Path(sys.argv[1]), Path(sys.argv[2])
def make(path):
    def values():
        for i in range(5):
            time.sleep(0.1)
            yield f"t{i}", torch.full((50_000,), float(i))
    write_quantized(path, values(), {})
print("ready", flush=True)
while not go.exists():
    time.sleep(0.005)
checkpoint, made = Cache(folder, 1 << 30).get_or_make("key", make, 1 << 20)
assert all((checkpoint.tensors[f"t{i}"] == i).all() for i in range(5))
print("made" if made else "found", flush=True)
"""


def start(tmp_path: Path, count: int) -> list[subprocess.Popen[str]]:
    command = [sys.executable, "-c", CHILD, str(tmp_path / "cache"), str(tmp_path / "go")]
    children = [subprocess.Popen(command, text=True, stdout=subprocess.PIPE) for _ in range(count)]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    (tmp_path / "go").touch()
    return children


def test_of_two_processes_one_makes_it(tmp_path: Path) -> None:
    said = [child.communicate(timeout=60)[0].strip() for child in start(tmp_path, 2)]
    assert sorted(said) == ["found", "made"]
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["key.safetensors"]


def test_a_process_that_dies_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    (child,) = start(tmp_path, 1)
    folder = tmp_path / "cache"
    end = time.monotonic() + 30
    while not list(folder.glob("*.tmp")):
        assert time.monotonic() < end
        time.sleep(0.01)
    child.kill()
    child.communicate()
    (left,) = folder.glob("*.tmp")
    cache = Cache(folder, 10 * SIZE)
    assert cache.get_or_make("key", make, SIZE)[1]
    assert left.exists()  # it could still be written to
    os.utime(left, (time.time() - 4000,) * 2)
    cache.evict()
    assert [p.name for p in folder.iterdir()] == ["key.safetensors"]


def test_waiting_can_be_given_up(tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop() -> None:
        raise Stopped

    cache = Cache(tmp_path, 10 * SIZE)
    with locked(tmp_path / "a.lock"), pytest.raises(Stopped):
        cache.get_or_make("a", unexpected, SIZE, stop)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are hashed, in order."""
    found: list[Path] = []
    real: Any = module._sha256

    def counted(path: Path, hashing: Any) -> str:
        found.append(path)
        return real(path, hashing)

    monkeypatch.setattr(module, "_sha256", counted)
    return found


def settle(path: Path) -> None:
    """Wait until the file is older than the time within which it could change unseen."""
    time.sleep(max(0.0, module.RACY_S + 0.05 - (time.time() - path.stat().st_ctime)))


def test_a_source_is_hashed_once(cache: Cache, tmp_path: Path, hashed: list[Path]) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"one")
    fresh = cache.source_hash(source)
    assert cache.source_hash(source) == fresh
    assert len(hashed) == 2  # written just now, so it may change within the clock's tick
    settle(source)
    assert [cache.source_hash(source) for _ in range(3)] == [fresh] * 3
    assert len(hashed) == 3
    (tmp_path / "link").symlink_to(source)
    assert cache.source_hash(tmp_path / "link") == fresh
    assert len(hashed) == 3
    before = source.stat()
    source.write_bytes(b"two")
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))  # the same size and time, other content
    assert cache.source_hash(source) != fresh


def test_a_source_that_is_being_written_is_refused(cache: Cache, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"one")
    with pytest.raises(FileError, match="changed while it was read"):
        cache.source_hash(source, lambda: source.write_bytes(b"longer"))


def test_keys() -> None:
    content = {"source": "abc", "tensors": [["a", None, 3]]}
    assert cache_key(content) == cache_key(dict(reversed(content.items())))
    assert cache_key(content) != cache_key({**content, "source": "abd"})


def test_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("QUANTWIRE_CACHE", raising=False)
    monkeypatch.delenv("QUANTWIRE_CACHE_GIB", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if sys.platform == "linux":
        assert default_cache() == Cache(tmp_path / "quantwire", 32 * GIB)
    monkeypatch.setenv("QUANTWIRE_CACHE", str(tmp_path / "mine"))
    monkeypatch.setenv("QUANTWIRE_CACHE_GIB", "1.5")
    assert default_cache() == Cache(tmp_path / "mine", GIB * 3 // 2)
    for bad in ("many", "-1", "nan", "inf"):
        monkeypatch.setenv("QUANTWIRE_CACHE_GIB", bad)
        with pytest.raises(SpecError, match="QUANTWIRE_CACHE_GIB"):
            default_cache()
