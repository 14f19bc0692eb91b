"""QuantPlan: which tensor becomes what, and why. Made from names, shapes and dtypes alone, before any work."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from .base import Quantizer
from .errors import SpecError
from .registry import availability, format_ids, get_quantizer
from .spec import QuantSpec
from .weight import TensorMeta

# Layers that cost little and hurt most: a few percent of the weights of a full-size model, and every token passes
# through them. The names are those of ComfyUI's and diffusers' layouts of the FLUX, SD3, Wan and Qwen-Image families
# and of CLIP, T5 and Llama-type text encoders.
SENSITIVE: tuple[tuple[str, str], ...] = (
    (
        r"(^|\.)(img_in|txt_in|vector_in|time_in|guidance_in|x_embedder|context_embedder|time_text_embed|\w+_embedder"
        r"|\w*patch_embed\w*|pos_embed\w*|time_embed\w*|time_projection|text_embedding|condition_embedder|\w+_emb)(\.|$)",
        "embedder",
    ),
    (r"(^|\.)(\w*embeddings?|embed_tokens|shared|text_projection|relative_attention_bias)(\.|$)", "embedding"),
    (r"(^|\.)(\w*_mod|modulation|adaLN_modulation|norm\w*|\w+_norm|layer_norm\w*)(\.|$)", "norm or modulation"),
    # Blocks have a proj_out of their own, so only the prefixes of whole models may stand in front.
    (
        r"^((model|diffusion_model|transformer)\.)*(proj_out|final_layer|head|lm_head|norm_out)(\.|$)",
        "final layer",
    ),
)


class Action(str, Enum):
    QUANTIZE = "quantize"
    KEEP = "keep"
    REFUSE = "refuse"  # asked for, but the format cannot hold this tensor


@dataclass(frozen=True)
class Slot:
    """A tensor of a model as the plan sees it; `linear` is true for the weight of a linear layer."""

    meta: TensorMeta
    linear: bool


@dataclass(frozen=True)
class Decision:
    """What happens to one tensor; `nbytes_out` is the predicted size."""

    meta: TensorMeta
    action: Action
    reason: str
    nbytes_out: int


@dataclass(frozen=True)
class QuantPlan:
    spec: QuantSpec
    decisions: tuple[Decision, ...]

    @property
    def to_quantize(self) -> list[Decision]:
        return [d for d in self.decisions if d.action is Action.QUANTIZE]

    @property
    def refused(self) -> list[Decision]:
        return [d for d in self.decisions if d.action is Action.REFUSE]

    @property
    def nbytes_in(self) -> int:
        return sum(d.meta.nbytes for d in self.decisions)

    @property
    def nbytes_out(self) -> int:
        return sum(d.nbytes_out for d in self.decisions)

    def raise_on_refusal(self, among: Sequence[str] | None = None) -> None:
        """Stop before any work if a tensor cannot be quantized as asked.

        Args:
            among: formats that may be suggested instead; default: all that can be made.
        Raises:
            SpecError: names the first tensor, the reason, and a format that would take all of the refused ones.
        """
        if not self.refused:
            return
        first = self.refused[0]
        more = f" (and {len(self.refused) - 1} more)" if len(self.refused) > 1 else ""
        candidates = format_ids() if among is None else among
        fit = next((f for f in candidates if all(_fits(f, d.meta) for d in self.refused)), None)
        other = f"Use {fit}, or add" if fit else "Add"
        raise SpecError(
            f"'{first.meta.name}': {first.reason}{more}.\n{other} the layer to the layers to keep (`exclude`)."
        )


def make_plan(slots: Iterable[Slot], spec: QuantSpec, quantizer: Quantizer) -> QuantPlan:
    """Decide for every tensor.

    `spec.exclude` wins over `spec.include`, which wins over the built-in list of sensitive layers.

    Raises:
        SpecError: a pattern of `include` or `exclude` matches no linear layer.
    """
    slots = list(slots)
    names = [_layer(s.meta.name) for s in slots if s.linear]
    for pattern in (*spec.include, *spec.exclude):
        if not any(matches(pattern, name) for name in names):
            shown = f" (such as {', '.join(names[:3])})" if names else ""
            raise SpecError(f"Pattern '{pattern}' matches none of the {len(names)} linear layers{shown}.")
    return QuantPlan(spec, tuple(_decide(slot, spec, quantizer) for slot in slots))


def _decide(slot: Slot, spec: QuantSpec, quantizer: Quantizer) -> Decision:
    meta = slot.meta
    keep = _reason_to_keep(slot, spec)
    if keep:
        return Decision(meta, Action.KEEP, keep, meta.nbytes)
    refusal = quantizer.refuse(spec, meta)
    if refusal:
        return Decision(meta, Action.REFUSE, f"{spec.format_id}: {refusal}", meta.nbytes)
    return Decision(meta, Action.QUANTIZE, "linear weight", quantizer.predict_nbytes(spec, meta))


def _reason_to_keep(slot: Slot, spec: QuantSpec) -> str | None:
    if not slot.linear:
        return "not a linear weight"
    layer = _layer(slot.meta.name)
    if _any(spec.exclude, layer):
        return "excluded"
    if _any(spec.include, layer):
        return None
    return sensitive_reason(layer)


def sensitive_reason(layer: str) -> str | None:
    """Why a layer stays at full precision by default, or None."""
    return next((f"sensitive: {reason}" for pattern, reason in SENSITIVE if re.search(pattern, layer)), None)


def matches(pattern: str, layer: str) -> bool:
    """Glob over the whole dotted layer name, or any dotted part of it when the pattern has no wildcard.

    `.weight` at the end of a pattern is ignored, because messages and reports name tensors so.
    """
    pattern = _layer(pattern)
    if any(c in pattern for c in "*?["):
        return fnmatch.fnmatchcase(layer, pattern)
    return f".{pattern}." in f".{layer}."


def _any(patterns: Sequence[str], layer: str) -> bool:
    return any(matches(p, layer) for p in patterns)


def _layer(name: str) -> str:
    return name.removesuffix(".weight")


def _fits(format_id: str, meta: TensorMeta) -> bool:
    if get_quantizer(format_id).refuse(QuantSpec(format_id), meta) is not None:
        return False
    return availability(format_id).works  # a format whose library is missing is no way out
