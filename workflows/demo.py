"""The five workflows of the demo model, which run as they are: a FLUX-shaped model of 64 x 64 digits."""

from __future__ import annotations

from .describe import BLUE, BROWN, GREEN, PURPLE, Group, Node, Workflow

PROMPT = "a handwritten seven"
FILES = (
    "It runs on the small models in `demo/models`, in ComfyUI (after `python demo/export_comfyui.py PATH/TO/ComfyUI`) "
    "and without it:"
)
UNET = Node("UNETLoader", "Model", {"unet_name": "digits_flux.safetensors"})


def note(name: str, title: str, text: str, *change: str) -> str:
    command = f"    quantwire run workflows/api/{name}.json --models demo/models"
    points = "\n".join(f"- {line}" for line in change)
    return f"# {title}\n{text}\n\n{FILES}\n\n{command}\n\n## What to change\n{points}"


def quantize(carrier: str) -> Node:
    return Node("QuantizeModel", "Quantize", {"model": ("1", 0), "format": "bnb-nf4", "carrier": carrier})


def compat(mode: str) -> Node:
    return Node("OffloadCompat", "Offload check", {"model": ("2", 0), "mode": mode, "action": "block"})


def report(source: str) -> dict[str, Node]:
    return {"20": Node("PreviewAny", "Report", {"source": (source, 1)})}


def prompt_nodes() -> dict[str, Node]:
    """Text encoder, prompt, guidance, latent and VAE."""
    return {
        "4": Node("CLIPLoader", "Text encoder", {"clip_name": "digits_clip.safetensors", "type": "stable_diffusion"}),
        "5": Node("CLIPTextEncode", "Prompt", {"text": PROMPT, "clip": ("4", 0)}),
        "6": Node("FluxGuidance", "Guidance", {"conditioning": ("5", 0), "guidance": 3.5}),
        "7": Node("CLIPTextEncode", "Negative prompt", {"text": "", "clip": ("4", 0)}),
        "8": Node("EmptySD3LatentImage", "Latent", {"width": 64, "height": 64, "batch_size": 1}),
        "10": Node("VAELoader", "VAE", {"vae_name": "digits_tae.safetensors"}),
    }


def sampling_nodes(first: int, model: tuple[str, int], prefix: str, title: str = "") -> dict[str, Node]:
    """Sampler, decoder and SaveImage with the ids first, first + 1, first + 2."""
    sampler = {
        **{"model": model, "seed": 7, "steps": 8, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"},
        **{"positive": ("6", 0), "negative": ("7", 0), "latent_image": ("8", 0), "denoise": 1.0},
    }
    a, b, c = (str(first + i) for i in range(3))
    return {
        a: Node("KSampler", f"Sampler{title}", sampler),
        b: Node("VAEDecode", f"Decode{title}", {"samples": (a, 0), "vae": ("10", 0)}),
        c: Node("SaveImage", f"Save{title}", {"images": (b, 0), "filename_prefix": prefix}),
    }


TEXT = Group("Prompt", (("4", "10"), ("5", "7"), ("6", "8")), GREEN)
DRAW = Group("Picture", (("11",), ("12", "13")), PURPLE)


def checked(title: str, *columns: tuple[str, ...]) -> tuple[Group, Group]:
    return Group(title, columns), Group("Offload check and report", (("3",), ("20",)), BROWN)


def workflow(name: str, text: str, nodes: dict[str, Node], *bands: tuple[Group, ...]) -> Workflow:
    return Workflow(name, text, nodes, bands)


DEMO = (
    workflow(
        "full_precision",
        note(
            *("full_precision", "Full precision", "The demo model as it is, to compare the others with."),
            "Change the number in the prompt: it knows the digits from zero to nine, in words.",
            "Open `side_by_side` to see a quantized branch beside this one.",
        ),
        {"1": UNET, **prompt_nodes(), **sampling_nodes(11, ("1", 0), "full_precision")},
        (Group("Model", (("1",),)), TEXT, DRAW),
    ),
    workflow(
        "quantized",
        note(
            *("quantized", "Quantized in the graph"),
            "**Quantize** turns the linear layers of the model into 4 bits while the graph runs, **Offload check** "
            "stops the run before it samples where the quantized layers would not survive the memory mode.",
            "`format` in Quantize: the report says the size and the error of each.",
            "`keep_layers` in Quantize: `*.attn.*` leaves the attention layers as they are.",
        ),
        {
            "1": UNET,
            "2": quantize("quantwire"),
            "3": compat("auto"),
            **prompt_nodes(),
            **sampling_nodes(11, ("3", 0), "quantized"),
            **report("2"),
        },
        checked("Model", ("1", "2")),
        (TEXT, DRAW),
    ),
    workflow(
        "gguf",
        note(
            *("gguf", "A GGUF file"),
            "The same model from a GGUF file. Make the file first: `quantwire convert "
            "demo/models/diffusion_models/digits_flux.safetensors models/diffusion_models/digits_flux-Q8_0.gguf --type "
            "Q8_0`, and give `--models models` as well.",
            "Convert with another `--type`, such as `Q4_K_M`, and choose that file in **GGUF model**.",
        ),
        {
            "2": Node("LoadGGUF", "GGUF model", {"gguf_name": "digits_flux-Q8_0.gguf", "carrier": "quantwire"}),
            "3": compat("auto"),
            **prompt_nodes(),
            **sampling_nodes(11, ("3", 0), "gguf"),
            **report("2"),
        },
        checked("Model", ("2",)),
        (TEXT, DRAW),
    ),
    workflow(
        "conflict",
        note(
            *("conflict", "An offload conflict"),
            "Made to be stopped: bitsandbytes' own 4-bit layers do not survive sequential offload, so **Offload "
            "check** refuses before anything is sampled, and says what would work.",
            "`carrier` in Quantize: `quantwire` holds the same weights in plain tensors, which every mode can move.",
            "`mode` in Offload check: `auto` asks about the mode that is really in force.",
        ),
        {
            "1": UNET,
            "2": quantize("library"),
            "3": compat("sequential"),
            **prompt_nodes(),
            **sampling_nodes(11, ("3", 0), "conflict"),
            **report("2"),
        },
        checked("Model", ("1", "2")),
        (TEXT, DRAW),
    ),
    workflow(
        "side_by_side",
        note(
            *("side_by_side", "Side by side"),
            "One model, two branches with the same seed: as it is, and quantized. Quantizing never changes the model "
            "that comes in, so both can run in one graph.",
            "`format` in Quantize: the two pictures tell whether you can see it.",
            "Link both pictures to **CompareQuality** for numbers.",
        ),
        {
            "1": UNET,
            "2": quantize("quantwire"),
            "3": compat("auto"),
            **prompt_nodes(),
            **sampling_nodes(11, ("1", 0), "side_by_side_full", " (full precision)"),
            **sampling_nodes(14, ("3", 0), "side_by_side_quantized", " (quantized)"),
            **report("2"),
        },
        checked("Model", ("1", "2")),
        (
            TEXT,
            Group("Full precision", (("11",), ("12", "13")), BLUE),
            Group("Quantized", (("14",), ("15", "16")), PURPLE),
        ),
    ),
)
