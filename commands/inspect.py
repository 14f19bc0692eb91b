"""`quantwire inspect PATH`: what a model file holds, from its header alone."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .paths import add_json, json_to_output

OK, BAD_INPUT = 0, 2


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "inspect",
        parents=[common],
        help="what a model file holds: component, quantization, what loads it",
        description=(
            "Say what a model file is, how each of its layers is quantized, what wrote it and what loads it here. Only "
            "headers are read. PATH is a safetensors or GGUF file, a *.safetensors.index.json, or a folder of "
            "diffusers or transformers: one component, or a whole pipeline. Warnings come first. Exit code 2: the file "
            "is damaged; what can still be read of it is shown."
        ),
    )
    parser.add_argument("path", type=Path, metavar="PATH")
    parser.add_argument(
        "--layers", nargs="?", const="*", metavar="PATTERN",
        help="list layers, a line each: all, or those whose names fit a pattern such as '*.img_attn.*'",
    )  # fmt: skip
    add_json(parser)
    parser.set_defaults(handler=handle)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Thousands of small objects that all live on make Python look for garbage, 4 % of the command's time."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def handle(args: argparse.Namespace, report: dict[str, Any]) -> int:
    from ..quantizers.files.inspect import inspect

    to_output = json_to_output(args)
    with _no_collection():
        found = inspect(args.path, args.layers)
    if to_output:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        report |= found.to_dict()
        print(found)
    return BAD_INPUT if found.facts.damage else OK
