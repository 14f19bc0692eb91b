"""Command line: `quantwire run, inspect, doctor, convert, imatrix, calibrate, lint, compat, formats, help`.

Exit codes: 0 done; 2 bad workflow or input; 3 blocked by OffloadCompat; 4 a node failed; 130 interrupted. An error is
one line on standard error and, where there is one, what to do about it; `--debug` adds the traceback.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .commands.paths import require_file, require_writable, write_json
from .quantizers.errors import FileError, OffloadConflict, QuantwireError

if TYPE_CHECKING:
    from .hosts.comfyui.remote import RemoteResult
    from .hosts.standalone.executor import RunResult
    from .hosts.standalone.workflow import Prompt

# modules of `commands/`
COMMANDS = (
    "inspect", "doctor", "convert", "imatrix", "calibrate", "lint", "compat", "compare", "forecast",
    "advise", "fit", "recipe", "bench", "serve",
)  # fmt: skip
STANDALONE = ("torch", "diffusers", "transformers", "accelerate", "tokenizers", "PIL", "tqdm", "aiohttp")  # the extra
OK, BAD_INPUT, BLOCKED, NODE_FAILED, INTERRUPTED = 0, 2, 3, 4, 130
STATUS = {OK: "ok", BAD_INPUT: "bad input", BLOCKED: "blocked", NODE_FAILED: "node failed", INTERRUPTED: "interrupted"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    # Read when torch loads OpenMP. Threads that spin while they wait slow a busy machine down, sampling 17 times
    # (44.7 s against 2.6 s, measured with other jobs beside).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    argv = sys.argv[1:] if argv is None else argv
    args = _parser(argv).parse_args(_joined(argv))
    logging.basicConfig(level=logging.DEBUG if args.debug else logging.WARNING, format="%(levelname)s: %(message)s")
    if not args.debug:
        quiet_loggers()
    report: dict[str, Any] = {}
    try:
        code = args.handler(args, report)
        error = None
    except KeyboardInterrupt:
        code, error = INTERRUPTED, None
        print("Interrupted.", file=sys.stderr)
    except BrokenPipeError:  # the reader of our output, such as `head`, has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code, error = OK, None
    except Exception as err:  # the boundary: every failure becomes a message and an exit code
        if _caused_by_interrupt(err):
            code, error = INTERRUPTED, None
            print("Interrupted.", file=sys.stderr)
        else:
            code, error = _exit_code(err), err
            _print_error(err, args.debug)
    if getattr(args, "json", None) is not None:
        try:
            data = {"status": STATUS[code], "exit_code": code, "error": _error_json(error), **report}
            write_json(args.json, data, "--json")
        except FileError as err:
            if str(err) != str(error):  # the command may have refused the same file
                _print_error(err, args.debug)
            return code or BAD_INPUT
    return code


def _joined(argv: Sequence[str]) -> list[str]:
    """`--vram -8GB` as `--vram=-8GB`: argparse takes `-8GB` for an option, and says that the size is missing."""
    made: list[str] = []
    for text in argv:
        if made and made[-1] in ("--vram", "--budget") and re.match(r"-[\d.]", text):
            made[-1] += f"={text}"
        else:
            made.append(text)
    return made


def quiet_loggers() -> None:
    """Hold back what libraries report at import and is nobody's fault here."""
    # bitsandbytes reports optional kernels that are absent, and its int8 layer every cast to float16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # diffusers imports torchao where it is installed, which then reports every CUDA extension that it cannot load.
    for name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="quantwire", description=__doc__.splitlines()[0] if __doc__ else None)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show tracebacks and debug logs")
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="show the version and leave")
    commands = parser.add_subparsers(dest="command", required=True)

    # Only what is asked for is made: to show all the help takes longer than to look into a file.
    first = argv[0] if argv else ""
    one = first in COMMANDS
    if not one:
        _add_run(commands, common)
    for name in (first,) if one else COMMANDS:
        importlib.import_module(f".commands.{name}", __package__).add_parser(commands, common)
    if not one:
        _add_lists(commands, common)
    return parser


def _add_run(commands: Any, common: argparse.ArgumentParser) -> None:
    run = commands.add_parser("run", parents=[common], help="run a workflow in API form")
    run.add_argument("workflow", type=Path, metavar="WORKFLOW.json")
    run.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="NODE.INPUT=VALUE",
        help="change an input; NODE is an id, a title or a node type that occurs once",
    )  # fmt: skip
    run.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="where images go (default: out)")
    run.add_argument("--models", type=Path, action="append", metavar="DIR", help="model folder, laid out as ComfyUI's")
    run.add_argument("--json", type=Path, metavar="REPORT", help="write a machine-readable report")
    run.add_argument("--server", metavar="URL", help="run on a ComfyUI server, such as http://127.0.0.1:8188")
    run.set_defaults(handler=_run)


def _add_lists(commands: Any, common: argparse.ArgumentParser) -> None:
    formats = commands.add_parser("formats", parents=[common], help="list the formats and whether they run here")
    formats.add_argument("--json", action="store_const", const=Path("-"), help="print a list of id, works, reason")
    formats.add_argument("--verbose", action="store_true", help="show the kernel of each format's product, and why")
    formats.set_defaults(handler=_formats)

    helper = commands.add_parser("help", parents=[common], help="backends, their formats and arguments")
    helper.add_argument("backends", nargs="*", metavar="BACKEND", help="backend or format; none lists the backends")
    helper.set_defaults(handler=_help)


