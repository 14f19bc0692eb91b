"""Which layers a plan quantizes, keeps and refuses."""

from __future__ import annotations

import pytest
import torch
from quantwire.quantizers import apply
from quantwire.quantizers.apply import REPORTED_TOKENS, OnFailure, quantize_linears, quantize_tensor, slots_of
from quantwire.quantizers.base import Availability
from quantwire.quantizers.compat.modes import Carrier
from quantwire.quantizers.errors import BackendUnavailable, SpecError, WeightError
from quantwire.quantizers.plan import Action, QuantPlan, Slot, make_plan, matches, sensitive_reason
from quantwire.quantizers.registry import get_quantizer
from quantwire.quantizers.rules import Rule
from quantwire.quantizers.spec import QuantSpec
from quantwire.quantizers.weight import QuantizedWeight, TensorMeta

EMBEDDER, EMBEDDING, NORM, FINAL = (
    f"sensitive: {reason}" for reason in ("embedder", "embedding", "norm or modulation", "final layer")
)

FLUX_COMFYUI = {
    "img_in": EMBEDDER,
    "txt_in": EMBEDDER,
    "time_in.in_layer": EMBEDDER,
    "vector_in.out_layer": EMBEDDER,
    "guidance_in.in_layer": EMBEDDER,
    "double_blocks.0.img_mod.lin": NORM,
    "double_blocks.18.txt_mod.lin": NORM,
    "double_blocks.0.img_attn.qkv": None,
    "double_blocks.0.txt_attn.proj": None,
    "double_blocks.0.img_mlp.0": None,
    "single_blocks.37.modulation.lin": NORM,
    "single_blocks.0.linear1": None,
    "single_blocks.0.linear2": None,
    "final_layer.linear": FINAL,
    "final_layer.adaLN_modulation.1": NORM,
}
FLUX_DIFFUSERS = {
    "x_embedder": EMBEDDER,
    "context_embedder": EMBEDDER,
    "time_text_embed.timestep_embedder.linear_1": EMBEDDER,
    "time_text_embed.guidance_embedder.linear_2": EMBEDDER,
    "transformer_blocks.0.norm1.linear": NORM,
    "transformer_blocks.0.norm1_context.linear": NORM,
    "transformer_blocks.0.attn.to_q": None,
    "transformer_blocks.0.attn.to_out.0": None,
    "transformer_blocks.0.attn.add_q_proj": None,
    "transformer_blocks.0.ff.net.0.proj": None,
    "transformer_blocks.0.ff_context.net.2": None,
    "single_transformer_blocks.0.norm.linear": NORM,
    "single_transformer_blocks.0.proj_mlp": None,
    "single_transformer_blocks.0.proj_out": None,
    "norm_out.linear": NORM,
    "proj_out": FINAL,
}
CLIP = {
    "text_model.embeddings.token_embedding": EMBEDDING,
    "text_model.embeddings.position_embedding": EMBEDDING,
    "text_model.encoder.layers.0.self_attn.q_proj": None,
    "text_model.encoder.layers.0.self_attn.out_proj": None,
    "text_model.encoder.layers.0.mlp.fc1": None,
    "text_model.encoder.layers.0.layer_norm1": NORM,
    "text_model.final_layer_norm": NORM,
    "text_projection": EMBEDDING,
}
T5 = {
    "shared": EMBEDDING,
    "encoder.embed_tokens": EMBEDDING,
    "encoder.block.0.layer.0.SelfAttention.q": None,
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias": EMBEDDING,
    "encoder.block.0.layer.0.layer_norm": NORM,
    "encoder.block.23.layer.1.DenseReluDense.wi_0": None,
    "encoder.final_layer_norm": NORM,
    "lm_head": FINAL,
}
WAN = {
    "patch_embedding": EMBEDDER,
    "text_embedding.0": EMBEDDER,
    "time_projection.1": EMBEDDER,
    "img_emb.proj.1": EMBEDDER,
    "blocks.0.self_attn.q": None,
    "blocks.0.ffn.0": None,
    "head.head": FINAL,
}


