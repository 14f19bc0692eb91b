"""Write `core_nodes.txt` from a running ComfyUI: ids, and of nodes that take or give models their inputs and outputs.

    python -m quantwire.hosts.lint.record_nodes mark DIR
    python main.py --cpu --base-directory DIR --port 8390           (in ComfyUI's folder)
    python -m quantwire.hosts.lint.record_nodes write http://127.0.0.1:8390 VERSION

`mark` puts one empty file into each model folder, named after it, so that the lists of choices tell which folder they
are read from.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

from .catalog import CORE, NodeType, from_object_info, to_line

FOLDERS = (
    *("checkpoints", "configs", "loras", "vae", "text_encoders", "diffusion_models", "clip_vision", "style_models"),
    *("embeddings", "diffusers", "vae_approx", "controlnet", "gligen", "upscale_models", "latent_upscale_models"),
    *("hypernetworks", "photomaker", "classifiers", "model_patches", "audio_encoders", "background_removal"),
    *("frame_interpolation", "geometry_estimation", "optical_flow", "detection"),
)
MARK = "quantwire-lint-"
HEAD = (
    "# Node ids of ComfyUI {version}, written by record_nodes.py. ! marks output nodes. Of nodes that take models or\n"
    "# files of them: name:TYPE of each input (? optional, + control_after_generate follows, @ a model folder),\n"
    "# and behind > the types of the outputs.\n"
)


def mark(folder: Path) -> None:
    for name in FOLDERS:
        (folder / "models" / name).mkdir(parents=True, exist_ok=True)
        for suffix in (".safetensors", ".yaml"):
            (folder / "models" / name / f"{MARK}{name}{suffix}").touch()


def write(url: str, version: str) -> None:
    with urllib.request.urlopen(f"{url}/object_info") as answer:
        info: dict[str, Any] = json.load(answer)
    own = {k: v for k, v in info.items() if _is_core(str(v.get("python_module", "")))}
    types = [_with_folders(from_object_info(name, entry)) for name, entry in own.items()]
    CORE.write_text(HEAD.format(version=version) + "".join(f"{to_line(t)}\n" for t in sorted(types, key=_name)))


def _is_core(module: str) -> bool:
    return not module.startswith("custom_nodes") or module == "custom_nodes.websocket_image_save"  # comes with ComfyUI


def _name(node_type: NodeType) -> str:
    return node_type.name


def _with_folders(node_type: NodeType) -> NodeType:
    for i in node_type.inputs.values():
        marks = [str(c) for c in i.choices or () if str(c).startswith(MARK)]
        if marks:
            node_type = node_type.with_folder(i.name, marks[0].removeprefix(MARK).rpartition(".")[0])
    return node_type


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "mark":
        mark(Path(arguments[0]))
    else:
        write(*arguments)
