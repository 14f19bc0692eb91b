"""Running workflows: order, caching, lazy inputs, hidden inputs, errors, progress, cancel."""

from __future__ import annotations

import contextlib
import contextvars
import io
import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from quantwire.hosts.standalone.executor import Executor, Interrupted, NodeFailed, QuantwireError
from quantwire.hosts.standalone.progress import Listener, Progress, TqdmListener, check_interrupted, progress
from quantwire.hosts.standalone.validate import WorkflowError
from quantwire.hosts.standalone.workflow import NodePlace, PromptNode, parse_workflow

Graph = dict[str, dict[str, Any]]
INT: tuple[str, dict[str, Any]] = ("INT", {})
calls: list[str] = []


@pytest.fixture(autouse=True)
def no_calls() -> None:
    calls.clear()


class Const:
    RETURN_TYPES = ("INT",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"value": INT}}

    def run(self, value: int) -> tuple[int]:
        calls.append(f"const {value}")
        return (value,)


class Add:
    RETURN_TYPES = ("INT", "INT")
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"a": INT, "b": INT}}

    def run(self, a: int, b: int) -> tuple[int, int]:
        calls.append(f"{a}+{b}")
        return (a + b, a - b)


class Show:
    RETURN_TYPES = ()
    FUNCTION = "run"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"x": ("*",)}}

    def run(self, x: object) -> dict[str, Any]:
        calls.append(f"show {x}")
        return {"ui": {"text": [str(x)]}, "result": (x,)}


class Switch:
    """Takes one of two inputs, and evaluates only that one."""

    RETURN_TYPES = ("INT",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        lazy = ("INT", {"lazy": True})
        return {"required": {"first": ("BOOLEAN", {}), "a": lazy, "b": lazy}}

    def check_lazy_status(self, first: bool, a: int | None, b: int | None) -> list[str]:
        wanted, value = ("a", a) if first else ("b", b)
        return [wanted] if value is None else []

    def run(self, first: bool, a: int | None, b: int | None) -> tuple[int | None]:
        assert (b if first else a) is None
        return (a if first else b,)


class Hidden:
    RETURN_TYPES = ("DICT",)
    FUNCTION = "run"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        kinds = {"prompt": "PROMPT", "me": "UNIQUE_ID", "info": "EXTRA_PNGINFO", "token": "AUTH_TOKEN_COMFY_ORG"}
        return {"required": {}, "hidden": kinds}

    def run(self, **inputs: Any) -> tuple[dict[str, Any]]:
        calls.append(f"hidden {inputs['me']}")
        return (inputs,)


class Watch:
    """IS_CHANGED answers what the test puts here."""

    RETURN_TYPES = ("INT",)
    FUNCTION = "run"
    answer: Any = 1

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"value": INT}, "optional": {"link": INT}}

    @classmethod
    def IS_CHANGED(cls, value: int, link: None = None) -> Any:
        assert link is None  # not evaluated yet
        if isinstance(cls.answer, Exception):
            raise cls.answer
        return cls.answer

    def run(self, value: int, link: int = 0) -> tuple[int]:
        calls.append("watch")
        return (value,)


def node_class(run: Callable[..., Any], **attributes: Any) -> type:
    """An output node without inputs that runs a function of the test."""
    members = {
        "INPUT_TYPES": classmethod(lambda cls: {"required": {}}),
        "RETURN_TYPES": ("INT",),
        "FUNCTION": "run",
        "OUTPUT_NODE": True,
        "run": lambda self: run(),
    }
    return type("TestNode", (), {**members, **attributes})


CLASSES: dict[str, type] = {c.__name__: c for c in (Const, Add, Show, Switch, Hidden, Watch)}


def const(value: int) -> dict[str, Any]:
    return {"class_type": "Const", "inputs": {"value": value}}


def add(a: Any, b: Any) -> dict[str, Any]:
    return {"class_type": "Add", "inputs": {"a": a, "b": b}}


def show(source: str, output: int = 0) -> dict[str, Any]:
    return {"class_type": "Show", "inputs": {"x": [source, output]}}


def two_branches(left: int = 1, right: int = 2) -> Graph:
    return {
        "l": const(left),
        "r": const(right),
        "lsum": add(["l", 0], 10),
        "sum": add(["lsum", 0], ["r", 0]),
        "out": show("sum"),
    }