def slot(name: str, shape: tuple[int, ...] = (64, 64), linear: bool = True) -> Slot:
    return Slot(TensorMeta(f"{name}.weight", shape, torch.bfloat16), linear)


def plan(slots: list[Slot], spec: QuantSpec) -> QuantPlan:
    return make_plan(slots, spec, get_quantizer(spec.format_id))


def quantized(names: list[str], **lists: tuple[str, ...]) -> list[str]:
    made = plan([slot(n) for n in names], QuantSpec("bnb-int8", **lists))
    return [d.meta.name.removesuffix(".weight") for d in made.to_quantize]


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        pytest.param(layer, reason, id=f"{family}-{layer}")
        for family, layers in (
            ("comfyui", FLUX_COMFYUI),
            ("diffusers", FLUX_DIFFUSERS),
            ("clip", CLIP),
            ("t5", T5),
            ("wan", WAN),
        )
        for layer, reason in layers.items()
    ],
)
def test_sensitive_layers(layer: str, reason: str | None) -> None:
    assert sensitive_reason(layer) == reason


@pytest.mark.parametrize("kind", ["gguf-iq2-xxs", "gguf-iq1-s"])
def test_formats_that_are_meant_for_an_importance_matrix_say_so(kind: str) -> None:
    slots = [slot("blocks.3.attn", (256, 256)), slot("blocks.3.mlp", (256, 256))]
    for spec in (QuantSpec(kind), QuantSpec("gguf-q4-k", rules=(Rule("*.mlp", kind),))):
        (note,) = plan(slots, spec).notes
        assert kind in note
        assert "quantwire imatrix" in note
    assert not plan(slots, QuantSpec(kind, rules=(Rule("*", "gguf-q4-k"),))).notes


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "model.", "transformer."])
def test_final_layers_behind_the_prefix_of_a_whole_model(prefix: str) -> None:
    for layer in ("final_layer.linear", "proj_out", "head.head", "lm_head"):
        assert sensitive_reason(prefix + layer) == FINAL
    assert sensitive_reason(f"{prefix}single_transformer_blocks.0.proj_out") is None


@pytest.mark.parametrize(
    ("pattern", "layer", "hit"),
    [
        ("img_attn", "double_blocks.0.img_attn.qkv", True),
        ("img_attn.qkv", "double_blocks.0.img_attn.qkv", True),
        ("attn", "double_blocks.0.img_attn.qkv", False),
        ("double_blocks.1", "double_blocks.10.img_attn.qkv", False),
        ("*.qkv", "double_blocks.0.img_attn.qkv", True),
        ("*attn*", "double_blocks.0.img_attn.qkv", True),
        ("double_blocks.[01].*", "double_blocks.1.img_mlp.0", True),
        ("double_blocks.[01].*", "double_blocks.2.img_mlp.0", False),
        ("qkv*", "double_blocks.0.img_attn.qkv", False),
        ("double_blocks.0.img_attn.qkv.weight", "double_blocks.0.img_attn.qkv", True),
        ("*.qkv.weight", "double_blocks.0.img_attn.qkv", True),
    ],
)
def test_patterns(pattern: str, layer: str, hit: bool) -> None:
    assert matches(pattern, layer) is hit


def test_include_beats_the_sensitive_list_and_exclude_beats_include() -> None:
    names = ["img_in", "txt_in", "blocks.0.qkv", "blocks.1.qkv"]
    assert quantized(names) == ["blocks.0.qkv", "blocks.1.qkv"]
    assert quantized(names, include=("img_in",)) == ["img_in", "blocks.0.qkv", "blocks.1.qkv"]
    assert quantized(names, exclude=("blocks.0",)) == ["blocks.1.qkv"]
    assert quantized(names, include=("*_in",), exclude=("txt_in",)) == ["img_in", "blocks.0.qkv", "blocks.1.qkv"]


