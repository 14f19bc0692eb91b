"""What the declarations and checks of nodes ask of the embedded host, apart from it: to look needs no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...quantizers.compat.modes import OffloadMode
from ...quantizers.errors import FileError
from ..base import missing

if TYPE_CHECKING:
    from ..offload import OffloadSettings

PACK_ROOT = Path(__file__).resolve().parents[2]
# ComfyUI's folder names, and the older names that it still searches.
ALIASES = {"diffusion_models": ("diffusion_models", "unet"), "text_encoders": ("text_encoders", "clip")}


class ModelFolders:
    """The model folders, and what the embedded host has whatever is in them.

    Args:
        models: folders laid out as ComfyUI's `models` folder, searched in order; default: `default_model_folders()`.
    """

    name = "standalone"

    def __init__(self, models: Sequence[Path] | None = None) -> None:
        self.models = list(models) if models else default_model_folders()

    def list_files(self, folder: str, suffixes: tuple[str, ...] = ()) -> list[str]:
        found = {name for root in self._roots(folder) for name in _files_below(root)}
        return sorted(n for n in found if not suffixes or n.lower().endswith(suffixes))

    def resolve(self, folder: str, name: str, suffixes: tuple[str, ...] = ()) -> Path:
        for path in self.candidates(folder, name):
            if os.path.isfile(path):  # False, too, for a name that no file system takes
                return path
        files = self.list_files(folder, suffixes)
        searched = ", ".join(str(root) for root in self._roots(folder))
        if not searched:
            raise FileError(f"'{name}' cannot be found: there is no folder '{folder}' in {self._shown()}.")
        raise FileError(missing(name, searched, files, suffixes))

    def text_encoder_types(self) -> Mapping[int, Sequence[str]]:
        return {1: ["stable_diffusion"], 2: ["flux"]}

    def check_offload(self, mode: OffloadMode, settings: OffloadSettings | None = None) -> None:
        from ..offload import OffloadSettings

        OffloadSettings(mode)

    def candidates(self, folder: str, name: str) -> Iterator[Path]:
        """Where a file may be, one path for each folder searched, whether it is there or not."""
        for root in self._roots(folder):
            # By the path as written: a link inside the folder may lead to another disk, `..` may not lead anywhere.
            path = Path(os.path.normpath(root / name))
            if path.is_relative_to(os.path.normpath(root)):
                yield path

    def _roots(self, folder: str) -> list[Path]:
        names = ALIASES.get(folder, (folder,))
        return [root / name for root in self.models for name in names if (root / name).is_dir()]

    def _shown(self) -> str:
        return ", ".join(str(m) for m in self.models)


def _files_below(root: Path) -> Iterator[str]:
    """Relative paths of the files below a folder, links to folders followed once each."""
    seen: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = [f for f in folders if not f.startswith(".")]
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        files = (Path(folder, n) for n in names if not n.startswith("."))
        # A link to a file that is gone is listed by the system, and is none.
        yield from (path.relative_to(root).as_posix() for path in files if os.path.exists(path))


def default_model_folders() -> list[Path]:
    """`QUANTWIRE_MODELS`, `./models`, and the demo models when the pack runs from a source checkout."""
    given = [Path(p) for p in os.environ.get("QUANTWIRE_MODELS", "").split(os.pathsep) if p]
    return [*given, Path("models"), PACK_ROOT / "demo" / "models"]