class Recorder(Listener):
    def __init__(self) -> None:
        self.events: list[str] = []
        self.bars: list[tuple[str, int, int | None, int, bool]] = []

    def node_start(self, node: PromptNode) -> None:
        self.events.append(f"start {node.id}")

    def node_cached(self, node: PromptNode, ui: Mapping[str, Any] | None) -> None:
        self.events.append(f"cached {node.id}" + (f" {ui['text'][0]}" if ui else ""))

    def node_done(self, node: PromptNode, seconds: float, ui: Mapping[str, Any] | None) -> None:
        assert seconds >= 0
        self.events.append(f"done {node.id}" + (f" {ui['text'][0]}" if ui else ""))

    def node_error(self, node: PromptNode, error: BaseException) -> None:
        self.events.append(f"error {node.id} {type(error).__name__}")

    def progress(self, node: PromptNode, bar: Progress) -> None:
        self.bars.append((f"{node.id} {bar.desc}", bar.done, bar.total, bar.depth, bar.closed))


# --- results ---


def test_results_ui_timings_and_events() -> None:
    heard = Recorder()
    result = Executor(CLASSES, heard).run({"1": const(2), "2": add(["1", 0], 3), "3": show("2", 1)})
    assert result.results == {"3": (-1,)}
    assert result.outputs == {"3": {"text": ["-1"]}}
    assert list(result.timings_s) == ["1", "2", "3"]
    assert result.cached == []
    assert heard.events == ["start 1", "done 1", "start 2", "done 2", "start 3", "done 3 -1"]


def test_a_prompt_object_or_wrapped_json_runs_too() -> None:
    graph: Graph = {"1": const(2), "3": show("1")}
    assert Executor(CLASSES).run(parse_workflow(graph)).results == {"3": (2,)}
    assert Executor(CLASSES).run({"prompt": graph}).results == {"3": (2,)}


def test_literals_reach_the_node_converted_and_strays_do_not() -> None:
    graph: Graph = {"1": {"class_type": "Add", "inputs": {"a": "5", "b": 2.9, "upload": "image"}}, "2": show("1")}
    assert Executor(CLASSES).run(graph).results == {"2": (7,)}


def test_a_workflow_with_problems_runs_nothing() -> None:
    with pytest.raises(WorkflowError, match=r"the workflow: 2 problems"):
        Executor(CLASSES).run({"1": const(2), "2": show("1"), "3": show("9"), "4": {"class_type": "Gone"}})
    assert calls == []


def test_a_cycle_is_an_error_not_a_hang() -> None:
    with pytest.raises(WorkflowError, match="part of a cycle"):
        Executor(CLASSES).run({"1": add(["2", 0], 1), "2": add(["1", 0], 1), "3": show("1")})


def test_only_what_outputs_need_runs() -> None:
    Executor(CLASSES).run({"1": const(1), "unused": const(5), "2": show("1")})
    assert calls == ["const 1", "show 1"]


def test_a_diamond_runs_the_shared_node_once() -> None:
    graph: Graph = {"1": const(3), "2": add(["1", 0], 1), "3": add(["1", 0], 2), "4": add(["2", 0], ["3", 0])}
    assert Executor(CLASSES).run({**graph, "5": show("4")}).results == {"5": (9,)}
    assert calls.count("const 3") == 1


def test_depth_first_finishes_one_output_before_the_next() -> None:
    Executor(CLASSES).run({"a": const(1), "b": const(2), "oa": show("a"), "ob": show("b")})
    assert calls == ["const 1", "show 1", "const 2", "show 2"]


def test_a_chain_of_2000_nodes_does_not_recurse() -> None:
    graph: Graph = {"0": const(0)}
    for i in range(1, 2000):
        graph[str(i)] = add([str(i - 1), 0], 1)
    graph = dict(reversed(graph.items()))
    executor = Executor(CLASSES)
    assert executor.run({**graph, "out": show("1999")}).results == {"out": (1999,)}
    assert len(executor.run({**graph, "out": show("1999")}).cached) == 2001


