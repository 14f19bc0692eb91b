"""Images of two model files from the same workflow and seeds, by the embedded host."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..quantizers.errors import FileError, SpecError, WorkflowError
from .bench_graph import with_format
from .standalone.host import StandaloneHost
from .standalone.workflow import Prompt, apply_overrides

LOADERS = ("UNETLoader", "LoadQuantized", "LoadGGUF", "LoadAndQuantize")
FOLDER = "diffusion_models"
SEEDS = ("seed", "noise_seed")


@dataclass(frozen=True)
class Case:
    """One run: overrides as in `--set`, and what its images are to show, for tasks."""

    sets: tuple[str, ...]
    expected: Any = None


@dataclass(frozen=True)
class Task:
    """Runs whose images have a right answer.

    Attributes:
        read: (B, H, W, 3) float32 array in [0, 1] -> one answer an image.
    """

    cases: tuple[Case, ...]
    read: Callable[[Any], Sequence[Any]]


class FilesHost(StandaloneHost):
    """The embedded host with two more diffusion models, wherever they lie.

    Args:
        files: name in graphs -> path.
    """

    def __init__(self, models: Sequence[Path] | None, output: Path, files: Mapping[str, Path]) -> None:
        super().__init__(models, output)
        self._files = dict(files)

    def list_files(self, folder: str, suffixes: tuple[str, ...] = ()) -> list[str]:
        return [*super().list_files(folder, suffixes), *(self._files if folder == FOLDER else ())]

    def candidates(self, folder: str, name: str) -> Iterator[Path]:
        if folder == FOLDER and name in self._files:
            yield self._files[name]
        else:
            yield from super().candidates(folder, name)


def load_task(path: Path) -> Task:
    """A task out of a Python file with `cases()`, a list of (list of NODE.INPUT=VALUE, answer), and `read(images)`.

    The file is run: it is the user's own.

    Raises:
        FileError: it cannot be run, or lacks one of them.
    """
    if not path.is_file():
        raise FileError(f"--task: '{path}' is no file.\nName a Python file with `cases()` and `read(images)`.")
    spec = importlib.util.spec_from_file_location("quantwire_task", path)
    if spec is None or spec.loader is None:
        raise FileError(f"--task: '{path.name}' is no Python file.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        cases = tuple(Case(tuple(sets), expected) for sets, expected in module.cases())
        read = module.read
    except Exception as err:  # whatever the user's own code raises
        raise FileError(
            f"--task: {path.name}: {type(err).__name__}: {err}\nIt needs `cases()`, a list of (list of "
            "NODE.INPUT=VALUE, answer), and `read(images)`."
        ) from err
    if not cases:
        raise FileError(f"--task: {path.name}: `cases()` has none.")
    return Task(cases, read)


def seed_cases(prompt: Prompt, count: int) -> tuple[Case, ...]:
    """So many runs that differ in their seeds, the first with the workflow's own.

    Raises:
        WorkflowError: more than one run is asked for, and no node has a seed of its own.
    """
    seeds = [(n.id, name, v) for n in prompt.nodes.values() for name in SEEDS if type(v := n.inputs.get(name)) is int]
    if count > 1 and not seeds:
        raise WorkflowError("--seeds: no node of the workflow has a seed that could be changed.")
    return tuple(Case(tuple(f"{i}.{name}={seed + k}" for i, name, seed in seeds)) for k in range(count))


def with_model(prompt: Prompt, name: str, quantized: bool) -> Prompt:
    """The workflow with its diffusion model taken from a file, and nothing that quantizes another time.

    Raises:
        WorkflowError: it has no loader of a diffusion model, or several, or no SaveImage.
    """
    loaders = [node for node in prompt.nodes.values() if node.class_type in LOADERS]
    if len(loaders) != 1:
        told = ", ".join(str(node.place) for node in loaders) or "none"
        raise WorkflowError(
            f"--workflow: {prompt.source} must have one loader of a diffusion model ({', '.join(LOADERS)}), got {told}."
        )
    if not any(node.class_type == "SaveImage" for node in prompt.nodes.values()):
        raise WorkflowError(f"--workflow: {prompt.source} has no SaveImage, so there are no images to compare.")
    plain = replace(loaders[0], class_type="UNETLoader", inputs={"unet_name": name, "weight_dtype": "default"})
    changed = with_format(Prompt({**prompt.nodes, plain.id: plain}, prompt.source), None, lambda _: None)
    if not quantized:
        return changed
    loader = replace(loaders[0], class_type="LoadQuantized", inputs={"model_name": name})
    return Prompt({**changed.nodes, loader.id: loader}, prompt.source)


def is_quantized(path: Path) -> bool:
    """Whether LoadQuantized opens a file, not UNETLoader.

    Raises:
        FileError: it cannot be read, or is a folder.
    """
    from ..quantizers.files.locate import Container, locate
    from ..quantizers.files.model_file import open_model
    from ..quantizers.files.schemes.scan import scan

    if path.is_dir() or path.suffix == ".json":
        raise FileError(f"'{path.name}': images are made of single files only.\nLeave --workflow out, or give a file.")
    return locate(path).container is Container.GGUF or bool(scan(open_model(path)).layers)


def check_overrides(prompt: Prompt, cases: Sequence[Case], sets: Sequence[str]) -> None:
    """Find out before any work that a run's overrides do not fit.

    Raises:
        WorkflowError: as `apply_overrides`.
    """
    from .. import nodes
    from .standalone.core_nodes import CORE_NODES

    classes = {**CORE_NODES, **nodes.NODE_CLASS_MAPPINGS}
    for case in cases:
        apply_overrides(prompt, [*sets, *case.sets], classes)


def render(
    prompt: Prompt,
    cases: Sequence[Case],
    sets: Sequence[str],
    host: FilesHost,
    progress: Callable[[Sequence[Case]], Iterable[Case]],
) -> tuple[Any, list[Any]]:
    """Run every case.

    Args:
        sets: overrides of all of them, which a case's own come after.
    Returns:
        (B, H, W, 3) float32, and what each image is to show.
    Raises:
        SpecError: runs whose images differ in size.
        Interrupted: by Ctrl-C.
    """
    import torch

    from .. import nodes
    from . import use
    from .standalone.core_nodes import CORE_NODES
    from .standalone.executor import Executor

    classes = {**CORE_NODES, **nodes.NODE_CLASS_MAPPINGS}
    executor = Executor(classes)
    images: list[torch.Tensor] = []
    expected: list[Any] = []
    with use(host):
        for case in progress(cases):
            result = executor.run(apply_overrides(prompt, [*sets, *case.sets], classes))
            saved = [i for i, node in prompt.nodes.items() if node.class_type == "SaveImage"]
            made = [result.results[i][0] for i in saved if i in result.results]
            images += made
            expected += [case.expected] * sum(len(batch) for batch in made)
    if len({tuple(batch.shape[1:]) for batch in images}) > 1:
        sizes = ", ".join(sorted({f"{b.shape[2]} x {b.shape[1]}" for b in images}))
        raise SpecError(f"The runs make images of several sizes ({sizes}).\nGive all of them one size.")
    return torch.cat(images), expected
