"""Write `memory.txt`: what the notes in the templates say of memory, computed by the pack's own forecast.

    python -m quantwire.workflows.memory

Models are made by diffusers' own classes on the meta device, from the values of their published configurations: names
and shapes without a byte of weights. ACE-Step's are those of ComfyUI, which builds more of it (`ace_step.py`). Text
encoders and VAE are those of `quantizers/measure/assumed.json`. What a template opens quantized takes what its file
holds (`published.py`). Each line is the name of a template, a tab, and a sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .published import CITY96_Q4_K_S, FP8

if TYPE_CHECKING:
    from ..quantizers.measure.parts import ModelPart

FILE = Path(__file__).with_name("memory.txt")
GIB = 2**30
CARDS = (8, 12, 16, 24)
ADA = (8, 9)  # compute capability of the cards asked about; the sizes are the same on others


@dataclass(frozen=True)
class Case:
    """A model, its formats and what is generated.

    Attributes:
        kind: class in diffusers, or `ACE`.
        config: for the class in diffusers.
        formats: part -> format that the graph makes of it.
        opened: part -> layout of a file that comes quantized, for `published.as_published`.
        shape: for RunShape; without one only weights are said.
        beside: other formats that the workflow makes of the diffusion model.
    """

    kind: str
    config: Mapping[str, Any]
    formats: Mapping[str, str]
    shape: Mapping[str, Any] = field(default_factory=lambda: dict[str, Any]())
    beside: tuple[str, ...] = ()
    opened: Mapping[str, str] = field(default_factory=lambda: dict[str, str]())


ACE = "ACE-Step 1.5"
IMAGE = {"width": 1024, "height": 1024}
FLUX = {"guidance_embeds": True}  # black-forest-labs/FLUX.1-dev: the rest are the defaults of the class
SD35_LARGE = {  # stabilityai/stable-diffusion-3.5-large
    **{"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192},
    "qk_norm": "rms_norm",
}
SDXL = {  # stabilityai/stable-diffusion-xl-base-1.0
    **{"cross_attention_dim": 2048, "block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20)},
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    **{"transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True, "addition_embed_type": "text_time"},
    **{"addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816, "sample_size": 128},
}
CASES: dict[str, Case] = {
    "flux_nf4": Case(
        "FluxTransformer2DModel", FLUX, {"transformer": "bnb-nf4", "t5xxl": "bnb-nf4"}, {**IMAGE, "cfg": 1.0}
    ),
    "flux_gguf_t5_gguf": Case(
        *("FluxTransformer2DModel", FLUX, {}, {**IMAGE, "cfg": 1.0}),
        opened={"transformer": CITY96_Q4_K_S, "t5xxl": "Q5_K_M"},
    ),
    "sd35_int8": Case(
        *("SD3Transformer2DModel", SD35_LARGE, {"transformer": "comfy-int8", "t5xxl": "comfy-int8"}),
        {**IMAGE, "cfg": 4.0},
    ),
    "sdxl_int8_convrot": Case(
        "UNet2DConditionModel", SDXL, {"transformer": "comfy-int8-convrot"}, {**IMAGE, "cfg": 8.0}
    ),
    "wan_q4_k": Case(  # Wan-AI/Wan2.2-T2V-A14B: the defaults of the class, twice
        *("WanTransformer3DModel", {}, {"transformer": "gguf-q4-k"}),
        {"width": 640, "height": 640, "frames": 81, "cfg": 3.5},
        opened={"umt5xxl": FP8},
    ),
    "qwen_image_nvfp4": Case(  # Qwen/Qwen-Image: the defaults of the class
        *("QwenImageTransformer2DModel", {}, {"transformer": "comfy-nvfp4"}),
        {"width": 1328, "height": 1328, "cfg": 4.0},
        opened={"qwen2.5vl": FP8},
    ),
    "compare_three_formats": Case(  # black-forest-labs/FLUX.1-schnell: the defaults of the class
        "FluxTransformer2DModel", {}, {"transformer": "bnb-nf4"}, beside=("gguf-q4-k", "comfy-int8")
    ),
    "audio_int8": Case(ACE, {}, {"transformer": "comfy-int8"}),
}


def model_part(case: Case) -> ModelPart:
    """The diffusion model at 16 bits."""
    import torch

    from ..quantizers.measure.parts import Role, parts_of_modules

    if case.kind == ACE:
        return _ace_step()
    import diffusers

    with torch.device("meta"):
        model = getattr(diffusers, case.kind)(**case.config)
    return parts_of_modules({"transformer": torch.nn.Module.to(model, torch.bfloat16)}, Role.DIFFUSION, case.kind)[0]


def _ace_step() -> ModelPart:
    import torch

    from ..quantizers.families import find_family
    from ..quantizers.measure.parts import ModelPart, Role
    from ..quantizers.plan import Slot
    from ..quantizers.weight import TensorMeta
    from .ace_step import tensors

    slots = tuple(Slot(TensorMeta(name, shape, torch.bfloat16), linear) for name, shape, linear in tensors())
    family = find_family(slot.meta for slot in slots).name
    return ModelPart("transformer", Role.DIFFUSION, family, slots, sum(s.meta.nbytes for s in slots), ACE)


def parts_of(case: Case) -> list[ModelPart]:
    """The diffusion model and what it runs with, each as its file holds it."""
    from ..quantizers.measure.assumed import with_assumed
    from .published import as_published

    parts, _ = with_assumed([model_part(case)])
    return [as_published(p, case.opened[p.name]) if p.name in case.opened else p for p in parts]


def sentence(case: Case) -> str:
    from ..quantizers.measure.parts import Role
    from ..quantizers.measure.units import show_size
    from ..quantizers.spec import QuantSpec

    specs = {name: QuantSpec(format_id) for name, format_id in case.formats.items()}
    parts = parts_of(case)
    model = parts[0]
    texts = [p for p in parts if p.role is Role.TEXT]
    held, whole = sum(p.nbytes(specs.get(p.name)) for p in texts), sum(p.full_nbytes for p in texts)
    small, full = model.nbytes(specs.get(model.name)), model.full_nbytes
    if case.beside:
        sizes = {f: model.nbytes(QuantSpec(f)) for f in (case.formats["transformer"], *case.beside)}
        copies = ", ".join(f"{show_size(size)} as {format_id}" for format_id, size in sizes.items())
        total = full + sum(sizes.values()) + held
        return (
            f"The diffusion model takes {show_size(full)} at 16 bits, {copies}; all stay in the main memory, with the "
            f"text encoders ({show_size(held)}) {show_size(total)} together."
        )
    said = f"The diffusion model takes {show_size(small)} instead of {show_size(full)} at 16 bits"
    if not case.shape:
        return f"{said}. Text encoders and activations are not counted."
    instead = f" instead of {show_size(whole)}" if held != whole else ""
    return f"{said}, the text encoders {show_size(held)}{instead}. {_cards(parts, specs, case.shape)}"


def _cards(parts: Sequence[ModelPart], specs: Mapping[str, Any], shape: Mapping[str, Any]) -> str:
    from ..quantizers.auto import DeviceFacts
    from ..quantizers.compat.modes import HostName
    from ..quantizers.measure.activations import RunShape
    from ..quantizers.measure.forecast import forecast
    from ..quantizers.measure.units import show_size

    verdicts: dict[str, list[int]] = {}
    peak = ""
    for gib in CARDS:
        device = DeviceFacts("cuda", "a GPU", gib * GIB, gib * GIB, ADA)
        found = forecast(parts, specs, RunShape(**shape), device, HostName.COMFYUI)
        best = found.best
        holds = (
            "streams part of the weights" if best is not None and best.streams else "holds the whole diffusion model"
        )
        how = holds if best is not None else "is too small"
        verdicts.setdefault(how, []).append(gib)
        if best is not None and not best.streams:
            peak = peak or f" The most in use at one time is {show_size(best.peak)}, while {best.worst.name}."
    size = f"{shape['width']} x {shape['height']}" + (f", {shape['frames']} frames" if "frames" in shape else "")
    cards = "; ".join(f"a card of {_listed(sizes)} GB {how}" for how, sizes in verdicts.items())
    return f"At {size}: {cards}.{peak}"


def _listed(sizes: list[int]) -> str:
    return " or ".join(map(str, sizes)) if len(sizes) < 3 else f"{', '.join(map(str, sizes[:-1]))} or {sizes[-1]}"


def written(make: Callable[[Case], str] = sentence) -> str:
    return "".join(f"{name}\t{make(case)}\n" for name, case in CASES.items())


def read() -> dict[str, str]:
    """Template -> sentence."""
    rows = (line.partition("\t") for line in FILE.read_text(encoding="utf-8").splitlines())
    return {name: text for name, _, text in rows}


if __name__ == "__main__":
    FILE.write_text(written(), encoding="utf-8")