@pytest.mark.parametrize(
    ("returned", "result", "ui"),
    [
        pytest.param((1,), (1,), None, id="tuple"),
        pytest.param([1], (1,), None, id="list"),
        pytest.param(None, (), None, id="none"),
        pytest.param({"ui": {"images": []}}, (), {"images": []}, id="ui-only"),
        pytest.param({"result": (1,)}, (1,), None, id="result-only"),
    ],
)
def test_forms_of_a_result(returned: Any, result: tuple[Any, ...], ui: dict[str, Any] | None) -> None:
    got = Executor({"Node": node_class(lambda: returned)}).run({"1": {"class_type": "Node"}})
    assert got.results == {"1": result}
    assert got.outputs == ({} if ui is None else {"1": ui})


@pytest.mark.parametrize(
    ("returned", "text"),
    [
        pytest.param(5, "the node returned int; expected a tuple", id="bare"),
        pytest.param({"expand": {}}, "expands into a graph, which this host does not support", id="expand"),
    ],
)
def test_results_that_are_none(returned: Any, text: str) -> None:
    with pytest.raises(NodeFailed, match=text):
        Executor({"Node": node_class(lambda: returned)}).run({"1": {"class_type": "Node"}})


def test_a_node_that_returns_too_little_is_named() -> None:
    classes = {**CLASSES, "Node": node_class(lambda: ())}
    with pytest.raises(NodeFailed, match=r"node 2 \(Show\): input 'x': node 1 \(Node\) returned 0 values"):
        Executor(classes).run({"1": {"class_type": "Node"}, "2": show("1")})


def test_hidden_inputs() -> None:
    graph: Graph = {"7": {"class_type": "Hidden", "inputs": {}, "_meta": {"title": "H"}}}
    result = Executor(CLASSES).run(graph, extra_pnginfo={"workflow": {"nodes": []}})
    expected = {"prompt": graph, "me": "7", "info": {"workflow": {"nodes": []}}, "token": None}
    assert result.results == {"7": (expected,)}


def test_nodes_run_in_inference_mode_and_the_caller_stays_out_of_it() -> None:
    result = Executor({"Node": node_class(lambda: (torch.is_inference_mode_enabled(),))}).run(
        {"1": {"class_type": "Node"}}
    )
    assert result.results == {"1": (True,)}
    assert not torch.is_inference_mode_enabled()


def test_instances_are_per_node_id_and_live_as_long_as_the_workflow_has_them() -> None:
    class Once:
        RETURN_TYPES, FUNCTION, OUTPUT_NODE, NOT_IDEMPOTENT = ("OBJECT",), "run", True, True

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            return {"required": {"n": INT}}

        def run(self, n: int) -> tuple[object]:
            return (self,)

    def graph(*ids: str, n: int) -> Graph:
        return {i: {"class_type": "Once", "inputs": {"n": n}} for i in ids}

    executor = Executor({"Once": Once})
    first = executor.run(graph("1", "2", n=1)).results
    second = executor.run(graph("1", n=2)).results
    third = executor.run(graph("1", "2", n=3)).results
    assert first["1"][0] is not first["2"][0]
    assert first["1"][0] is second["1"][0] is third["1"][0]
    assert first["2"][0] is not third["2"][0]


# --- caching ---


def test_an_unchanged_workflow_runs_nothing_and_gives_the_same() -> None:
    heard = Recorder()
    executor = Executor(CLASSES, heard)
    first = executor.run(two_branches())
    calls.clear()
    heard.events.clear()
    second = executor.run(two_branches())
    assert calls == []
    assert (second.results, second.outputs) == (first.results, first.outputs)
    assert second.timings_s == {}
    assert set(second.cached) == set(two_branches())
    assert "cached out 13" in heard.events


@pytest.mark.parametrize(
    ("change", "again"),
    [
        pytest.param({"left": 5}, ["const 5", "5+10", "15+2", "show 17"], id="far"),
        pytest.param({"right": 5}, ["const 5", "11+5", "show 16"], id="near"),
    ],
)
def test_a_changed_literal_reruns_exactly_what_depends_on_it(change: dict[str, int], again: list[str]) -> None:
    executor = Executor(CLASSES)
    executor.run(two_branches())
    calls.clear()
    executor.run(two_branches(**change))
    assert calls == again


def test_new_ids_titles_and_stray_inputs_rerun_nothing() -> None:
    executor = Executor(CLASSES)
    executor.run({"1": const(1), "2": show("1")})
    calls.clear()
    moved = {"10": {**const(1), "_meta": {"title": "New"}}, "20": show("10")}
    moved["10"]["inputs"]["upload"] = "image"
    result = executor.run(moved)
    assert calls == []
    assert result.outputs == {"20": {"text": ["1"]}}


