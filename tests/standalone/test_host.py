"""Folders of the embedded host: what is listed, what may be opened."""

from __future__ import annotations

from pathlib import Path

import pytest
from quantwire.hosts import current, use
from quantwire.hosts.standalone import folders
from quantwire.hosts.standalone.folders import default_model_folders
from quantwire.hosts.standalone.host import StandaloneHost
from quantwire.quantizers.errors import FileError


@pytest.fixture
def models(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    for name in (
        "diffusion_models/b.safetensors", "diffusion_models/sub/deep/a.GGUF", "diffusion_models/notes.txt",
        "diffusion_models/.hidden.safetensors", "unet/old.safetensors", "clip/clip_l.safetensors",
        "text_encoders/t5.safetensors", "vae/v.safetensors", "../outside.safetensors",
    ):  # fmt: skip
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return root


def test_listing_joins_the_older_folder_names(models: Path) -> None:
    host = StandaloneHost([models])
    assert host.list_files("diffusion_models") == ["b.safetensors", "notes.txt", "old.safetensors", "sub/deep/a.GGUF"]
    assert host.list_files("diffusion_models", (".safetensors", ".gguf"))[-1] == "sub/deep/a.GGUF"
    assert host.list_files("text_encoders", (".safetensors",)) == ["clip_l.safetensors", "t5.safetensors"]
    assert host.list_files("loras") == []


def test_resolve(models: Path) -> None:
    host = StandaloneHost([models])
    assert host.resolve("diffusion_models", "sub/deep/a.GGUF") == models / "diffusion_models/sub/deep/a.GGUF"
    assert host.resolve("diffusion_models", "old.safetensors") == models / "unet/old.safetensors"
    assert host.resolve("text_encoders", "clip_l.safetensors") == models / "clip/clip_l.safetensors"
    assert host.resolve("vae", "./v.safetensors") == models / "vae/v.safetensors"


def test_first_folder_wins(models: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "vae"
    other.mkdir(parents=True)
    (other / "v.safetensors").write_bytes(b"")
    assert StandaloneHost([tmp_path / "other", models]).resolve("vae", "v.safetensors") == other / "v.safetensors"


@pytest.mark.parametrize(
    "name",
    ["../../outside.safetensors", "../vae/v.safetensors", "sub/../../../outside.safetensors", "", ".", "sub", "a\0b"],
)
def test_names_that_lead_outside_or_nowhere(models: Path, name: str) -> None:
    with pytest.raises(FileError, match="is not in"):
        StandaloneHost([models]).resolve("diffusion_models", name)


def test_absolute_names_are_refused(models: Path) -> None:
    with pytest.raises(FileError, match="is not in"):
        StandaloneHost([models]).resolve("diffusion_models", str(models.parent / "outside.safetensors"))


def test_links_may_lead_to_another_disk(models: Path, tmp_path: Path) -> None:
    """Model folders are full of links; only the name as written is confined."""
    disk = tmp_path / "disk"
    disk.mkdir()
    (disk / "big.safetensors").write_bytes(b"")
    (models / "loras").symlink_to(disk)
    (models / "vae" / "linked.safetensors").symlink_to(disk / "big.safetensors")
    (models / "vae" / "folder").symlink_to(disk)
    (disk / "loop").symlink_to(disk)
    host = StandaloneHost([models])
    assert host.list_files("vae") == ["folder/big.safetensors", "linked.safetensors", "v.safetensors"]
    for folder, name in (
        ("loras", "big.safetensors"),
        ("vae", "linked.safetensors"),
        ("vae", "folder/big.safetensors"),
    ):
        assert host.resolve(folder, name).samefile(disk / "big.safetensors")


def test_message_names_folders_files_and_near_names(models: Path) -> None:
    with pytest.raises(FileError) as caught:
        StandaloneHost([models]).resolve("diffusion_models", "old.safetensor")
    first, second = str(caught.value).splitlines()
    assert str(models / "diffusion_models") in first
    assert str(models / "unet") in first
    assert "Did you mean old.safetensors" in first
    assert second == "Files there: b.safetensors, notes.txt, old.safetensors, sub/deep/a.GGUF."
    with pytest.raises(FileError, match=r"there is no folder 'loras' in .*models"):
        StandaloneHost([models]).resolve("loras", "x")


def test_default_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QUANTWIRE_MODELS", f"{tmp_path / 'a'}:{tmp_path / 'b'}")
    demo = folders.PACK_ROOT / "demo" / "models"
    assert default_model_folders() == [tmp_path / "a", tmp_path / "b", Path("models"), demo]
    monkeypatch.delenv("QUANTWIRE_MODELS")
    assert StandaloneHost().models == [Path("models"), demo]


def test_current_host(models: Path) -> None:
    mine = StandaloneHost([models])
    with use(mine):
        assert current() is mine
        with use(StandaloneHost([])):
            assert current() is not mine
        assert current() is mine
    assert current() is not mine


def test_a_missing_folder_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"^'a.safetensors' cannot be found: there is no folder 'vae' in "):
        StandaloneHost([tmp_path]).resolve("vae", "a.safetensors")
