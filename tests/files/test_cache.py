"""The cache of quantized files: found by content, within its size, whole under several processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from quantwire.quantizers.errors import FileError, SpecError
from quantwire.quantizers.files import cache as module
from quantwire.quantizers.files.cache import GIB, Cache, CacheUnwritable, cache_key, default_cache
from quantwire.quantizers.files.locks import locked
from quantwire.quantizers.files.quantized_file import verify_checksum, write_quantized

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


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose disk holds 4 MiB. Only its size is made up: what is used is what lies there."""
    folder = tmp_path / "disk"
    folder.mkdir()
    usage = namedtuple("usage", "total used free")

    def measured(path: Path) -> Any:
        used = sum(p.stat().st_size for p in folder.iterdir())
        return usage(4 * SIZE, used, 4 * SIZE - used)

    monkeypatch.setattr(shutil, "disk_usage", measured)
    return folder


def test_a_disk_of_made_up_size_filled_by_the_cache_still_takes_entries(small_disk: Path) -> None:
    cache = Cache(small_disk, 100 * SIZE)
    for i, name in enumerate("abc"):
        cache.get_or_make(name, make, SIZE)
        os.utime(small_disk / f"{name}.safetensors", (1000 + i, 1000 + i))
    _, made = cache.get_or_make("d", make, 2 * SIZE)
    assert made
    assert {p.stem for p in small_disk.glob("*.safetensors")} == {"c", "d"}  # no more went than had to


def test_nothing_is_removed_for_what_a_disk_of_made_up_size_can_never_take(small_disk: Path) -> None:
    cache = Cache(small_disk, 100 * SIZE)
    cache.get_or_make("a", make, SIZE)
    with pytest.raises(CacheUnwritable, match="no room"):
        cache.get_or_make("b", unexpected, 5 * SIZE)
    with pytest.raises(CacheUnwritable, match="no room"):
        Cache(small_disk, 2 * SIZE).get_or_make("b", unexpected, 3 * SIZE)
    assert cache.get("a") is not None


def test_room_is_made_before_the_file(cache: Cache) -> None:
    """The entries stay within the limit while the next one is written, too."""
    for i in range(9):
        cache.get_or_make(str(i), make, SIZE)
        os.utime(cache.folder / f"{i}.safetensors", (1000 + i, 1000 + i))
    sizes: list[int] = []

    def measured(path: Path) -> None:
        sizes.append(sum(p.stat().st_size for p in cache.folder.glob("*.safetensors")))
        make(path)

    cache.get_or_make("next", measured, 3 * SIZE)
    assert sizes[0] + 3 * SIZE <= cache.limit_nbytes
    assert cache.get("8") is not None


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
from quantwire.quantizers.files.quantized_file import verify_checksum, write_quantized
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


@pytest.mark.parametrize("stop", [InterruptedError, TimeoutError, PermissionError])
def test_waiting_is_given_up_with_an_error_of_the_system_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, stop: type[OSError]
) -> None:
    def give_up() -> None:
        raise stop("given up")

    ran = False
    with locked(tmp_path / "a.lock"), pytest.raises(stop, match="given up"), locked(tmp_path / "a.lock", give_up):
        ran = True
    assert not ran
    assert "cannot be locked" not in caplog.text


def test_without_locks_the_block_runs_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ran = False
    with locked(tmp_path / "missing" / "a.lock"):
        ran = True
    assert ran
    assert "cannot be locked" in caplog.text


def test_hashing_is_given_up_with_an_error_of_the_system_too(cache: Cache, tmp_path: Path) -> None:
    def give_up() -> None:
        raise InterruptedError("given up")

    (tmp_path / "source").write_bytes(b"one")
    with pytest.raises(InterruptedError, match="given up"):
        cache.source_hash(tmp_path / "source", give_up)


def change_a_byte(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("at", [-1, -SIZE // 2, -SIZE], ids=["last byte", "middle", "first byte"])
def test_changed_data_is_found_only_when_asked_to(
    cache: Cache, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    monkeypatch.setenv("QUANTWIRE_CACHE", str(cache.folder))
    monkeypatch.setenv("QUANTWIRE_CACHE_VERIFY", "1")
    cache.get_or_make("a", make, SIZE)
    verified = default_cache()
    assert verified.verify
    assert verified.get_or_make("a", unexpected, SIZE)[1] is False
    change_a_byte(cache.folder / "a.safetensors", at)
    served, made = cache.get_or_make("a", unexpected, SIZE)  # as documented: nothing of the data is read
    assert not made
    assert not torch.equal(served.tensors["t"], torch.ones(SIZE // 4))  # type: ignore[arg-type]
    found, made = verified.get_or_make("a", make, SIZE)
    assert made
    assert torch.equal(found.tensors["t"], torch.ones(SIZE // 4))  # type: ignore[arg-type]
    assert "removed from the cache" in caplog.text
    assert "checksum" in caplog.text
    assert verified.get_or_make("a", unexpected, SIZE)[1] is False


def test_a_changed_header_is_found_when_asked_to(cache: Cache) -> None:
    """One that is a header still: the same bytes read as other numbers."""
    cache.get_or_make("a", make, SIZE)
    path = cache.folder / "a.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"', 1))
    assert cache.get("a") is not None
    assert Cache(cache.folder, cache.limit_nbytes, verify=True).get_or_make("a", make, SIZE)[1]


def test_verifying_can_be_given_up(cache: Cache) -> None:
    def give_up() -> None:
        raise InterruptedError("given up")

    cache.get_or_make("a", make, SIZE)
    with pytest.raises(InterruptedError, match="given up"):
        Cache(cache.folder, cache.limit_nbytes, verify=True).get_or_make("a", unexpected, SIZE, give_up)
    assert cache.get("a") is not None


def test_the_checksum_holds_where_the_data_moved_for_a_long_header(tmp_path: Path) -> None:
    path = tmp_path / "q.safetensors"
    tensors = {f"t{i}": torch.full((i * 700,), float(i)) for i in range(40)}  # small ones of odd sizes go last
    write_quantized(path, tensors.items(), {"note": "x" * 90_000, "float": 0.1, "pair": (1, 2)}, expected=0)
    verify_checksum(path)
    change_a_byte(path, -1)
    with pytest.raises(FileError, match="checksum"):
        verify_checksum(path)


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
    monkeypatch.delenv("QUANTWIRE_CACHE_VERIFY", raising=False)
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
    monkeypatch.delenv("QUANTWIRE_CACHE_GIB")
    for value, verify in (("", False), ("0", False), ("1", True)):
        monkeypatch.setenv("QUANTWIRE_CACHE_VERIFY", value)
        assert default_cache().verify is verify
    monkeypatch.setenv("QUANTWIRE_CACHE_VERIFY", "yes")
    with pytest.raises(SpecError, match="QUANTWIRE_CACHE_VERIFY"):
        default_cache()