class _ShowVersion(argparse.Action):
    """argparse's own wants the version at every start, and looking it up takes 20 ms."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(f"quantwire {_version()}")
        parser.exit()


def _version() -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version("quantwire")
    except importlib.metadata.PackageNotFoundError:  # a custom node is a folder, not an installed package
        return "(not installed as a package)"


def _run(args: argparse.Namespace, report: dict[str, Any]) -> int:
    from .hosts.standalone.progress import Interrupted

    require_writable(args.out, "--out")
    if args.json is not None:
        require_file(args.json, "--json")
    try:
        prompt, result = _run_on_server(args) if args.server is not None else _run_here(args)
    except Interrupted:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
    report |= {"outputs": result.outputs, "timings_s": result.timings_s, "cached": result.cached}
    for node_id, ui in result.outputs.items():
        for file in (f for found in ui.values() if isinstance(found, list) for f in found if isinstance(f, dict)):
            if "filename" in file and file.get("type") in ("output", "temp"):
                folder = args.out if file["type"] == "output" else args.out / "temp"
                print(folder / file["subfolder"] / file["filename"])
        node = prompt.nodes.get(node_id)  # None: a server's node that another one expanded into
        for text in ui.get("text", []):
            print(f"[{(node.title or node.class_type) if node else node_id}] {text}")
    return OK


def _run_on_server(args: argparse.Namespace) -> tuple[Prompt, RunResult | RemoteResult]:
    from .hosts.comfyui.remote import run_remote
    from .hosts.standalone.progress import TqdmListener
    from .hosts.standalone.workflow import load_workflow

    if args.models:
        raise FileError(f"--models: {args.server} reads its own model folders; leave --models out.")
    return run_remote(args.server, load_workflow(args.workflow), args.overrides, args.out, TqdmListener())


def _run_here(args: argparse.Namespace) -> tuple[Prompt, RunResult | RemoteResult]:
    from . import nodes
    from .hosts import use
    from .hosts.standalone.core_nodes import CORE_NODES
    from .hosts.standalone.executor import Executor
    from .hosts.standalone.host import StandaloneHost
    from .hosts.standalone.progress import TqdmListener
    from .hosts.standalone.workflow import apply_overrides, load_workflow

    classes = {**CORE_NODES, **nodes.NODE_CLASS_MAPPINGS}
    for folder in args.models or []:
        if not folder.is_dir():
            raise FileError(f"--models: '{folder}' is not a folder.")
    with use(StandaloneHost(args.models, args.out)):
        prompt = apply_overrides(load_workflow(args.workflow), args.overrides, classes)
        return prompt, Executor(classes, TqdmListener()).run(prompt)


def _formats(args: argparse.Namespace, _: dict[str, Any]) -> int:
    from .commands.quiet import quiet_libraries
    from .quantizers import overview

    with quiet_libraries(args.debug):
        rows = list(overview.rows())
        device = overview.compute_device()
        if args.json is not None:
            args.json = None  # a plain list on standard output, not the report of `run`
            print(json.dumps([overview.to_json(row, device if args.verbose else None) for row in rows], indent=2))
            return OK
        if args.verbose:
            n, k = overview.SHAPE
            print(f"Kernels are those for a {n} x {k} weight and bfloat16 activations on {device.type}.")
        for row in rows:
            print(f"{row.id:22} {row.bits:>7g} bit  {overview.verdict(row)}\n{'':36}{overview.summary(row)}")
            if args.verbose and row.works and row.writable:
                print(f"{'':36}{overview.kernel_text(row, device)}")
        if args.verbose and any(row.works and not row.writable for row in rows):
            print("Read-only formats: no kernel is shown, since no weight can be made here to ask with.")
    print(overview.count_text(rows))
    return OK


def _help(args: argparse.Namespace, _: dict[str, Any]) -> int:
    from .quantizers.help import find_backend, overview, text

    found = {b.name: b for b in map(find_backend, args.backends)}
    print(text(list(found.values())) if found else overview())
    return OK


def _caused_by_interrupt(err: BaseException) -> bool:
    """Whether a Ctrl-C is somewhere behind an error: lazy imports of the libraries turn it into an ImportError."""
    cause: BaseException | None = err
    while cause is not None:
        if isinstance(cause, KeyboardInterrupt):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _exit_code(err: BaseException) -> int:
    if isinstance(err, OffloadConflict):
        return BLOCKED
    return BAD_INPUT if isinstance(err, QuantwireError) or _is_uninstalled(err) else NODE_FAILED


def _is_uninstalled(err: BaseException) -> bool:
    """Whether a package of the extra `standalone` is not there."""
    return isinstance(err, ModuleNotFoundError) and err.name in STANDALONE


def _print_error(err: BaseException, debug: bool) -> None:
    if debug:
        import traceback

        traceback.print_exception(err)
    text = str(err).strip() or type(err).__name__
    if _is_uninstalled(err):
        text += "\nRun `pip install quantwire[standalone]`, or use the Python that runs ComfyUI."
    place = getattr(err, "node_place", None)
    where = f"{place}: " if place is not None and not text.startswith(str(place)) else ""
    print(f"{type(err).__name__}: {where}{text}", file=sys.stderr)


def _error_json(err: BaseException | None) -> dict[str, Any] | None:
    if err is None:
        return None
    place = getattr(err, "node_place", None)
    node = {"id": place.node_id, "title": place.title, "class_type": place.class_type} if place is not None else None
    return {"type": type(err).__name__, "message": str(err), "node": node}


if __name__ == "__main__":
    sys.exit(main())
