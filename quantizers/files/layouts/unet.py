"""Stable Diffusion 1, 2 and XL: diffusers' names to the original ones, which ComfyUI reads.

The original numbers the layers of all levels in one row, diffusers those of each level; so the rules follow from how
many levels and layers a file has.

Sources (names): diffusers loaders/single_file_utils.py 0.42, comfy/utils.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ...errors import FileError
from .table import Rule, Table, move, under

_RESNET = (
    move("in_layers.0.*", "norm1.*"),
    move("in_layers.2.*", "conv1.*"),
    move("emb_layers.1.*", "time_emb_proj.*"),
    move("out_layers.0.*", "norm2.*"),
    move("out_layers.3.*", "conv2.*"),
    move("skip_connection.*", "conv_shortcut.*"),
)
_ATTENTION = (move("@", "@"),)
_ENDS = (
    move("time_embed.0.*", "time_embedding.linear_1.*"),
    move("time_embed.2.*", "time_embedding.linear_2.*"),
    move("input_blocks.0.0.*", "conv_in.*"),
    move("out.0.*", "conv_norm_out.*"),
    move("out.2.*", "conv_out.*"),
    *(
        move(f"label_emb.0.{to}.*", f"{embedder}.linear_{source}.*")
        for embedder in ("add_embedding", "class_embedding")
        for to, source in ((0, 1), (2, 2))
    ),
    move("label_emb.weight", "class_embedding.weight"),
    *under("middle_block.0", "mid_block.resnets.0", *_RESNET),
    *under("middle_block.1", "mid_block.attentions.0", *_ATTENTION),
    *under("middle_block.2", "mid_block.resnets.1", *_RESNET),
)


def unet(names: Iterable[str]) -> Table:
    """The table for a file with these names, which are diffusers'.

    Raises:
        FileError: a level or a layer is missing.
    """
    names = list(names)
    return Table((*_ENDS, *_down(names), *_up(names)))


def _down(names: list[str]) -> list[Rule]:
    rules: list[Rule] = []
    number = 1  # the input convolution is the first
    for level, layers in enumerate(_layers(names, "down_blocks")):
        for layer in range(layers):
            rules += under(f"input_blocks.{number}.0", f"down_blocks.{level}.resnets.{layer}", *_RESNET)
            rules += under(f"input_blocks.{number}.1", f"down_blocks.{level}.attentions.{layer}", *_ATTENTION)
            number += 1
        if f"down_blocks.{level}.downsamplers.0.conv.weight" in names:
            rules += [move(f"input_blocks.{number}.0.op.*", f"down_blocks.{level}.downsamplers.0.conv.*")]
            number += 1
    return rules


def _up(names: list[str]) -> list[Rule]:
    rules: list[Rule] = []
    number = 0
    for level, layers in enumerate(_layers(names, "up_blocks")):
        for layer in range(layers):
            rules += under(f"output_blocks.{number}.0", f"up_blocks.{level}.resnets.{layer}", *_RESNET)
            rules += under(f"output_blocks.{number}.1", f"up_blocks.{level}.attentions.{layer}", *_ATTENTION)
            number += 1
        # The upsampler stands behind the last layer of its level, and behind the attention where there is one.
        place = 2 if any(n.startswith(f"up_blocks.{level}.attentions.") for n in names) else 1
        rules += [move(f"output_blocks.{number - 1}.{place}.conv.*", f"up_blocks.{level}.upsamplers.0.conv.*")]
    return rules


def _layers(names: list[str], side: str) -> list[int]:
    """How many layers each level has."""
    found = {
        (int(m[1]), int(m[2]))
        for m in (re.match(rf"{side}\.(\d+)\.resnets\.(\d+)\.conv1\.weight$", n) for n in names)
        if m
    }
    levels = sorted({level for level, _ in found})
    counts = [sorted(layer for at, layer in found if at == level) for level in levels]
    whole = levels == list(range(len(levels))) and all(c == list(range(len(c))) for c in counts)
    if not whole or not levels:
        shown = ", ".join(f"{level}: {c}" for level, c in zip(levels, counts, strict=True)) or "none"
        raise FileError(
            f"UNet: '{side}' has gaps in its levels or layers ({shown}).\n"
            "The file is not complete; join its parts if it is one of several."
        )
    return [len(c) for c in counts]
