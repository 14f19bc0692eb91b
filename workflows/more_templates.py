"""Templates for video, audio, files and memory, and the comparison of formats."""

from __future__ import annotations

from . import parts as p
from .describe import BLUE, BROWN, GREEN, PURPLE, RED, Group, Node, Workflow
from .parts import note, offload, picture, prompts, sampler, shown
from .templates import DRAW, PROMPT, flux_tail, template

FLUX_FILE = f"{p.FLUX_DEV.folder}/{p.FLUX_DEV.name}"


def wan_q4_k() -> Workflow:
    """Two models of one size: one for the first half of the steps, one for the second."""
    both = {"cfg": 3.5, "steps": 20, "sampler_name": "euler", "scheduler": "simple", "positive": ("30", 0)}
    both |= {"negative": ("31", 0)}
    first = {"add_noise": "enable", "noise_seed": 20, "start_at_step": 0, "end_at_step": 10}
    second = {"add_noise": "disable", "noise_seed": 20, "start_at_step": 10, "end_at_step": 10000}
    nodes = {
        "1": p.loader("LoadAndQuantize", "High noise as Q4_K", p.WAN_HIGH, "model_name", format="gguf-q4-k"),
        "2": p.loader("LoadAndQuantize", "Low noise as Q4_K", p.WAN_LOW, "model_name", format="gguf-q4-k"),
        "3": p.loader("CLIPLoader", "umT5", p.UMT5, "clip_name", type="wan"),
        "4": p.loader("VAELoader", "VAE", p.WAN_VAE, "vae_name"),
        "5": offload(("1", 0)),
        "6": offload(("2", 0)),
        "7": Node("ModelSamplingSD3", "Shift, high noise", {"model": ("5", 0), "shift": 5.0}),
        "8": Node("ModelSamplingSD3", "Shift, low noise", {"model": ("6", 0), "shift": 5.0}),
        **prompts(
            ("3", 0),
            "A red fox trots along a snowy forest path, breath steaming, camera tracking beside it, morning sun",
            "static, blurred, overexposed, subtitles, deformed, worst quality",
        ),
        "33": Node("EmptyHunyuanLatentVideo", "Size", {"width": 640, "height": 640, "length": 81}),
        "40": Node(
            *("KSamplerAdvanced", "Steps 1 to 10"),
            {"model": ("7", 0), "latent_image": ("33", 0), "return_with_leftover_noise": "enable", **both, **first},
        ),
        "41": Node(
            *("KSamplerAdvanced", "Steps 11 to 20"),
            {"model": ("8", 0), "latent_image": ("40", 0), "return_with_leftover_noise": "disable", **both, **second},
        ),
        "42": Node("VAEDecode", "Decode", {"samples": ("41", 0), "vae": ("4", 0)}),
        "43": Node("CreateVideo", "16 frames a second", {"images": ("42", 0), "fps": 16.0}),
        "44": Node("SaveVideo", "Save", {"video": ("43", 0), "filename_prefix": "video/wan_q4_k"}),
        "50": shown("What became of the layers", ("1", 1)),
    }
    text = note(
        "Wan 2.2 text to video in Q4_K",
        "Wan 2.2 has two models of 14 billion parameters, one for the noisy first half of the steps and one for the "
        "rest. Each 16-bit file is quantized to GGUF's Q4_K while it is read, and the result is kept on disk, so later "
        "runs open it at once. Only the one that samples has to be on the card.",
        [p.WAN_HIGH, p.WAN_LOW, p.UMT5, p.WAN_VAE],
        f"For each of the two models: {p.MEMORY['wan_q4_k']} {p.AS_FILES} {p.COMPUTED}",
        [
            "Have Q4_K files already? Put **LoadGGUF** in the place of both *as Q4_K* nodes.",
            "`length` in *Size*: frames, 4 n + 1. Activations grow with it, weights do not.",
            "A lightning LoRA for 4 steps: **LoraLoaderModelOnly** before each *Shift*, cfg 1, steps 4, 2 and 2.",
        ],
        p.COMFYUI,
    )
    return template(
        *("wan_q4_k", text, nodes),
        (
            Group("1. Load and quantize", (("1", "3"), ("2", "4"))),
            Group("2. Check before sampling", (("5",), ("6",), ("50",)), BROWN),
        ),
        (
            Group("Prompt", (("30", "31"), ("33",)), GREEN),
            Group("High noise, then low noise", (("7", "40"), ("8", "41")), PURPLE),
            Group("Video", (("42", "43"), ("44",)), BLUE),
        ),
    )