def test_twins_in_one_workflow_run_once() -> None:
    result = Executor(CLASSES).run({"1": const(1), "2": const(1), "3": show("1"), "4": show("2")})
    assert calls == ["const 1", "show 1"]
    assert result.outputs["4"] == result.outputs["3"]
    assert result.cached == ["4"]


def test_another_output_of_the_same_node_is_another_key() -> None:
    executor = Executor(CLASSES)
    executor.run({"1": add(3, 1), "2": show("1", 0)})
    assert executor.run({"1": add(3, 1), "2": show("1", 1)}).results == {"2": (2,)}


def test_values_that_python_calls_equal_are_different_literals() -> None:
    executor = Executor(CLASSES)
    seen = [executor.run({"1": {"class_type": "Show", "inputs": {"x": x}}}).results["1"] for x in (1, 1.0, True, "1")]
    assert [type(s[0]) for s in seen] == [int, float, bool, str]


def test_a_node_that_asks_for_its_id_is_cached_per_id() -> None:
    executor = Executor(CLASSES)
    executor.run({"1": {"class_type": "Hidden"}, "2": {"class_type": "Hidden"}})
    executor.run({"2": {"class_type": "Hidden"}, "3": {"class_type": "Hidden"}})
    assert calls == ["hidden 1", "hidden 2", "hidden 3"]


def test_only_what_the_latest_workflow_can_use_is_kept() -> None:
    executor = Executor(CLASSES)
    executor.run(two_branches())
    executor.run({"l": const(1), "out": show("l")})
    calls.clear()
    executor.run(two_branches())
    assert calls == ["1+10", "const 2", "11+2", "show 13"]


def test_is_changed_decides() -> None:
    executor = Executor(CLASSES)
    graph: Graph = {"1": {"class_type": "Watch", "inputs": {"value": 1}}, "2": show("1")}

    def runs(answer: Any) -> list[str]:
        Watch.answer = answer
        calls.clear()
        executor.run(graph)
        return list(calls)

    both = ["watch", "show 1"]
    assert runs("a") == both
    assert runs("a") == []
    assert runs("b") == both
    assert runs(b"b") == both
    assert runs({"k": [1, (2.0, None)]}) == both
    assert runs({"k": [1, (2.0, None)]}) == []
    assert runs(float("nan")) == both
    assert runs(float("nan")) == both
    assert runs(object()) == both  # nothing is known of its content


def test_is_changed_that_raises_runs_every_time_and_warns(caplog: pytest.LogCaptureFixture) -> None:
    executor = Executor(CLASSES)
    graph: Graph = {
        "0": const(1),
        "1": {"class_type": "Watch", "inputs": {"value": 1, "link": ["0", 0]}},
        "2": show("1"),
    }
    Watch.answer = OSError("gone")
    for _ in range(2):
        with caplog.at_level(logging.WARNING):
            executor.run(graph)
    assert calls == ["const 1", "watch", "show 1", "watch", "show 1"]
    assert "node 1 (Watch): IS_CHANGED failed" in caplog.text


# --- lazy inputs ---


def lazy_graph(first: bool) -> Graph:
    switch = {"class_type": "Switch", "inputs": {"first": first, "a": ["1", 0], "b": ["2", 0]}}
    return {"1": const(1), "2": const(2), "s": switch, "out": show("s")}


def test_the_branch_that_nobody_asks_for_does_not_run() -> None:
    executor = Executor(CLASSES)
    assert executor.run(lazy_graph(True)).results == {"out": (1,)}
    assert calls == ["const 1", "show 1"]
    calls.clear()
    assert executor.run(lazy_graph(False)).results == {"out": (2,)}
    assert calls == ["const 2", "show 2"]


def test_a_lazy_input_that_happens_to_be_there_is_still_none_until_asked_for() -> None:
    graph = {"first": show("2"), **lazy_graph(True)}
    assert Executor(CLASSES).run(graph).results == {"first": (2,), "out": (1,)}  # Switch.run asserts the None


def test_a_lazy_branch_may_hold_a_deep_chain() -> None:
    graph = lazy_graph(True)
    graph["1"] = add(["c0", 0], 0)
    graph |= {f"c{i}": add([f"c{i + 1}", 0], 1) for i in range(1500)}
    graph["c1500"] = const(0)
    assert Executor(CLASSES).run(graph).results == {"out": (1500,)}


