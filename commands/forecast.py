"""`quantwire forecast FILE|WORKFLOW`: whether a generation fits a device's memory, under which offload mode."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..quantizers.compat.modes import Carrier, HostName
from ..quantizers.errors import FileError, SpecError
from .paths import add_json, json_to_output, require_file, write_file

if TYPE_CHECKING:
    from ..hosts.forecast import Asked
    from ..quantizers.auto import DeviceFacts
    from ..quantizers.measure.activations import RunShape
    from ..quantizers.measure.forecast import Forecast
    from ..quantizers.measure.parts import ModelPart
    from ..quantizers.spec import QuantSpec

OK = 0
DEFAULT_SIZE = "1024x1024"


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "forecast",
        parents=[common],
        help="whether a model, format and image size fit a device's memory, and in which offload mode",
        description=(
            "Say what a generation takes of a device's memory: weights (exact), unpacked layers, LoRAs and activations "
            "(measured, with their error) for text encoding, sampling and decoding, under each offload mode. Only "
            "headers are read. PATH is a model file, the index of several, a folder, or a workflow in the editor's or "
            "API form, whose files, formats and sizes count; options override them. Exit code 0, whatever the verdict; "
            "2: a wrong file or option."
        ),
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="model file or workflow")
    parser.add_argument("--format", metavar="FORMAT", help="format of the diffusion model: an id or a URI")
    parser.add_argument("--text-format", metavar="FORMAT", help="format of the text encoders, assumed ones too")
    parser.add_argument(
        "--rules", type=Path, metavar="FILE", help="formats of single layers, a line each: PATTERN = FORMAT or keep"
    )
    parser.add_argument(
        "--text-encoder", type=Path, action="append", default=[], metavar="FILE",
        help="a text encoder that runs with it; without any, those usual for the model are assumed",
    )  # fmt: skip
    parser.add_argument("--vae", type=Path, metavar="FILE", help="the VAE; without it the usual one is assumed")
    parser.add_argument("--lora", type=Path, action="append", default=[], metavar="FILE", help="a LoRA on the model")
    parser.add_argument("--no-assumed", action="store_true", help="count only what is given")
    parser.add_argument(
        "--resolution", metavar="WxH", help=f"size of the image (default: the workflow's, else {DEFAULT_SIZE})"
    )
    parser.add_argument("--frames", type=_count, metavar="N", help="frames of a video (default: 1)")
    parser.add_argument("--batch", type=_count, metavar="N", help="images at once (default: 1)")
    parser.add_argument("--text-tokens", type=_count, metavar="N", help="length of the prompt (default: the model's)")
    parser.add_argument(
        "--cfg", type=float, metavar="X", help="guidance by a negative prompt; above 1 ComfyUI runs both in one batch"
    )
    parser.add_argument("--vram", metavar="SIZE", help="memory of the device, such as 8GB (default: this machine's)")
    parser.add_argument("--device", metavar="KIND", help="with --vram: cuda (default), cuda:8.6, rocm, xpu, mps or cpu")
    parser.add_argument(
        "--host", choices=[h.value for h in HostName],
        help="whose offload modes: standalone (quantwire run) or comfyui (default: as the workflow needs, else both)",
    )  # fmt: skip
    parser.add_argument(
        "--carrier", choices=[c.value for c in Carrier],
        help="what holds the quantized weights (default: the workflow's, else quantwire)",
    )  # fmt: skip
    parser.add_argument("--models", type=Path, action="append", metavar="DIR", help="model folder of a workflow")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw it as bars; several as FILE-2.png, ...")
    add_json(parser)
    parser.set_defaults(handler=handle)


def handle(args: argparse.Namespace, report: dict[str, Any]) -> int:
    to_output = json_to_output(args)
    if args.plot is not None:
        require_file(args.plot, "--plot")
    found = forecasts(args)
    data = {"path": str(args.path), "forecasts": [{"node": title or None, **f.to_dict()} for title, f in found]}
    if args.plot is not None:
        data["plots"] = [str(p) for p in _draw(args.plot, [f for _, f in found])]
    if to_output:
        print(json.dumps(data, indent=2))
        return OK
    report |= data
    for index, (title, each) in enumerate(found):
        several = f"{title or args.path.name}, " if title or len(found) > 1 else ""
        print(f"{chr(10) if index else ''}{several}{_where(each)}")
        print(each)
    for plot in data.get("plots", []):
        print(plot)
    return OK


def forecasts(args: argparse.Namespace) -> list[tuple[str, Forecast]]:
    """(title of the node or empty, forecast) for each model of a workflow, or each host of a file."""
    from ..hosts.forecast import is_workflow

    _check_files(args)
    device = _device(args)
    return _of_workflow(args, device) if is_workflow(args.path) else _of_file(args, device)


def _of_file(args: argparse.Namespace, device: DeviceFacts) -> list[tuple[str, Forecast]]:
    from ..quantizers.measure.parts import parts_of_file

    parts = _with_given(args, list(parts_of_file(args.path)))
    hosts = [HostName(args.host)] if args.host else list(HostName)
    shape = _shape(args, None)
    carrier = Carrier(args.carrier or Carrier.QUANTWIRE.value)
    return [("", _forecast(args, parts, {}, shape, device, host, 0, carrier, ())) for host in hosts]


def _of_workflow(args: argparse.Namespace, device: DeviceFacts) -> list[tuple[str, Forecast]]:
    from ..hosts.forecast import read_workflow
    from ..nodes import NODE_CLASS_MAPPINGS

    host = HostName(args.host) if args.host else None
    asked = read_workflow(args.path, NODE_CLASS_MAPPINGS, device, args.models or (), host)
    return [(each.title, _of_asked(args, each, device)) for each in asked]


def _of_asked(args: argparse.Namespace, asked: Asked, device: DeviceFacts) -> Forecast:
    if asked.shape is None and args.resolution is None:
        raise SpecError(f"{asked.title}: the workflow does not tell the size of the image.\nGive --resolution.")
    parts = _with_given(args, list(asked.parts))
    names = {p.name for p in parts}
    specs = {name: spec for name, spec in asked.specs.items() if name in names}
    notes = list(asked.notes)
    if asked.mode is not None:
        notes.append(f"the workflow sets mode {asked.mode.value} through OffloadCompat")
    carrier = Carrier(args.carrier) if args.carrier else asked.carrier
    shape = _shape(args, asked.shape)
    return _forecast(args, parts, specs, shape, device, asked.host, asked.loras_nbytes, carrier, notes)


def _forecast(
    args: argparse.Namespace,
    parts: list[ModelPart],
    specs: dict[str, QuantSpec],
    shape: RunShape,
    device: DeviceFacts,
    host: HostName,
    loras_nbytes: int,
    carrier: Carrier,
    notes: Any,
) -> Forecast:
    from ..quantizers.measure.assumed import with_assumed
    from ..quantizers.measure.forecast import forecast
    from ..quantizers.measure.parts import Role

    counted = parts if args.no_assumed else with_assumed(parts)[0]
    for part in counted:
        spec = _spec(args, part.role is Role.TEXT) if part.role in (Role.DIFFUSION, Role.TEXT) else None
        if spec is not None:
            specs = {**specs, part.name: spec}
    found = forecast(
        *(parts, specs, shape, device, host, loras_nbytes),
        carrier=carrier,
        assume=not args.no_assumed,
        notes=notes,
    )
    return found


def _spec(args: argparse.Namespace, text: bool) -> QuantSpec | None:
    from dataclasses import replace

    from ..quantizers.rules import parse_rules
    from ..quantizers.spec import QuantSpec

    asked = args.text_format if text else args.format
    if asked is None:
        if args.rules is not None and not text:
            raise SpecError("--rules are formats of single layers.\nGive --format, the format of all others.")
        return None
    spec = QuantSpec.from_uri(asked)
    if args.rules is None or text:
        return spec
    try:
        return replace(spec, rules=(*spec.rules, *parse_rules(args.rules.read_text(encoding="utf-8"))))
    except (OSError, UnicodeDecodeError) as err:
        raise FileError(f"--rules: {args.rules} cannot be read: {err}.") from err


def _with_given(args: argparse.Namespace, parts: list[ModelPart]) -> list[ModelPart]:
    """The parts with those of the command line in the place of others of their role."""
    from ..quantizers.measure.parts import Role, parts_of_file

    given = {Role.TEXT: args.text_encoder, Role.VAE: [args.vae] if args.vae else [], Role.LORA: args.lora}
    for role, paths in given.items():
        found = [p for path in paths for p in parts_of_file(path)]
        wrong = [p for p in found if p.role is not role]
        if wrong and len(wrong) == len(found):
            raise FileError(f"{wrong[0].source}: holds a {wrong[0].role.value}, not a {role.value}.")
        if found and role is not Role.LORA:
            parts = [p for p in parts if p.role is not role]
        parts += [p for p in found if p.role is role]
    return parts


def _shape(args: argparse.Namespace, found: RunShape | None) -> RunShape:
    from dataclasses import replace

    from ..quantizers.measure.activations import RunShape

    shape = found or RunShape()
    if args.resolution is not None or found is None:
        width, height = parse_resolution(args.resolution or DEFAULT_SIZE)
        shape = replace(shape, width=width, height=height)
    given = {"frames": args.frames, "batch": args.batch, "text_tokens": args.text_tokens, "cfg": args.cfg}
    return replace(shape, **{name: value for name, value in given.items() if value is not None})


def parse_resolution(text: str) -> tuple[int, int]:
    """Width and height of `1024x768`, or `1024` for a square.

    Raises:
        SpecError: no such size.
    """
    match = re.fullmatch(r"\s*(\d{1,6})(?:\s*[xX*]\s*(\d{1,6}))?\s*", text)
    sizes = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if min(sizes) < 8:
        raise SpecError(f"--resolution: '{text}' is no size of an image.\nWrite width and height: 1024x768.")
    return sizes


def _device(args: argparse.Namespace) -> DeviceFacts:
    from ..quantizers.measure.units import parse_vram

    if args.vram is None:
        if args.device is not None:
            raise SpecError("--device is a device that is not this one.\nGive its memory too: --vram 8GB.")
        from ..hosts.standalone.offload.device import execution_device
        from ..quantizers.memory import device_facts

        return device_facts(execution_device())
    nbytes = parse_vram(args.vram)
    if args.device in (None, "cuda"):
        from ..quantizers.auto import DeviceFacts

        return DeviceFacts("cuda", "a CUDA device", nbytes, nbytes)
    from ..quantizers.measure.native import parse_device

    return parse_device(args.device, nbytes)


def _check_files(args: argparse.Namespace) -> None:
    for path in (args.path, *args.text_encoder, *args.lora, *([args.vae] if args.vae else [])):
        if not path.exists():
            raise FileError(f"'{path}' is not there.")
    for folder in args.models or []:
        if not folder.is_dir():
            raise FileError(f"--models: '{folder}' is not a folder.")


def _where(found: Forecast) -> str:
    s, names = found.shape, {HostName.STANDALONE: "quantwire run", HostName.COMFYUI: "ComfyUI"}
    frames = f", {s.frames} frames" if s.frames > 1 else ""
    batch = f", batch {s.batch}" if s.batch > 1 else ""
    return f"{names[found.host]} on {found.device.name}, {s.width} x {s.height}{frames}{batch}:"


def _draw(path: Path, found: list[Forecast]) -> list[Path]:
    from ..quantizers.measure.forecast_bars import bars
    from ..quantizers.measure.plots import to_png

    paths: list[Path] = []
    for index, each in enumerate(found):
        name = path if index == 0 else path.with_name(f"{path.stem}-{index + 1}{path.suffix}")
        write_file(name, to_png(bars(each)), "--plot")
        paths.append(name)
    return paths


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"'{text}' is no number of at least 1")
    return int(text)
