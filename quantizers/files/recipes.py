"""Mixed types as llama.cpp's users know them (Q4_K_M, IQ3_XS, ...): which tensor of a GGUF file gets which ggml type.

A recipe is a base type and upgrades by the role of a tensor (attention v, attention output, the way down of an MLP) and
its place among the layers of its kind. The choices for language models are llama.cpp's (`llama_tensor_get_type_impl` in
ggml-org/llama.cpp src/llama-quant.cpp). Fused qkv matrices of image models follow the patch with which most image files
in circulation were made (city96/ComfyUI-GGUF tools/lcpp.patch) where it changes them: Q3_K_M, Q3_K_L, IQ3_M, Q4_K_M and
Q5_K_M. It leaves them at the base type elsewhere (or has no such recipe); there they go up as v does, as llama.cpp has
it for language models (`category_is_attn_v`), since a third of them is v: Q2_K, Q4_K_S (first four blocks), IQ3_XXS and
the recipes below. Beyond both, the modulation of image models goes up by one type in recipes that have upgrades at all,
where it is too large to stay whole.

What stays whole is said by `families.py` for diffusion models and by llama.cpp for text encoders; what the user keeps
loses nothing. Everything that is no linear weight (norms, biases, free parameters, convolutions) is F32 or F16, since
ComfyUI-GGUF and diffusers read BF16 only as the weight of a linear layer; F32 they read everywhere. Kept matrices of a
float32 model are F32 up to `KEPT_NUMEL`; beyond it they are rounded to BF16, and the reason says so.

Where a row is no whole number of blocks, the tensor falls back to a type of smaller blocks, as in llama.cpp.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..errors import SpecError, near
from ..families import find_family
from ..ggml_types import PLAIN_TYPES, TYPES, format_id, type_name
from ..plan import built_in
from ..rules import KEEP, Hit, Rule, layer_name, resolve
from ..weight import TensorMeta
from .architectures import Found
from .layouts.target import Target

FLOATS = ("F32", "F16", "BF16")
SMALL_NUMEL = 1 << 16  # tensors that are no linear weights stay F32 up to here
KEPT_NUMEL = 1 << 24  # float32 weights of linear layers that are kept by built-in rules stay F32 up to here
PLAIN = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
# (type, where): every layer of the kind, or those that llama.cpp's formulas choose; the first that applies counts.
Upgrade = tuple[tuple[str, str], ...]
GROUPED = 4  # query heads for each key and value head from which llama.cpp spends more bits on v


@dataclass(frozen=True)
class Recipe:
    """One mixed type.

    Attributes:
        name: as users write it.
        base: ggml type of what has no upgrade.
        file_type: llama.cpp's number in `general.file_type`.
        upgrades: role -> upgrades.
        without_importance: the same, where there is no importance matrix; before `upgrades`.
        grouped: type of attention v with grouped queries; empty where there is no such rule.
        embedding, output: types of a language model's token embedding, and of what turns hidden states into tokens.
        bare: types that need an importance matrix are made without one too, every column counting the same.
    """

    name: str
    base: str
    file_type: int
    upgrades: Mapping[str, Upgrade] = field(default_factory=lambda: dict[str, Upgrade]())
    without_importance: Mapping[str, Upgrade] = field(default_factory=lambda: dict[str, Upgrade]())
    grouped: str = ""
    embedding: str = ""
    output: str = "Q6_K"
    bare: bool = False


def _attention(kind: str, where: str = "all") -> dict[str, Upgrade]:
    return {"v": ((kind, where),), "qkv": ((kind, where),)}


def _low(name: str, base: str, number: int, more: str, out: str = "") -> Recipe:
    """The recipes below 3 bits."""
    upgrades = {**_attention(more), "down": ((more, "eighth"),), "modulation": ((more, "all"),)}
    if out:
        upgrades["out"] = ((out, "all"),)
    return Recipe(name, base, number, upgrades, grouped="Q4_K", embedding=more, output="Q5_K")


_RECIPES = (
    Recipe("F32", "F32", 0, output=""),
    Recipe("F16", "F16", 1, output=""),
    Recipe("BF16", "BF16", 32, output=""),
    Recipe("Q4_0", "Q4_0", 2),
    Recipe("Q4_1", "Q4_1", 3),
    Recipe("Q5_0", "Q5_0", 8),
    Recipe("Q5_1", "Q5_1", 9),
    Recipe("Q8_0", "Q8_0", 7, output="Q8_0"),
    Recipe(
        "Q2_K", "Q2_K", 10,
        {**_attention("Q3_K"), "out": (("Q3_K", "all"),), "down": (("Q3_K", "all"),), "modulation": (("Q3_K", "all"),)},
        grouped="Q4_K",
    ),
    Recipe("Q2_K_S", "Q2_K", 21, {"down": (("Q4_K", "eighth"),)}, grouped="Q4_K"),
    Recipe("Q3_K_S", "Q3_K", 11),
    Recipe(
        "Q3_K_M", "Q3_K", 12,
        {
            "v": (("Q5_K", "first 2"), ("Q4_K", "all")), "qkv": (("Q4_K", "all"),), "out": (("Q4_K", "all"),),
            "down": (("Q5_K", "sixteenth"), ("Q4_K", "all")), "modulation": (("Q4_K", "all"),),
        },
    ),
    Recipe(
        "Q3_K_L", "Q3_K", 13,
        {
            "v": (("Q5_K", "all"),), "qkv": (("Q4_K", "all"),), "out": (("Q5_K", "all"),), "down": (("Q5_K", "all"),),
            "modulation": (("Q5_K", "all"),),
        },
    ),
    Recipe("Q4_K_S", "Q4_K", 14, {**_attention("Q5_K", "first 4"), "down": (("Q5_K", "eighth"),)}),
    Recipe(
        "Q4_K_M", "Q4_K", 15,
        {
            "v": (("Q6_K", "more"),), "qkv": (("Q5_K", "all"),), "down": (("Q6_K", "more"),),
            "modulation": (("Q5_K", "all"),),
        },
    ),
    Recipe("Q5_K_S", "Q5_K", 16),
    Recipe(
        "Q5_K_M", "Q5_K", 17,
        {
            "v": (("Q6_K", "more"),), "qkv": (("Q6_K", "all"),), "down": (("Q6_K", "more"),),
            "modulation": (("Q6_K", "all"),),
        },
    ),
    Recipe("Q6_K", "Q6_K", 18),
    _low("IQ1_S", "IQ1_S", 24, "Q2_K", "IQ2_XXS"),
    _low("IQ1_M", "IQ1_M", 31, "Q2_K", "IQ2_XXS"),
    _low("IQ2_XXS", "IQ2_XXS", 19, "Q2_K"),
    _low("IQ2_XS", "IQ2_XS", 20, "Q2_K"),
    _low("IQ2_S", "IQ2_XS", 28, "IQ3_S", "IQ3_S"),
    _low("IQ2_M", "IQ2_S", 29, "IQ3_S", "IQ3_S"),
    Recipe(
        "IQ3_XXS", "IQ3_XXS", 23,
        {"q": (("IQ2_S", "all"),), "k": (("IQ2_S", "all"),), "out": (("IQ3_S", "all"),)},
        {**_attention("IQ3_S"), "down": (("Q4_K", "eighth"), ("Q3_K", "all"))},
        grouped="Q4_K", embedding="IQ3_S", output="Q5_K",
    ),
    Recipe(
        "IQ3_XS", "IQ3_S", 22,
        {
            "q": (("IQ3_XXS", "all"),), "k": (("IQ3_XXS", "all"),), "gate": (("IQ3_XXS", "middle"),),
            "up": (("IQ3_XXS", "middle"),),
        },
        grouped="Q4_K",
    ),
    Recipe("IQ3_S", "IQ3_S", 26, grouped="Q4_K"),
    Recipe(
        "IQ3_M", "IQ3_S", 27,
        {
            **_attention("Q4_K"), "out": (("Q4_K", "all"),), "down": (("Q4_K", "eighth"),),
            "modulation": (("Q4_K", "all"),),
        },
    ),
    Recipe("IQ4_NL", "IQ4_NL", 25, {}, {"down": (("Q5_K", "eighth"),)}, grouped="Q5_K"),
    Recipe("IQ4_XS", "IQ4_XS", 30, {}, {"down": (("Q5_K", "eighth"),)}, grouped="Q5_K"),
    Recipe("TQ1_0", "TQ1_0", 36, embedding="Q4_K"),
    Recipe("TQ2_0", "TQ2_0", 37, embedding="Q4_K"),
    Recipe("MXFP4", "MXFP4", 38, output="Q8_0"),
    Recipe("NVFP4", "NVFP4", 39),
)  # fmt: skip
RECIPES: dict[str, Recipe] = {r.name: r for r in _RECIPES}
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}  # llama-quantize's own

# Where a row is no whole number of blocks (llama.cpp's `tensor_type_fallback`; the last line is not there).
FALLBACKS = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    **{"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"},
    **{"NVFP4": "MXFP4"},
}
WITHOUT_IMPORTANCE = "Q2_K"  # in place of types that ggml cannot make without an importance matrix

# Role of a tensor by its name, in ComfyUI's layout or llama.cpp's; the first match counts.
_ROLES = {
    role: re.compile(pattern)
    for role, pattern in {
        "qkv": r"(^|[._])(to_)?(qkv|kv)(_linear|_proj)?\.weight$",
        "v": r"(^|[._])(attn_v|to_v(_t|\.0)?|(add_)?v_proj|v_img|w[12]v)\.weight$|attn\w*\.v\.weight$",
        "k": r"(^|[._])(attn_k|to_k(_t|\.0)?|(add_)?k_proj|k_img|w[12]k)\.weight$|attn\w*\.k\.weight$",
        "q": r"(^|[._])(attn_q|to_q(_t|\.0)?|(add_)?q_proj|w[12]q)\.weight$|attn\w*\.q\.weight$",
        "out": r"(^|[._])(to_out(\.0|_t)?|to_add_out|o_proj|output_proj|out_proj|attn_o(utput)?|w[12]o)\.weight$"
        r"|(attn|attention)\w*[._](proj|out|o)\.weight$",
        "down": r"(^|[._])(ffn_down|linear2|down_proj|c_proj|w2)\.weight$"
        r"|(^|[._])(mlp|ffn|ff|block)(\.net)?\.(2|fc2|layer2)\.weight$",
        "gate": r"(^|[._])(ffn_gate|gate_proj|w1|c_fc1)\.weight$",
        "up": r"(^|[._])(ffn_up|up_proj|w3|c_fc2)\.weight$"
        r"|(^|[._])(mlp|ffn|ff|block)(\.net)?\.(0|fc1|layer1|0\.proj)\.weight$",
        "modulation": r"(^|[._])(mod|modulation|mod[XC]{1,2}|ada[lL][nN]_modulation\w*)(\.\w+)?\.weight$",
    }.items()
}
# Beside what `families.py` keeps, by architecture: models whose names it does not know.
_SENSITIVE = {
    "aura": (r"^(init_x_linear|cond_seq_linear|final_linear|modF|t_embedder)\b", "input, output or timestep"),
    "cosmos": (r"^(x_embedder|t_embedder|t_embedding_norm|pos_embedder|final_layer)\b", "input, output or timestep"),
    "hidream": (r"\bff_i\.gate\b|^caption_projection\b", "expert gate or text projection"),
    "ltxv": (r"^(patchify_proj|adaln_single|caption_projection|proj_out)\b", "input, output or timestep"),
    "pixart": (r"^(x_embedder|t_embedder|y_embedder|csize_embedder|ar_embedder|final_layer)\b", "input or output"),
}
# Weights that are added to or looked up in, not multiplied with: F32 where they are small.
_NOT_LINEAR = re.compile(r"\bff_i\.gate\.weight$|(^|[._])(attn_rel_b|position_embd?|pos_embd?|rel_pos)\.weight$")
# Text encoders, in llama.cpp's names.
_TEXT_KEPT = re.compile(r"_norm\.weight$|attn_rel_b|position_embd|patch_embd|ffn_gate_inp|^(v|mm)\.")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Choice:
    """What a tensor becomes.

    Attributes:
        kind: ggml type name.
        reason: why.
        change: "upgrade", "fallback", "rule" or empty.
        quantized: whether a recipe or rule chose the type, rather than the tensor being kept.
    """

    target: Target
    kind: str
    reason: str
    change: str = ""
    quantized: bool = False

    @property
    def nbytes(self) -> int:
        return nbytes(self.kind, self.target.shape)


def nbytes(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor in a file; its rows must be whole blocks."""
    t = TYPES.get(kind) or PLAIN_TYPES[kind]
    return math.prod(shape) // t.block * t.nbytes


