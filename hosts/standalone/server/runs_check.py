"""The answer to a prompt: which of its outputs can run, and what is wrong with the others, node by node.

As in ComfyUI's server, and unlike `quantwire run`, outputs that are in order run although others are not: the editor
marks what was left out, so nothing is missing silently.
"""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ....quantizers.errors import WorkflowError
from ..validate import Problem, check
from ..workflow import Prompt, as_link, parse_workflow

MAX_SHOWN = 1_000
MESSAGES = {
    "required_input_missing": "Required input is missing",
    "bad_linked_input": "Bad linked input",
    "return_type_mismatch": "Return type mismatch between linked nodes",
    "invalid_input_type": "The value is of another type",
    "value_smaller_than_min": "The value is too small",
    "value_bigger_than_max": "The value is too large",
    "value_not_in_list": "Value not in list",
    "custom_validation_failed": "The node refuses its inputs",
    "dependency_cycle": "Dependency cycle detected",
    "exception_during_validation": "The node cannot be checked",
    "missing_node_type": "This host has no such node",
    "prompt_no_outputs": "Prompt has no outputs",
}


@dataclass(frozen=True)
class Verdict:
    """`error` is None when something can run; then `outputs` says what."""

    error: dict[str, Any] | None
    node_errors: dict[str, dict[str, Any]] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)

    def refusal(self) -> dict[str, Any]:
        return {"error": self.error, "node_errors": self.node_errors}


def fault(kind: str, message: str, details: str = "", extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    return {"type": kind, "message": message, "details": details, "extra_info": dict(extra or {})}


def judge(data: Any, node_classes: Mapping[str, type], targets: Collection[str] | None = None) -> Verdict:
    """Check a prompt in API form.

    Args:
        targets: only these outputs were asked for.
    """
    if data == {}:  # an empty canvas is no mistake of the client's
        return Verdict(fault("prompt_no_outputs", MESSAGES["prompt_no_outputs"], "the workflow has no nodes"))
    try:
        prompt = parse_workflow(data, "the prompt")
    except WorkflowError as err:
        return Verdict(fault("invalid_prompt", str(err)))
    lacking = [n for n in prompt.nodes.values() if node_classes.get(n.class_type) is None]
    problems = check(prompt, node_classes, None if lacking else targets).problems
    if lacking:
        node = lacking[0]
        first = next(p for p in problems if p.kind == "missing_node_type" and p.node_id == node.id)
        about = {"node_id": node.id, "class_type": node.class_type, "node_title": node.title or node.class_type}
        where = f"Node ID '#{node.id}'"
        error = fault(
            "missing_node_type", f"Node '{about['node_title']}' not found: {_cut(first.message)}", where, about
        )
        return Verdict(error, _by_node(prompt, problems, {}))
    outputs = [i for i, n in prompt.nodes.items() if getattr(node_classes[n.class_type], "OUTPUT_NODE", False) is True]
    outputs = [i for i in outputs if targets is None or i in targets]
    whole = [p for p in problems if p.node_id is None]
    if whole or not outputs:
        text = whole[0].message if whole else "none of the asked nodes is an output node"
        return Verdict(fault("prompt_no_outputs", MESSAGES["prompt_no_outputs"], _cut(text)))
    faulty = {p.node_id for p in problems if p.node_id is not None}
    needs = {output: _needed(prompt, output) for output in outputs}
    good = [output for output in outputs if not needs[output] & faulty]
    errors = _by_node(prompt, problems, {o: needs[o] for o in outputs if o not in good})
    if good:
        return Verdict(None, errors, good)
    lines = "\n".join(f"{e['message']}: {e['details']}" for node in errors.values() for e in node["errors"])
    return Verdict(fault("prompt_outputs_failed_validation", "Prompt outputs failed validation", lines), errors)


def _needed(prompt: Prompt, output: str) -> set[str]:
    """The node and all that it is linked to, lazily or not."""
    found, rest = {output}, [output]
    while rest:
        for value in prompt.nodes[rest.pop()].inputs.values():
            link = as_link(value)
            if link is not None and link.node_id in prompt.nodes and link.node_id not in found:
                found.add(link.node_id)
                rest.append(link.node_id)
    return found


def _by_node(
    prompt: Prompt, problems: Iterable[Problem], needs: Mapping[str, Collection[str]]
) -> dict[str, dict[str, Any]]:
    errors: dict[str, dict[str, Any]] = {}
    for problem in problems:
        if problem.node_id is None:
            continue
        held = errors.setdefault(
            problem.node_id,
            {
                "errors": [],
                "dependent_outputs": [o for o, needed in needs.items() if problem.node_id in needed],
                "class_type": problem.class_type,
            },
        )
        held["errors"].append(_error(prompt, problem))
    return errors


def _shown(value: Any) -> Any:
    """The value as the editor shows it; a large one cut, since each problem repeats it."""
    if isinstance(value, str):
        return _cut(value)
    if not isinstance(value, (list, dict)):
        return value
    text = reprlib.repr(value)  # looks at a few values alone, however many there are
    return value if len(text) <= MAX_SHOWN and "..." not in text else text


def _cut(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _error(prompt: Prompt, problem: Problem) -> dict[str, Any]:
    extra: dict[str, Any] = {}
    details = problem.message
    if problem.input is not None:
        value = prompt.nodes[problem.node_id or ""].inputs.get(problem.input)
        extra = {"input_name": problem.input, "received_value": _shown(value)}
        if as_link(value):
            extra["linked_node"] = value
        details = f"{problem.input}: {details}"
    details = _cut(details)
    return fault(problem.kind, MESSAGES.get(problem.kind, problem.kind), details, extra)