def audio_int8() -> Workflow:
    song = {
        "tags": "chamber folk, fingerpicked guitar, cello, brushed drums, warm female voice, slow and intimate",
        "lyrics": "[Verse]\nThe kettle sings before the day\nThe lamp has burned the night away\n\n[Chorus]\nKeep the "
        "light, keep the light\nFor every sail that moves by night",
        **{"seed": 20, "bpm": 84, "duration": 120.0, "timesignature": "4", "language": "en", "keyscale": "D major"},
    }
    nodes = {
        "1": p.loader("UNETLoader", "ACE-Step 1.5 turbo", p.ACE, "unet_name"),
        "2": p.clips("DualCLIPLoader", "Text encoder and language model", p.ACE_TEXT, p.ACE_LM, type="ace"),
        "3": Node("QuantizeModel", "Model as int8", {"model": ("1", 0), "format": "comfy-int8"}),
        "4": p.loader("VAELoader", "Audio VAE", p.ACE_VAE, "vae_name"),
        "5": offload(("3", 0)),
        "6": shown("What became of the layers", ("3", 1)),
        "7": Node("ModelSamplingAuraFlow", "Shift", {"model": ("5", 0), "shift": 3.0}),
        "30": Node("TextEncodeAceStepAudio1.5", "Song", {"clip": ("2", 0), **song}),
        "31": Node("ConditioningZeroOut", "No negative prompt", {"conditioning": ("30", 0)}),
        "33": Node("EmptyAceStep1.5LatentAudio", "Length", {"seconds": 120.0}),
        "40": sampler("Sampler", ("7", 0), ("30", 0), ("33", 0), 8, 1.0),
        "41": Node("VAEDecodeAudio", "Decode", {"samples": ("40", 0), "vae": ("4", 0)}),
        "42": Node("SaveAudioAdvanced", "Save", {"audio": ("41", 0), "filename_prefix": "audio/audio_int8"}),
    }
    text = note(
        "Music with ACE-Step 1.5 in int8",
        "The diffusion model becomes 8-bit integers, one scale a row: the transformer of the song, and with it the "
        "encoder of text, lyrics and timbre and the tokenizers of audio. Embedders, the projections of lyrics and of "
        "time, and the final layer stay at full precision, by rules for this family. The language model that plans "
        "the song is left as it is.",
        *([p.ACE, p.ACE_TEXT, p.ACE_LM, p.ACE_VAE], f"{p.MEMORY['audio_int8']} {p.COMPUTED}"),
        [
            "`duration` in *Song* and `seconds` in *Length* belong together.",
            "`format` `comfy-int8-convrot` or `gguf-q8-0`: listen to the same seed with each.",
            "`on_failure` *full precision* goes on where a format cannot take a layer, and the report names it.",
        ],
        p.COMFYUI,
    )
    return template(
        *("audio_int8", text, nodes),
        (
            Group("1. Load and quantize", (("1", "3"), ("2", "4"))),
            Group("2. Check before sampling", (("5",), ("6",)), BROWN),
        ),
        (
            Group("Song", (("30",), ("31", "33", "7")), GREEN),
            Group("Audio", (("40",), ("41", "42")), PURPLE),
        ),
    )


