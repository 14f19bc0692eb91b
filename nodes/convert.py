"""ConvertModel."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..hosts import current
from ..quantizers.errors import FileError, QuantwireError
from ..quantizers.registry import format_ids, get_entry
from ..quantizers.rules import RuleSet
from ..quantizers.spec import QuantSpec
from .common import CATEGORY, patterns, stamp, with_report

if TYPE_CHECKING:  # the converter is imported when it is asked for: a host starts without it
    from ..quantizers.files.convert import Ticks
    from ..quantizers.files.convert_plan import Request
    from ..quantizers.files.converting import Description
    from ..quantizers.report import QuantReport

FOLDERS = ("diffusion_models", "text_encoders", "checkpoints")
SUFFIXES = (".safetensors", ".sft", ".gguf")
# What the converter calls by its options on the command line.
WORDS = {
    "`quantwire convert --imatrix`": "the input imatrix_name of ConvertModel",
    "Use --overwrite": "Set overwrite",
    "with --imatrix": "by imatrix_name",
    "--restart": "set overwrite",
    "--overwrite": "overwrite",
}


@dataclass(frozen=True)
class _Bar:
    update: Ticks


@dataclass(frozen=True)
class _Inputs:
    """What is converted into what, beside the rules, which IS_CHANGED is not given."""

    source: Path
    target: Path
    type: str
    keep_layers: str
    matrix: Path | None

    def stamp(self) -> str:
        """The state of the files that are read."""
        from ..quantizers.files.gguf_parts import named_parts

        return stamp([*named_parts(self.source), *([self.matrix] if self.matrix else [])])


@dataclass(frozen=True)
class _Made:
    """A file that the node wrote, as long as it is `result`."""

    request: Request
    read: str
    result: str
    report: QuantReport


# Of this process: a graph that runs again takes the file that is there, whatever the host's cache has forgotten.
_made: dict[_Inputs, _Made] = {}
_lost: Counter[_Inputs] = Counter()  # how often what was made was no more there, so that it is made again


class ConvertModel:
    DESCRIPTION = (
        "Converts a model file into a GGUF file of any type, or back, without loading the model: tensor by tensor, in "
        "little memory. The new file stands in the folder of the old one. An interrupted conversion continues when it "
        "runs again, except to a comfy format, which starts over."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("STRING", "REPORT")
    RETURN_NAMES = ("file_name", "report")
    OUTPUT_TOOLTIPS = (
        "Name of the new file in its model folder, as the loaders list it.",
        "What became of each tensor, with its size and error.",
    )
    FUNCTION = "convert"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        from ..quantizers.files.recipes import RECIPES

        host = current()
        files = [f"{folder}/{name}" for folder in FOLDERS for name in host.list_files(folder, SUFFIXES)]
        native = [f for f in format_ids() if get_entry(f).backend == "comfy"]
        name = "A file of the folders diffusion_models, text_encoders or checkpoints: safetensors or GGUF."
        kind = (
            "What the weights become. Q2_K to Q8_0, IQ and others: a GGUF file, mixed as llama.cpp mixes them. F32, "
            "F16 and BF16: plain, GGUF or safetensors. comfy-*: a safetensors file that ComfyUI's own loaders open."
        )
        output = "Name of the new file, with .gguf or .safetensors; empty: the old name with the type behind it."
        rules = "Types of single layers from QuantRules, such as *.img_attn.* = gguf-q6-k."
        imatrix = "Name of an importance matrix (llama.cpp's .gguf or .dat) in the same model folder; empty is none."
        keep = (
            "Layers that stay at full precision: names or patterns such as *.attn.to_out.*, separated by commas or "
            "lines."
        )
        dry = "Only show what each group of tensors would become, and the size of the file."
        return {
            "required": {
                "model_name": (files, {"tooltip": name}),
                "type": ([*RECIPES, *native], {"default": "Q4_K_M", "tooltip": kind}),
            },
            "optional": {
                "output_name": ("STRING", {"default": "", "tooltip": output}),
                "overwrite": ("BOOLEAN", {"default": False, "tooltip": "Replace a file that is there already."}),
                "dry_run": ("BOOLEAN", {"default": False, "tooltip": dry}),
                "rules": ("QUANT_CONFIG", {"tooltip": rules}),
                "keep_layers": ("STRING", {"default": "", "multiline": True, "tooltip": keep}),
                "imatrix_name": ("STRING", {"default": "", "tooltip": imatrix}),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, model_name: str | None) -> bool | str:
        if model_name is None:  # a link: the name is not known yet
            return True
        try:
            _resolve(model_name)
        except QuantwireError as err:
            return " ".join(str(err).splitlines())
        return True

    @classmethod
    def IS_CHANGED(
        cls,
        model_name: str,
        type: str,
        output_name: str = "",
        keep_layers: str = "",
        imatrix_name: str = "",
        **_: Any,
    ) -> str:
        """Another state of the files that are read, or the file that was made is no more there. That it comes to be is
        no change: the same graph would convert twice."""
        inputs = _inputs(model_name, type, output_name, keep_layers, imatrix_name)
        made = _made.get(inputs)
        if made is not None and made.result != stamp([inputs.target]):
            del _made[inputs]
            _lost[inputs] += 1
        return f"{inputs.stamp()} {_lost[inputs]}"

    def convert(
        self,
        model_name: str,
        type: str,
        output_name: str = "",
        overwrite: bool = False,
        dry_run: bool = False,
        rules: QuantSpec | RuleSet | None = None,
        keep_layers: str = "",
        imatrix_name: str = "",
    ) -> dict[str, Any]:
        from ..quantizers.files.convert_plan import Request

        inputs = _inputs(model_name, type, output_name, keep_layers, imatrix_name)
        exclude, include = (rules.exclude, rules.include) if isinstance(rules, QuantSpec) else ((), ())
        request = Request(
            inputs.source, inputs.target, type, rules.rules if rules is not None else (),
            (*exclude, *patterns(keep_layers)), include, inputs.matrix, overwrite=overwrite, restart=overwrite,
        )  # fmt: skip
        with _own_words():
            report = _described(request) if dry_run else _converted(inputs, request)
        shown = inputs.target.relative_to(_root(model_name, inputs.source)).as_posix()
        return with_report(report, shown, report)


def _inputs(model_name: str, type: str, output_name: str, keep_layers: str, imatrix_name: str) -> _Inputs:
    source = _resolve(model_name)
    folder = model_name.partition("/")[0]
    matrix = current().resolve(folder, imatrix_name) if imatrix_name.strip() else None
    return _Inputs(source, _target(model_name, source, type, output_name), type, keep_layers, matrix)


def _described(request: Request) -> Description:
    from ..quantizers.files.converting import Description, describe

    plan = describe(request)
    return Description(_own(plan.text), plan.data | {"warnings": [_own(w) for w in plan.data["warnings"]]})


def _converted(inputs: _Inputs, request: Request) -> QuantReport:
    """Convert, unless the same was made before and is there."""
    from ..quantizers.files.converting import convert

    asked, read, made = replace(request, overwrite=False, restart=False), inputs.stamp(), _made.get(inputs)
    if made is not None and (made.request, made.read, made.result) == (asked, read, stamp([inputs.target])):
        return made.report
    report = convert(request, _bar)
    if made is not None and made.request != asked:
        _lost[inputs] += 1  # other rules had made another file of this name
    _made[inputs] = _Made(asked, read, stamp([inputs.target]), report)
    return report


@contextlib.contextmanager
def _own_words() -> Iterator[None]:
    """The converter's errors with the names of the node's inputs."""
    try:
        yield
    except QuantwireError as err:
        err.args = (_own(str(err)),)
        raise


def _own(text: str) -> str:
    for option, word in WORDS.items():
        text = text.replace(option, word)
    return text


@contextlib.contextmanager
def _bar(total: int) -> Iterator[_Bar]:
    from ..quantizers.files.convert import Ticks

    ticks = Ticks(current().progress, total)
    yield _Bar(ticks)
    ticks.close()


def _resolve(model_name: str) -> Path:
    folder, _, name = model_name.partition("/")
    if folder not in FOLDERS or not name:
        raise FileError(f"'{model_name}' is not of the form FOLDER/NAME.\nFolders: {', '.join(FOLDERS)}.")
    return current().resolve(folder, name)


def _root(model_name: str, source: Path) -> Path:
    """The model folder that the source was found in."""
    return source.parents[len(Path(model_name.partition("/")[2]).parts) - 1]


def _target(model_name: str, source: Path, type: str, output_name: str) -> Path:
    """The path of the new file.

    Raises:
        FileError: a name that leads out of the model folder.
    """
    from ..quantizers.files.recipes import FLOATS, RECIPES

    root = Path(os.path.normpath(_root(model_name, source)))
    name = output_name.strip()
    if not name:
        plain = type in FLOATS and source.suffix.lower() == ".gguf"
        suffix = ".safetensors" if plain or type not in RECIPES else ".gguf"
        name = str(source.relative_to(_root(model_name, source)).with_name(f"{source.stem}-{type}{suffix}"))
    target = Path(os.path.normpath(root / name))
    if Path(name).is_absolute() or not target.is_relative_to(root) or target == root:
        raise FileError(f"'{output_name}' is not a name in the model folder.\nGive a name such as flux-{type}.gguf.")
    beside = target.parent == Path(os.path.normpath(source.parent))  # a link that the host has followed already
    if not beside and target.parent.exists() and not target.parent.resolve().is_relative_to(root.resolve()):
        raise FileError(f"'{output_name}' leads out of the model folder through a link.\nGive another name.")
    return target
