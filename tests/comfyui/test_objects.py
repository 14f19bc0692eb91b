"""`components_of` on the real objects of ComfyUI: a process of its own imports it, without a server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The module needs torch and nothing of the pack, whose own dependencies the host's Python may lack.
CODE = """
import importlib.util, json, sys
root, tree = sys.argv[1:3]
sys.path.insert(0, tree)
sys.argv = ["main.py", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import comfy.controlnet, comfy.sd, comfy.sd1_clip, comfy.utils, torch
spec = importlib.util.spec_from_file_location("objects", root + "/hosts/objects.py")
objects = importlib.util.module_from_spec(spec)
spec.loader.exec_module(objects)


class Target:
    clip, tokenizer, params = comfy.sd1_clip.SD1ClipModel, comfy.sd1_clip.SD1Tokenizer, {}


model = comfy.sd.load_diffusion_model(root + "/demo/models/diffusion_models/digits_flux.safetensors")
vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(root + "/demo/models/vae/digits_tae.safetensors"))
clip = comfy.sd.CLIP(Target, embedding_directory=None)
control = comfy.controlnet.ControlNet(torch.nn.Linear(2, 2), load_device=torch.device("cpu"))
wanted = {
    "model": (model, model.model.diffusion_model),
    "clone": (model.clone(), model.model.diffusion_model),
    "vae": (vae, vae.first_stage_model),
    "clip": (clip, clip.cond_stage_model.clip_l),
    "control": (control, control.control_model),
    "wrapped": ({"pipe": {"model": model}}, model.model.diffusion_model),
}
found = {name: objects.components_of(obj) for name, (obj, _) in wanted.items()}
same = {name: list(found[name].values()) == [module] for name, (_, module) in wanted.items()}
print("RESULT", json.dumps([{name: list(parts) for name, parts in found.items()}, same]))
"""


def test_components_of_models_clips_decoders_and_controlnets() -> None:
    tree = os.environ.get("COMFYUI_PATH")
    if not tree:
        pytest.skip("COMFYUI_PATH does not name a ComfyUI tree")
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    done = subprocess.run([python, "-c", CODE, str(ROOT), tree], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    names, same = json.loads(line.removeprefix("RESULT "))
    assert names == {
        "model": ["diffusion_model"],
        "clone": ["diffusion_model"],
        "vae": ["vae"],
        "clip": ["clip_l"],
        "control": ["control_model"],
        "wrapped": ["diffusion_model"],
    }
    assert all(same.values()), same
