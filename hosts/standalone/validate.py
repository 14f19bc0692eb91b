"""Every problem of a workflow, found before anything runs.

The rules are those of ComfyUI's server, so that a workflow which passes here passes there: what links may join, how
literals are converted, what VALIDATE_INPUTS replaces. Stricter in these places, each of which would run there with
another value than the one written, or fail in mid-run: text for a BOOLEAN (`"false"` would count as true), null or an
object for a STRING, null for a COMBO also where VALIDATE_INPUTS answers for it (to which null is a link), nan or
infinity for a FLOAT (nan is below no minimum), a negative output index, a link into an input that the node does not
have. And one bad branch stops the whole workflow: in a batch run, a silently missing output is worse than an error.
Values for inputs that a node does not have are passed over as there, but with a warning.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...quantizers.errors import WorkflowError, near
from .workflow import InputSpec, Link, NodePlace, NodeSpec, Prompt, PromptNode, as_link

IN_COMFYUI = "Run this workflow in ComfyUI"


@dataclass(frozen=True)
class Problem:
    kind: str
    """ComfyUI's name for it, which its editor knows: `value_not_in_list`, `required_input_missing`, ..."""
    node_id: str | None
    """None: the workflow as a whole."""
    title: str
    class_type: str
    input: str | None
    message: str

    def __str__(self) -> str:
        if self.node_id is None:
            return self.message
        place = str(NodePlace(self.node_id, self.title, self.class_type))
        return f"{place}{'.' + self.input if self.input else ''}: {self.message}"


class InvalidWorkflow(WorkflowError):
    """A WorkflowError that still holds its problems one by one."""

    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True)
class BoundNode:
    """A node whose inputs were checked against its class."""

    node: PromptNode
    node_class: type | None
    spec: NodeSpec | None
    literals: dict[str, Any] = field(default_factory=dict)
    """Converted; only inputs that the class declares."""
    links: dict[str, Link] = field(default_factory=dict)
    lazy: set[str] = field(default_factory=set)
    """Names of links that are evaluated only when check_lazy_status asks for them."""
    received_types: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Checked:
    problems: list[Problem]
    order: list[str]
    """Nodes that the outputs need, every node after those that it needs; meaningless when there is a cycle."""
    outputs: list[str]
    bound: dict[str, BoundNode]
    warnings: list[Problem] = field(default_factory=lambda: list[Problem]())
    """What ComfyUI passes over without a word: inputs that a node does not have, such as a misspelt name."""


def validate(prompt: Prompt, node_classes: Mapping[str, type]) -> list[Problem]:
    """All problems, in the order of the file; empty when the workflow can run."""
    return check(prompt, node_classes).problems


def order(prompt: Prompt, node_classes: Mapping[str, type]) -> list[str]:
    """Ids of the nodes that the output nodes need, dependencies first.

    Raises:
        WorkflowError: the workflow has problems.
    """
    checked = check(prompt, node_classes)
    raise_problems(checked.problems, prompt.source)
    return checked.order


def check(prompt: Prompt, node_classes: Mapping[str, type], targets: Collection[str] | None = None) -> Checked:
    """`validate` and `order` in one pass, with the converted inputs.

    Args:
        targets: only these output nodes and what they need are looked at; None: all, and every node of no known class.
    """
    return _Checker(prompt, node_classes, targets).run()


def raise_problems(problems: Iterable[Problem], source: str = "the workflow") -> None:
    """Raise one WorkflowError for all problems; do nothing when there are none."""
    problems = tuple(problems)
    if not problems:
        return
    text = str(problems[0])
    if len(problems) > 1:
        text = f"{source}: {len(problems)} problems, the first: {text}\n" + "\n".join(map(str, problems))
    error = InvalidWorkflow(text)
    error.problems = problems
    raise error


def types_match(received: Any, wanted: Any) -> bool:
    """Whether an output of type `received` may feed an input of type `wanted`: unions need one type in common."""
    # `!=` and not `==`: packs ship a str subclass for "any type" that overrides __ne__ alone.
    if not (received != wanted):  # noqa: SIM202
        return True
    if isinstance(received, (list, tuple)) and wanted == "COMBO":
        return True
    if not isinstance(received, str) or not isinstance(wanted, str):
        return "*" in (received, wanted)
    sides = [{part.strip() for part in side.split(",")} for side in (received, wanted)]
    return bool(sides[0] & sides[1]) or "*" in sides[0] | sides[1]


