"""LoadGGUFTextEncoder."""

from __future__ import annotations

from typing import Any

from ..hosts import current
from ..quantizers.compat.modes import Carrier
from ..quantizers.errors import QuantwireError, SpecError
from .common import CATEGORY, carrier_input, stamp, with_report

FOLDER = "text_encoders"
SUFFIXES = (".gguf", ".safetensors", ".sft")
NONE = "none"
WORDS = {1: "one file", 2: "two files", 3: "three files", 4: "four files"}


class LoadGGUFTextEncoder:
    DESCRIPTION = (
        "Opens one to four text encoder files as one CLIP: GGUF files, whose weights stay quantized in memory, and "
        "safetensors files, in any order. The vision part of a text encoder (mmproj) is found beside its file."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("CLIP", "REPORT")
    RETURN_NAMES = ("clip", "report")
    OUTPUT_TOOLTIPS = ("The text encoders.", "Types and sizes of their layers, and the files that belong to them.")
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        host = current()
        files = host.list_files(FOLDER, SUFFIXES)
        by_count = host.text_encoder_types()
        types = list(dict.fromkeys(kind for kinds in by_count.values() for kind in kinds))
        counts = "; ".join(f"{WORDS[count]}: {', '.join(kinds)}" for count, kinds in by_count.items())
        first = {"tooltip": "A .gguf or .safetensors file of the folder text_encoders."}
        more = {"default": NONE, "tooltip": "Another text encoder, where the type takes several."}
        required = {
            "clip_name1": (files, first),
            "type": (types, {"tooltip": f"What the prompts are for. {counts}."}),
        }
        optional: dict[str, Any] = {f"clip_name{i}": ([NONE, *files], dict(more)) for i in (2, 3, 4)}
        return {"required": required, "optional": {**optional, "carrier": carrier_input()}}

    @classmethod
    def VALIDATE_INPUTS(
        cls,
        clip_name1: str | None,
        type: str | None,
        clip_name2: str | None = NONE,
        clip_name3: str | None = NONE,
        clip_name4: str | None = NONE,
    ) -> bool | str:
        names = (clip_name1, clip_name2, clip_name3, clip_name4)
        try:
            for name in names:
                if name not in (None, NONE):
                    current().resolve(FOLDER, str(name))
            if type is not None and None not in names:  # None is a link: the value is not known yet
                _check_count(_given(*map(str, names)), type)
        except QuantwireError as err:
            return " ".join(str(err).splitlines())
        return True

    @classmethod
    def IS_CHANGED(
        cls, clip_name1: str, clip_name2: str = NONE, clip_name3: str = NONE, clip_name4: str = NONE, **_: Any
    ) -> str:
        paths = [current().resolve(FOLDER, n) for n in _given(clip_name1, clip_name2, clip_name3, clip_name4)]
        # Any GGUF file of the folder may be the vision part that an earlier run did not find.
        folders = dict.fromkeys(p.parent for p in paths if p.suffix.lower() == ".gguf")
        beside = [p for folder in folders for p in sorted(folder.iterdir()) if p.suffix.lower() == ".gguf"]
        from ..quantizers.files.gguf_parts import named_parts

        return stamp(dict.fromkeys([*(part for path in paths for part in named_parts(path)), *beside]))

    def load(
        self,
        clip_name1: str,
        type: str,
        clip_name2: str = NONE,
        clip_name3: str = NONE,
        clip_name4: str = NONE,
        carrier: str = Carrier.QUANTWIRE.value,
    ) -> dict[str, Any]:
        host = current()
        names = _given(clip_name1, clip_name2, clip_name3, clip_name4)
        _check_count(names, type)
        clip, report = host.load_text_encoder([host.resolve(FOLDER, n) for n in names], type, Carrier(carrier))
        return with_report(report, clip, report)


def _given(*names: str) -> list[str]:
    return [name for name in names if name != NONE]


def _check_count(names: list[str], kind: str) -> None:
    """Raises SpecError where the type takes another number of files, or a file is given twice."""
    by_count = current().text_encoder_types()
    fitting = [count for count, kinds in by_count.items() if kind in kinds]
    if len(set(names)) < len(names):
        raise SpecError(f"A file is given twice: {', '.join(names)}.\nSet the inputs that are not needed to none.")
    if len(names) not in fitting:
        takes = " or ".join(WORDS[count] for count in fitting) or "no number of files here"
        here = f"For {WORDS[len(names)]}: {', '.join(by_count.get(len(names), ['no type here']))}"
        raise SpecError(f"Type {kind} takes {takes}, got {len(names)} ({', '.join(names)}).\n{here}.")