def find_recipe(name: str, others: Sequence[str] = ()) -> Recipe:
    """A recipe by its name, in any case, or by a format id (`gguf-q4-k`: that type for all, without upgrades).

    Args:
        others: formats that the user may have meant in place of a GGUF type, for the message.
    Raises:
        SpecError: no such type; with the nearest names.
    """
    asked = name.strip()
    if asked.lower().startswith("gguf-"):
        kind = type_name(asked.lower())
        if kind in TYPES or kind in FLOATS:
            return pure(kind)
    else:
        upper = asked.upper().replace("-", "_")
        upper = ALIASES.get(upper, upper)
        if upper in RECIPES:
            return RECIPES[upper]
    if others:
        within = [n for n in others if asked.lower() in n]
        close = f" Did you mean {', '.join(within[:3])}?" if within else near(asked.lower(), others)
        raise SpecError(
            f"Unknown type '{asked}'.{close or near(asked.upper(), RECIPES)}\n"
            f"A safetensors file takes {', '.join(FLOATS)} and every format of `quantwire formats`; a GGUF file "
            f"{', '.join(RECIPES)}."
        )
    names = [*RECIPES, *ALIASES]
    raise SpecError(f"Unknown GGUF type '{asked}'.{near(asked.upper(), names)}\nTypes: {', '.join(RECIPES)}.")


