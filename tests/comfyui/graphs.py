"""Graphs that the real-host tests post."""

from __future__ import annotations

from typing import Any

Graph = dict[str, dict[str, Any]]


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def sampled(
    model: tuple[str, int],
    nodes: Graph,
    *,
    steps: int = 1,
    latent: dict[str, Any] | None = None,
    prompt: str = "a handwritten seven",
) -> Graph:
    """`nodes`, and sampling with the model from output (node id, index); node `save` writes the latent.

    One step from pure noise makes the latent a linear function of one model call.
    """
    return {
        "clip": node("CLIPLoader", clip_name="digits_clip.safetensors", type="stable_diffusion"),
        "prompt": node("CLIPTextEncode", clip=["clip", 0], text=prompt),
        "empty": latent or node("EmptySD3LatentImage", width=64, height=64, batch_size=2),
        "sampler": node(
            "KSampler",
            model=list(model),
            seed=7,
            steps=steps,
            cfg=1.0,
            sampler_name="euler",
            scheduler="simple",
            positive=["prompt", 0],
            negative=["prompt", 0],
            latent_image=["empty", 0],
            denoise=1.0,
        ),
        "save": node("SaveLatent", samples=["sampler", 0], filename_prefix="latents/test"),
        **nodes,
    }


def unet(name: str = "digits_flux.safetensors") -> dict[str, Any]:
    return node("UNETLoader", unet_name=name, weight_dtype="default")


def chain(
    source: str, format_id: str, lora: bool, mode: str, options: dict[str, Any] | None = None
) -> tuple[tuple[str, int], Graph]:
    """Loader, quantizer, LoRA and forced load mode; the output to sample from, and the nodes.

    Args:
        source: `QuantizeModel`, `LoadGGUF`, or `full` for the model as it is.
        options: more inputs of QuantizeModel.
    """
    nodes: Graph = {}
    if source == "LoadGGUF":
        kind = format_id.removeprefix("gguf-").upper().replace("-", "_")
        nodes["model"] = node("LoadGGUF", gguf_name=f"digits_flux-{kind}.gguf", carrier="quantwire")
        last = "model"
    else:
        nodes["model"] = unet()
        last = "model"
        if source == "QuantizeModel":
            nodes["quantize"] = node("QuantizeModel", model=["model", 0], format=format_id, **(options or {}))
            last = "quantize"
    if lora:
        nodes["lora"] = node("LoraLoaderModelOnly", model=[last, 0], lora_name="lora.safetensors", strength_model=1.0)
        last = "lora"
    if mode != "default":
        nodes["force"] = node("ProbeLoad", model=[last, 0], mode=mode)
        last = "force"
    return (last, 0), nodes


MODES = ("default", "partial", "novram")


def every_call(source: str, format_id: str) -> tuple[Graph, dict[tuple[bool, str], str]]:
    """One graph that quantizes once and calls the model without and with the LoRA in every load mode.

    Returns:
        The graph, and the id of the node that saves the latent of (LoRA, mode).
    """
    (last, _), nodes = chain(source, format_id, False, "default")
    return calls(last, nodes, lora="lora.safetensors")


def calls(
    last: str, nodes: Graph, *, lora: str = "", latent: dict[str, Any] | None = None
) -> tuple[Graph, dict[tuple[bool, str], str]]:
    """One graph that calls the model of a node in every load mode, and, where one is named, with a LoRA too."""
    if lora:
        inputs = {"model": [last, 0], "lora_name": lora, "strength_model": 1.0}
        nodes = {**nodes, "lora": node("LoraLoaderModelOnly", **inputs)}
    graph = sampled((last, 0), nodes, latent=latent)
    sampler = graph.pop("sampler")
    del graph["save"]
    saves: dict[tuple[bool, str], str] = {}
    before: dict[str, Any] = {}
    for with_lora in (False, True) if lora else (False,):
        for mode in MODES:
            name = f"{'lora' if with_lora else 'plain'}_{mode}"
            model = ["lora" if with_lora else last, 0]
            graph[f"force_{name}"] = node("ProbeLoad", model=model, mode=mode, **before)
            graph[f"sampler_{name}"] = {**sampler, "inputs": {**sampler["inputs"], "model": [f"force_{name}", 0]}}
            saves[with_lora, mode] = f"save_{name}"
            latents = {"samples": [f"sampler_{name}", 0], "filename_prefix": f"latents/{name}"}
            graph[f"save_{name}"] = node("SaveLatent", **latents)
            before = {"after": [f"sampler_{name}", 0]}
    return graph, saves