def convert_a_file() -> Workflow:
    gguf = {"model_name": FLUX_FILE, "type": "Q4_K_M", "dry_run": True}
    native = {"model_name": FLUX_FILE, "type": "comfy-int8", "dry_run": True}
    check = {"model_name": FLUX_FILE, "only_check": True}
    nodes = {
        "1": Node("InspectModel", "What is in the file?", {"model_name": FLUX_FILE}, (p.FLUX_DEV,)),
        "2": shown("Contents", ("1", 1)),
        "3": Node("RepairModel", "Is it sound?", check, (p.FLUX_DEV,)),
        "4": shown("Faults", ("3", 1)),
        "5": Node("ConvertModel", "To GGUF, Q4_K_M", gguf, (p.FLUX_DEV,)),
        "6": shown("What would be written", ("5", 1)),
        "7": Node("ConvertModel", "To ComfyUI's own int8", native, (p.FLUX_DEV,)),
        "8": shown("What would be written (int8)", ("7", 1)),
    }
    text = note(
        "Convert a model file",
        "No picture is made here: the graph looks into a file, checks it, and converts it, to GGUF and to ComfyUI's "
        "own int8, which its stock loader opens. `dry_run` is on: the first run only says what would be written. "
        "Files are converted tensor by tensor, so one larger than the memory works too.",
        *([p.FLUX_DEV], ""),
        [
            "`model_name`: any model file in your folders, also a text encoder.",
            "`dry_run` off in one of the converters: it writes the file beside the source.",
            "`type`: `Q8_0` and `Q5_K_M` keep more, `Q3_K_M` is smaller; the other formats are in the list as well.",
            "On the command line: `quantwire convert flux1-dev.safetensors flux1-dev-Q4_K_M.gguf --type Q4_K_M`.",
        ],
        p.ANYWHERE.format("convert_a_file"),
    )
    return template(
        *("convert_a_file", text, nodes),
        (Group("1. Look", (("1",), ("2",))), Group("2. Check", (("3",), ("4",)), BROWN)),
        (
            Group("3. Convert to GGUF", (("5",), ("6",)), GREEN),
            Group("Or to ComfyUI's own format", (("7",), ("8",)), PURPLE),
        ),
    )


FORMATS = ("bnb-nf4", "gguf-q4-k", "comfy-int8")


def compare_three_formats() -> Workflow:
    """FLUX.1 schnell: 4 steps a picture, and an open licence."""
    nodes = {
        "1": p.loader("UNETLoader", "FLUX.1 schnell", p.FLUX_SCHNELL, "unet_name"),
        "2": p.clips("DualCLIPLoader", "Text encoders", p.CLIP_L, p.T5, type="flux"),
        "4": p.loader("VAELoader", "VAE", p.FLUX_VAE, "vae_name"),
        **prompts(("2", 0), p.SCENE, title="Negative prompt (not used at cfg 1)"),
        "33": Node("EmptySD3LatentImage", "Size", {"width": 1024, "height": 1024}),
        "40": sampler("Sampler (full precision)", ("1", 0), ("30", 0), ("33", 0), 4, 1.0),
        **picture(41, ("40", 0), ("4", 0), "compare_full", " (full precision)"),
    }
    branches: list[tuple[Group, ...]] = []
    for i, format_id in enumerate(FORMATS):
        ids = [str(50 + 10 * i + k) for k in range(7)]
        model, draw, decode, save, compare, plot, numbers = ids
        named = f" ({format_id})"
        links = {"model_a": ("1", 0), "model_b": (model, 0), "images_a": ("41", 0), "images_b": (decode, 0)}
        nodes |= {
            model: Node("QuantizeModel", format_id, {"model": ("1", 0), "format": format_id}),
            draw: sampler(f"Sampler{named}", (model, 0), ("30", 0), ("33", 0), 4, 1.0),
            **picture(int(decode), (draw, 0), ("4", 0), f"compare_{format_id}", named),
            compare: Node("CompareQuality", f"Against full precision{named}", links),
            plot: Node("PreviewImage", f"Differences{named}", {"images": (compare, 1)}),
            numbers: shown(f"Numbers{named}", (compare, 0)),
        }
        columns = ((model,), (draw, decode), (save,), (compare,), (numbers,), (plot,))
        branches.append((Group(format_id, columns, PURPLE),))
    text = note(
        "Three formats, one seed",
        "The same prompt and seed at full precision and in three formats, each with its difference to full precision: "
        "the error of the weights, and what the pictures differ in. `QuantizeModel` never changes the model that comes "
        "in, so all four branches start from one loaded file.",
        [p.FLUX_SCHNELL, p.CLIP_L, p.T5, p.FLUX_VAE],
        f"{p.MEMORY['compare_three_formats']} {p.COMPUTED} To run fewer at a time, bypass nodes (Ctrl+B).",
        [
            "`format` in any of the three: the list has every format; what cannot run here says why.",
            "Another model: choose its file in *FLUX.1 schnell*; give it its own steps and cfg.",
            "For many prompts and seeds use **BenchmarkModel** or `quantwire bench`: one picture proves little.",
        ],
        p.ANYWHERE.format("compare_three_formats"),
    )
    return template(
        *("compare_three_formats", text, nodes),
        (Group("Full precision", (("1",), ("40", "41"), ("42",)), BLUE),),
        *branches,
        aside=(Group("Load", (("2", "4"),)), Group("Prompt", (("30", "31", "33"),), GREEN)),
    )