def pure(kind: str) -> Recipe:
    """One type for all that is quantized."""
    file_type = next((r.file_type for r in _RECIPES if r.base == kind), RECIPES["Q4_0"].file_type)
    return Recipe(format_id(kind), kind, file_type, output="", embedding="", bare=True)


def parse_target(text: str) -> str:
    """ggml type that a rule names: `keep`, a type (`Q6_K`, `F16`) or a format id (`gguf-q6-k`).

    Raises:
        SpecError: something else.
    """
    name = text.strip()
    if name.lower() == KEEP:
        return KEEP
    kind = type_name(name.lower()) if name.lower().startswith("gguf-") else name.upper()
    if kind in TYPES or kind in FLOATS:
        return kind
    words = [*TYPES, *FLOATS, KEEP]
    raise SpecError(f"A GGUF file cannot hold {text.strip()}.{near(kind, words)}\nRules may name {', '.join(words)}.")


def choose(
    found: Found,
    targets: Sequence[Target],
    recipe: Recipe,
    rules: Sequence[Rule] = (),
    exclude: Sequence[str] = (),
    include: Sequence[str] = (),
    importance: Collection[str] | None = None,
) -> tuple[list[Choice], list[str]]:
    """The type of every tensor, from names and shapes alone.

    Args:
        rules: a type or `keep` for single layers; with `exclude` and `include` as in `QuantSpec`. They win over the
            recipe, and over the lists of sensitive layers.
        importance: names that have an importance matrix; None is no matrix at all.
    Returns:
        one choice a target, in order, and notes for the report.
    Raises:
        SpecError: a pattern that matches nothing or contradicts another, or a type that needs an importance matrix.
    """
    rules = [dataclasses.replace(rule, target=parse_target(rule.target)) for rule in rules]
    matrices = {layer_name(t.name): t for t in targets if len(t.shape) > 1}
    hits = resolve(rules, exclude, include, list(matrices))
    linear = {name: t.meta for name, t in matrices.items() if is_linear(t)}
    if found.component == "text encoder":
        reasons, notes = _kept_text(linear), list[str]()
    else:
        included = {layer for p in include for layer in resolve([Rule(p, KEEP)], (), (), list(matrices))}
        reasons, notes = _kept_diffusion(found, targets, linear, {*hits, *included})
    kinds = _Kinds(recipe, linear, importance, found.component == "text encoder")
    choices = [_choice(t, recipe, kinds, hits, reasons, linear) for t in targets]
    choices = [_fallback(c, None if recipe.bare else importance) for c in choices]
    if recipe.bare:
        notes += _bare_notes(choices, importance)
    elif importance is None:
        _refuse_without_importance(choices, recipe)
    return choices, notes


