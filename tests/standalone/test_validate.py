"""Every problem of a workflow is found before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
from quantwire.hosts.standalone.validate import (
    InvalidWorkflow,
    Problem,
    WorkflowError,
    check,
    order,
    raise_problems,
    types_match,
    validate,
)
from quantwire.hosts.standalone.workflow import parse_workflow


class AnyType(str):
    """The trick that packs use for "any type": never unequal."""

    __hash__ = str.__hash__

    def __ne__(self, other: object) -> bool:
        return False


class AnyInput(dict[str, Any]):
    """The trick that packs use for any number of inputs: every name is in it."""

    def __contains__(self, key: object) -> bool:
        return True

    def __getitem__(self, key: str) -> Any:
        return ("*",)


def node(
    required: dict[str, Any] | None = None,
    returns: tuple[Any, ...] = ("INT",),
    optional: dict[str, Any] | None = None,
    hidden: dict[str, Any] | None = None,
    **attributes: Any,
) -> type:
    """A node class; it is never run here."""
    groups = {"required": required or {}, "optional": optional or {}, "hidden": hidden or {}}
    members = {
        "INPUT_TYPES": classmethod(lambda cls: groups),
        "RETURN_TYPES": returns,
        "FUNCTION": "run",
        "run": lambda self, **inputs: (),
    }
    return type("TestNode", (), {**members, **attributes})


def validate_file(cls: type, file: str) -> bool | str:
    return True if file == "good" else f"{file} cannot\nbe read"


CLASSES: dict[str, type] = {
    "Const": node({"value": ("INT", {"min": 1, "max": 10})}),
    "Out": node({"x": ("*",)}, (), OUTPUT_NODE=True),
    "Need": node({"image": ("IMAGE",)}, ("IMAGE", "MASK")),
    "Union": node({"x": ("STRING,INT",)}),
    "Real": node({"value": ("FLOAT", {"min": 0.0, "max": 1.0})}, ("FLOAT",)),
    "Text": node({"value": ("STRING",)}, ("STRING",)),
    "Flag": node({"value": ("BOOLEAN",)}, ("BOOLEAN",)),
    "Pick": node({"value": (["euler", "heun"],)}),
    "Pick3": node({"value": ("COMBO", {"options": ["a", "b"], "multiselect": True})}),
    "PickOwn": node(
        {"value": (["none", "heun"],)}, VALIDATE_INPUTS=classmethod(lambda cls, value=None: value in (None, "own"))
    ),
    "PickMany": node({"value": ([f"model-{i:03}.safetensors" for i in range(50)],)}),
    "PickNone": node({"value": ([],)}),
    "Remote": node({"value": ("COMBO", {"remote": {"route": "/x"}})}),
    "Add": node({"a": ("INT", {}), "b": ("INT", {})}),
    "Maybe": node(optional={"steps": ("INT", {})}, run=lambda self, steps=0: ()),
    "List": node({"value": ("INT", {})}, INPUT_IS_LIST=True),
    "ListOut": node({"value": ("INT", {})}, OUTPUT_IS_LIST=(True,)),
    "PlainOut": node({"value": ("INT", {})}, OUTPUT_IS_LIST=(False,)),
    "Dyn": node({"value": ("INT", {})}, hidden={"d": "DYNPROMPT"}),
    "File": node({"file": (["good"],), "n": ("INT", {})}, VALIDATE_INPUTS=classmethod(validate_file)),
    "Kwargs": node({"a": ("INT", {"max": 1})}, VALIDATE_INPUTS=classmethod(lambda cls, **kw: kw["a"] != 5)),
    "Types": node({"a": ("INT", {})}, VALIDATE_INPUTS=classmethod(lambda cls, input_types: str(input_types))),
    "Crash": node({"a": ("INT", {})}, VALIDATE_INPUTS=classmethod(lambda cls, a: 1 // 0)),
    "Broken": type("Broken", (), {"FUNCTION": "run", "run": print, "RETURN_TYPES": ("INT",)}),
    "NoFunction": node({}, FUNCTION="gone"),
    "Wild": node(optional=AnyInput()),
}


def out(*sources: str) -> dict[str, Any]:
    return {f"out{i}": {"class_type": "Out", "inputs": {"x": [s, 0]}} for i, s in enumerate(sources)}


def one(class_type: str, **inputs: Any) -> list[str]:
    """Problems of one node that an output needs."""
    graph = {"1": {"class_type": class_type, "inputs": inputs}, "9": {"class_type": "Const", "inputs": {"value": 1}}}
    return [str(p) for p in validate(parse_workflow({**graph, **out("1")}), CLASSES)]


@pytest.mark.parametrize(
    ("class_type", "value", "text"),
    [
        pytest.param("Const", 0, "0 is below the minimum 1", id="min"),
        pytest.param("Const", 11, "11 is above the maximum 10", id="max"),
        pytest.param("Const", "x", "expected INT, got 'x'", id="int-text"),
        pytest.param("Const", "4.5", "expected INT, got '4.5'", id="int-float-text"),
        pytest.param("Const", None, "expected INT, got None", id="int-null"),
        pytest.param("Const", float("inf"), "expected INT, got inf", id="int-inf"),
        pytest.param("Const", {"a": 1}, "expected INT, got {'a': 1}", id="int-object"),
        pytest.param("Real", "x", "expected FLOAT, got 'x'", id="float-text"),
        pytest.param("Real", 1.5, "1.5 is above the maximum 1.0", id="float-max"),
        pytest.param("Text", None, "expected STRING, got None", id="string-null"),
        pytest.param("Text", {"a": 1}, "expected STRING, got {'a': 1}", id="string-object"),
        pytest.param("Flag", "false", "expected BOOLEAN, got 'false'", id="bool-text"),
        pytest.param("Pick", "eulr", "'eulr': not one of: euler, heun. Did you mean euler", id="combo"),
        pytest.param("Pick", None, "None: not one of: euler, heun.", id="combo-null"),
        pytest.param("PickOwn", None, "None: not one of: none, heun.", id="combo-null-of-its-own-check"),
        pytest.param("Pick3", {"__value__": ["a", "z"]}, "'z': not one of: a, b.", id="multiselect"),
        pytest.param("PickMany", "model-07.safetensors", "not among its 50 choices. Did you mean model-", id="long"),
        pytest.param("PickNone", "a", "'a': there is nothing to choose from", id="empty-combo"),
    ],
)
def test_wrong_literals(class_type: str, value: Any, text: str) -> None:
    (problem,) = one(class_type, value=value)
    assert problem.startswith(f"node 1 ({class_type}).value: ")
    assert text in problem


@pytest.mark.parametrize(
    ("class_type", "value", "converted"),
    [
        pytest.param("Const", "5", 5, id="int-from-text"),
        pytest.param("Const", 4.7, 4, id="int-truncates"),
        pytest.param("Const", True, 1, id="int-from-bool"),
        pytest.param("Real", "0.5", 0.5, id="float-from-text"),
        pytest.param("Real", 1, 1.0, id="float-from-int"),
        pytest.param("Text", 5, "5", id="string-from-int"),
        pytest.param("Flag", 1, True, id="bool-from-int"),
        pytest.param("Pick", "heun", "heun", id="combo"),
        pytest.param("Pick3", {"__value__": ["a", "b"]}, ["a", "b"], id="multiselect"),
        pytest.param("Remote", "x", "x", id="combo-filled-by-the-editor"),
    ],
)
def test_literals_are_converted_and_the_prompt_is_untouched(class_type: str, value: Any, converted: Any) -> None:
    prompt = parse_workflow({"1": {"class_type": class_type, "inputs": {"value": value}}, **out("1")})
    checked = check(prompt, CLASSES)
    assert checked.problems == []
    got = checked.bound["1"].literals["value"]
    assert got == converted
    assert type(got) is type(converted)
    assert prompt.nodes["1"].inputs["value"] == value


@pytest.mark.parametrize(
    ("class_type", "link", "text"),
    [
        pytest.param("Need", ["77", 0], "linked to node 77, which is not in the workflow", id="missing-node"),
        pytest.param("Need", ["9", 3], "linked to output 3 of node 9 (Const), whose outputs are: 0 INT", id="index"),
        pytest.param("Need", ["9", -1], "linked to output -1 of node 9 (Const)", id="negative-index"),
        pytest.param("Need", ["9", 0], "expected IMAGE, but output 0 of node 9 (Const) is INT", id="type"),
        pytest.param("Need", [9, 0], "[9, 0] is no link", id="number-as-id"),
        pytest.param("Need", ["9"], "['9'] is no link", id="short-list"),
    ],
)
def test_wrong_links(class_type: str, link: list[Any], text: str) -> None:
    (problem,) = one(class_type, image=link)
    assert problem.startswith(f"node 1 ({class_type}).image: ")
    assert text in problem


@pytest.mark.parametrize(
    ("received", "wanted", "match"),
    [
        ("INT", "INT", True),
        ("INT", "FLOAT", False),
        ("*", "MODEL", True),
        ("MODEL", "*", True),
        ("INT", "STRING,INT", True),
        ("INT,FLOAT", "STRING, FLOAT", True),
        ("INT,FLOAT", "STRING,MODEL", False),
        ("IMAGE,*", "MODEL", True),
        (["a", "b"], ["a", "b"], True),
        (["a", "b"], "COMBO", True),
        ("COMBO", ["a", "b"], False),
        (["a"], "*", True),
        (AnyType("*"), "MODEL", True),
        (AnyType("ANY"), "MODEL", True),
    ],
)
def test_types_match(received: Any, wanted: Any, match: bool) -> None:
    assert types_match(received, wanted) is match


def test_missing_required_input_names_what_the_workflow_calls_it() -> None:
    assert one("Const", vale=3) == [
        "node 1 (Const).value: the required input is missing. Is it what the workflow calls vale?"
    ]


def test_undeclared_literals_are_ignored_and_undeclared_links_are_not() -> None:
    assert one("Maybe", steps=1, upload="image") == []
    (problem,) = one("Maybe", step=["9", 0])
    assert problem == "node 1 (Maybe).step: the node has no such input to link to. Did you mean steps?"


def test_a_node_that_takes_any_input_takes_any_link() -> None:
    assert one("Wild", anything=["9", 0], more=["9", 0], text="x") == []


def test_unknown_class_names_near_ones_and_comfyui_and_its_ancestors_are_checked_too() -> None:
    graph = {
        "1": {"class_type": "Const", "inputs": {"value": 99}},
        "2": {"class_type": "Neet", "inputs": {"image": ["1", 0]}},  # may be an output node: nothing needs it
    }
    first, second = (str(p) for p in validate(parse_workflow(graph), CLASSES))
    assert first == "node 1 (Const).value: 99 is above the maximum 10"
    assert second.startswith("node 2 (Neet): this host has no node 'Neet'. Did you mean Need")
    assert "ComfyUI" in second


def test_no_output_node() -> None:
    (problem,) = validate(parse_workflow({"1": {"class_type": "Const", "inputs": {"value": 99}}}), CLASSES)
    assert problem.kind == "prompt_no_outputs"
    assert str(problem).endswith("there is no output node, so nothing would run. Add one of: Out.")


def test_only_nodes_that_outputs_need_are_checked() -> None:
    graph = {
        "1": {"class_type": "Const", "inputs": {"value": 1}},
        "2": {"class_type": "Const", "inputs": {"value": 99}},
        **out("1"),
    }
    assert validate(parse_workflow(graph), CLASSES) == []


def test_cycle_is_named_in_the_direction_of_the_data() -> None:
    graph = {
        "a": {"class_type": "Add", "inputs": {"a": 1, "b": ["b", 0]}},
        "b": {"class_type": "Add", "inputs": {"a": 1, "b": ["c", 0]}},
        "c": {"class_type": "Add", "inputs": {"a": 1, "b": ["a", 0]}},
        **out("a"),
    }
    (problem,) = validate(parse_workflow(graph), CLASSES)
    assert problem.kind == "dependency_cycle"
    assert problem.message == "part of a cycle: c (Add) -> b (Add) -> a (Add) -> c (Add)"


def test_a_node_linked_to_itself_is_a_cycle() -> None:
    (problem,) = validate(
        parse_workflow({"1": {"class_type": "Union", "inputs": {"x": ["1", 0]}}, **out("1")}), CLASSES
    )
    assert problem.message == "part of a cycle: 1 (Union) -> 1 (Union)"


def test_a_long_cycle_is_found_and_its_text_is_short() -> None:
    graph = {str(i): {"class_type": "Union", "inputs": {"x": [str((i + 1) % 2000), 0]}} for i in range(2000)}
    (problem,) = validate(parse_workflow({**graph, **out("0")}), CLASSES)
    assert " -> ... -> " in problem.message
    assert len(problem.message) < 300


@pytest.mark.parametrize("class_type", ["List", "ListOut", "Dyn"])
def test_unsupported_contracts_are_refused(class_type: str) -> None:
    (problem,) = one(class_type, value=1)
    assert "which this host does not support. Run this workflow in ComfyUI." in problem


def test_output_is_list_that_lists_nothing_is_fine() -> None:
    assert one("PlainOut", value=1) == []


def test_a_class_whose_contract_is_broken_is_a_problem_not_a_crash() -> None:
    (problem,) = one("Broken")
    assert "Broken.INPUT_TYPES failed: AttributeError" in problem
    (problem,) = one("NoFunction")
    assert "no method that FUNCTION names" in problem


def test_async_function_is_refused() -> None:
    async def run(self: object) -> tuple[()]:
        return ()

    prompt = parse_workflow({"1": {"class_type": "Async", "inputs": {}}})
    (problem,) = validate(prompt, {"Async": node({}, (), OUTPUT_NODE=True, run=run)})
    assert "an async FUNCTION" in problem.message


# --- VALIDATE_INPUTS ---


def test_validate_inputs_message_becomes_one_line_and_replaces_the_choice_check() -> None:
    assert one("File", file="good", n=1) == []
    assert one("File", file="bad", n=1) == ["node 1 (File).file: bad cannot be read"]


def test_validate_inputs_is_not_asked_about_a_missing_input() -> None:
    assert one("File", n=1) == ["node 1 (File).file: the required input is missing."]


def test_validate_inputs_still_runs_when_another_input_is_wrong() -> None:
    assert one("File", file="bad", n="x") == [
        "node 1 (File).n: expected INT, got 'x'",
        "node 1 (File).file: bad cannot be read",
    ]


def test_validate_inputs_gets_none_for_a_link() -> None:
    assert one("File", file=["9", 0], n=1) == [
        "node 1 (File).file: expected COMBO, but output 0 of node 9 (Const) is INT"
    ]
    (problem,) = one("Kwargs", a=5)  # takes all names, so the range is its own business: 5 > 1 is not reported
    assert problem == "node 1 (Kwargs): the node refuses its inputs"
    assert one("Kwargs", a=["9", 0]) == []


def test_validate_inputs_with_input_types_replaces_the_type_check() -> None:
    assert one("Types", a=["9", 0]) == ["node 1 (Types): {'a': 'INT'}"]


def test_validate_inputs_that_raises_is_a_problem() -> None:
    assert one("Crash", a=1) == ["node 1 (Crash).a: VALIDATE_INPUTS failed: ZeroDivisionError: " + DIVISION]


DIVISION = "integer division or modulo by zero"


# --- many problems, order ---


def test_all_problems_come_in_one_message_in_file_order() -> None:
    graph = {
        "12": {"class_type": "Const", "inputs": {"value": 0}, "_meta": {"title": "My title"}},
        "13": {"class_type": "Nope", "inputs": {}},
        "14": {"class_type": "Add", "inputs": {"a": ["12", 5]}},
        "15": {"class_type": "Pick", "inputs": {"value": "x"}},
        **out("12", "13", "14", "15"),
    }
    prompt = parse_workflow(graph, "flux.json")
    problems = validate(prompt, CLASSES)
    with pytest.raises(WorkflowError) as caught:
        raise_problems(problems, prompt.source)
    lines = str(caught.value).splitlines()
    assert lines[0] == "flux.json: 5 problems, the first: node 12 'My title' (Const).value: 0 is below the minimum 1"
    assert lines[1:] == [str(p) for p in problems]
    assert [p.node_id for p in problems] == ["12", "13", "14", "14", "15"]
    assert isinstance(caught.value, InvalidWorkflow)
    assert caught.value.problems == tuple(problems)
    assert problems[0] == Problem(
        "value_smaller_than_min", "12", "My title", "Const", "value", "0 is below the minimum 1"
    )


def test_one_problem_is_one_line_and_none_raises_nothing() -> None:
    raise_problems([])
    with pytest.raises(WorkflowError) as caught:
        raise_problems([Problem("k", "1", "", "A", None, "text")])
    assert str(caught.value) == "node 1 (A): text"


def test_order_puts_dependencies_first_and_leaves_the_rest_out() -> None:
    graph = {
        **out("3"),
        "3": {"class_type": "Add", "inputs": {"a": ["1", 0], "b": ["2", 0]}},
        "2": {"class_type": "Add", "inputs": {"a": ["1", 0], "b": 1}},
        "1": {"class_type": "Const", "inputs": {"value": 1}},
        "unused": {"class_type": "Const", "inputs": {"value": 1}},
    }
    assert order(parse_workflow(graph), CLASSES) == ["1", "2", "3", "out0"]
    with pytest.raises(WorkflowError):
        order(parse_workflow(out("none")), CLASSES)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), "nan"], ids=str)
def test_floats_that_are_not_finite(value: Any) -> None:
    classes = {"Out": node({"x": ("FLOAT", {"min": 0.0, "max": 100.0})}, OUTPUT_NODE=True)}
    prompt = parse_workflow({"1": {"class_type": "Out", "inputs": {"x": value}}})
    (problem,) = validate(prompt, classes)
    assert (problem.kind, problem.input) == ("invalid_input_type", "x")
    assert problem.message == f"expected FLOAT, got {value!r}"


def test_a_literal_where_only_a_link_can_be() -> None:
    class Make:
        RETURN_TYPES = ("MODEL",)
        FUNCTION = "run"

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            return {"required": {}}

        def run(self) -> tuple[str]:
            return ("model",)

    class Use(Make):
        OUTPUT_NODE = True

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            return {"required": {"model": ("MODEL", {})}}

    graph = {"1": {"class_type": "Make", "inputs": {}}, "2": {"class_type": "Use", "inputs": {"model": "foo"}}}
    (problem,) = check(parse_workflow(graph), {"Make": Make, "Use": Use}).problems
    assert str(problem) == "node 2 (Use).model: expected a link to a MODEL output, got 'foo'"


def test_an_input_that_the_node_does_not_have_is_a_warning() -> None:
    """ComfyUI passes over it, so a misspelt optional input keeps its default without a word."""

    def keywords(self: Any, **inputs: Any) -> tuple[()]:
        return ()

    def named(self: Any, mode: str = "auto", id: str = "") -> tuple[()]:
        return ()

    groups: dict[str, Any] = {"optional": {"mode": ("STRING", {})}, "hidden": {"id": "UNIQUE_ID"}, "OUTPUT_NODE": True}
    classes = {"Named": node(**groups, run=named), "Any": node(**groups, run=keywords)}
    inputs = {"modes": "novram", "id": "1", "_": 1}
    data = {kind: {"class_type": kind, "inputs": inputs} for kind in classes}
    checked = check(parse_workflow(data), classes)
    assert checked.problems == []
    said = [str(warning) for warning in checked.warnings]
    assert said == [
        "node Named (Named).modes: the node has no such input, so what the workflow gives it is not used. "
        "Did you mean mode?",
        "node Named (Named)._: the node has no such input, so what the workflow gives it is not used.",
    ]
