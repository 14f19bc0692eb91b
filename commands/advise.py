"""`quantwire advise FILE`: which format for this model on this device, ranked."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..quantizers.compat.modes import HostName
from ..quantizers.errors import FileError, SpecError
from .paths import add_json, json_to_output, require_file, write_file
from .quiet import quiet_libraries

if TYPE_CHECKING:
    from ..quantizers.auto import DeviceFacts
    from ..quantizers.measure.activations import RunShape
    from ..quantizers.measure.advise import Advice
    from ..quantizers.measure.parts import ModelPart
    from ..quantizers.spec import QuantSpec

OK = 0
LISTED = 12  # without --all
DEFAULT_SIZE = "1024x1024"


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "advise",
        parents=[common],
        help="which format for a model on a device: ranked by fit, measured quality and native products",
        description=(
            "Rank the formats for a model file on this device or another: size, peak, measured quality, whether the "
            "device multiplies natively, and the offload mode in which it fits. Only headers are read. Exit code 0, "
            "whatever fits; 2: a wrong file or option."
        ),
        epilog="Example: quantwire advise flux1-dev.safetensors --device cuda:8.6 --vram 12GB",
    )
    parser.add_argument("path", type=Path, metavar="FILE", help="diffusion model, checkpoint or text encoder")
    parser.add_argument(
        "--vram", metavar="SIZE", help="memory of the device: 6, 8, 12, 16, 24 or any GB (default: this machine's)"
    )
    parser.add_argument(
        "--device", metavar="KIND",
        help="cuda:8.6 (with the compute capability), rocm, xpu, mps or cpu (default: this machine's)",
    )  # fmt: skip
    parser.add_argument("--tiers", action="store_true", help="also what is best with 6, 8, 12, 16 and 24 GB")
    parser.add_argument("--budget", metavar="SIZE", help="most that the weights may take, such as 6.5GB")
    parser.add_argument(
        "--host", choices=[h.value for h in HostName], default=HostName.COMFYUI.value,
        help="whose products and offload modes: comfyui (default) or standalone (quantwire run)",
    )  # fmt: skip
    parser.add_argument("--formats", nargs="+", metavar="FORMAT", help="choose among these (default: all)")
    parser.add_argument(
        "--text-encoder", type=Path, action="append", default=[], metavar="FILE",
        help="a text encoder that runs with it; without any, those usual for the model are assumed",
    )  # fmt: skip
    parser.add_argument("--vae", type=Path, metavar="FILE", help="the VAE; without it the usual one is assumed")
    parser.add_argument("--text-format", metavar="FORMAT", help="format of the text encoders beside it")
    parser.add_argument("--resolution", metavar="WxH", default=DEFAULT_SIZE, help=f"default: {DEFAULT_SIZE}")
    parser.add_argument("--frames", type=_count, default=1, metavar="N", help="frames of a video (default: 1)")
    parser.add_argument("--batch", type=_count, default=1, metavar="N", help="images at once (default: 1)")
    parser.add_argument(
        "--cfg", type=float, metavar="X", help="of the sampler; above 1 ComfyUI may run both prompts in one batch "
        "(default: what the model's family is usually sampled with)",
    )  # fmt: skip
    parser.add_argument("--all", action="store_true", help=f"list every format, not the best {LISTED}")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw size against quality")
    add_json(parser)
    parser.set_defaults(handler=handle)


def handle(args: argparse.Namespace, report: dict[str, Any]) -> int:
    to_output = json_to_output(args)
    if args.plot is not None:
        require_file(args.plot, "--plot")
    with quiet_libraries(args.debug):
        advice = _advice(args)
    data: dict[str, Any] = {"path": str(args.path), **advice.to_dict()}
    if args.plot is not None:
        from ..quantizers.measure.advise_plot import scatter
        from ..quantizers.measure.plots import to_png

        write_file(args.plot, to_png(scatter(advice)), "--plot")
        data["plot"] = str(args.plot)
    if to_output:
        print(json.dumps(data, indent=2, allow_nan=False))
        return OK
    report |= data
    print(advice.text(0 if args.all else LISTED))
    if args.plot is not None:
        print(args.plot)
    return OK


def _advice(args: argparse.Namespace) -> Advice:
    from ..hosts.fit import refusal
    from ..quantizers.measure.advise import advise
    from ..quantizers.measure.parts import Role
    from ..quantizers.measure.units import parse_size
    from ..quantizers.spec import QuantSpec

    parts, role = _parts(args)
    if why := refusal(args.host, parts):
        raise SpecError(f"--host standalone: {why}\nTake --host comfyui.")
    device, shape = _device(args), _shape(args, next((p.family for p in parts if p.role is Role.DIFFUSION), ""))
    beside: dict[str, QuantSpec] = {}
    if args.text_format is not None:
        if role is Role.TEXT:
            raise SpecError("--text-format is for encoders beside a diffusion model, and this file is an encoder.")
        beside = _beside(parts, QuantSpec.from_uri(args.text_format))
    return advise(
        parts,
        device,
        HostName(args.host),
        shape,
        role=role,
        formats=args.formats,
        beside=beside,
        budget=parse_size(args.budget, "GB") if args.budget is not None else 0,
        tiers=args.tiers,
        progress=_progress,
    )


def _parts(args: argparse.Namespace) -> tuple[list[ModelPart], Any]:
    """The parts of the file and those given beside it, which replace the file's own; and the role to advise on."""
    from ..quantizers.measure.parts import Role, parts_of_file

    paths = (args.path, *args.text_encoder, *([args.vae] if args.vae else []))
    for path in paths:
        if not path.exists():
            raise FileError(f"'{path}' is not there.")
    if args.path.suffix == ".json" and not args.path.name.endswith(".index.json"):
        raise FileError(
            f"'{args.path.name}' is no model file.\nGive that of the model; `quantwire forecast` takes workflows."
        )
    parts = list(parts_of_file(args.path))
    roles = {p.role for p in parts}
    role = next((r for r in (Role.DIFFUSION, Role.TEXT) if r in roles), None)
    if role is None:
        held = ", ".join(p.role.value for p in parts)
        raise FileError(f"'{args.path.name}' holds a {held}, no diffusion model or text encoder.\nGive one of those.")
    for kind, given in ((Role.TEXT, args.text_encoder), (Role.VAE, [args.vae] if args.vae else [])):
        if not given or kind is role:
            continue
        found = [p for path in given for p in parts_of_file(path) if p.role is kind]
        if not found:
            raise FileError(f"'{given[0].name}' holds no {kind.value}.")
        parts = [p for p in parts if p.role is not kind] + found
    return parts, role