def test_asking_for_what_is_not_linked_fails() -> None:
    class Greedy(Switch):
        OUTPUT_NODE = True

        def check_lazy_status(self, first: bool, a: int | None, b: int | None) -> list[str]:
            return ["a", "b", "nothing"]

    graph: Graph = {"1": const(1), "g": {"class_type": "Greedy", "inputs": {"first": True, "a": ["1", 0], "b": 4}}}
    with pytest.raises(NodeFailed, match=r"node g \(Greedy\): check_lazy_status asks for nothing, which"):
        Executor({**CLASSES, "Greedy": Greedy}).run(graph)


# --- errors ---


def run_raising(error: BaseException, heard: Listener | None = None, **attributes: Any) -> None:
    def fail() -> None:
        raise error

    classes = {"KSampler": node_class(fail, **attributes)}
    Executor(classes, heard).run({"5": {"class_type": "KSampler", "inputs": {}, "_meta": {"title": "Sampler"}}})


@pytest.mark.parametrize(
    ("error", "text"),
    [
        pytest.param(RuntimeError("bad shape\nmore"), "bad shape", id="first-line"),
        pytest.param(ValueError(), "ValueError", id="empty"),
        pytest.param(KeyError("weight"), "KeyError: 'weight'", id="key-error"),
    ],
)
def test_a_failing_node_is_named(error: Exception, text: str) -> None:
    heard = Recorder()
    with pytest.raises(NodeFailed) as caught:
        run_raising(error, heard)
    failed = caught.value
    assert str(failed) == f"node 5 'Sampler' (KSampler): {text}"
    assert (failed.node_id, failed.title, failed.class_type) == ("5", "Sampler", "KSampler")
    assert failed.original is failed.__cause__ is error
    assert heard.events == ["start 5", "error 5 NodeFailed"]


@pytest.mark.parametrize(
    "error",
    [QuantwireError("K is odd"), torch.OutOfMemoryError("CUDA out of memory"), MemoryError()],
    ids=["quantwire", "device-memory", "memory"],
)
def test_the_packs_errors_and_out_of_memory_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        run_raising(error)
    assert caught.value is error
    assert getattr(error, "node_place") == NodePlace("5", "Sampler", "KSampler")  # noqa: B009
    assert str(getattr(error, "node_place")) == "node 5 'Sampler' (KSampler)"  # noqa: B009


def test_a_constructor_that_raises_is_a_failed_node() -> None:
    def construct(self: object) -> None:
        raise OSError("no device")

    with pytest.raises(NodeFailed, match=r"node 5 'Sampler' \(KSampler\): no device"):
        run_raising(RuntimeError(), __init__=construct)


def test_what_finished_before_an_error_stays_cached_and_a_fixed_node_runs() -> None:
    broken = True

    def maybe() -> tuple[int]:
        if broken:
            raise RuntimeError("broken")
        return (1,)

    executor = Executor({**CLASSES, "Node": node_class(maybe)})
    graph: Graph = {"1": const(1), "2": show("1"), "3": {"class_type": "Node"}}
    with pytest.raises(NodeFailed):
        executor.run(graph)
    broken = False
    calls.clear()
    assert executor.run(graph).results == {"2": (1,), "3": (1,)}
    assert calls == []


# --- progress ---


def test_progress_reaches_the_listener_with_its_node_and_depth() -> None:
    def work() -> tuple[int]:
        with progress(2, "layers") as layers:
            layers.update()
            with progress(None, "bytes") as inner:
                inner.update(5)
        return (1,)

    heard = Recorder()
    Executor({"Node": node_class(work)}, heard).run({"1": {"class_type": "Node"}})
    assert heard.bars == [
        ("1 layers", 0, 2, 0, False),
        ("1 layers", 1, 2, 0, False),
        ("1 bytes", 0, None, 1, False),
        ("1 bytes", 5, None, 1, False),
        ("1 bytes", 5, None, 1, True),
        ("1 layers", 1, 2, 0, True),
    ]


def test_progress_outside_a_run_only_counts() -> None:
    check_interrupted()
    with progress(3, "alone") as bar:
        bar.update(2)
    assert (bar.done, bar.total) == (2, 3)


