"""`quantwire lint WORKFLOW.json...`: what is wrong with workflow files, without running them."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..quantizers.compat.modes import HOST_MODES, HostName, OffloadMode
from ..quantizers.errors import FileError
from .paths import require_file

if TYPE_CHECKING:
    from ..hosts.lint.graph import Finding
    from ..hosts.lint.lint import FileReport, Options

OK, FAILS, BLOCKED = 0, 2, 3
STATUS = {OK: "ok", FAILS: "bad input", BLOCKED: "blocked"}
SHOWN_REMEDIES = 2  # the report has all of them
STANDARD_OUTPUT = Path("-")
COUNTED = {"block": "conflict", "error": "error", "warning": "warning", "note": "note"}
HOSTS = {HostName.STANDALONE: "quantwire run", HostName.COMFYUI: "ComfyUI"}


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "lint",
        parents=[common],
        help="check workflow files for offload conflicts, missing models and unknown nodes",
        description=(
            "Check workflow files, in the editor's form or in API form, without running them or loading a model: "
            "offload conflicts of quantized weights, missing models, unknown nodes, formats that this machine cannot "
            "run. Exit code 3: a conflict; 2: something else that is certain to fail; 0: neither (warnings and notes "
            "do not count)."
        ),
    )
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="WORKFLOW.json", help="files, and folders whose .json files are checked"
    )
    parser.add_argument(
        "--offload", choices=[m.value for m in OffloadMode], metavar="MODE",
        help="check every model for this mode, and OffloadCompat nodes set to auto too: "
        + ", ".join(m.value for m in OffloadMode),
    )  # fmt: skip
    parser.add_argument(
        "--host", choices=[h.value for h in HostName], metavar="HOST",
        help="standalone (quantwire run) or comfyui; default: comfyui where only it has a mode or node of the file",
    )  # fmt: skip
    parser.add_argument(
        "--models", type=Path, action="append", metavar="DIR", help="model folder, laid out as ComfyUI's"
    )
    parser.add_argument("--no-models", action="store_true", help="look for no model files and no libraries of formats")
    parser.add_argument("--server", metavar="URL", help="check nodes, choices and models against a ComfyUI server")
    parser.add_argument(
        "--known", action="append", default=[], metavar="NODE", help="a node type that a pack brings; * is any text"
    )
    parser.add_argument(
        "--strict", action="store_true", help="nodes that are not known here are errors, as they are with --server"
    )
    parser.add_argument(
        "--json", type=Path, nargs="?", const=STANDARD_OUTPUT, metavar="REPORT",
        help="write a machine-readable report; without a file, print it instead of the text",
    )  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="print only what makes the check fail")
    parser.set_defaults(handler=handle)


def handle(args: argparse.Namespace, report: dict[str, Any]) -> int:
    from ..hosts.lint.lint import Linter
    from ..nodes import NODE_CLASS_MAPPINGS

    args.offload = OffloadMode(args.offload) if args.offload else None
    args.host = HostName(args.host) if args.host else None
    printed, target = args.json == STANDARD_OUTPUT, args.json
    args.json = None  # no file is written for bad arguments: one of them may be the file
    _check_arguments(args, target)
    files = _files(args.paths)
    linter = Linter(_options(args), NODE_CLASS_MAPPINGS)
    found: list[FileReport] = []
    for path, given in files:
        result = linter.check(path, given)
        found.append(result)
        if not printed:
            print_findings(result, args.quiet)
    code = exit_code(found)
    report |= {"files": [_file_json(r) for r in found], "summary": _counts(found)}
    if printed:
        print(json.dumps({"status": STATUS[code], "exit_code": code, **report}, indent=2))
    else:
        args.json = target
        if not (args.quiet and code == OK):
            print(summary(found))
    return code


def exit_code(reports: Iterable[FileReport]) -> int:
    levels = {f.level.value for r in reports for f in r.findings}
    return BLOCKED if "block" in levels else FAILS if "error" in levels else OK


def print_findings(report: FileReport, quiet: bool) -> None:
    """A line for each finding, and one for each way out."""
    for f in report.findings:
        if quiet and f.level.value not in ("block", "error"):
            continue
        where = f"{f.where}: " if f.where else ""
        print(f"{report.path}: {where}{f.level.value}: {f.message}")
        for remedy in f.remedies[:SHOWN_REMEDIES]:
            print(f"    {remedy}")


def summary(reports: Sequence[FileReport]) -> str:
    counts = _counts(reports)
    found = [f"{n} {word}{'s' if n != 1 else ''}" for level, word in COUNTED.items() if (n := counts[level])]
    hosts = [HOSTS[h] for h in HostName if any(r.host is h for r in reports)]
    files = f"{len(reports)} file{'s' if len(reports) != 1 else ''}"
    for_hosts = f" for {' and '.join(hosts)}" if hosts else ""
    return f"{files} checked{for_hosts}: {', '.join(found) or 'nothing found'}."


def _counts(reports: Iterable[FileReport]) -> dict[str, int]:
    counts = Counter(f.level.value for r in reports for f in r.findings)
    return {level: counts[level] for level in COUNTED}


def _file_json(report: FileReport) -> dict[str, Any]:
    return {
        "file": str(report.path),
        "form": report.form or None,
        "host": report.host.value if report.host else None,
        "nodes": report.nodes,
        "findings": [_finding_json(f) for f in report.findings],
    }


def _finding_json(f: Finding) -> dict[str, Any]:
    p = f.place
    node = {"id": p.node_id, "title": p.title, "class_type": p.class_type} if p is not None else None
    return {
        "level": f.level.value,
        "code": f.code,
        "node": node,
        "message": f.message,
        "remedies": list(f.remedies),
        **({"data": dict(f.data)} if f.data else {}),
    }


def _options(args: argparse.Namespace) -> Options:
    from ..hosts.lint.catalog import ask_server
    from ..hosts.lint.lint import Options

    server = ask_server(args.server) if args.server is not None else None
    models = tuple(args.models or ())
    return Options(args.offload, args.host, models, not args.no_models, tuple(args.known), server, args.strict)


def _check_arguments(args: argparse.Namespace, target: Path | None) -> None:
    """Raises FileError for options that contradict each other, and for a report that would overwrite something else."""
    if args.host is not None and args.offload is not None and args.offload not in HOST_MODES[args.host]:
        modes = ", ".join(m.value for m in HOST_MODES[args.host])
        raise FileError(f"--offload: {args.host.value} has no mode {args.offload.value}.\nIts modes: {modes}.")
    if args.server is not None and args.host is HostName.STANDALONE:
        raise FileError("--server: a server is ComfyUI, so --host standalone contradicts it.\nLeave one of them out.")
    if args.no_models and (args.models or args.server):
        raise FileError("--no-models contradicts --models and --server.\nLeave one of them out.")
    for folder in args.models or []:
        if not folder.is_dir():
            raise FileError(f"--models: '{folder}' is not a folder.")
    if target not in (None, STANDARD_OUTPUT):
        require_file(target, "--json")
        if target.exists() and not _is_report(target):  # `--json WORKFLOW.json` is one slip away
            raise FileError(
                f"--json: {target} is there and is no report of lint, so it is not overwritten.\n"
                "Write --json last, or give it another name."
            )


def _is_report(path: Path) -> bool:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(data, dict) and {"exit_code", "status"} <= data.keys()


def _files(paths: Sequence[Path]) -> list[tuple[Path, bool]]:
    """Each file once, and whether it was named itself; of a folder its .json files, those of its folders included."""
    found: dict[Path, bool] = {}
    for path in paths:
        if not path.is_dir():
            found[path] = True
            continue
        inside = sorted(p for p in path.rglob("*.json") if p.is_file())
        if not inside:
            where = "this folder" if path == Path() else path  # `.` reads as an end of the sentence
            raise FileError(f"There is no .json file in {where}.\nName workflow files, or a folder that has some.")
        for each in inside:
            found.setdefault(each, False)
    return list(found.items())
