"""Mixed recipes: the choice is the best one, keeps to its budget, and its rules give each layer what was chosen."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path

import pytest
import torch
from quantwire.quantizers.errors import BackendUnavailable, SpecError
from quantwire.quantizers.measure import sensitivity
from quantwire.quantizers.measure.knapsack import knapsack
from quantwire.quantizers.measure.parts import ModelPart
from quantwire.quantizers.measure.recipe import Recipe, check_possible, checked, find_recipe
from quantwire.quantizers.measure.recipe_plot import plot_recipe
from quantwire.quantizers.measure.rule_text import rules_text
from quantwire.quantizers.measure.sensitivity import Inputs, Sensitivities, by_weights, of_file, output_noise, sampled
from quantwire.quantizers.rules import KEEP, matches, parse_rules, resolve
from quantwire.quantizers.spec import QuantSpec

FORMATS = ("gguf-q8-0", "gguf-q6-k", "gguf-q5-0", "gguf-q4-0", "gguf-q2-k")


def best_by_trying(sizes: list[list[int]], costs: list[list[float]], budget: int) -> float:
    found = math.inf
    for options in itertools.product(*(range(len(row)) for row in sizes)):
        if sum(sizes[i][o] for i, o in enumerate(options)) <= budget:
            found = min(found, sum(costs[i][o] for i, o in enumerate(options)))
    return found


@pytest.mark.parametrize("seed", range(40))
def test_no_choice_is_better(seed: int) -> None:
    """Against every choice there is; sizes without a common divisor too."""
    draw = random.Random(seed)
    sizes = [[draw.randint(1, 60) * (1 if seed % 2 else 32) for _ in range(draw.randint(1, 4))] for _ in range(6)]
    costs = [[draw.random() for _ in row] for row in sizes]
    for share in (0.0, 0.3, 0.7, 1.0):
        low, high = sum(map(min, sizes)), sum(map(max, sizes))
        budget = int(low + share * (high - low))
        picks = knapsack(sizes, costs, budget)
        assert picks.exact
        assert picks.cost == pytest.approx(best_by_trying(sizes, costs, budget))
        assert picks.nbytes == sum(sizes[i][o] for i, o in enumerate(picks.options)) <= budget


@pytest.mark.parametrize("seed", range(10))
def test_a_coarse_unit_keeps_the_budget_and_tells_how_far_it_can_be(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantwire.quantizers.measure.knapsack.STEPS", 50)
    draw = random.Random(seed)
    sizes = [[draw.randint(1, 10**6) for _ in range(4)] for _ in range(6)]
    costs = [[draw.random() for _ in row] for row in sizes]
    budget = (sum(map(min, sizes)) + sum(map(max, sizes))) // 2
    best = best_by_trying(sizes, costs, budget)
    picks = knapsack(sizes, costs, budget)
    assert not picks.exact
    assert picks.nbytes <= budget
    assert picks.bound <= best + 1e-9
    assert best <= picks.cost <= 1.5 * best + 0.1


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="smallest options take 30"):
        knapsack([[10, 20], [20]], [[1.0, 0.0], [0.0]], 29)


def layers_of(kind: str, numbers: range | list[int]) -> list[str]:
    return [kind.replace("#", str(n)) for n in numbers]


def test_rules_name_the_layers_of_both_layouts_and_no_others() -> None:
    """`proj_out` at the top of a model is not the `proj_out` of its blocks."""
    units = {f"single_blocks.{n}.linear2": [f"single_transformer_blocks.{n}.proj_out"] for n in range(12)}
    units |= {f"double_blocks.{n}.img_attn.qkv": [f"transformer_blocks.{n}.attn.to_{x}" for x in "qkv"] for n in (0, 1)}
    units |= {"final_layer.linear": ["proj_out"], "img_in": ["x_embedder"]}
    draw = random.Random(0)
    targets = {name: draw.choice(["gguf-q6-k", "gguf-q4-0", KEEP]) for name in units}
    rules = parse_rules(rules_text(targets, units))
    assert len(rules) <= 7  # a line for a kind and a target
    here = [layer for layers in units.values() for layer in layers]
    hits = resolve(rules, (), (), here)
    assert {layer: targets[name] for name, layers in units.items() for layer in layers} == {
        layer: hit.target for layer, hit in hits.items()
    }
    there = resolve(rules, (), (), list(units))
    assert {name: hit.target for name, hit in there.items()} == targets


def test_rules_leave_a_checkpoint_s_prefix_open() -> None:
    units = {f"model.diffusion_model.blocks.{n}.ff": [f"model.diffusion_model.blocks.{n}.ff"] for n in range(3)}
    rules = parse_rules(rules_text(dict.fromkeys(units, "gguf-q4-0"), units))
    assert len(rules) == 1
    assert matches(rules[0].pattern, "model.diffusion_model.blocks.2.ff")
    assert matches(rules[0].pattern, "blocks.2.ff")
    assert not matches(rules[0].pattern, "other.blocks.2.ff")


@pytest.fixture(scope="module")
def digits(demo_models: Path) -> tuple[ModelPart, Sensitivities]:
    part, read = of_file(demo_models / "diffusion_models" / "digits_flux.safetensors")
    return part, by_weights(part, read, FORMATS)


@pytest.mark.parametrize("share", [0.48, 0.5, 0.55, 0.62, 0.7, 0.99])
def test_a_recipe_takes_what_it_says_and_beats_single_formats(
    digits: tuple[ModelPart, Sensitivities], share: float
) -> None:
    part, found = digits
    budget = int(share * part.full_nbytes)
    recipe = find_recipe(found, budget)
    plan = part.plan(recipe.spec())
    assert not plan.refused
    assert plan.nbytes_out == recipe.nbytes <= budget
    for single in recipe.singles:
        assert part.plan(QuantSpec(single.format)).nbytes_out == single.nbytes
        if single.nbytes <= budget:
            assert recipe.predicted_error <= single.predicted_error
    assert str(recipe).startswith("transformer: ")
    assert all(len(line) <= 120 for line in str(recipe).splitlines())
    assert Recipe.to_dict(recipe)["targets"] == recipe.targets


def test_more_bytes_are_never_worse(digits: tuple[ModelPart, Sensitivities]) -> None:
    part, found = digits
    errors = [find_recipe(found, part.full_nbytes * i // 40).predicted_error for i in range(20, 41)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0.0


def test_the_whole_budget_quantizes_nothing(digits: tuple[ModelPart, Sensitivities]) -> None:
    part, found = digits
    recipe = find_recipe(found, part.full_nbytes)
    assert not recipe.quantizes
    assert recipe.nbytes == part.full_nbytes
    with pytest.raises(SpecError, match="at full precision"):
        recipe.spec()


def test_fewer_formats_to_choose_from(digits: tuple[ModelPart, Sensitivities]) -> None:
    part, found = digits
    recipe = find_recipe(found, part.full_nbytes * 3 // 4, ["gguf-q8-0"])
    assert set(recipe.targets.values()) == {KEEP, "gguf-q8-0"}
    with pytest.raises(SpecError, match="'gguf-q3-k' was not measured"):
        find_recipe(found, part.full_nbytes, ["gguf-q3-k"])


def test_a_budget_that_is_too_small_names_the_least(digits: tuple[ModelPart, Sensitivities]) -> None:
    _, found = digits
    with pytest.raises(SpecError, match=r"smallest mixture .* takes 5\.\d MiB") as refused:
        find_recipe(found, 10**6)
    least = int(str(refused.value).partition("(")[2].split()[0])
    assert find_recipe(found, least).nbytes == least
    with pytest.raises(SpecError):
        find_recipe(found, least - 1)


def test_a_single_format_that_measures_better_is_the_recipe(digits: tuple[ModelPart, Sensitivities]) -> None:
    part, found = digits
    recipe = find_recipe(found, part.full_nbytes * 3 // 4)
    mixed = checked(recipe, found, {"recipe": 0.01, "gguf-q8-0": 0.02}, "a run")
    assert (mixed.single, mixed.targets, mixed.rules) == ("", recipe.targets, recipe.rules)
    assert mixed.measured_error == 0.01
    assert "NOTE" not in str(mixed)
    single = checked(recipe, found, {"recipe": 0.03, "gguf-q8-0": 0.02, "gguf-q6-k": 0.025}, "a run")
    assert "NOTE: gguf-q8-0 alone measured 2.00 %, less than the mixture's 3.00 %" in str(single)
    assert single.single == single.to_dict()["single"] == "gguf-q8-0"
    assert single.measured_error == 0.02
    assert all(len(line) <= 120 for line in str(single).splitlines())
    assert single.predicted_error * (1 - single.gap) == pytest.approx(recipe.predicted_error)
    plan, alone = part.plan(single.spec()), part.plan(QuantSpec("gguf-q8-0"))
    assert plan.nbytes_out == alone.nbytes_out == single.nbytes <= single.budget
    formats = {name: "gguf-q8-0" for name, target in single.targets.items() if target != KEEP}
    assert formats == {unit.name: "gguf-q8-0" for unit in found.units if not unit.kept}


def test_a_single_format_beyond_the_budget_is_never_the_recipe(digits: tuple[ModelPart, Sensitivities]) -> None:
    part, found = digits
    recipe = find_recipe(found, part.full_nbytes * 11 // 20)
    assert next(s for s in recipe.singles if s.format == "gguf-q8-0").nbytes > recipe.budget
    assert checked(recipe, found, {"recipe": 0.03, "gguf-q8-0": 0.02}, "a run").targets == recipe.targets


def test_what_is_told_before_measuring_is_what_the_choice_says(digits: tuple[ModelPart, Sensitivities]) -> None:
    """By weights alone the layers that stay by default take their full size, and the smallest mixture counts it."""
    part, found = digits
    with pytest.raises(SpecError) as late:
        find_recipe(found, 10**6)
    with pytest.raises(SpecError) as early:
        check_possible(part.name, part.slots, found.units, FORMATS, 10**6, measured=False)
    assert str(early.value) == str(late.value)
    least = int(str(late.value).partition("(")[2].split()[0])
    check_possible(part.name, part.slots, found.units, FORMATS, least, measured=False)
    check_possible(part.name, part.slots, found.units, FORMATS, least // 2, measured=True)
    with pytest.raises(SpecError, match="at full precision, which fits"):
        check_possible(part.name, part.slots, found.units, FORMATS, part.full_nbytes, measured=True)
    check_possible(part.name, part.slots, found.units, FORMATS, part.full_nbytes - 1, measured=True)


def test_the_picture(digits: tuple[ModelPart, Sensitivities]) -> None:
    part, found = digits
    figure = plot_recipe(find_recipe(found, part.full_nbytes * 3 // 5), found)
    sizes, layers = figure.axes
    assert len(sizes.texts) == len(find_recipe(found, part.full_nbytes).singles)
    assert len(layers.get_yticklabels()) == 24


def test_units_are_the_weights_of_the_file(digits: tuple[ModelPart, Sensitivities]) -> None:
    _, found = digits
    assert len(found.units) == 33
    assert {u.name for u in found.units if u.kept} >= {"img_in", "final_layer.linear", "double_blocks.0.img_mod.lin"}
    assert all(set(found.effects[u.name]) == {KEEP} for u in found.units if u.kept)


def test_formats_that_cannot_be_candidates() -> None:
    with pytest.raises(SpecError, match="layer patterns"):
        sensitivity.check_formats(["gguf-q4-0;exclude=img_in"])
    with pytest.raises(SpecError, match="No formats"):
        sensitivity.check_formats([])
    with pytest.raises((SpecError, BackendUnavailable)):
        sensitivity.check_formats(["gguf-q9-9"])
    assert sensitivity.check_formats([" gguf-q8-0", "gguf-q8-0"]) == ("gguf-q8-0",)


def test_a_quantized_file_is_refused(tmp_path: Path, demo_models: Path) -> None:
    from quantwire.cli import main

    source = demo_models / "diffusion_models" / "digits_flux.safetensors"
    assert main(["convert", str(source), str(tmp_path / "q.gguf"), "--type", "q8_0"]) == 0
    with pytest.raises(SpecError, match="quantized already"):
        of_file(tmp_path / "q.gguf")


def test_noise_of_a_layer_is_that_of_its_kernel() -> None:
    """8 bits lose more in a product of few tokens, whose kernel rounds the inputs too, and none at full precision."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(512, 256, generator=g).to(torch.bfloat16)
    x = torch.randn(48, 256, generator=g).to(torch.bfloat16)
    eight, four = (output_noise(w, [Inputs(x, 4096)], f) for f in ("gguf-q8-0", "gguf-q4-0"))
    assert 1e-5 < eight < 5e-5
    assert 100 * eight < four < 1e-2
    few = output_noise(w, [Inputs(x[:2], 2)], "gguf-q8-0")
    assert few > 1.2 * eight
    assert torch.equal(sampled(w[:100]), w[:100])
    assert sampled(w).shape == (256, 256)
