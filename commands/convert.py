"""`quantwire convert IN OUT --type TYPE`: model files into GGUF, into quantized safetensors, and back."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import time
from pathlib import Path
from typing import Any

from ..quantizers.errors import FileError
from .paths import require_file, require_writable

OK = 0
PERIOD_S = 30.0


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "convert",
        parents=[common],
        help="convert a model file to GGUF, to quantized safetensors of any format, or back",
        description=(
            "Convert a model file. IN is a safetensors file, a *.safetensors.index.json, a folder of diffusers, or a "
            ".gguf file; OUT ends in .gguf or .safetensors, or is a folder, which gets diffusers' layout. An "
            "interrupted conversion continues when it is run again."
        ),
    )
    parser.add_argument("source", type=Path, metavar="IN")
    parser.add_argument("target", type=Path, metavar="OUT")
    parser.add_argument(
        "--type", required=True, metavar="TYPE",
        help="GGUF: Q4_K_M, Q8_0, IQ4_XS, BF16, ... or gguf-q4-k for one type without upgrades; "
        "safetensors: F32, F16, BF16, or any format or URI, such as comfy-nvfp4, bnb-nf4, 'quanto;weights=qint4'",
    )  # fmt: skip
    parser.add_argument(
        "--layout", default="", metavar="LAYOUT",
        help="how quantized layers are laid out in safetensors: comfy, comfy-metadata, scaled-fp8, bnb, quanto, sdnq, "
        "torchao, plain-fp8 or quantwire; default: the usual one of the format",
    )  # fmt: skip
    parser.add_argument(
        "--shard-size", type=_nbytes, default=0, metavar="SIZE",
        help="write several safetensors files of at most SIZE (such as 5GB) with an index beside them",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="show what every group of tensors becomes, and the size")
    parser.add_argument(
        "--rules", type=Path, metavar="FILE", help="types of single layers, a line each: PATTERN = TYPE"
    )
    parser.add_argument(
        "--keep", action="append", default=[], metavar="PATTERN", help="layers to keep at full precision; repeatable"
    )
    parser.add_argument("--imatrix", type=Path, metavar="FILE", help="importance matrix of llama.cpp or of this pack")
    parser.add_argument(
        "--scales", type=Path, metavar="FILE",
        help="calibration of `quantwire calibrate`, for the input_scale of comfy-fp8-* and comfy-nvfp4",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace OUT where it is there already")
    parser.add_argument(
        "--resume", action="store_true",
        help="refuse where there is no interrupted conversion to continue; without it, one is continued or begun",
    )  # fmt: skip
    parser.add_argument("--restart", action="store_true", help="start over where another conversion was interrupted")
    parser.add_argument("--threads", type=int, metavar="N", help="default: one for each core")
    parser.add_argument("--arch", default="", metavar="NAME", help="general.architecture, in place of the detected one")
    parser.add_argument("--measure", action="store_true", help="measure every value's error, not one row in 16")
    parser.add_argument(
        "--no-verify", action="store_true",
        help="do not read quantized safetensors files again before they take their names",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="REPORT", help="write a machine-readable report")
    parser.set_defaults(handler=handle)


def handle(args: argparse.Namespace, report: dict[str, Any]) -> int:
    from ..quantizers.files.convert_plan import Request
    from ..quantizers.files.converting import convert, describe
    from ..quantizers.rules import parse_rules

    if args.threads is not None and args.threads < 1:
        raise FileError(f"--threads: {args.threads} is not a number of threads.\nLeave it out for one for each core.")
    if args.resume and args.restart:
        raise FileError("--resume and --restart: one continues and the other begins anew.\nGive one of them.")
    if not args.dry_run:
        require_writable(args.target.parent, "OUT")
    if args.json is not None:
        require_file(args.json, "--json")
    rules = parse_rules(_read(args.rules)) if args.rules is not None else ()
    request = Request(
        args.source, args.target, args.type, rules, tuple(args.keep), (), args.imatrix, args.arch, args.overwrite,
        args.threads or 0, args.measure, args.restart, args.resume, args.layout, args.shard_size, not args.no_verify,
        scales=args.scales,
    )  # fmt: skip
    if args.dry_run:
        plan = describe(request)
        report |= {"plan": plan.to_dict()}
        print(plan)
        return OK
    from tqdm import tqdm

    def bar(total: int) -> Any:
        if not sys.stderr.isatty():
            return contextlib.nullcontext(Lines(total))
        return tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024)

    done = convert(request, bar)
    report |= {"report": done.to_dict()}
    print(done)
    return OK


def _nbytes(text: str) -> int:
    """Bytes of a size: `5GB`, `500MiB`, `1.5G`, or a plain number.

    Raises:
        ArgumentTypeError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if match is None or not float(match[1]):
        raise argparse.ArgumentTypeError(f"'{text}' is no size such as 5GB or 500MiB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))


class Lines:
    """Progress where standard error is no terminal: a line now and then.

    Args:
        total: bytes of the work.
    """

    def __init__(self, total: int) -> None:
        self._total, self._done = max(total, 1), 0
        self._began = self._said = time.monotonic()

    def update(self, n: int, /) -> None:
        self._done += n
        now = time.monotonic()
        if now - self._said >= PERIOD_S:
            self._said = now
            done, total = self._done / 2**20, self._total / 2**20
            text = f"{self._done / self._total:.0%}: {done:.0f} of {total:.0f} MiB after {now - self._began:.0f} s"
            print(text, file=sys.stderr, flush=True)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as err:
        raise FileError(f"--rules: {path} cannot be read: {err.strerror}.") from err
    except UnicodeDecodeError as err:
        raise FileError(f"--rules: {path} is not a text file.") from err
