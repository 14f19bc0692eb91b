"""Write the demo model in the sizes that ComfyUI's stock loaders expect.

    python demo/export_comfyui.py PATH/TO/ComfyUI [--models DIR]

ComfyUI builds CLIP-L at one size, 768 wide with 12 layers. The demo's text encoder, 128 wide with 2 layers, is embedded
in that exactly: each 128-vector is repeated six times (a layer norm over six copies is the layer norm over one), the
first two of the twelve heads do the work, and the layers that are left add zero. The transformer's two text inputs read
the first copy. Every word of the demo's prompts is one token in CLIP's vocabulary too, so the rows of the embedding
table are moved to CLIP's ids; other words get a row of zeros. Writes 260 MB.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from quantwire.quantizers.files.checkpoint import read_safetensors
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

MODELS = Path(__file__).resolve().parent / "models"
SMALL, WIDE, LAYERS, MLP, VOCABULARY = 128, 768, 12, 3072, 49408
COPIES = WIDE // SMALL
BEGIN, END = 49406, 49407
VOCABULARY_FILE = Path("comfy", "sd1_tokenizer", "vocab.json")


def wide_rows(w: Tensor, rows: int) -> Tensor:
    """(n, 128) -> (rows, 768): reads the first copy, the other rows are zero."""
    out = torch.zeros(rows, WIDE, dtype=w.dtype)
    out[: len(w), :SMALL] = w
    return out


def padded(b: Tensor, size: int) -> Tensor:
    out = torch.zeros(size, dtype=b.dtype)
    out[: len(b)] = b
    return out


def clip_l(vocabulary: dict[str, int]) -> dict[str, Tensor]:
    """The demo's text encoder at CLIP-L's size; `vocabulary` is CLIP's, token -> id."""
    source = read_safetensors(MODELS / "text_encoders" / "digits_clip.safetensors")
    t = {n.removeprefix("text_model."): v for n, v in source.tensors.items() if isinstance(v, Tensor)}
    tokens = Tokenizer.from_str(source.metadata["tokenizer_json"]).get_vocab()
    table = torch.zeros(VOCABULARY, WIDE, dtype=torch.bfloat16)
    for token, small_id in tokens.items():
        wide_id = {"<|startoftext|>": BEGIN, "<|endoftext|>": END}.get(token, vocabulary.get(token))
        if wide_id is not None:
            table[wide_id] = t["embeddings.token_embedding.weight"][small_id].repeat(COPIES)
    out = {
        "embeddings.token_embedding.weight": table,
        "embeddings.position_embedding.weight": t["embeddings.position_embedding.weight"].repeat(1, COPIES),
        "final_layer_norm.weight": t["final_layer_norm.weight"].repeat(COPIES),
        "final_layer_norm.bias": t["final_layer_norm.bias"].repeat(COPIES),
    }
    for i in range(LAYERS):
        out.update(_layer(t, f"encoder.layers.{i}"))
    # Without it ComfyUI multiplies the pooled vector by whatever the memory held.
    projection = {"text_projection.weight": torch.eye(WIDE, dtype=torch.bfloat16)}
    return {f"text_model.{name}": value.contiguous() for name, value in out.items()} | projection


def _layer(t: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    present = f"{name}.layer_norm1.weight" in t

    def get(leaf: str, shape: tuple[int, ...]) -> Tensor:
        return t[f"{name}.{leaf}"] if present else torch.zeros(shape, dtype=torch.bfloat16)

    out: dict[str, Tensor] = {}
    for norm in ("layer_norm1", "layer_norm2"):
        for leaf in ("weight", "bias"):
            out[f"{norm}.{leaf}"] = get(f"{norm}.{leaf}", (SMALL,)).repeat(COPIES)
    for part in ("q_proj", "k_proj", "v_proj"):
        out[f"self_attn.{part}.weight"] = wide_rows(get(f"self_attn.{part}.weight", (SMALL, SMALL)), WIDE)
        out[f"self_attn.{part}.bias"] = padded(get(f"self_attn.{part}.bias", (SMALL,)), WIDE)
    mixed = wide_rows(get("self_attn.out_proj.weight", (SMALL, SMALL)), SMALL)
    out["self_attn.out_proj.weight"] = mixed.repeat(COPIES, 1)
    out["self_attn.out_proj.bias"] = get("self_attn.out_proj.bias", (SMALL,)).repeat(COPIES)
    out["mlp.fc1.weight"] = wide_rows(get("mlp.fc1.weight", (1, SMALL)), MLP)
    out["mlp.fc1.bias"] = padded(get("mlp.fc1.bias", (1,)), MLP)
    narrow = get("mlp.fc2.weight", (SMALL, 1))
    second = torch.zeros(SMALL, MLP, dtype=torch.bfloat16)
    second[:, : narrow.shape[1]] = narrow
    out["mlp.fc2.weight"] = second.repeat(COPIES, 1)
    out["mlp.fc2.bias"] = get("mlp.fc2.bias", (SMALL,)).repeat(COPIES)
    return {f"{name}.{leaf}": value for leaf, value in out.items()}


def transformer() -> dict[str, Tensor]:
    """The demo's FLUX file with text inputs 768 wide."""
    tensors = read_safetensors(MODELS / "diffusion_models" / "digits_flux.safetensors").tensors
    out = {n: v for n, v in tensors.items() if isinstance(v, Tensor)}
    for name in ("txt_in.weight", "vector_in.in_layer.weight"):
        out[name] = wide_rows(out[name], len(out[name]))
    return out


def export(comfyui: Path, models: Path) -> None:
    """Write the three files into a models folder, under the names that the shipped workflows use.

    Args:
        comfyui: a ComfyUI tree, which has CLIP's vocabulary.

    Raises:
        NotADirectoryError: it has none, so it is no ComfyUI tree. Nothing is written.
    """
    file = comfyui / VOCABULARY_FILE
    if not file.is_file():
        raise NotADirectoryError(
            f"{comfyui.absolute()} is no ComfyUI folder: {VOCABULARY_FILE.as_posix()} is not in it. "
            "Give the folder that holds ComfyUI's main.py."
        )
    vocabulary = json.loads(file.read_text(encoding="utf-8"))
    vae = read_safetensors(MODELS / "vae" / "digits_tae.safetensors").tensors
    files = {
        "diffusion_models/digits_flux.safetensors": transformer(),
        "text_encoders/digits_clip.safetensors": clip_l(vocabulary),
        "vae/digits_tae.safetensors": {n: v for n, v in vae.items() if isinstance(v, Tensor)},
    }
    for name, tensors in files.items():
        (models / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, models / name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("comfyui", type=Path, help="a ComfyUI tree")
    parser.add_argument("--models", type=Path, help="where to write; default: the tree's own models folder")
    args = parser.parse_args()
    try:
        export(args.comfyui, args.models or args.comfyui / "models")
    except NotADirectoryError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
