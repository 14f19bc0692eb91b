"""What ConvertModel does with its inputs; imported when the node is asked for something."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ..hosts import current
from ..quantizers.errors import FileError, QuantwireError
from ..quantizers.files.convert import Ticks
from ..quantizers.files.convert_plan import Request
from ..quantizers.files.converting import Description, convert, describe
from ..quantizers.report import QuantReport
from ..quantizers.rules import RuleSet
from ..quantizers.spec import QuantSpec
from .common import patterns, stamp
from .convert import FOLDERS

# What the converter calls by its options on the command line.
WORDS = {
    "`quantwire convert --imatrix`": "the input imatrix_name of ConvertModel",
    "Use --overwrite": "Set overwrite",
    "with --imatrix": "by imatrix_name",
    "--layout": "layout",
    "--scales": "calibration_name",
    "--restart": "set overwrite",
    "--overwrite": "overwrite",
}


@dataclass(frozen=True)
class _Bar:
    update: Ticks


@dataclass(frozen=True)
class Inputs:
    """What is converted into what, beside the rules, which IS_CHANGED is not given."""

    source: Path
    target: Path
    type: str
    keep_layers: str
    matrix: Path | None
    scales: Path | None = None

    def stamp(self) -> str:
        """The state of the files that are read."""
        from ..quantizers.files.gguf_parts import named_parts

        return stamp([*named_parts(self.source), *(f for f in (self.matrix, self.scales) if f is not None)])


@dataclass(frozen=True)
class _Made:
    """A file that the node wrote, as long as it is `result`."""

    request: Request
    read: str
    result: str
    report: QuantReport


# Of this process: a graph that runs again takes the file that is there, whatever the host's cache has forgotten.
_made: dict[Inputs, _Made] = {}
_lost: Counter[Inputs] = Counter()  # how often what was made was no more there, so that it is made again


def changed(inputs: Inputs) -> str:
    """Another state of the files that are read, or the file that was made is no more there. That it comes to be is no
    change: the same graph would convert twice."""
    made = _made.get(inputs)
    if made is not None and made.result != stamp([inputs.target]):
        del _made[inputs]
        _lost[inputs] += 1
    return f"{inputs.stamp()} {_lost[inputs]}"


def run(
    inputs: Inputs, rules: QuantSpec | RuleSet | None, overwrite: bool, dry_run: bool, layout: str = ""
) -> QuantReport | Description:
    """Convert, or tell what a conversion would make."""
    exclude, include = (rules.exclude, rules.include) if isinstance(rules, QuantSpec) else ((), ())
    request = Request(
        inputs.source, inputs.target, inputs.type, rules.rules if rules is not None else (),
        (*exclude, *patterns(inputs.keep_layers)), include, inputs.matrix, overwrite=overwrite, restart=overwrite,
        layout=layout, scales=inputs.scales,
    )  # fmt: skip
    with _own_words():
        return _described(request) if dry_run else _converted(inputs, request)


def inputs_of(
    model_name: str, type: str, output_name: str, keep_layers: str, imatrix_name: str, calibration_name: str = ""
) -> Inputs:
    source = resolve(model_name)
    folder = model_name.partition("/")[0]
    matrix = current().resolve(folder, imatrix_name) if imatrix_name.strip() else None
    named = calibration_name.strip().removesuffix(".json")
    scales = current().output_path(f"{named}.json") if named else None
    return Inputs(source, _target(model_name, source, type, output_name), type, keep_layers, matrix, scales)


def _described(request: Request) -> Description:
    plan = describe(request)
    return Description(_own(plan.text), plan.data | {"warnings": [_own(w) for w in plan.data["warnings"]]})


def _converted(inputs: Inputs, request: Request) -> QuantReport:
    """Convert, unless the same was made before and is there."""
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
    ticks = Ticks(current().progress, total)
    yield _Bar(ticks)
    ticks.close()


def resolve(model_name: str) -> Path:
    folder, _, name = model_name.partition("/")
    if folder not in FOLDERS or not name:
        raise FileError(f"'{model_name}' is not of the form FOLDER/NAME.\nFolders: {', '.join(FOLDERS)}.")
    return current().resolve(folder, name)


def root_of(model_name: str, source: Path) -> Path:
    """The model folder that the source was found in."""
    return source.parents[len(Path(model_name.partition("/")[2]).parts) - 1]


def _target(model_name: str, source: Path, type: str, output_name: str) -> Path:
    """The path of the new file.

    Raises:
        FileError: a name that leads out of the model folder.
    """
    from ..quantizers.files.recipes import FLOATS, RECIPES

    name = output_name.strip()
    if not name:
        plain = type in FLOATS and source.suffix.lower() == ".gguf"
        suffix = ".safetensors" if plain or type not in RECIPES else ".gguf"
        name = str(source.relative_to(root_of(model_name, source)).with_name(f"{source.stem}-{type}{suffix}"))
    return in_folder(model_name, source, name, f"flux-{type}.gguf")


def in_folder(model_name: str, source: Path, name: str, such: str) -> Path:
    """The path of a new file in the model folder of another one.

    Args:
        such: an example of a name, for the message.
    Raises:
        FileError: a name that leads out of the model folder.
    """
    root = Path(os.path.normpath(root_of(model_name, source)))
    target = Path(os.path.normpath(root / name))
    if Path(name).is_absolute() or not target.is_relative_to(root) or target == root:
        raise FileError(f"'{name}' is not a name in the model folder.\nGive a name such as {such}.")
    beside = target.parent == Path(os.path.normpath(source.parent))  # a link that the host has followed already
    if not beside and target.parent.exists() and not target.parent.resolve().is_relative_to(root.resolve()):
        raise FileError(f"'{name}' leads out of the model folder through a link.\nGive another name.")
    return target
