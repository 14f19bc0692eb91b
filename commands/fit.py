"""`quantwire fit FILE --vram 8GB`: what to use so that a model runs in so much memory, and why."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..quantizers.errors import FileError, SpecError
from .paths import add_json, json_to_output, require_file, write_json

if TYPE_CHECKING:
    from ..quantizers.measure.activations import RunShape
    from ..quantizers.measure.parts import ModelPart
    from ..quantizers.measure.sensitivity import Sensitivities

OK = 0
COLUMNS = 118
HOSTS = ("comfyui", "standalone")
DEVICE = "cuda:8.6"  # where --vram says how much: what most people with 6 to 24 GB have


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add `quantwire fit`."""
    parser = commands.add_parser(
        "fit",
        parents=[common],
        help="what to use so that a model fits a GPU: format, offload mode, text encoder",
        description=(
            "Choose the format, the offload mode and the formats of the text encoders with which a model runs in so "
            "much memory at the least loss of quality, and say why; only headers are read. Full precision where it "
            "fits; of formats that measure alike the one that the device multiplies natively; below 4 bits only where "
            "nothing else fits. The node Fit Model does the same in a graph. Text encoders and VAE that are not given "
            "count at the sizes of the family's usual ones. Exit code 2: nothing fits."
        ),
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="a diffusion model: safetensors, GGUF, index or folder")
    parser.add_argument("--vram", required=True, metavar="SIZE", help="memory of the device, such as 8GB")
    parser.add_argument(
        "--text-encoder", type=Path, action="append", default=[], metavar="FILE", help="may be repeated"
    )
    parser.add_argument("--vae", type=Path, metavar="FILE", help="the VAE")
    parser.add_argument("--lora", type=Path, action="append", default=[], metavar="FILE", help="may be repeated")
    parser.add_argument(
        "--device", default=DEVICE, metavar="DEVICE",
        help=f"cuda:8.6 (with the compute capability), rocm, xpu, mps or cpu (default: {DEVICE})",
    )  # fmt: skip
    parser.add_argument("--resolution", default="1024x1024", metavar="WxH", help="of the images (default: 1024x1024)")
    parser.add_argument("--frames", type=int, default=1, metavar="N", help="of a video (default: 1)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images at once (default: 1)")
    parser.add_argument(
        "--cfg", type=float, metavar="X",
        help="of the sampler; above 1 ComfyUI may run both prompts in one batch, which takes more memory (default: "
        "what the model's family is usually sampled with, which the first line says)",
    )  # fmt: skip
    parser.add_argument(
        "--prefer", choices=("balanced", "quality"), default="balanced",
        help="balanced: give up quality, down to 4 bits, before weights are copied to the device at every step; "
        "quality: the other way round",
    )  # fmt: skip
    parser.add_argument(
        "--mixed", action="store_true",
        help="try a mixture of formats too, by the errors of the weights; reads the file, which takes minutes if it is "
        "large",
    )  # fmt: skip
    parser.add_argument(
        "--host",
        choices=(*HOSTS, "both"),
        default="both",
        help="whose modes (default: those that open the model; `quantwire run` opens FLUX only)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="WORKFLOW.json",
        help="write a workflow with Fit Model that does it; takes --text-encoder and --vae",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace WORKFLOW.json")
    add_json(parser)
    parser.set_defaults(handler=handle)


def handle(args: argparse.Namespace, report: dict[str, Any]) -> int:
    """Choose for each host, print, and write what was asked for.

    Raises:
        QuantwireError: an argument, a file, or nothing fits.
    """
    from ..hosts.fit import refusal
    from ..quantizers.compat.modes import HostName
    from ..quantizers.measure.fit import Prefer
    from ..quantizers.measure.fitted import fit
    from ..quantizers.measure.native import parse_device
    from ..quantizers.measure.parts import Role
    from ..quantizers.measure.units import parse_vram

    to_output = json_to_output(args)
    vram = parse_vram(args.vram)
    _shape(args, "")  # what is wrong with it is told before files are read
    device = parse_device(args.device, vram)
    parts = _parts(args)
    family = next((p.family for p in parts if p.role is Role.DIFFUSION), "")
    shape = _shape(args, family)
    graph = _graph(args, family, vram, shape)
    refused = refusal("standalone", parts)
    if args.host == "standalone" and refused:
        raise SpecError(f"--host standalone: {refused}\nTake --host comfyui.")
    hosts = [h for h in (HOSTS if args.host == "both" else (args.host,)) if not refusal(h, parts)]
    loras = sum(p.held_nbytes for p in parts if p.role is Role.LORA)
    parts = [p for p in parts if p.role is not Role.LORA]
    measure = _sensitivities(args) if args.mixed else None
    found = {
        h: fit(parts, device, HostName(h), shape, Prefer(args.prefer), loras_nbytes=loras, sensitivities=measure)
        for h in hosts
    }
    left_out = {"standalone": refused} if refused and args.host == "both" else {}
    facts = {"vram_nbytes": vram, "hosts": {n: f.to_dict() for n, f in found.items()}, "left_out": left_out}
    if to_output:
        print(json.dumps(facts, indent=2, allow_nan=False))
    else:
        report |= facts
        said = [f"{_TITLES[name]}\n{f}" for name, f in found.items()]
        print("\n\n".join([*said, *(textwrap.fill(why, COLUMNS) for why in left_out.values())]))
    if graph is not None:
        write_json(args.out, graph, "--out")
        if not to_output:
            runs = "" if refused else f" and `quantwire run {args.out}` runs it"
            print(f"\n{args.out}: a workflow with Fit Model; ComfyUI opens it{runs}.")
    return OK


_TITLES = {"comfyui": "In ComfyUI", "standalone": "With `quantwire run`"}


def _parts(args: argparse.Namespace) -> list[ModelPart]:
    """The components of all files; those of a checkpoint with everything in it count too."""
    from ..quantizers.measure.parts import Role, parts_of_file

    found: list[ModelPart] = []
    wanted: Sequence[tuple[str, Path, Role]] = (
        *(("--text-encoder", path, Role.TEXT) for path in args.text_encoder),
        *(("--vae", path, Role.VAE) for path in ([args.vae] if args.vae else [])),
        *(("--lora", path, Role.LORA) for path in args.lora),
    )
    found += _unique(parts_of_file(args.file), found)
    if all(p.role is Role.LORA for p in found):
        raise FileError(
            f"{args.file.name} is a LoRA, which runs on a model.\nGive the model's file, and this one with --lora."
        )
    for option, path, role in wanted:
        parts = [p for p in parts_of_file(path) if p.role is role]
        if not parts:
            held = f"`quantwire inspect {path}` tells what it holds."
            raise FileError(f"{option}: {path.name} holds no {role.value}.\n{held}")
        found += _unique(parts, found)
    return found


def _sensitivities(args: argparse.Namespace) -> Callable[[ModelPart, str], Sensitivities]:
    """Measures the layers of the file in the usual formats of recipes and one more, once for each such format."""
    import functools

    from tqdm import tqdm

    from ..quantizers.files.stream import TensorFile
    from ..quantizers.measure.sensitivity import by_weights, check_formats

    found: dict[str, Sensitivities] = {}

    def measure(part: ModelPart, format_id: str) -> Sensitivities:
        if format_id not in found:
            formats = dict.fromkeys((*check_formats(None), format_id))
            bar = functools.partial(tqdm, desc="layers", file=sys.stderr, leave=False)
            found[format_id] = by_weights(part, TensorFile(args.file).read, formats, bar)
        return found[format_id]

    return measure


def _unique(parts: Sequence[ModelPart], taken: Sequence[ModelPart]) -> list[ModelPart]:
    """Files of one name in two folders are two parts."""
    from dataclasses import replace

    names = {p.name for p in taken}
    made: list[ModelPart] = []
    for part in parts:
        name, number = part.name, 2
        while name in names:
            name, number = f"{part.name} {number}", number + 1
        names.add(name)
        made.append(replace(part, name=name))
    return made


def _shape(args: argparse.Namespace, family: str) -> RunShape:
    from ..quantizers.measure.activations import RunShape
    from ..quantizers.measure.usual import usual_cfg
    from .forecast import parse_resolution

    cfg = usual_cfg(family) if args.cfg is None else args.cfg
    return RunShape(*parse_resolution(args.resolution), args.frames, args.batch, cfg=cfg)


def _graph(args: argparse.Namespace, family: str, vram: int, shape: RunShape) -> dict[str, Any] | None:
    """The workflow of --out, made before anything else so that what it lacks is said first."""
    from .fit_graph import workflow

    if args.out is None:
        return None
    if args.out.suffix.lower() != ".json":
        raise FileError(f"--out: '{args.out}' is no .json file.\nWorkflows are JSON files; name it so.")
    require_file(args.out, "--out")
    if args.out.exists() and not args.overwrite:
        raise FileError(f"--out: {args.out} is there already.\n--overwrite replaces it; or give another name.")
    if not args.text_encoder or args.vae is None:
        raise SpecError(
            "--out writes a whole workflow, which needs the text encoders and the VAE.\n"
            "Name them with --text-encoder (once for each) and --vae."
        )
    return workflow(family, args.file, args.text_encoder, args.vae, vram, shape, args.prefer, args.mixed)
