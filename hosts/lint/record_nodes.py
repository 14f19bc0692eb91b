"""Write `core_nodes.txt` from a running ComfyUI: ids, inputs with their ranges and choices, and outputs.

    python -m quantwire.hosts.lint.record_nodes mark DIR
    python main.py --cpu --base-directory DIR --port 8390           (in ComfyUI's folder)
    python -m quantwire.hosts.lint.record_nodes write http://127.0.0.1:8390 VERSION

`mark` puts one empty file into each model folder, named after it, so that the lists of choices tell which folder they
are read from. Lists of fewer than two choices are left out: they depend on the machine.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

from .catalog import CORE, REPLACED, NodeType, ask_server, to_line

FOLDERS = (
    *("checkpoints", "configs", "loras", "vae", "text_encoders", "diffusion_models", "clip_vision", "style_models"),
    *("embeddings", "diffusers", "vae_approx", "controlnet", "gligen", "upscale_models", "latent_upscale_models"),
    *("hypernetworks", "photomaker", "classifiers", "model_patches", "audio_encoders", "background_removal"),
    *("frame_interpolation", "geometry_estimation", "optical_flow", "detection"),
)
SERVICES = "comfy_api_nodes"  # three quarters of all text, and nothing in them is a model
MARK = "quantwire-lint-"
HEAD = (
    "# Nodes of ComfyUI {version}, by record_nodes.py. ! marks output nodes. name:TYPE of each input (? optional,\n"
    "# + control_after_generate follows, @ a model folder, ! a widget of a type that has none, or none where the type\n"
    "# has one, = range or choices), and behind > the types of the outputs. Of nodes that ask services: the id.\n"
)


def mark(folder: Path) -> None:
    for name in FOLDERS:
        (folder / "models" / name).mkdir(parents=True, exist_ok=True)
        for suffix in (".safetensors", ".yaml"):
            (folder / "models" / name / f"{MARK}{name}{suffix}").touch()


def write(url: str, version: str) -> None:
    types = {name: _with_folders(node_type) for name, node_type in ask_server(url).items()}
    modules = {k: str(v.get("python_module", "")) for k, v in _asked(f"{url}/object_info").items()}
    own = {k for k, module in modules.items() if _is_core(module)}
    types |= {k: replace(types[k], detailed=False) for k in own if modules[k].startswith(SERVICES)}
    older = {name: t.replaced_by for name, t in types.items() if t.replaced_by in own}
    replaced = {k: v[:1] for k, v in _asked(f"{url}/node_replacements").items() if k in older}
    head = HEAD.format(version=version) + (f"{REPLACED}{json.dumps(replaced)}\n" if replaced else "")
    CORE.write_text(head + "".join(f"{to_line(types[name])}\n" for name in sorted(own)), encoding="utf-8")


def _asked(address: str) -> dict[str, Any]:
    with urllib.request.urlopen(address) as answer:
        return json.load(answer)


def _is_core(module: str) -> bool:
    return not module.startswith("custom_nodes") or module == "custom_nodes.websocket_image_save"  # comes with ComfyUI


def _with_folders(node_type: NodeType) -> NodeType:
    for i in node_type.inputs.values():
        marks = [str(c) for c in i.choices or () if str(c).startswith(MARK)]
        if marks:
            node_type = node_type.with_folder(i.name, marks[0].removeprefix(MARK).rpartition(".")[0])
        if marks or len(i.choices or ()) < 2:
            node_type = node_type.with_choices(i.name, None)
    return node_type


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "mark":
        mark(Path(arguments[0]))
    else:
        write(*arguments)
