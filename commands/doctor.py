"""`quantwire doctor FILE`: what is wrong in a model file, what loaders make of it, and a repaired copy."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .paths import require_file, require_writable

OK, ERRORS_FOUND = 0, 2


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "doctor",
        parents=[common],
        help="find what is wrong in a model file, and repair what is certain",
        description=(
            "Look for faults in a model file: a damaged header, missing or wrong scales and metadata, names that do "
            "not fit together, nan and inf. For each one, what the loader makes of it is said. Exits with 2 where an "
            "error is found (with --repair: where one is left in OUT), with 0 where there are warnings and notes alone."
        ),
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="safetensors, *.safetensors.index.json, folder or GGUF")
    parser.add_argument("--deep", action="store_true", help="read the values of all tensors, not of small ones alone")
    parser.add_argument(
        "--repair", type=Path, metavar="OUT", help="write a copy with all fixes that are certain; FILE stays as it is"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT where it is there already")
    parser.add_argument("--json", type=Path, metavar="REPORT", help="write a machine-readable report")
    parser.set_defaults(handler=handle)


def handle(args: argparse.Namespace, report: dict[str, Any]) -> int:
    from ..quantizers.files.doctor import Severity, diagnose

    if args.json is not None:
        require_file(args.json, "--json")
    if args.repair is not None:
        require_writable(args.repair.parent, "--repair")
    found = diagnose(args.file, args.deep)
    report |= {"diagnosis": found.to_dict()}
    print(found)
    if args.repair is not None:
        if found.edit is None:
            why = "no fault has a certain fix" if found.findings else "nothing is wrong"
            print(f"{args.repair}: not written: {why}.")
        else:
            from ..quantizers.files.repair import repair

            done = repair(args.file, args.repair, args.overwrite, args.deep, found)
            report |= {"repair": done.to_dict()}
            print(done)
            found = done.after
    return ERRORS_FOUND if found.worst is Severity.ERROR else OK
