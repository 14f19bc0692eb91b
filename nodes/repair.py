"""RepairModel."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..hosts import current
from ..quantizers.errors import QuantwireError
from .common import CATEGORY, stamp, with_report
from .convert import FOLDERS, SUFFIXES

if TYPE_CHECKING:
    from ..quantizers.files.repair import Repair

# Of this process: a graph that runs again takes the copy that is there, and makes it again where it is gone.
_made: dict[tuple[Path, Path, bool], tuple[str, str, Repair]] = {}
_lost: Counter[Path] = Counter()


class RepairModel:
    DESCRIPTION = (
        "Looks for what is wrong in a model file, says what the loader would make of it, and writes a repaired copy "
        "where the fix is certain. The file itself is never changed."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("STRING", "REPORT")
    RETURN_NAMES = ("file_name", "report")
    OUTPUT_TOOLTIPS = (
        "Name of the repaired copy in its model folder, as the loaders list it; that of the file where none was made.",
        "What was found, what was fixed, and what is left.",
    )
    FUNCTION = "repair"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        host = current()
        files = [f"{folder}/{name}" for folder in FOLDERS for name in host.list_files(folder, SUFFIXES)]
        name = "A file of the folders diffusion_models, text_encoders or checkpoints. Copies are made of safetensors."
        output = "Name of the repaired copy; empty: the old name with -repaired behind it."
        deep = "Read the values of all tensors for nan and inf, not of the small ones alone. Reads the whole file."
        return {
            "required": {"model_name": (files, {"tooltip": name})},
            "optional": {
                "output_name": ("STRING", {"default": "", "tooltip": output}),
                "overwrite": ("BOOLEAN", {"default": False, "tooltip": "Replace a copy that is there already."}),
                "only_check": ("BOOLEAN", {"default": False, "tooltip": "Look for faults, and write nothing."}),
                "deep": ("BOOLEAN", {"default": False, "tooltip": deep}),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, model_name: str | None) -> bool | str:
        if model_name is None:  # a link: the name is not known yet
            return True
        from .conversion import resolve

        try:
            resolve(model_name)
        except QuantwireError as err:
            return " ".join(str(err).splitlines())
        return True

    @classmethod
    def IS_CHANGED(cls, model_name: str, output_name: str = "", **_: Any) -> str:
        from .conversion import resolve

        source = resolve(model_name)
        target = _target(model_name, source, output_name)
        for key, (_, made, _) in list(_made.items()):
            if key[1] == target and made != stamp([target]):
                del _made[key]
                _lost[target] += 1
        return f"{stamp([source])} {_lost[target]}"

    def repair(
        self,
        model_name: str,
        output_name: str = "",
        overwrite: bool = False,
        only_check: bool = False,
        deep: bool = False,
    ) -> dict[str, Any]:
        from ..quantizers.files.doctor import diagnose
        from ..quantizers.files.repair import repair
        from . import conversion

        source = conversion.resolve(model_name)
        target = _target(model_name, source, output_name)
        made = _made.get((source, target, deep))
        if not only_check and made is not None and made[:2] == (stamp([source]), stamp([target])):
            done = made[2]
        else:
            found = diagnose(source, deep)
            if only_check or found.edit is None:
                return with_report(found, model_name.partition("/")[2], found)
            read = stamp([source])
            try:
                done = repair(source, target, overwrite, deep, found)
            except QuantwireError as err:
                err.args = (str(err).replace("Use --overwrite", "Set overwrite"),)
                raise
            _made[source, target, deep] = (read, stamp([target]), done)
        shown = target.relative_to(conversion.root_of(model_name, source)).as_posix()
        return with_report(done, shown, done)


def _target(model_name: str, source: Path, output_name: str) -> Path:
    from . import conversion

    root = conversion.root_of(model_name, source)
    name = output_name.strip() or str(source.relative_to(root).with_name(f"{source.stem}-repaired.safetensors"))
    return conversion.in_folder(model_name, source, name, "flux-repaired.safetensors")
