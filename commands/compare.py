"""`quantwire compare A B`: what a version of a model differs in from another, in weights, images and a task."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..quantizers.errors import FileError, SpecError
from .paths import add_json, json_to_output, require_file, require_writable, write_file

if TYPE_CHECKING:
    from torch import Tensor

    from ..hosts.compare import Case
    from ..hosts.standalone.workflow import Prompt
    from ..quantizers.measure.compare import Comparison

OK, INTERRUPTED = 0, 130
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
FORMATS = ("PNG", "JPEG", "WEBP")  # whatever the name says: for EPS Pillow would start Ghostscript on the file
GAIN = 4.0


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "compare",
        parents=[common],
        help="what two versions of a model differ in: weights, images from the same seeds, a task",
        description=(
            "Compare two versions of a model; A is the reference. Without --workflow the weights alone: SQNR and "
            "largest error of each layer, files of any scheme and layout, a few rows at a time. With --workflow also "
            "images from the same seeds: PSNR, SSIM, FLIP, luminosity, and whether those of B are noise. A and B may "
            "be two pictures too. Exit code 0, whatever the verdict; 2: a wrong file or option; 4: a node failed."
        ),
    )
    parser.add_argument("a", type=Path, metavar="A", help="reference: model file, index, folder, or picture")
    parser.add_argument("b", type=Path, metavar="B", help="what to compare with it")
    parser.add_argument("--workflow", type=Path, metavar="FILE", help="workflow in API form; its loader gets A, then B")
    parser.add_argument("--seeds", type=int, metavar="N", help="runs with seeds that follow one another (default: 1)")
    parser.add_argument(
        "--set", dest="sets", action="append", default=[], metavar="NODE.INPUT=VALUE",
        help="change an input of the workflow, as in `quantwire run`",
    )  # fmt: skip
    parser.add_argument(
        "--task", type=Path, metavar="FILE.py",
        help="Python file with cases(), a list of (list of NODE.INPUT=VALUE, answer), and read(images); in place of "
        "--seeds; measures how often the images show what was asked for",
    )  # fmt: skip
    parser.add_argument(
        "--models", type=Path, action="append", metavar="DIR", help="model folder, laid out as ComfyUI's"
    )
    parser.add_argument("--no-weights", action="store_true", help="compare images only")
    parser.add_argument("--gain", type=float, default=GAIN, help="brightness of the difference picture (default: 4)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the images of both, side by side")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="write a picture of the comparison")
    add_json(parser)
    parser.set_defaults(handler=handle)


def handle(args: argparse.Namespace, report: dict[str, Any]) -> int:
    to_output = json_to_output(args)
    _check(args)
    from ..hosts.standalone.progress import Interrupted

    try:
        found, pair = _pictures(args) if _is_picture(args.a) else _models(args)
    except Interrupted:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
    if args.out is not None and pair is not None:
        _write_pictures(args, pair)
    if args.plot is not None:
        _write_plot(args, found, pair)
    if to_output:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        report |= found.to_dict()
        print(found)
    return OK


def _check(args: argparse.Namespace) -> None:
    for path in (args.a, args.b):
        if not path.exists():
            raise FileError(f"'{path}' does not exist.\nGive two model files, folders or pictures.")
    if _is_picture(args.a) != _is_picture(args.b):
        raise FileError(f"'{args.a.name}' and '{args.b.name}' are not of one kind.\nGive two models or two pictures.")
    _check_images(args)
    if args.seeds is not None and args.seeds < 1:
        raise SpecError(f"--seeds is {args.seeds}.\nGive 1 or more runs.")
    if args.gain <= 0:
        raise SpecError(f"--gain is {args.gain:g}.\nGive a number above 0.")
    if args.plot is not None:
        if args.plot.suffix.lower() != ".png":
            raise FileError(f"--plot: '{args.plot.name}' is a PNG file.\nName it *.png.")
        require_file(args.plot, "--plot")
    if args.out is not None:
        require_writable(args.out, "--out")


def _check_images(args: argparse.Namespace) -> None:
    """Refuse options that would have no effect."""
    runs = {"--task": args.task, "--set": args.sets, "--models": args.models, "--seeds": args.seeds is not None}
    if _is_picture(args.a):
        runs |= {"--workflow": args.workflow, "--no-weights": args.no_weights}
        given = [option for option, value in runs.items() if value]
        if given:
            raise SpecError(
                f"{', '.join(given)}: two pictures are compared as they are.\nLeave it out, or give two models."
            )
    elif args.workflow is None:
        given = [option for option, value in {**runs, "--out": args.out}.items() if value]
        if given:
            verb = "is" if len(given) == 1 else "are"
            raise SpecError(f"{', '.join(given)} {verb} about images.\nGive --workflow FILE, which makes them.")
        if args.no_weights:
            raise SpecError("--no-weights leaves nothing to compare.\nGive --workflow FILE as well.")
    elif args.task is not None and args.seeds is not None:
        raise SpecError("--seeds and --task both say which runs are made.\nGive one of them.")


def _models(args: argparse.Namespace) -> tuple[Comparison, tuple[Tensor, Tensor] | None]:
    from ..quantizers.measure.compare import Comparison, compare_pictures, task_accuracy
    from ..quantizers.measure.layers import compare_files

    # Before the weights: of large files they take minutes, and a wrong workflow is not to be told after them.
    runs = None if args.workflow is None else _runs(args)
    layers = None
    if not args.no_weights:
        layers = compare_files(args.a, args.b, lambda items, total: _bar(items, "layers"))
    if runs is None:
        assert layers is not None
        return Comparison(layers.a, layers.b, layers), None
    labels = (args.a.name, args.b.name) if args.a.name != args.b.name else ("A", "B")
    a, b, expected = _render(args, runs)
    images, noise = compare_pictures(a, b, labels)
    task = None if runs.read is None else task_accuracy(runs.read, a, b, expected)
    return Comparison(*labels, layers, images, noise, task), (a, b)


@dataclass(frozen=True)
class _Runs:
    """What is drawn.

    Attributes:
        files: name in the graphs -> model.
        graphs: one for each file.
        read: of the task.
    """

    files: Mapping[str, Path]
    graphs: Sequence[Prompt]
    cases: Sequence[Case]
    read: Callable[[Any], Sequence[Any]] | None


def _runs(args: argparse.Namespace) -> _Runs:
    """Raises:
    QuantwireError: the workflow, the task or a file does not fit.
    """
    from ..hosts.compare import check_overrides, is_quantized, load_task, seed_cases, with_model
    from ..hosts.standalone.workflow import load_workflow

    prompt = load_workflow(args.workflow)
    task = None if args.task is None else load_task(args.task)
    cases = seed_cases(prompt, args.seeds or 1) if task is None else task.cases
    # Under names that no other file has, since both may go by one name.
    files = {f"{side}-{path.name}": path for side, path in (("A", args.a), ("B", args.b))}
    graphs = [with_model(prompt, name, is_quantized(path)) for name, path in files.items()]
    for graph in graphs:
        check_overrides(graph, cases, args.sets)
    for folder in args.models or ():
        if not folder.is_dir():
            raise FileError(f"--models: '{folder}' is not a folder.")
    return _Runs(files, graphs, cases, None if task is None else task.read)


def _render(args: argparse.Namespace, runs: _Runs) -> tuple[Tensor, Tensor, list[Any]]:
    from ..hosts.compare import FilesHost, render

    found: list[Any] = []
    expected: list[Any] = []
    with tempfile.TemporaryDirectory(prefix="quantwire-compare-") as output:  # single images; --out gets pairs
        host = FilesHost(args.models, Path(output), runs.files)
        for graph, name in zip(runs.graphs, runs.files, strict=True):
            images, expected = render(
                graph, runs.cases, args.sets, host, lambda items, n=name: _bar(items, f"{n}: runs")
            )
            found.append(images)
    return found[0], found[1], expected


def _pictures(args: argparse.Namespace) -> tuple[Comparison, tuple[Tensor, Tensor] | None]:
    from ..quantizers.measure.compare import Comparison, compare_pictures

    a, b = _read(args.a), _read(args.b)
    labels = (args.a.name, args.b.name) if args.a.name != args.b.name else (str(args.a), str(args.b))
    images, noise = compare_pictures(a, b, labels)
    return Comparison(*labels, images=images, noise=noise), (a, b)


def _read(path: Path) -> Tensor:
    import numpy as np
    import torch
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path, formats=FORMATS) as image:
            values = _values(path, image)
    except (OSError, UnidentifiedImageError) as err:
        raise FileError(f"{path}: cannot be read as a picture: {err}.") from err
    return torch.from_numpy(np.ascontiguousarray(values))[None]


def _values(path: Path, image: Any) -> Any:
    """(H, W, 3) float32 in [0, 1].

    Raises:
        FileError: pixels that RGB cannot hold.
    """
    import numpy as np

    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
        grey = np.asarray(image, np.float32) / 65535
        return np.repeat(grey[..., None], 3, axis=-1)
    if "A" in image.getbands() or "transparency" in image.info:
        alpha = np.asarray(image.convert("RGBA").getchannel("A"))
        if alpha.min() < 255:
            raise FileError(f"{path}: has transparent pixels, which have no colour.\nSave it without transparency.")
    if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"):
        raise FileError(f"{path}: pixels of mode {image.mode}, which 8-bit RGB cannot hold.\nSave it as RGB.")
    return np.asarray(image.convert("RGB"), np.float32) / 255


def _write_pictures(args: argparse.Namespace, pair: tuple[Tensor, Tensor]) -> None:
    from PIL import Image

    from ..quantizers.measure.images import side_by_side

    args.out.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(side_by_side(*pair, args.gain)):
        pixels = (picture * 255).round().byte().numpy()
        Image.fromarray(pixels).save(args.out / f"compared_{number:04d}.png")


def _write_plot(args: argparse.Namespace, found: Comparison, pair: tuple[Tensor, Tensor] | None) -> None:
    from ..quantizers.measure.compare_plots import plot
    from ..quantizers.measure.images import side_by_side
    from ..quantizers.measure.plots import to_png

    data = to_png(plot(found, None if pair is None else side_by_side(*pair, args.gain)))
    write_file(args.plot, data, "--plot")


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURES


def _bar(items: Sequence[Any], what: str) -> Iterable[Any]:
    """Progress with the time left, on a terminal; just the items where tqdm is not installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, desc=what, file=sys.stderr, leave=False, disable=None)