def convert(info: InputSpec, value: Any) -> Any:
    """A literal as its input's type, by the server's rules: `int("5")`, `float(3)`, `str(4)`.

    Raises:
        ValueError: with the text for a Problem.
    """
    if isinstance(value, Mapping) and "__value__" in value:  # how the editor tells a list value from a link
        value = value["__value__"]
    python_type = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}.get(info.type_name)
    if python_type is None:
        return value
    try:
        if isinstance(value, (int, float)) or (isinstance(value, str) and python_type is not bool):
            converted = python_type(value)
            if not isinstance(converted, float) or math.isfinite(converted):
                return converted
    except (ValueError, OverflowError):
        pass
    raise ValueError(f"expected {info.type_name}, got {value!r}")


def _range_fault(info: InputSpec, value: Any) -> tuple[str, str] | None:
    """(kind, message) for a number out of bounds or a value that is no choice of a COMBO."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        low, high = info.options.get("min"), info.options.get("max")
        if low is not None and value < low:
            return "value_smaller_than_min", f"{value} is below the minimum {low}"
        if high is not None and value > high:
            return "value_bigger_than_max", f"{value} is above the maximum {high}"
    choices = info.choices
    if choices is None:
        return None
    values = value if isinstance(value, list) and info.options.get("multiselect") else [value]
    wrong = [v for v in values if v not in choices]
    if not wrong:
        return None
    if not choices:
        among = "there is nothing to choose from; the folder that this list is read from may be empty"
    elif len(choices) <= 20:
        among = f"not one of: {', '.join(map(str, choices))}"
    else:
        among = f"not among its {len(choices)} choices"
    hint = near(str(wrong[0]), map(str, choices)) if wrong[0] is not None else ""  # null is not meant to be `none`
    return "value_not_in_list", f"{wrong[0]!r}: {among}.{hint}"


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


class _Checker:
    def __init__(self, prompt: Prompt, node_classes: Mapping[str, type], targets: Collection[str] | None) -> None:
        self.prompt = prompt
        self.targets = targets
        self.classes = node_classes
        self.specs: dict[str, NodeSpec | str] = {}
        self.bound: dict[str, BoundNode] = {}
        self.problems: list[Problem] = []
        self.warnings: list[Problem] = []
        self.faulty: dict[str, set[str]] = {}
        # Object types such as MODEL: values of these come out of nodes only, never out of a workflow file.
        known = {node.class_type: node_classes.get(node.class_type) for node in prompt.nodes.values()}
        made = {kind for c in known.values() for kind in getattr(c, "RETURN_TYPES", ()) if isinstance(kind, str)}
        self.object_types = made - {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "*"}

    def add(self, node: PromptNode, name: str | None, kind: str, message: str) -> None:
        self.faulty.setdefault(node.id, set()).add(name or "")
        self.problems.append(Problem(kind, *node.place, name, _one_line(message)))

    def run(self) -> Checked:
        nodes = self.prompt.nodes
        outputs = [i for i, n in nodes.items() if getattr(self.classes.get(n.class_type), "OUTPUT_NODE", False) is True]
        # A class that this host lacks may be an output, so it counts as one: its branch is checked and it is reported.
        unknown = [i for i, n in nodes.items() if self.classes.get(n.class_type) is None]
        if self.targets is not None:
            outputs = [i for i in outputs if i in self.targets]
            unknown = []
        found_order, cycles = _walk([*outputs, *unknown], lambda i: self.bind(nodes[i]).links.values())
        for cycle in cycles:
            steps = [f"{i} ({nodes[i].class_type})" for i in (*reversed(cycle), cycle[-1])]
            steps = [*steps[:6], "...", *steps[-5:]] if len(steps) > 12 else steps
            self.add(nodes[cycle[-1]], None, "dependency_cycle", f"part of a cycle: {' -> '.join(steps)}")
        rank = {node_id: place for place, node_id in enumerate(nodes)}
        self.problems.sort(key=lambda p: rank[p.node_id] if p.node_id is not None else -1)
        if not outputs and not unknown:
            self.problems.append(Problem("prompt_no_outputs", None, "", "", None, self.no_output_text()))
        return Checked(self.problems, found_order, outputs, self.bound, self.warnings)

    def no_output_text(self) -> str:
        text = f"{self.prompt.source}: there is no output node, so nothing would run."
        known = [name for name, cls in self.classes.items() if getattr(cls, "OUTPUT_NODE", False) is True]
        return text + (f" Add one of: {', '.join(known[:12])}." if known else "")

    def spec(self, node: PromptNode, node_class: type) -> NodeSpec | None:
        if node.class_type not in self.specs:
            try:
                self.specs[node.class_type] = NodeSpec.of(node_class)
            except WorkflowError as err:
                self.specs[node.class_type] = str(err)
        spec = self.specs[node.class_type]
        if isinstance(spec, str):
            self.add(node, None, "exception_during_validation", spec)
            return None
        return spec

    def bind(self, node: PromptNode) -> BoundNode:
        node_class = self.classes.get(node.class_type)
        spec = self.spec(node, node_class) if node_class else None
        bound = self.bound[node.id] = BoundNode(node, node_class, spec)
        if node_class is None:
            text = f"this host has no node {node.class_type!r}.{near(node.class_type, self.classes)}"
            self.add(node, None, "missing_node_type", f"{text} {IN_COMFYUI} to use a node that this host lacks.")
        else:
            self.check_contract(node, node_class, spec)
        params, takes_all = _parameters(getattr(node_class, "VALIDATE_INPUTS", None))
        for name, value in node.inputs.items():
            info = spec.get(name) if spec else None
            own_check = takes_all or name in params
            if isinstance(value, list):
                self.bind_link(bound, name, value, info, check_type="input_types" not in params)
            elif info is not None:
                self.bind_literal(bound, name, value, info, check_range=not own_check)
            elif spec and not _parameters(_function(node_class))[1]:
                text = f"the node has no such input, so what the workflow gives it is not used.{near(name, spec.names)}"
                self.warnings.append(Problem("unknown_input", *node.place, name, text))
        for name in spec.groups.get("required", {}) if spec else ():
            if name not in node.inputs:
                stray = near(name, [n for n in node.inputs if spec and spec.get(n) is None], limit=1)
                hint = stray.replace("Did you mean", "Is it what the workflow calls")
                self.add(node, name, "required_input_missing", f"the required input is missing.{hint}")
        if node_class and (params or takes_all):
            self.call_validate_inputs(bound, node_class, params, takes_all)
        return bound

    def check_contract(self, node: PromptNode, node_class: type, spec: NodeSpec | None) -> None:
        function = _function(node_class)
        if function is None:
            self.add(node, None, "exception_during_validation", "its class has no method that FUNCTION names")
        uses = {
            "INPUT_IS_LIST": bool(getattr(node_class, "INPUT_IS_LIST", False)),
            "OUTPUT_IS_LIST": any(getattr(node_class, "OUTPUT_IS_LIST", None) or ()),
            "the hidden input DYNPROMPT": spec is not None and "DYNPROMPT" in spec.hidden.values(),
            "an async FUNCTION": inspect.iscoroutinefunction(function),
        }
        for what in (name for name, used in uses.items() if used):
            text = f"the node uses {what}, which this host does not support. {IN_COMFYUI}."
            self.add(node, None, "missing_node_type", text)

    def bind_literal(self, bound: BoundNode, name: str, value: Any, info: InputSpec, check_range: bool) -> None:
        if isinstance(info.type, str) and info.type in self.object_types:
            text = f"expected a link to a {info.type} output, got {value!r}"
            self.add(bound.node, name, "invalid_input_type", text)
            return
        try:
            value = bound.literals[name] = convert(info, value)
        except ValueError as err:
            self.add(bound.node, name, "invalid_input_type", str(err))
            return
        fault = _range_fault(info, value) if check_range or value is None else None
        if fault:
            self.add(bound.node, name, *fault)

    def bind_link(
        self, bound: BoundNode, name: str, value: list[Any], info: InputSpec | None, check_type: bool
    ) -> None:
        node, link = bound.node, as_link(value)
        if bound.spec and info is None and not _parameters(_function(bound.node_class))[1]:
            text = f"the node has no such input to link to.{near(name, bound.spec.names)}"
            self.add(node, name, "bad_linked_input", text)
        elif link is None:
            self.add(node, name, "bad_linked_input", f'{value!r} is no link; a link is ["node id", output index]')
        elif link.node_id not in self.prompt.nodes:
            hint = near(link.node_id, self.prompt.nodes)
            text = f"linked to node {link.node_id}, which is not in the workflow.{hint}"
            self.add(node, name, "bad_linked_input", text)
        else:
            bound.links[name] = link
            if info and info.options.get("lazy"):
                bound.lazy.add(name)
            self.check_link_type(bound, name, info if check_type else None)

    def check_link_type(self, bound: BoundNode, name: str, info: InputSpec | None) -> None:
        node, link = bound.node, bound.links[name]
        source = self.prompt.nodes[link.node_id]
        source_class = self.classes.get(source.class_type)
        if source_class is None:
            return
        types = tuple(getattr(source_class, "RETURN_TYPES", ()))
        if not 0 <= link.output < len(types):
            listed = ", ".join(f"{i} {_type_text(t)}" for i, t in enumerate(types)) or "none"
            text = f"linked to output {link.output} of {source.place}, whose outputs are: {listed}"
            self.add(node, name, "bad_linked_input", text)
            return
        given = bound.received_types[name] = types[link.output]
        if info and not types_match(given, info.type):
            text = f"expected {info.type_name}, but output {link.output} of {source.place} is {_type_text(given)}"
            self.add(node, name, "return_type_mismatch", text)

    def call_validate_inputs(self, bound: BoundNode, node_class: Any, params: dict[str, bool], takes_all: bool) -> None:
        # A linked input has no value yet and comes as None, as in ComfyUI.
        known: dict[str, Any] = {**dict.fromkeys(bound.links), **bound.literals}
        known = {n: v for n, v in known.items() if takes_all or n in params}
        if "input_types" in params:
            known["input_types"] = bound.received_types
        faulty = self.faulty.get(bound.node.id, set())
        lacking = [n for n, needed in params.items() if needed and n not in known]
        if lacking or faulty & (set(params) | (set(bound.node.inputs) if takes_all else set())):
            return  # already reported; its answer would repeat that or be a TypeError
        try:
            answer = node_class.VALIDATE_INPUTS(**known)
        except Exception as err:  # a node's own code: its failure is one more problem, no more
            answer = f"VALIDATE_INPUTS failed: {type(err).__name__}: {err}"
        if answer is not True:
            named = [n for n in params if n in bound.node.inputs]
            text = "the node refuses its inputs" if answer is None or answer is False else str(answer)
            self.add(bound.node, named[0] if len(named) == 1 else None, "custom_validation_failed", text)


def _type_text(kind: Any) -> str:
    return "COMBO" if isinstance(kind, (list, tuple)) else str(kind)


def _parameters(function: Any) -> tuple[dict[str, bool], bool]:
    """Names that a bound classmethod takes (True: it has no default), and whether it takes any name."""
    if function is None:
        return {}, False
    kinds = inspect.signature(function).parameters.values()
    named = {p.name: p.default is p.empty for p in kinds if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return named, any(p.kind is p.VAR_KEYWORD for p in kinds)


def _function(node_class: type | None) -> Any:
    return getattr(node_class, getattr(node_class, "FUNCTION", ""), None)


def _walk(roots: Iterable[str], edges: Callable[[str], Iterable[Link]]) -> tuple[list[str], list[list[str]]]:
    """Depth-first order (dependencies first) and the cycles met; with its own stack, because chains get long."""
    finished: list[str] = []
    open_: dict[str, bool] = {}
    cycles: list[list[str]] = []
    for root in roots:
        if root in open_:
            continue
        open_[root] = True
        stack = [(root, iter(edges(root)))]
        while stack:
            node_id, rest = stack[-1]
            for link in rest:
                if link.node_id not in open_:
                    open_[link.node_id] = True
                    stack.append((link.node_id, iter(edges(link.node_id))))
                    break
                if open_[link.node_id]:
                    path = [i for i, _ in stack]
                    cycles.append(path[path.index(link.node_id) :])
            else:
                open_[node_id] = False
                finished.append(node_id)
                stack.pop()
    return finished, cycles