def choose_plain(
    targets: Sequence[Target],
    recipe: Recipe,
    rules: Sequence[Rule] = (),
    exclude: Sequence[str] = (),
    include: Sequence[str] = (),
) -> list[Choice]:
    """`choose` for a safetensors file of plain values: the recipe's type for all but what the user says.

    Raises:
        SpecError: a pattern that matches nothing or contradicts another, or a rule with a type other than plain ones.
    """
    known = {kind.lower(): kind for kind in FLOATS} | {KEEP: KEEP}
    for rule in rules:
        if rule.target.strip().lower() not in known:
            raise SpecError(
                f"Rule '{rule}': a safetensors file of {recipe.base} cannot hold {rule.target}.\n"
                f"Rules may name {', '.join(known.values())} here; GGUF types need a target *.gguf."
            )
    rules = [dataclasses.replace(rule, target=known[rule.target.strip().lower()]) for rule in rules]
    matrices = [layer_name(t.name) for t in targets if len(t.shape) > 1]
    hits = resolve(rules, exclude, include, matrices)
    choices: list[Choice] = []
    for t in targets:
        hit = hits.get(layer_name(t.name)) if len(t.shape) > 1 else None
        if hit is None:
            choices.append(Choice(t, recipe.base, f"{recipe.base} asked for"))
        elif hit.target == KEEP:
            choices.append(Choice(t, PLAIN[t.dtype], _why_kept(hit)))
        else:
            choices.append(Choice(t, hit.target, f"rule '{hit.source}'", "rule"))
    return choices


