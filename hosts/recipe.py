"""From runs of a model to a mixed recipe: measure, choose, and check the choice on a run that was not measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..quantizers.errors import WorkflowError
from ..quantizers.measure.recipe import Recipe, checked, find_recipe
from ..quantizers.measure.sensitivity import Sensitivities
from .base import Host
from .record import Watcher
from .sensitivity import Calls, Check, Probe, check_mixtures, spread

LEVELS = 4  # noise levels of a run at which every layer is measured
CHECK_LEVELS = 2
Run = Callable[[Watcher, bool], None]  # (who is told of the model's calls, whether with other seeds) -> sampled


@dataclass(frozen=True)
class Wanted:
    """What is asked for.

    Attributes:
        budget: bytes of the component.
        formats: candidates; None for the usual ones.
        levels: at how many noise levels to measure.
        check: whether to measure the recipe, and the single formats that fit, on a run with other seeds.
    """

    budget: int
    formats: tuple[str, ...] | None = None
    levels: int = LEVELS
    check: bool = True


def recipe_by_runs(
    host: Host, run: Run, wanted: Wanted, calls: int = 0, name: str = ""
) -> tuple[Recipe, Sensitivities]:
    """Measure a model that is sampled with, and find its recipe.

    Args:
        run: samples once, with the watcher told of the model's calls.
        calls: how often the model is called in a run; 0 finds out with a run that measures nothing.
        name: of the component, for the report.
    Raises:
        QuantwireError: no model ran, one that is quantized already, or a budget that no mixture keeps to.
    """
    if not calls:
        counted = Calls(host, wanted.formats, wanted.budget)
        run(counted, False)
        calls = counted.count
    if not calls:
        raise WorkflowError(
            "No sampler ran a model, so nothing can be measured.\nThe workflow needs a KSampler that uses it."
        )
    probe = Probe(host, spread(calls, wanted.levels), wanted.formats, wanted.budget)
    run(probe, False)
    found = probe.result(name or "diffusion model")
    recipe = find_recipe(found, wanted.budget)
    if wanted.check and recipe.quantizes:
        check = Check(host, spread(calls, CHECK_LEVELS), check_mixtures(recipe, found))
        run(check, True)
        recipe = checked(recipe, found, check.errors(), f"{check.looked} noise levels of a run with another seed")
    return recipe, found


def node_run(host: Host, model: Any, seed: int, steps: int, positive: Any, latent: Any) -> Run:
    """Sampling as a node does it: Euler steps, schedule `simple`, without a negative prompt."""
    from .sampling import Generation

    def run(watcher: Watcher, other_seed: bool) -> None:
        how = Generation(seed + 1 if other_seed else seed, steps, 1.0, "euler", "simple", positive, positive, latent)
        host.sample(host.watched(model, watcher), how, lambda: None)

    return run


def workflow_run(workflow: Path, overrides: Sequence[str], listener: Callable[[], Any]) -> Run:
    """Sampling as a workflow of the embedded host does it; other seeds are those of its samplers plus one.

    Args:
        workflow: the JSON file.
        overrides: as `--set`.
        listener: makes what shows the progress of a run.
    """
    from .. import nodes
    from .standalone.core_nodes import CORE_NODES
    from .standalone.executor import Executor
    from .standalone.record import Recording, recording
    from .standalone.workflow import apply_overrides, load_workflow, parse_workflow

    classes = {**CORE_NODES, **nodes.NODE_CLASS_MAPPINGS}
    prompt = apply_overrides(load_workflow(workflow), overrides, classes)

    def run(watcher: Watcher, other_seed: bool) -> None:
        graph = prompt.to_json()
        for node in graph.values() if other_seed else ():
            for key in ("seed", "noise_seed"):
                if isinstance(node["inputs"].get(key), int):
                    node["inputs"][key] += 1
        told: Any = watcher
        with recording(Recording(recorder=told)):
            # An executor of its own: one that had run this workflow would take results from its cache.
            Executor(classes, listener()).run(parse_workflow(graph))

    return run
