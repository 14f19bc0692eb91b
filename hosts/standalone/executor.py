"""Run a workflow in this process: ComfyUI's classic node contract, caching, lazy inputs, cancel.

A node's cache key is a hash over its class, literals, IS_CHANGED and the keys of what it is linked to, hence over all
its ancestors. Node ids are left out, so renumbering or retitling a workflow reruns nothing, and twins run once; only a
node that asks for UNIQUE_ID or is NOT_IDEMPOTENT has its id in the key. The cache holds exactly what the latest prompt
can use: everything larger would keep models of workflows that are gone in memory.

Not supported, and refused before the run where it can be seen: list mapping, graph expansion, async nodes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...quantizers.compat.modes import HostName
from ...quantizers.errors import QuantwireError
from .progress import Interrupted, Listener, NodeScope, first_sigint_sets, node_scope
from .validate import BoundNode, Checked, check, raise_problems
from .workflow import Link, NodePlace, Prompt, PromptNode, parse_workflow

_log = logging.getLogger(__name__)


class NodeFailed(Exception):
    """A node raised something that is neither the pack's own error nor out-of-memory; `__cause__` is `original`."""

    def __init__(self, place: NodePlace, original: BaseException) -> None:
        lines = str(original).strip().splitlines()
        text = lines[0] if lines else type(original).__name__
        # str(KeyError("x")) is only "'x'", which reads as no error at all.
        super().__init__(f"{place}: {'KeyError: ' if isinstance(original, KeyError) else ''}{text}")
        self.node_place = place
        self.node_id, self.title, self.class_type = place
        self.original = original