def is_linear(t: Target) -> bool:
    """Whether a tensor is, by its name and shape, the weight of a linear layer or an embedding."""
    return len(t.shape) == 2 and t.name.endswith(".weight") and 0 not in t.shape and not _NOT_LINEAR.search(t.name)


def kept_kind(t: Target) -> str:
    """The type of a tensor that built-in rules keep."""
    if is_linear(t):
        return "BF16" if t.dtype is torch.float32 and math.prod(t.shape) > KEPT_NUMEL else PLAIN[t.dtype]
    small = len(t.shape) < 2 or len(t.shape) > 4 or math.prod(t.shape) <= SMALL_NUMEL or not t.name.endswith(".weight")
    return "F32" if small else "F16"


def exact_kind(t: Target) -> str:
    """The type of a tensor that the user keeps: one that holds all of its values."""
    if is_linear(t):
        return PLAIN[t.dtype]
    return kept_kind(t) if t.dtype is torch.float16 else "F32"


def _kept(t: Target, why: str) -> Choice:
    """What built-in rules keep; the reason says where that rounds values."""
    kind = kept_kind(t)
    if kind in ("F32", PLAIN[t.dtype]):
        return Choice(t, kind, why)
    return Choice(t, kind, f"{why}; {PLAIN[t.dtype]} rounded to {kind}")


def _why_kept(hit: Hit) -> str:
    return "excluded" if hit.source.startswith("exclude=") else f"rule '{hit.source}'"


def _kept_text(linear: Mapping[str, TensorMeta]) -> dict[str, str]:
    return {name: "kept by llama.cpp" for name, meta in linear.items() if _TEXT_KEPT.search(meta.name)}


def _kept_diffusion(
    found: Found, targets: Sequence[Target], linear: Mapping[str, TensorMeta], decided: Collection[str]
) -> tuple[dict[str, str], list[str]]:
    reasons, notes = built_in(find_family(t.meta for t in targets), linear, decided)
    pattern, reason = _SENSITIVE.get(found.architecture, (None, ""))
    if pattern is not None:
        reasons |= {n: f"{found.architecture}: {reason}" for n in linear if n not in reasons and re.search(pattern, n)}
    return reasons, notes


class _Kinds:
    """The type that a recipe gives each linear weight."""

    def __init__(
        self, recipe: Recipe, linear: Mapping[str, TensorMeta], importance: Collection[str] | None, text: bool
    ) -> None:
        self.recipe = recipe
        self.linear = linear
        self.has_importance = importance is not None
        self.text = text
        self.tied = "output" not in linear
        stacks: dict[str, list[tuple[tuple[int, ...], str]]] = {}
        for name in linear:
            numbers = tuple(int(n) for n in _NUMBER.findall(f".{name}."))
            stacks.setdefault(_NUMBER.sub("*", f".{name}."), []).append((numbers, name))
        # Layer -> (place, number of layers of its kind).
        self.places = {name: (i, len(stack)) for stack in stacks.values() for i, (_, name) in enumerate(sorted(stack))}

    def of(self, name: str) -> tuple[str, str]:
        """(type, role of the upgrade); the role is empty for the base type."""
        if self.text and name in ("token_embd", "output"):
            whole = name == "output" or self.tied
            kind = self.recipe.output if whole else self.recipe.embedding
            return (kind, "token embedding") if kind and kind != self.recipe.base else (self.recipe.base, "")
        role = role_of(self.linear[name].name)
        if role in ("v", "qkv") and self.recipe.grouped and self._grouped(name):
            return self.recipe.grouped, "attention v of grouped queries"
        tables = ((self.recipe.without_importance,) if not self.has_importance else ()) + (self.recipe.upgrades,)
        for table in tables:
            for kind, where in table.get(role, ()):
                if _applies(where, *self.places[name]):
                    return kind, _SHOWN.get(role, role)
        return self.recipe.base, ""

    def _grouped(self, name: str) -> bool:
        """Whether q has at least four times the rows of v."""
        q = re.sub(r"(attn_|to_|^|\.)v(_proj)?$", lambda m: m[0].replace("v", "q", 1), name)
        if q == name or q not in self.linear:
            return False
        return self.linear[q].shape[0] >= GROUPED * self.linear[name].shape[0]


