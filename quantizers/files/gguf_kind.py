"""What a GGUF file is for, by its keys and tensor names, where that is not a model: refusals that say what to do.

Diffusion models and text encoders in the layouts of ComfyUI, diffusers and transformers are `architectures.detect`'s.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import Enum
from pathlib import Path

from ..errors import FileError

DIFFUSION_PREFIX = "model.diffusion_model."
ENCODER_PREFIXES = ("cond_stage_model.", "conditioner.", "text_encoders.", "text_encoder.")
VAE_PREFIXES = ("first_stage_model.", "vae.")
# Of image and video VAEs, with their own prefix or without one.
VAE_NAMES = ("decoder.conv_in.weight", "decoder.conv_in.conv.weight", "decoder.conv1.weight", "post_quant_conv.weight")
LORA_SIGNS = (".lora_a", ".lora_b", ".lora_A.", ".lora_B.", ".lora_up.", ".lora_down.")


class Kind(str, Enum):
    """What a file holds. `OTHER` is everything that is not recognised here, diffusion models among it."""

    OTHER = "other"
    ALL_IN_ONE = "a whole checkpoint"
    TEXT_ENCODER = "a text encoder"
    MMPROJ = "the vision part (mmproj) of a text encoder"
    VAE = "a VAE"
    LORA = "a LoRA"
    IMATRIX = "an importance matrix"


def kind_of(metadata: Mapping[str, str], names: Collection[str]) -> Kind:
    """Recognise a file.

    Args:
        metadata: keys with a string.
        names: of its tensors.
    """
    declared = metadata.get("general.type", "")
    if declared == "imatrix" or any(n.endswith(".in_sum2") for n in names):
        return Kind.IMATRIX
    if declared == "adapter" or any(sign in n for n in names for sign in LORA_SIGNS):
        return Kind.LORA
    if declared == "mmproj" or metadata.get("general.architecture") == "clip" or _any(names, ("v.blk.", "mm.")):
        return Kind.MMPROJ
    if _any(names, (DIFFUSION_PREFIX,)):
        return Kind.ALL_IN_ONE if _any(names, (*ENCODER_PREFIXES, *VAE_PREFIXES)) else Kind.OTHER
    if _any(names, ("token_embd.", "blk.", "enc.blk.")):
        return Kind.TEXT_ENCODER
    if _any(names, VAE_PREFIXES) or _any(names, VAE_NAMES):
        return Kind.VAE
    return Kind.OTHER


def refuse_for_model(path: Path, kind: Kind) -> None:
    """Refuse what LoadGGUF, which opens one diffusion model, cannot open.

    Raises:
        FileError: says what the file is, and what opens it.
    """
    if kind is not Kind.OTHER:
        raise FileError(f"{path.name}: holds {kind.value}, and LoadGGUF opens a diffusion model.\n{_REMEDIES[kind]}")


def refuse_for_conversion(path: Path, kind: Kind) -> None:
    """Refuse what can be no source of a conversion and looks like no other model either.

    Raises:
        FileError: says what the file is, and what it is for.
    """
    if kind is Kind.IMATRIX:
        raise FileError(f"{path.name}: holds {kind.value}, and a conversion reads a model.\n{_REMEDIES[kind]}")


_REMEDIES = {
    Kind.ALL_IN_ONE: (
        "Its diffusion model, text encoders and VAE stand in one file. Take a file of the diffusion model alone, or "
        "make one of the full-precision checkpoint with `quantwire convert CHECKPOINT.safetensors MODEL.gguf`; open "
        "the text encoders with LoadGGUFTextEncoder or CLIPLoader and the VAE with VAELoader."
    ),
    Kind.TEXT_ENCODER: "Open it with LoadGGUFTextEncoder.",
    Kind.MMPROJ: "LoadGGUFTextEncoder finds it by itself beside the file of its text encoder.",
    Kind.VAE: "Open VAEs with VAELoader, from the safetensors file of the same model.",
    Kind.LORA: "Put LoRAs on a model with LoraLoaderModelOnly, from a safetensors file.",
    Kind.IMATRIX: "It goes to `quantwire convert --imatrix`, to make better files of a model; it holds no weights.",
}


def _any(names: Collection[str], beginnings: tuple[str, ...]) -> bool:
    return any(name.startswith(beginnings) for name in names)