def test_progress_from_a_thread_of_the_node() -> None:
    def work() -> tuple[int]:
        def inner() -> None:
            with progress(1, "in thread") as bar:
                bar.update()

        thread = threading.Thread(target=contextvars.copy_context().run, args=(inner,))
        thread.start()
        thread.join()
        return (1,)

    heard = Recorder()
    Executor({"Node": node_class(work)}, heard).run({"1": {"class_type": "Node"}})
    assert ("1 in thread", 1, 1, 0, False) in heard.bars


def drawn_by(bars: bool | None, fail: bool = False) -> str:
    def work() -> tuple[int]:
        with progress(3, "steps") as bar, progress(None, "bytes") as nested:
            for _ in range(3):
                bar.update()
                nested.update(7)
        if fail:
            raise RuntimeError("no")
        return (1,)

    stream = io.StringIO()
    executor = Executor({**CLASSES, "Node": node_class(work)}, TqdmListener(stream, bars=bars))
    graph: Graph = {"0": const(1), "1": {"class_type": "Node", "_meta": {"title": "Sampler"}}}
    for _ in range(2):
        try:
            executor.run(graph)
        except NodeFailed:
            break
    return stream.getvalue()


def test_without_a_terminal_there_is_one_line_per_node() -> None:
    lines = drawn_by(None).splitlines()
    assert len(lines) == 2
    assert lines[0].endswith(" s  node 1 'Sampler' (Node)")
    assert lines[1] == "   cached  node 1 'Sampler' (Node)"
    assert drawn_by(None, fail=True).splitlines() == ["   failed  node 1 'Sampler' (Node)"]


def test_forced_bars_are_drawn_and_cleared() -> None:
    pytest.importorskip("tqdm", reason="bars are drawn with tqdm")
    text = drawn_by(True)
    assert "Sampler: steps" in text
    assert "/3" in text
    assert " s  node 1 'Sampler' (Node)" in text


def test_a_bar_left_open_by_a_failed_node_is_cleared_before_its_line() -> None:
    pytest.importorskip("tqdm", reason="bars are drawn with tqdm")

    def steps() -> Iterator[int]:
        with progress(3, "steps") as bar:
            for i in range(3):
                yield i
                bar.update()

    def work() -> None:
        for i in steps():
            if i == 1:
                raise RuntimeError("no")

    stream = io.StringIO()
    with pytest.raises(NodeFailed):  # its traceback keeps the generator alive
        Executor({"Node": node_class(work)}, TqdmListener(stream, bars=True)).run({"1": {"class_type": "Node"}})
    assert "steps" in stream.getvalue()
    assert stream.getvalue().endswith("\r   failed  node 1 (Node)\n")


# --- cancel ---


class Slow:
    """Ticks until it is interrupted; quick once `quick` is set."""

    RETURN_TYPES = ("INT",)
    FUNCTION = "run"
    started = threading.Event()
    quick = False

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"x": INT}}

    def run(self, x: int) -> tuple[int]:
        with progress(1000, "slow") as bar:
            for _ in range(1 if self.quick else 1000):
                type(self).started.set()
                time.sleep(0.01)
                bar.update()
        return (x,)


SLOW_GRAPH: Graph = {"1": const(1), "2": {"class_type": "Slow", "inputs": {"x": ["1", 0]}}, "3": show("2")}


@pytest.fixture
def slow() -> type[Slow]:
    Slow.started, Slow.quick = threading.Event(), False
    return Slow


def test_interrupt_from_another_thread_stops_in_mid_node_and_the_next_run_works(slow: type[Slow]) -> None:
    heard = Recorder()
    executor = Executor({**CLASSES, "Slow": slow}, heard)
    canceller = threading.Thread(target=lambda: slow.started.wait(10) and executor.interrupt())
    canceller.start()
    start = time.perf_counter()
    with pytest.raises(Interrupted, match=r"Interrupted in node 2 \(Slow\)") as caught:
        executor.run(SLOW_GRAPH)
    canceller.join()
    assert time.perf_counter() - start < 5
    assert not isinstance(caught.value, QuantwireError)
    assert heard.events == ["start 1", "done 1", "start 2", "error 2 Interrupted"]
    assert heard.bars[-1][-1]  # the bar was closed
    slow.quick = True
    calls.clear()
    result = executor.run(SLOW_GRAPH)
    assert result.results == {"3": (1,)}
    assert result.cached == ["1"]
    assert calls == ["show 1"]