_SHOWN = {
    **{"v": "attention v", "qkv": "fused attention q, k, v", "out": "attention output", "down": "MLP, second half"},
    **{"q": "attention q", "k": "attention k", "gate": "MLP gate", "up": "MLP, first half"},
}


def role_of(name: str) -> str:
    """`v`, `qkv`, `out`, `down`, ... by the name of a tensor; empty for others."""
    return next((role for role, pattern in _ROLES.items() if pattern.search(name)), "")


def _applies(where: str, i: int, n: int) -> bool:
    """llama.cpp's formulas for the i-th of n layers; `more` is its `use_more_bits`."""
    if where == "more":
        return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2
    if where == "middle":
        return n // 8 <= i < 7 * n // 8
    limits = {"all": n, "eighth": n // 8, "sixteenth": n // 16, "first 2": 2, "first 4": 4}
    return i < limits[where]


def _choice(
    t: Target,
    recipe: Recipe,
    kinds: _Kinds,
    hits: Mapping[str, Hit],
    reasons: Mapping[str, str],
    linear: Mapping[str, TensorMeta],
) -> Choice:
    name = layer_name(t.name)
    hit = hits.get(name) if len(t.shape) > 1 else None
    if hit is not None and hit.target != KEEP:
        return Choice(t, hit.target, f"rule '{hit.source}'", "rule", quantized=True)
    if hit is not None:
        return Choice(t, exact_kind(t), _why_kept(hit))
    if recipe.base in FLOATS:
        whole = recipe.base == "F32" or is_linear(t) or (recipe.base == "F16" and len(t.shape) > 1)
        return Choice(t, recipe.base, f"{recipe.base} asked for") if whole else _kept(t, "not a linear weight")
    if name not in linear or t.name != linear[name].name:
        return _kept(t, "not a linear weight")
    if name in reasons:
        return _kept(t, reasons[name])
    kind, role = kinds.of(name)
    if kind == recipe.base:
        return Choice(t, kind, "linear weight", quantized=True)
    return Choice(t, kind, role, "upgrade", quantized=True)


def _fallback(c: Choice, importance: Collection[str] | None) -> Choice:
    """The choice with a type that the tensor's rows, and what is known of it, allow."""
    if c.kind in FLOATS:
        return c
    row, kind, why = c.target.shape[-1], c.kind, ""
    if TYPES[kind].needs_importance and importance is not None and c.target.name not in importance:
        kind, why = WITHOUT_IMPORTANCE, f"{kind} needs an importance matrix, and there is none for it"
    while row % TYPES[kind].block:
        why = f"rows of {row} are not whole blocks of {TYPES[kind].block} as {kind} needs"
        kind = FALLBACKS.get(kind, "F16")
        if kind == "F16":
            kind = kept_kind(c.target)
            break
    if kind == c.kind:
        return c
    return dataclasses.replace(c, kind=kind, reason=f"{c.reason}; {why}", change="fallback")


def _bare_notes(choices: Sequence[Choice], importance: Collection[str] | None) -> list[str]:
    needy = [c for c in choices if c.kind in TYPES and TYPES[c.kind].needs_importance]
    bare = [c for c in needy if importance is None or c.target.name not in importance]
    if not bare:
        return []
    return [f"{len(bare)} tensors in {bare[0].kind} without an importance matrix: every column counts the same"]


def _refuse_without_importance(choices: Sequence[Choice], recipe: Recipe) -> None:
    first = next((c for c in choices if c.kind in TYPES and TYPES[c.kind].needs_importance), None)
    if first is not None:
        raise SpecError(
            f"{recipe.name}: '{first.target.name}' would be {first.kind}, which needs an importance matrix.\n"
            "Give one with --imatrix (`quantwire imatrix WORKFLOW.json` records one), or use Q2_K or IQ3_XXS."
        )
