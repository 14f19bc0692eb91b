"""Progress of a running node, and the points at which it can be cancelled.

A node writes `with progress(total, "quantizing") as bar: ... bar.update()`. Who hears it is found through a context
variable that the executor sets, so that a node's signature stays ComfyUI's and the same code does nothing outside a
run. A thread that a node starts sees the variable only through `contextvars.copy_context().run(...)`; an update from
another thread through the bar object itself works as it is.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, TextIO

from .workflow import PromptNode


class Interrupted(Exception):
    """The run was cancelled. No QuantwireError: nothing is wrong with the workflow."""


class Listener:
    """What can be heard of a run. Every method does nothing here; override the ones of interest.

    Calls come from the thread that runs the workflow, `progress` also from a thread that a node started.
    """

    def run_start(self, cached: Sequence[str]) -> None:
        """Everything was checked; `cached` holds the ids of the nodes whose results are there already."""

    def node_start(self, node: PromptNode) -> None: ...

    def node_cached(self, node: PromptNode, ui: Mapping[str, Any] | None) -> None: ...

    def progress(self, node: PromptNode, bar: Progress) -> None:
        """After every change of `bar`: when it opens, at each update, and once more when it closes."""

    def text(self, node: PromptNode, text: str) -> None:
        """What a node says of itself while it runs."""

    def preview(self, node: PromptNode, latent: Any) -> None:
        """(B, C, H, W) latent that a sampler has so far, of noise rid as well as the model can; not to be modified."""

    def decoded(self, node: PromptNode, latent: Any, images: Any) -> None:
        """A latent (B, C, H, W) and the images (B, 8H, 8W, 3) in [0, 1] that a VAE made of it."""

    def node_done(self, node: PromptNode, seconds: float, ui: Mapping[str, Any] | None) -> None: ...

    def node_error(self, node: PromptNode, error: BaseException) -> None:
        """Also for a cancelled node, with Interrupted."""


@dataclass
class NodeScope:
    node: PromptNode
    listener: Listener
    cancelled: Callable[[], bool]
    depth: int = 0
    interrupt_raised: bool = False
    """A node that swallows Interrupted returns a half-done result; the executor must see that it was told to stop."""

    def check(self) -> None:
        if self.cancelled():
            self.interrupt_raised = True
            raise Interrupted(f"Interrupted in {self.node.place}.")


_scope: ContextVar[NodeScope | None] = ContextVar("quantwire_node_scope", default=None)


@contextmanager
def node_scope(scope: NodeScope) -> Iterator[NodeScope]:
    """Executor's side: route the progress of the code inside to this node."""
    token = _scope.set(scope)
    try:
        yield scope
    finally:
        _scope.reset(token)


def check_interrupted() -> None:
    """Raise Interrupted if the run was cancelled. For loops that have no bar."""
    scope = _scope.get()
    if scope is not None:
        scope.check()


def show_text(text: str) -> None:
    """Tell the listener what the node that runs now says of itself."""
    scope = _scope.get()
    if scope is not None:
        scope.listener.text(scope.node, text)


def show_preview(latent: Any) -> None:
    """Offer the listener the latent that a sampler has so far: (B, C, H, W), denoised as well as the model can."""
    scope = _scope.get()
    if scope is not None:
        scope.listener.preview(scope.node, latent)


def show_decoded(latent: Any, images: Any) -> None:
    """Tell the listener which images (B, 8H, 8W, 3) a VAE made of a latent (B, C, H, W)."""
    scope = _scope.get()
    if scope is not None:
        scope.listener.decoded(scope.node, latent, images)


@dataclass(eq=False)
class Progress:
    total: int | None
    desc: str
    depth: int = 0
    done: int = 0
    closed: bool = False
    _scope: NodeScope | None = field(default=None, repr=False)

    def update(self, n: int = 1) -> None:
        """Advance by n steps.

        Raises:
            Interrupted: the run was cancelled.
        """
        self.done += n
        self._tell()
        if self._scope is not None:
            self._scope.check()

    def _tell(self) -> None:
        if self._scope is not None:
            self._scope.listener.progress(self._scope.node, self)


@contextmanager
def progress(total: int | None, desc: str = "") -> Iterator[Progress]:
    """A bar for the node that runs now; bars nest. Outside a run it counts and tells nobody.

    Args:
        total: steps, or None when unknown.
    """
    scope = _scope.get()
    bar = Progress(total, desc, scope.depth if scope else 0, _scope=scope)
    if scope is None:
        yield bar
        return
    scope.check()
    scope.depth += 1
    try:
        bar._tell()
        yield bar
    finally:
        scope.depth -= 1
        bar.closed = True
        bar._tell()


@contextmanager
def first_sigint_sets(cancel: threading.Event) -> Iterator[None]:
    """Executor's side: the first Ctrl-C only asks, because raising in mid-node may leave a half-moved model.

    A handler that the program installed itself stays; elsewhere than in the main thread there is nothing to install.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def ask(signum: int, frame: FrameType | None) -> None:
        if cancel.is_set():
            raise KeyboardInterrupt
        cancel.set()

    signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class TqdmListener(Listener):
    """One line per node with its seconds, and tqdm bars while a node runs.

    Args:
        stream: standard error by default, looked up at construction.
        bars: True and False force; None draws bars on a terminal only, so that logs hold no control characters. Without
            tqdm installed there are lines only.
    """

    def __init__(self, stream: TextIO | None = None, bars: bool | None = None) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._bars = self._stream.isatty() if bars is None else bars
        self._open: dict[Progress, Any] = {}

    def node_cached(self, node: PromptNode, ui: Mapping[str, Any] | None) -> None:
        self._line(f"{'cached':>9}  {node.place}")

    def progress(self, node: PromptNode, bar: Progress) -> None:
        if not self._bars or (bar.closed and bar not in self._open):
            return
        drawn = self._open[bar] if bar in self._open else self._draw(node, bar)
        if drawn is None:
            return
        drawn.update(bar.done - drawn.n)
        if bar.closed:
            drawn.close()
            del self._open[bar]

    def _draw(self, node: PromptNode, bar: Progress) -> Any:
        try:
            from tqdm import tqdm
        except ImportError:
            self._bars = False
            return None
        name = node.title or node.class_type
        text = f"{name}: {bar.desc}" if bar.desc else name
        # leave=False: the node's own line takes the bar's place.
        drawn = tqdm(
            total=bar.total, desc=text, position=bar.depth, leave=False, file=self._stream, disable=False,
            dynamic_ncols=True,
        )  # fmt: skip
        self._open[bar] = drawn
        return drawn

    def node_done(self, node: PromptNode, seconds: float, ui: Mapping[str, Any] | None) -> None:
        self._line(f"{seconds:7.2f} s  {node.place}")

    def node_error(self, node: PromptNode, error: BaseException) -> None:
        word = "stopped" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "failed"
        self._line(f"{word:>9}  {node.place}")

    def _line(self, text: str) -> None:
        # A bar that a generator opened outlives its node when the node raised and its frames are still held.
        while self._open:
            self._open.popitem()[1].close()
        print(text, file=self._stream, flush=True)