@dataclass(frozen=True)
class RunResult:
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What nodes returned under "ui", by node id; cached nodes too."""
    results: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    """Return values of the output nodes only: holding all of them would keep every model of the graph alive."""
    timings_s: dict[str, float] = field(default_factory=dict)
    """Nodes that ran, in the order in which they finished."""
    cached: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Entry:
    result: tuple[Any, ...]
    ui: dict[str, Any] | None


class Executor:
    """Runs prompts one after another, keeping node instances and results between them.

    Args:
        node_classes: class_type to class; may load lazily.
    """

    def __init__(self, node_classes: Mapping[str, type], listener: Listener | None = None) -> None:
        self._classes = node_classes
        self._listener = listener or Listener()
        self._cache: dict[str, _Entry] = {}
        self._instances: dict[tuple[str, type], Any] = {}
        self._cancel = threading.Event()
        self._running = threading.Lock()

    def interrupt(self) -> None:
        """Stop the run in progress at its next progress update or node. Any thread; no effect on a later run."""
        self._cancel.set()

    def forget(self) -> None:
        """Drop all cached results and node instances, and so the models that only they hold.

        Raises:
            RuntimeError: a run is in progress.
        """
        if not self._running.acquire(blocking=False):
            raise RuntimeError("This executor is running a workflow; interrupt it or wait for it first.")
        try:
            self._cache = {}
            self._instances = {}
        finally:
            self._running.release()

    def run(
        self,
        prompt: Prompt | Mapping[str, Any],
        extra_pnginfo: Mapping[str, Any] | None = None,
        targets: Collection[str] | None = None,
        cancel: threading.Event | None = None,
        listener: Listener | None = None,
    ) -> RunResult:
        """Validate, then run every output node and what it needs.

        In the main thread the first Ctrl-C acts as `interrupt()` and a second one stops at once, unless the program has
        its own SIGINT handler; a KeyboardInterrupt that such a handler raises stops at once.

        Args:
            prompt: or its JSON in API form.
            extra_pnginfo: for nodes with the hidden input EXTRA_PNGINFO.
            targets: ids of the output nodes to run; None: all.
            cancel: stops this run when it is set, also before it begins; `interrupt()` sets it.
            listener: who hears of this run; None: who was named when the executor was made.
        Raises:
            WorkflowError: the workflow has problems; nothing ran.
            NodeFailed: a node raised. QuantwireError and out-of-memory errors come as they are, and raw errors of
                quantized weights under offload as the QuantwireError that explains them, with the attribute
                `node_place`.
            Interrupted: cancelled; what finished stays cached.
            RuntimeError: a run is in progress.
        """
        if not self._running.acquire(blocking=False):
            raise RuntimeError("This executor is running a workflow already; wait for it or use another executor.")
        try:
            self._cancel = cancel or threading.Event()
            with first_sigint_sets(self._cancel):
                return self._checked_run(prompt, extra_pnginfo, targets, listener or self._listener)
        except KeyboardInterrupt:
            raise Interrupted("Interrupted.") from None
        finally:
            self._running.release()

    def _checked_run(
        self,
        prompt: Prompt | Mapping[str, Any],
        extra_pnginfo: Mapping[str, Any] | None,
        targets: Collection[str] | None,
        listener: Listener,
    ) -> RunResult:
        prompt = prompt if isinstance(prompt, Prompt) else parse_workflow(prompt)
        checked = check(prompt, self._classes, targets)
        raise_problems(checked.problems, prompt.source)
        for warning in checked.warnings:
            _log.warning("%s", warning)
        import torch

        with torch.inference_mode():
            run = _Run(self, prompt, checked, extra_pnginfo, listener)
            keys = set(run.keys.values())
            if targets is not None:  # what the other outputs of the same prompt can use stays as well
                whole = check(prompt, self._classes)
                if not whole.problems:
                    keys.update(_Run(self, prompt, whole, extra_pnginfo, listener).keys.values())
            self._cache = {key: entry for key, entry in self._cache.items() if key in keys}
            used = {(node_id, run.node_class(node_id)) for node_id in checked.order}
            self._instances = {key: obj for key, obj in self._instances.items() if key in used}
            return run.run()

    def _instance(self, node_id: str, node_class: type) -> Any:
        key = (node_id, node_class)
        if key not in self._instances:
            self._instances[key] = node_class()
        return self._instances[key]


class _Run:
    """The state of one run."""

    def __init__(
        self,
        executor: Executor,
        prompt: Prompt,
        checked: Checked,
        extra_pnginfo: Mapping[str, Any] | None,
        listener: Listener,
    ) -> None:
        self.executor = executor
        self.listener = listener
        self.prompt = prompt
        self.checked = checked
        self.extra_pnginfo = extra_pnginfo
        self.entries: dict[str, _Entry] = {}
        self.demanded: dict[str, set[str]] = {}
        self.result = RunResult()
        self.keys: dict[str, str | None] = {}
        for node_id in checked.order:
            self.keys[node_id] = self.key(checked.bound[node_id])

    def node_class(self, node_id: str) -> type:
        node_class = self.checked.bound[node_id].node_class
        assert node_class is not None  # a class that this host lacks did not pass the check
        return node_class

    def run(self) -> RunResult:
        cache = self.executor._cache
        cached = [node_id for node_id in self.checked.order if self.keys[node_id] in cache]
        self.listener.run_start(cached)
        for node_id in cached:
            self.note_cached(node_id, cache[str(self.keys[node_id])])
        for node_id in self.checked.outputs:
            self.evaluate(node_id)
            self.result.results[node_id] = self.entries[node_id].result
        self.check_cancel()
        return self.result

    def evaluate(self, wanted: str) -> None:
        """Depth first with a stack of its own: chains get longer than Python's recursion limit."""
        stack = [wanted]
        while stack:
            node_id = stack[-1]
            if node_id in self.entries or self.take_cached(node_id):
                stack.pop()
                continue
            self.check_cancel()
            bound = self.checked.bound[node_id]
            missing = [link.node_id for link in self.active_links(bound).values() if link.node_id not in self.entries]
            if missing:
                stack.extend(reversed(missing))
                continue
            entry = self.execute(bound)
            if entry is None:  # it asked for lazy inputs
                continue
            self.store(node_id, entry)
            stack.pop()

    def active_links(self, bound: BoundNode) -> dict[str, Link]:
        """Without the lazy ones that nobody asked for, even if they happen to be there: the order must not matter."""
        asleep = bound.lazy - self.demanded.get(bound.node.id, set())
        return {name: link for name, link in bound.links.items() if name not in asleep}

    def take_cached(self, node_id: str) -> bool:
        entry = self.executor._cache.get(self.keys[node_id] or "")
        if entry is None:
            return False
        if node_id not in self.result.cached:  # a twin of this node finished earlier in this run
            self.note_cached(node_id, entry)
        self.keep(node_id, entry)
        return True

    def note_cached(self, node_id: str, entry: _Entry) -> None:
        self.result.cached.append(node_id)
        self.listener.node_cached(self.prompt.nodes[node_id], entry.ui)

    def store(self, node_id: str, entry: _Entry) -> None:
        key = self.keys[node_id]
        if key is not None:
            self.executor._cache[key] = entry
        self.keep(node_id, entry)

    def keep(self, node_id: str, entry: _Entry) -> None:
        self.entries[node_id] = entry
        if entry.ui is not None:
            self.result.outputs[node_id] = entry.ui

    def check_cancel(self) -> None:
        if self.executor._cancel.is_set():
            raise Interrupted("Interrupted.")

    # --- one node ---

    def execute(self, bound: BoundNode) -> _Entry | None:
        """The node's result, or None when check_lazy_status wants more inputs first."""
        node = bound.node
        scope = NodeScope(node, self.listener, self.executor._cancel.is_set)
        try:
            obj = self.executor._instance(node.id, self.node_class(node.id))
            inputs = self.inputs(bound)
            wanted = self.wanted_lazy(bound, obj, inputs)
            if wanted:
                self.demanded.setdefault(node.id, set()).update(wanted)
                return None
            self.listener.node_start(node)
            start = time.perf_counter()
            with node_scope(scope):
                entry = _entry(getattr(obj, obj.FUNCTION)(**inputs))
        except (Exception, KeyboardInterrupt) as err:
            failure = self.failure(node, err)
            if failure is err:
                raise
            try:
                raise failure from (None if isinstance(failure, Interrupted) else err)
            finally:
                del failure  # its traceback holds this frame, and with it every tensor of the node
        if scope.interrupt_raised:  # the node swallowed the Interrupted, so its result is half done
            raise self.failure(node, Interrupted(f"Interrupted in {node.place}."))
        seconds = self.result.timings_s[node.id] = time.perf_counter() - start
        self.listener.node_done(node, seconds, entry.ui)
        return entry

    def failure(self, node: PromptNode, err: BaseException) -> BaseException:
        """The exception to raise for one that a node raised, with its `node_place`."""
        import torch

        place = node.place
        if isinstance(err, KeyboardInterrupt):
            err = Interrupted(f"Interrupted in {place}.")
        elif not isinstance(err, (Interrupted, QuantwireError, torch.OutOfMemoryError, MemoryError)):
            from ...quantizers.compat.translate import translate

            err = translate(err, host=HostName.STANDALONE) or NodeFailed(place, err)
        setattr(err, "node_place", place)  # noqa: B010 - the types are not all ours
        self.listener.node_error(node, err)
        return err

    def inputs(self, bound: BoundNode) -> dict[str, Any]:
        values: dict[str, Any] = {**bound.literals, **dict.fromkeys(bound.lazy)}
        for name, link in self.active_links(bound).items():
            result = self.entries[link.node_id].result
            if link.output >= len(result):
                source = self.prompt.nodes[link.node_id].place
                raise ValueError(f"input {name!r}: {source} returned {len(result)} values, so none for {link.output}")
            values[name] = result[link.output]
        return {**values, **self.hidden(bound)}

    def hidden(self, bound: BoundNode, with_run_data: bool = True) -> dict[str, Any]:
        known: dict[str, Any] = {"UNIQUE_ID": bound.node.id, "EXTRA_PNGINFO": None, "PROMPT": {}}
        # Account data of ComfyUI's paid services; absent here as it is there for whoever has no account.
        known.update(dict.fromkeys(("AUTH_TOKEN_COMFY_ORG", "API_KEY_COMFY_ORG", "COMFY_USAGE_SOURCE")))
        declared = bound.spec.hidden if bound.spec else {}
        if with_run_data and {"PROMPT", "EXTRA_PNGINFO"} & set(declared.values()):
            known.update(PROMPT=self.prompt.to_json(), EXTRA_PNGINFO=self.extra_pnginfo)
        return {name: known[kind] for name, kind in declared.items() if kind in known}

    def wanted_lazy(self, bound: BoundNode, obj: Any, inputs: dict[str, Any]) -> set[str]:
        if not hasattr(obj, "check_lazy_status"):
            return set()
        asked = {name for name in obj.check_lazy_status(**inputs) or () if isinstance(name, str)}
        asked -= {*bound.literals, *self.active_links(bound)}
        strangers = asked - bound.lazy
        if strangers:
            raise ValueError(f"check_lazy_status asks for {', '.join(sorted(strangers))}, which nothing is linked to")
        return asked

    # --- cache keys ---

    def key(self, bound: BoundNode) -> str | None:
        """None: never cached, and neither is anything that depends on it."""
        node_class, hidden = self.node_class(bound.node.id), bound.spec.hidden if bound.spec else {}
        parts: list[Any] = [bound.node.class_type]
        if "UNIQUE_ID" in hidden.values() or getattr(node_class, "NOT_IDEMPOTENT", False):
            parts.append(bound.node.id)
        for name, link in sorted(bound.links.items()):
            source = self.keys[link.node_id]
            if source is None:
                return None
            parts.append([name, source, link.output])
        try:
            parts.append(_token(bound.literals))
            parts.append(_token(self.is_changed(bound, node_class)))
        except _NeverEqual:
            return None
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def is_changed(self, bound: BoundNode, node_class: Any) -> Any:
        if not hasattr(node_class, "IS_CHANGED"):
            return None
        # All inputs, links as None, as in ComfyUI: a signature that works here must work there.
        known = {**dict.fromkeys(bound.links), **bound.literals, **self.hidden(bound, with_run_data=False)}
        try:
            return node_class.IS_CHANGED(**known)
        except Exception as err:  # never wrong, only slower: the node runs every time
            _log.warning("%s: IS_CHANGED failed, so the node runs every time: %r", bound.node.place, err)
            return float("nan")


class _NeverEqual(Exception):
    """The value is NaN or of a type whose equality says nothing about its content."""


def _token(value: Any) -> Any:
    """A value as JSON that differs whenever the value differs in content or type."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float) and not math.isnan(value):
        return value
    if isinstance(value, bytes):
        return ["bytes", value.hex()]
    if isinstance(value, (list, tuple)):
        return ["list", *map(_token, value)]
    if isinstance(value, Mapping):
        return ["dict", *sorted(([_token(k), _token(v)] for k, v in value.items()), key=repr)]
    raise _NeverEqual


def _entry(returned: Any) -> _Entry:
    ui = None
    if isinstance(returned, Mapping):
        if "expand" in returned:
            raise NotImplementedError("the node expands into a graph, which this host does not support")
        ui, returned = returned.get("ui"), returned.get("result")
    if returned is None:
        returned = ()
    if not isinstance(returned, (tuple, list)):
        raise TypeError(f"the node returned {type(returned).__name__}; expected a tuple with one value per output")
    return _Entry(tuple(returned), ui)