def low_vram_offload_compat() -> Workflow:
    nodes = {
        "1": p.clips("DualCLIPLoader", "Text encoders", p.CLIP_L, p.T5, type="flux"),
        "2": p.loader(
            "FitModel", "FLUX.1 dev, made to fit 8 GiB", p.FLUX_DEV, "model_name", vram_gib=8.0, clip=("1", 0)
        ),
        "4": p.loader("VAELoader", "VAE", p.FLUX_VAE, "vae_name"),
        "5": offload(("2", 0), ("2", 1), ("4", 0)),
        "6": shown("What was chosen, and why", ("2", 2)),
        "7": shown("Is the memory mode safe?", ("5", 1)),
        "8": Node(
            *("MemoryForecast", "Forecast for 8 GiB"),
            {"model": ("5", 0), "format": "as it is", "clip": ("5", 2), "vae": ("5", 3), "vram_gib": 8.0},
        ),
        "9": Node("PreviewImage", "Memory by stage", {"images": ("8", 1)}),
        **flux_tail("low_vram_offload_compat", ("5", 0), ("5", 2), ("5", 3)),
    }
    text = note(
        "A small card, without guessing",
        "**FitModel** chooses formats for the model and T5 so that generating fits the card, and quantizes while it "
        "reads. **Offload check** looks at the quantized layers and at the memory mode in force: layers of some "
        "libraries break when they are moved, and then the run is stopped before it samples rather than minutes later. "
        "**Forecast** says what each stage will take.",
        [p.FLUX_DEV, p.CLIP_L, p.T5, p.FLUX_VAE],
        f"With bnb-nf4 in both, for instance: {p.MEMORY['flux_nf4']} {p.COMPUTED}",
        [
            "`vram_gib` in both nodes: your card. 0 asks the host what is free now.",
            "`prefer` `quality` takes larger formats and lets the host stream them.",
            "`action` in *Offload check*: `warn` goes on and says so. `mode` asks about another mode.",
        ],
        p.ANYWHERE.format("low_vram_offload_compat"),
    )
    return template(
        *("low_vram_offload_compat", text, nodes),
        (
            Group("1. Choose and quantize", (("1", "4"), ("2",))),
            Group("2. Check before sampling", (("5",),), RED),
            *(PROMPT, DRAW),
        ),
        (
            Group("What the nodes say", (("6",), ("7",)), BROWN),
            Group("3. Forecast", (("8",), ("9",)), BROWN),
        ),
    )


OTHERS = (
    wan_q4_k(),
    audio_int8(),
    convert_a_file(),
    compare_three_formats(),
    low_vram_offload_compat(),
)