def _beside(parts: Sequence[ModelPart], spec: QuantSpec) -> dict[str, QuantSpec]:
    """The format for every text encoder, assumed ones too."""
    from ..quantizers.measure.assumed import with_assumed
    from ..quantizers.measure.parts import Role

    return {p.name: spec for p in with_assumed(parts)[0] if p.role is Role.TEXT}


def _device(args: argparse.Namespace) -> DeviceFacts:
    from ..quantizers.measure.native import parse_device
    from ..quantizers.measure.tiers import TIERS, with_memory
    from ..quantizers.measure.units import parse_vram

    if args.device is not None:
        device = parse_device(args.device, TIERS[-1].nbytes)
        if args.vram is None and not args.tiers:
            raise SpecError("--device is a device that is not this one.\nGive its memory too: --vram 8GB, or --tiers.")
    else:
        from ..hosts.standalone.offload.device import execution_device
        from ..quantizers.memory import device_facts

        device = device_facts(execution_device())
    if args.vram is None:
        return device if args.device is None else with_memory(device, str(TIERS[-1]))
    parse_vram(args.vram)  # the presets are no way to write it here
    return with_memory(device, args.vram)


def _shape(args: argparse.Namespace, family: str) -> RunShape:
    from ..quantizers.measure.activations import RunShape
    from ..quantizers.measure.usual import usual_cfg
    from .forecast import parse_resolution

    width, height = parse_resolution(args.resolution)
    return RunShape(width, height, args.frames, args.batch, cfg=usual_cfg(family) if args.cfg is None else args.cfg)


def _progress(formats: Sequence[str]) -> Iterable[str]:
    from tqdm import tqdm

    return tqdm(formats, desc="formats", file=sys.stderr, leave=False)


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"'{text}' is no number of at least 1")
    return int(text)