def test_interrupt_works_on_a_run_in_another_thread(slow: type[Slow]) -> None:
    executor = Executor({**CLASSES, "Slow": slow})
    errors: list[BaseException] = []

    def work() -> None:
        try:
            executor.run(SLOW_GRAPH)
        except Interrupted as err:
            errors.append(err)

    thread = threading.Thread(target=work)
    thread.start()
    assert slow.started.wait(10)
    with pytest.raises(RuntimeError, match="running a workflow already"):
        executor.run(SLOW_GRAPH)
    executor.interrupt()
    thread.join(10)
    assert len(errors) == 1


def test_interrupt_without_ticks_stops_at_the_next_node_and_keeps_what_finished() -> None:
    executor: Executor

    def cancel() -> tuple[int]:
        executor.interrupt()
        return (1,)

    executor = Executor({**CLASSES, "Node": node_class(cancel, OUTPUT_NODE=False)})
    graph: Graph = {"1": {"class_type": "Node"}, "2": show("1")}
    with pytest.raises(Interrupted):
        executor.run(graph)
    assert calls == []
    assert executor.run(graph).cached == ["1"]


def test_a_node_that_swallows_the_interrupt_is_neither_cached_nor_used() -> None:
    executor: Executor

    def swallow() -> tuple[int]:
        executor.interrupt()
        with contextlib.suppress(Exception):
            check_interrupted()
        return (1,)

    executor = Executor({"Node": node_class(swallow)})
    for _ in range(2):
        with pytest.raises(Interrupted):
            executor.run({"1": {"class_type": "Node"}})


def test_an_interrupt_before_the_run_has_no_effect() -> None:
    executor = Executor(CLASSES)
    executor.interrupt()
    assert executor.run({"1": const(1), "2": show("1")}).results == {"2": (1,)}


def test_keyboard_interrupt_of_a_node_stops_cleanly_and_the_next_run_works() -> None:
    first = True

    def press() -> tuple[int]:
        if first:
            raise KeyboardInterrupt
        return (1,)

    executor = Executor({"Node": node_class(press)})
    with pytest.raises(Interrupted) as caught:
        executor.run({"1": {"class_type": "Node"}})
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    first = False
    assert executor.run({"1": {"class_type": "Node"}}).results == {"1": (1,)}


def test_the_programs_own_sigint_handler_stays() -> None:
    before = signal.getsignal(signal.SIGINT)

    def mine(signum: int, frame: object) -> None: ...

    signal.signal(signal.SIGINT, mine)
    try:
        classes = {"Node": node_class(lambda: (signal.getsignal(signal.SIGINT),))}
        result = Executor(classes).run({"1": {"class_type": "Node"}})
        assert result.results == {"1": (mine,)}
        assert signal.getsignal(signal.SIGINT) is mine
    finally:
        signal.signal(signal.SIGINT, before)


SCRIPT = """
import sys, time
from quantwire.hosts.standalone.executor import Executor, Interrupted
from quantwire.hosts.standalone.progress import progress

class Slow:
    RETURN_TYPES, FUNCTION, OUTPUT_NODE, quick = ("INT",), "run", True, False
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}
    def run(self):
        if Slow.quick:
            return (1,)
        print("running", flush=True)
        with progress(3000) as bar:
            for _ in range(3000):
                time.sleep(TICK)
                bar.update()

executor = Executor({"Slow": Slow})
try:
    executor.run({"1": {"class_type": "Slow", "inputs": {}}})
except Interrupted as err:
    print("stopped:", err, flush=True)
Slow.quick = True
print(executor.run({"1": {"class_type": "Slow", "inputs": {}}}).results, flush=True)
sys.exit(130)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT cannot be sent to one process on Windows")
@pytest.mark.parametrize(
    ("tick", "presses"), [("0.01", 1), ("30", 2)], ids=["at-the-next-tick", "second-press-at-once"]
)
def test_a_real_sigint_stops_the_run_without_a_traceback(tick: str, presses: int) -> None:
    script = SCRIPT.replace("TICK", tick)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "running\n"
        for _ in range(presses):
            time.sleep(0.3)
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert out.splitlines() == ["stopped: Interrupted in node 1 (Slow).", "{'1': (1,)}"]
    assert "Traceback" not in err
    assert process.returncode == 130
