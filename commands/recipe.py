"""`quantwire recipe WORKFLOW.json|FILE --budget 6.5GB`: a format for each layer, measured, under a budget of bytes."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..quantizers.errors import FileError, SpecError
from .paths import add_json, json_to_output, require_file, write_file

if TYPE_CHECKING:
    from ..quantizers.measure.recipe import Recipe
    from ..quantizers.measure.sensitivity import Sensitivities

OK, INTERRUPTED = 0, 130


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "recipe",
        parents=[common],
        help="find the format of each layer that changes the output least, under a budget of bytes",
        description=(
            "Measure what quantizing each layer does to the output of a model, and find the mixture of formats with "
            "the smallest error whose weights fit into the budget. A WORKFLOW is run in the embedded host, and each "
            "layer is measured on its own prompt at a few noise levels; the recipe is then checked on a run with "
            "another seed, beside the single formats that fit; where one of those measures better, the recipe is that "
            "format. Of a FILE (safetensors or GGUF at full precision, an index, a folder of diffusers) only the "
            "errors of its weights are measured: quicker, and a rougher guess. "
            "The rules go into QuantRules, FindRecipe's config, or `quantwire convert --rules`."
        ),
    )
    parser.add_argument("source", type=Path, metavar="WORKFLOW.json|FILE")
    parser.add_argument(
        "--budget", required=True, metavar="SIZE",
        help="bytes of the diffusion model's weights: 6.5GB, 6.5GiB, 700MB; a number alone is GB",
    )  # fmt: skip
    parser.add_argument(
        "--formats", nargs="+", metavar="FORMAT",
        help="format ids or URIs to choose from (default: gguf formats of 2 to 8 bits, which one file can hold mixed)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the rules here, one a line")
    parser.add_argument(
        "--levels", type=int, default=4, metavar="N", help="noise levels at which layers are measured (default: 4)"
    )
    parser.add_argument("--no-check", action="store_true", help="do not measure the recipe on a run with another seed")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="NODE.INPUT=VALUE",
        help="change an input of the workflow; NODE is an id, a title or a node type that occurs once",
    )  # fmt: skip
    parser.add_argument(
        "--models", type=Path, action="append", metavar="DIR", help="model folder, laid out as ComfyUI's"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="error against size, and which layers matter")
    add_json(parser, "the recipe and every measurement")
    parser.set_defaults(handler=handle)


def handle(args: argparse.Namespace, report: dict[str, Any]) -> int:
    from ..quantizers.measure.plots import new_figure, to_png
    from ..quantizers.measure.sensitivity import check_formats
    from ..quantizers.measure.units import parse_size

    to_output = json_to_output(args)
    for path, option in ((args.out, "--out"), (args.plot, "--plot")):
        if path is not None:
            require_file(path, option)
    if args.levels < 1:
        raise SpecError(f"--levels: {args.levels} is no number of noise levels.\nGive 1 or more; the default is 4.")
    for folder in args.models or []:
        if not folder.is_dir():
            raise FileError(f"--models: '{folder}' is not a folder.")
    budget = parse_size(args.budget, "GB")
    check_formats(args.formats)
    if args.plot is not None:
        new_figure()  # minutes of measuring are not to end in a library that is missing
    if is_workflow(args.source):
        done = _by_workflow(args, budget)
        if done is None:
            print("Interrupted.", file=sys.stderr)
            return INTERRUPTED
        recipe, found = done
    else:
        if args.overrides:
            raise SpecError(f"--set: {args.source.name} is a model file and has no nodes.\nGive a workflow.")
        recipe, found = of_file(args.source, budget, args.formats)
    if args.out is not None:
        write_file(args.out, _commented(recipe).encode(), "--out")
    if args.plot is not None:
        from ..quantizers.measure.recipe_plot import plot_recipe

        write_file(args.plot, to_png(plot_recipe(recipe, found)), "--plot")
    data = {"recipe": recipe.to_dict(), "sensitivities": found.to_dict()}
    if to_output:
        print(json.dumps(data, indent=2))
        return OK
    report |= data
    print(recipe)
    if args.out is None:
        print(recipe.rules)
    else:
        print(f"rules: {args.out}")
    return OK


def is_workflow(path: Path) -> bool:
    """Whether a path is a workflow, and not a model: the index of a model in several files is JSON too."""
    return path.suffix.lower() == ".json" and not path.name.lower().endswith(".index.json") and not path.is_dir()


def of_file(path: Path, budget: int, formats: list[str] | None) -> tuple[Recipe, Sensitivities]:
    """By the errors of the weights of the file's diffusion model, or of what else is in it.

    Raises:
        QuantwireError: it cannot be read, is quantized already, or no mixture keeps to the budget.
    """
    from tqdm import tqdm

    from ..quantizers.measure.recipe import check_possible, find_recipe
    from ..quantizers.measure.sensitivity import by_weights, check_formats, units_of
    from ..quantizers.measure.sensitivity import of_file as open_part

    part, read = open_part(path)
    candidates = check_formats(formats)
    check_possible(part.name, part.slots, units_of(part.slots), candidates, budget, measured=False)
    found = by_weights(part, read, formats, lambda items: tqdm(items, desc="layers", file=sys.stderr, leave=False))
    return find_recipe(found, budget), found


def _by_workflow(args: argparse.Namespace, budget: int) -> tuple[Recipe, Sensitivities] | None:
    """None where it was interrupted."""
    from ..hosts import use
    from ..hosts.recipe import Wanted, recipe_by_runs, workflow_run
    from ..hosts.standalone.host import StandaloneHost
    from ..hosts.standalone.progress import Interrupted, TqdmListener

    wanted = Wanted(budget, tuple(args.formats) if args.formats else None, args.levels, not args.no_check)
    run = workflow_run(args.source, args.overrides, TqdmListener)
    with (
        tempfile.TemporaryDirectory(prefix="quantwire-") as scratch,
        use(StandaloneHost(args.models, Path(scratch))) as host,
    ):
        try:
            return recipe_by_runs(host, run, wanted, name="transformer")
        except Interrupted:
            return None


def _commented(recipe: Recipe) -> str:
    head = "\n".join(f"# {line}" for line in str(recipe).splitlines())
    return f"{head}\n{recipe.rules}\n"