def test_reasons_and_predicted_bytes() -> None:
    slots = [slot("img_in"), slot("a.qkv", (48, 128)), slot("b.qkv"), slot("conv", (8, 4, 3, 3), linear=False)]
    made = plan(slots, QuantSpec("gguf-q4-0", exclude=("b",)))
    assert [(d.action, d.reason) for d in made.decisions] == [
        (Action.KEEP, EMBEDDER),
        (Action.QUANTIZE, "linear weight"),
        (Action.KEEP, "excluded"),
        (Action.KEEP, "not a linear weight"),
    ]
    whole = 64 * 64 * 2
    assert [d.nbytes_out for d in made.decisions] == [whole, 48 * 128 // 32 * 18, whole, 8 * 4 * 9 * 2]
    assert made.nbytes_in == 2 * whole + 48 * 128 * 2 + 8 * 4 * 9 * 2
    assert made.nbytes_out == made.nbytes_in - 48 * 128 * 2 + 48 * 128 // 32 * 18


@pytest.mark.parametrize("which", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_refused(which: str) -> None:
    with pytest.raises(SpecError) as failure:
        quantized(["blocks.0.qkv", "blocks.1.qkv"], **{which: ("block.0",)})
    assert str(failure.value) == (
        "Pattern 'block.0' matches none of the 2 linear layers (such as blocks.0.qkv, blocks.1.qkv)."
    )


def test_a_pattern_on_a_model_without_linear_layers() -> None:
    with pytest.raises(SpecError, match=r"^Pattern 'a' matches none of the 0 linear layers\.$"):
        plan([slot("conv", (8, 4, 3, 3), linear=False)], QuantSpec("bnb-int8", exclude=("a",)))


def test_refused_tensors_are_named_with_a_format_that_takes_all_of_them() -> None:
    made = plan([slot("a", (64, 33)), slot("b"), slot("c", (64, 40))], QuantSpec("gguf-q8-0"))
    assert [d.action for d in made.decisions] == [Action.REFUSE, Action.QUANTIZE, Action.REFUSE]
    with pytest.raises(SpecError) as failure:
        made.raise_on_refusal()
    assert str(failure.value).splitlines() == [
        "'a.weight': gguf-q8-0: K=33 is not a multiple of block size 32 (and 1 more).",
        "Use bnb-int8, or add the layer to the layers to keep (`exclude`).",
    ]


def test_a_suggestion_comes_from_the_given_formats_only() -> None:
    made = plan([slot("a", (64, 33))], QuantSpec("gguf-q8-0"))
    with pytest.raises(SpecError) as failure:
        made.raise_on_refusal(["gguf-q8-0", "gguf-q4-0"])
    assert str(failure.value).splitlines()[1] == "Add the layer to the layers to keep (`exclude`)."


def test_nothing_refused_raises_nothing() -> None:
    plan([slot("a")], QuantSpec("gguf-q8-0")).raise_on_refusal()


def test_rules_choose_formats_layer_by_layer() -> None:
    spec = QuantSpec(
        "bnb-nf4", rules=(Rule("*.mlp", "gguf-q8-0"), Rule("re:^img", "bnb;bits=8"), Rule("b.qkv", "keep"))
    )
    made = plan([slot(n) for n in ("img_in", "a.qkv", "a.mlp", "b.qkv", "txt_in")], spec)
    assert [(d.action, d.spec and d.spec.format_id, d.reason) for d in made.decisions] == [
        (Action.QUANTIZE, "bnb-int8", "linear weight, rule 're:^img = bnb-int8'"),
        (Action.QUANTIZE, "bnb-nf4", "linear weight"),
        (Action.QUANTIZE, "gguf-q8-0", "linear weight, rule '*.mlp = gguf-q8-0'"),
        (Action.KEEP, None, "rule 'b.qkv = keep'"),
        (Action.KEEP, None, EMBEDDER),
    ]
    assert made.format_ids == ["bnb-int8", "bnb-nf4", "gguf-q8-0"]
    assert [d.nbytes_out for d in made.decisions][:3] == [64 * 64 + 4 * 64, 64 * 32 + 4 * 64, 64 * 64 // 32 * 34]


def test_a_layer_that_its_rule_cannot_hold_is_refused_by_that_format() -> None:
    made = plan([slot("a", (64, 33)), slot("b")], QuantSpec("bnb-int8", rules=(Rule("a", "gguf-q8-0"),)))
    with pytest.raises(SpecError, match=r"^'a\.weight': gguf-q8-0: K=33 is not a multiple of block size 32\.\n"):
        made.raise_on_refusal([])


def test_contradictions_stop_the_plan() -> None:
    with pytest.raises(SpecError, match=r"'a = bnb-nf4' and 're:a = keep' both match 'a'"):
        plan([slot("a")], QuantSpec("bnb-int8", rules=(Rule("a", "bnb-nf4"), Rule("re:a", "keep"))))


def test_every_layer_gets_its_own_quantizer_and_the_report_says_so() -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))
    spec = QuantSpec("bnb-nf4", rules=(Rule("re:^[01]$", "gguf-q8-0"), Rule("3", "keep")))
    layers, report = quantize_linears(model, spec)
    assert {name: layer.format_id for name, layer in layers.items()} == {
        "0": "gguf-q8-0", "1": "gguf-q8-0", "2": "bnb-nf4",
    }  # fmt: skip
    alone, _ = quantize_tensor("0.weight", model[0].weight.detach(), QuantSpec("gguf-q8-0"))
    assert torch.equal(layers["0"].qdata, alone.tensors["qdata"])
    entries = {e.name: e for e in report.entries if e.action == "quantize"}
    assert {name: e.format_id for name, e in entries.items()} == {
        "0.weight": "gguf-q8-0", "1.weight": "gguf-q8-0", "2.weight": "bnb-nf4",
    }  # fmt: skip
    for name, e in entries.items():
        layer = layers[name.removesuffix(".weight")]
        chosen = get_quantizer(layer.format_id).kernel(
            layer.quantized_weight, torch.device("cpu"), torch.float32, REPORTED_TOKENS
        )
        assert e.kernel == f"{chosen.name}: {chosen.reason}"
    first = str(report).splitlines()[0]
    assert first == "model: 3 linear layers: 2 in gguf-q8-0, 1 in bnb-nf4 (quantwire carrier)"
    assert QuantSpec.from_uri(report.uri) == spec
    assert report.to_dict()["entries"][0]["kernel"] == ""


def test_formats_of_rules_must_run_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    from quantwire.quantizers import registry

    real = registry.availability
    gone = Availability(False, "the library is missing.", "Install it.")
    monkeypatch.setattr(registry, "availability", lambda f: gone if f == "gguf-q8-0" else real(f))
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    with pytest.raises(BackendUnavailable, match=r"^gguf-q8-0: the library is missing\."):
        quantize_linears(model, QuantSpec("bnb-nf4", rules=(Rule("1", "gguf-q8-0"),)))


@pytest.mark.parametrize("which", ["rules", "include"])
def test_naming_some_layers_changes_nothing_for_the_others(which: str) -> None:
    """20 modulation layers of 32 MiB are too many to keep; with 15 of them named, the other 5 alone would not be."""
    slots = [slot(f"double_blocks.{i}.img_mod.lin", (8192, 2048)) for i in range(20)]
    slots += [slot("double_blocks.0.img_attn.qkv"), slot("single_blocks.0.linear1"), slot("txt_in"), slot("img_in")]
    named = r"re:blocks\.([1-9]|1[0-5])\.img_mod"
    lists = {"rules": (Rule(named, "bnb-nf4"),)} if which == "rules" else {"include": (named,)}
    without, some = (plan(slots, QuantSpec("gguf-q8-0", **kwargs)) for kwargs in ({}, lists))
    asked = {f"double_blocks.{i}.img_mod.lin.weight" for i in range(1, 16)}
    for a, b in zip(without.decisions, some.decisions, strict=True):
        assert a.meta.name in asked or a == b
    assert without.decisions[18].action is Action.QUANTIZE
    assert without.notes == some.notes != ()


class Doubled(torch.nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def with_own_forward() -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Linear(64, 64), Doubled(64, 64))


def test_a_layer_with_a_forward_of_its_own_stays() -> None:
    layers, report = quantize_linears(with_own_forward(), QuantSpec("bnb-int8"))
    assert list(layers) == ["0"]
    (entry,) = (e for e in report.entries if e.name == "1.weight")
    assert entry.action == "keep"
    assert entry.reason.startswith("Doubled is a subclass of nn.Linear with a forward of its own")


@pytest.mark.parametrize("asked", [{"include": ("1",)}, {"rules": (Rule("1", "bnb-nf4"),)}], ids=["include", "rule"])
def test_such_a_layer_is_refused_where_the_user_names_it(asked: dict[str, tuple[Rule | str, ...]]) -> None:
    with pytest.raises(SpecError) as failure:
        quantize_linears(with_own_forward(), QuantSpec("bnb-int8", **asked))
    said, advice = str(failure.value).splitlines()
    assert said.startswith("'1.weight': Doubled is a subclass of nn.Linear with a forward of its own")
    assert advice.startswith("Add the layer to the layers to keep"), "no other format would take it"
    layers, report = quantize_linears(
        with_own_forward(), QuantSpec("bnb-int8", **asked), on_failure=OnFailure.FULL_PRECISION
    )
    assert list(layers) == ["0"]
    assert report.warnings[0].startswith("1.weight stays at full precision: Doubled is a subclass")


def test_subclasses_that_multiply_as_linear_does_are_quantized() -> None:
    from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
    from transformers.models.falcon.modeling_falcon import FalconLinear

    class Named(torch.nn.Linear):
        pass

    def forward(self: torch.nn.Linear, input: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(input, self.weight, self.bias)

    # What ComfyUI's layers look like: nested classes of the module comfy.ops.
    hosts = type("Linear", (torch.nn.Linear,), {"__module__": "comfy.ops", "forward": forward})
    strange = type("Linear", (torch.nn.Linear,), {"__module__": "comfy.opsimilar", "forward": forward})
    kinds = (torch.nn.Linear, NonDynamicallyQuantizableLinear, FalconLinear, Named, hosts, strange)
    found = slots_of(torch.nn.Sequential(*(kind(64, 64, bias=False) for kind in kinds)))
    assert [bool(s.stays) for s in found] == [False] * 5 + [True]
    assert all(s.linear for s in found)


def test_layers_without_values_are_refused_before_any_work() -> None:
    lazy = torch.nn.Sequential(torch.nn.LazyLinear(64), torch.nn.Linear(64, 64))
    with pytest.raises(WeightError, match=r"^'0\.weight': LazyLinear has no values yet.*\nRun the model once"):
        quantize_linears(lazy, QuantSpec("bnb-int8"))
    lazy(torch.zeros(1, 64))
    assert len(quantize_linears(lazy, QuantSpec("bnb-int8"))[0]) == 2
    seen: list[object] = []
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64, device="meta"))
    for carrier in Carrier:
        with pytest.raises(WeightError, match=r"^'1\.weight': is on the device meta.*\nLoad the model's weights"):
            quantize_linears(
                model, QuantSpec("bnb-int8"), carrier=carrier, progress=lambda items, total: seen.append(total) or items
            )
    assert seen == []
    assert list(quantize_linears(model, QuantSpec("bnb-int8", exclude=("1",)))[0]) == ["0"]


def test_a_result_that_is_worse_than_zeros_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(get_quantizer("bnb-int8"))

    class Negated(kind):
        """Gives finite values of the right size, every one with the wrong sign: noise of 4 times the signal."""

        def quantize(self, w: torch.Tensor, spec: QuantSpec) -> QuantizedWeight:
            return super().quantize(-w, spec)

    monkeypatch.setattr(apply, "require", lambda _: Negated())
    quantize_tensor("a.weight", torch.zeros(64, 64), QuantSpec("bnb-int8"))
    with pytest.raises(WeightError) as failure:
        quantize_tensor("a.weight", torch.randn(64, 64), QuantSpec("bnb-int8"))
    said, advice = str(failure.value).splitlines()
    assert said == "'a.weight': bnb-int8 gives SQNR -6.0 dB: the result is worse than a layer of zeros."
    assert "exclude" in advice
