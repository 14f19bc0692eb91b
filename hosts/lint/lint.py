"""One workflow file from its text to findings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any

from ...quantizers.compat.modes import HOST_MODES, HostName, OffloadMode
from ...quantizers.errors import QuantwireError
from .. import use
from ..standalone.folders import ModelFolders
from ..standalone.workflow import parse_workflow, read_json
from .catalog import Catalog, NodeType, core_nodes, foreign
from .check import Checks, embedded, outputs
from .editor import MOST_NODES, TOO_LARGE, is_editor_form, read_editor, too_large
from .files import Headers, ModelFiles
from .flow import COMPAT, Flow
from .graph import Finding, Graph, Level, from_prompt, shortened
from .sources import Sources

_ORDER = {level: position for position, level in enumerate(Level)}


@dataclass(frozen=True)
class Options:
    """What files are checked against.

    Attributes:
        host: None: told from each file.
        models: model folders; empty are the embedded host's.
        find_models: False where the machine that checks has none.
        known: patterns of node ids that are there, whoever brings them.
        server: a server's node types.
        strict: an unknown node is an error, whether it may be a pack's or not.
        folders: asked for model files in place of `models`.
        here: `server` is this process: its libraries and model files are those of the run.
        in_force: `offload` is what the host does now, which splits only what does not fit.
        headers: of model files that earlier checks have read.
        most_nodes: of a workflow, with those of its subgraphs; a larger one is refused.
    """

    offload: OffloadMode | None = None
    host: HostName | None = None
    models: tuple[Path, ...] = ()
    find_models: bool = True
    known: tuple[str, ...] = ()
    server: Mapping[str, NodeType] | None = None
    strict: bool = False
    folders: ModelFolders | None = None
    here: bool = False
    in_force: bool = False
    headers: Headers | None = None
    most_nodes: int = MOST_NODES


@dataclass(frozen=True)
class FileReport:
    """Findings of one file, in the order of its nodes.

    Attributes:
        form: "editor", "api", or empty for a file that is no workflow.
        host: what it was checked for.
    """

    path: Path
    findings: tuple[Finding, ...]
    form: str = ""
    host: HostName | None = None
    nodes: int = 0


@dataclass
class Linter:
    """Checks files one by one; lists of classes and model files are made once.

    Args:
        pack: the pack's node classes.
    """

    options: Options
    pack: InitVar[Mapping[str, type]]
    classes: dict[str, type] = field(init=False)
    own: frozenset[str] = field(init=False)

    def __post_init__(self, pack: Mapping[str, type]) -> None:
        from ..standalone.core_nodes import CORE_NODES

        self.own = frozenset(pack)
        self.classes = {**CORE_NODES, **pack}
        self._models = self.options.folders or ModelFolders(self.options.models)
        self.files = ModelFiles(self._models, self.options.headers)
        self.catalog = Catalog(pack, CORE_NODES, self.options.server)

    def check(self, path: Path, given: bool = True) -> FileReport:
        """Never raises for what a file holds.

        Args:
            given: the user named this file; else it was found in a folder, where JSON of other kinds may lie.
        """
        try:
            data = read_json(path)
            if not given and not _may_be_workflow(data):
                note = Finding(Level.NOTE, "no-workflow", None, "JSON of another kind than a workflow; left out.")
                return FileReport(path, (note,))
            return self.check_data(data, path)[0]
        except OSError as err:
            message = f"cannot be checked: {err}"
            return FileReport(path, (Finding(Level.ERROR, "unreadable", None, message),))
        except QuantwireError as err:
            first, _, rest = str(err).removeprefix(f"{path}: ").partition("\n")
            remedies = tuple(shortened(line, 300) for line in rest.splitlines()[:3])
            return FileReport(path, (Finding(Level.ERROR, "unreadable", None, shortened(first, 600), remedies),))

    def check_data(self, data: Any, path: Path = Path("the workflow")) -> tuple[FileReport, Graph]:
        """The findings of a workflow that has been read, and the graph that it became.

        Args:
            data: JSON of either form; not modified.
            path: what messages call it.
        Raises:
            WorkflowError: it is no workflow.
        """
        with use(self._models):
            graph = self.read(data, str(path))
        return self.check_graph(graph, path), graph

    def check_graph(self, graph: Graph, path: Path) -> FileReport:
        with use(self._models):
            return self._check(path, graph)

    def _check(self, path: Path, graph: Graph) -> FileReport:
        host = self.options.host or self.host_of(graph)
        if any(f.code == TOO_LARGE for f in graph.findings):
            return FileReport(path, graph.findings, graph.form, host)
        roots = outputs(graph, self.catalog)
        live = graph.needed(roots) if roots else set(graph.nodes)
        findings = [*graph.findings]
        now = self.options.in_force
        flow = Flow(graph, self.catalog, Sources(graph, self.files), host, self.options.offload, live, now)
        findings += flow.run()
        files = self.files if self.options.find_models else None
        checks = Checks(
            *(graph, self.catalog, self.classes, self.own, host, self.options.known, files, live),
            *(self.options.strict, self.options.here),
        )
        found = checks.run()
        if host is HostName.STANDALONE:
            missing = {
                (f.place.node_id, str(f.data["input"]))
                for f in found
                if f.code == "missing-model" and f.place is not None
            }
            if not self.options.find_models:
                missing |= {(n.id, i) for n in graph.nodes.values() for i in self.file_inputs(n.class_type)}
            found += embedded(graph, str(path), self.classes, missing, here=self.options.here)
            found = checks.without_dead_branches(found) if self.options.here else found
        return FileReport(path, _sorted([*findings, *found], graph), graph.form, host, len(graph.nodes))

    def read(self, data: Any, source: str) -> Graph:
        most = self.options.most_nodes
        if is_editor_form(data):
            return read_editor(data, self.catalog, most)
        prompt = parse_workflow(data, source)
        return from_prompt(prompt) if len(prompt.nodes) <= most else Graph({}, "api", (too_large(most),), True)

    def file_inputs(self, class_type: str) -> list[str]:
        node_type = self.catalog.find(class_type)
        return [i.name for i in node_type.inputs.values() if i.folder] if node_type else []

    def host_of(self, graph: Graph) -> HostName:
        """ComfyUI where only it has a mode or a node of the file; else the embedded host."""
        if self.options.server is not None:
            return HostName.COMFYUI
        modes = {str(n.values.get("mode")) for n in graph.nodes.values() if n.class_type == COMPAT}
        modes |= {self.options.offload.value} if self.options.offload else set()
        only = set(HOST_MODES[HostName.COMFYUI]) - set(HOST_MODES[HostName.STANDALONE])
        lacking = {n.class_type for n in graph.nodes.values()} - self.classes.keys()
        elsewhere = any(name in core_nodes() or foreign(name) is not None for name in lacking)
        packs = any(n.pack not in ("", "comfy-core") for n in graph.nodes.values() if n.class_type in lacking)
        comfyui = elsewhere or packs or any(m.value in modes for m in only)
        return HostName.COMFYUI if comfyui else HostName.STANDALONE


def _may_be_workflow(data: Any) -> bool:
    if not isinstance(data, dict):
        return False
    prompt = data.get("prompt") if isinstance(data.get("prompt"), dict) else data
    return is_editor_form(data) or any(isinstance(v, dict) and "class_type" in v for v in prompt.values())


def _sorted(findings: Sequence[Finding], graph: Graph) -> tuple[Finding, ...]:
    rank = {node_id: position for position, node_id in enumerate(graph.nodes)}

    def key(f: Finding) -> tuple[int, int]:
        return (rank.get(f.place.node_id, -1) if f.place else -1, _ORDER[f.level])

    return tuple(sorted(findings, key=key))
