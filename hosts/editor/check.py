"""The linter for the graph in the editor: this host's nodes, models and memory mode, and remedies that are a click.

A finding names its node by the id that the host runs it under: `12:3` is node 3 in the subgraph of node 12, and its
`path` is `["12"]`. `links` are ids in the graph that the node stands in; `links_at` has those of all graphs on the way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..lint.graph import FileLink, Finding, Graph, Level, shortened
from ..lint.lint import FileReport, Linter
from . import session
from .changes import Change, applied, candidates

MOST_TRIED = 24  # changed graphs that one request checks
MOST_TRIED_NODES = 2000  # of all these graphs together: a check takes about as long as the graph has nodes
MOST_FINDINGS = 500  # in an answer, the worst first
MOST_CHARACTERS = 300  # of a name that the file chose
IN_EDITOR = Path("the workflow")


def check(workflow: Any, prompt: Any = None) -> dict[str, Any]:
    """What is wrong with a graph, for the host that runs now; `more` counts the findings that are left out.

    Args:
        workflow: in the editor's form, or None: then `prompt` is checked.
        prompt: in API form. With a workflow it tells which nodes the editor would send: others are of its own kinds.
    Raises:
        WorkflowError: it is no workflow.
    """
    linter = session.linter()
    data = workflow if workflow is not None else prompt
    report, graph = linter.check_data(data, IN_EDITOR)
    sent = set(prompt) if workflow is not None and isinstance(prompt, dict) else None
    findings = [f for f in report.findings if not _of_the_editor(f, sent)]
    # The worst first; those of one level in the order of the nodes.
    findings.sort(key=lambda f: _ORDER[f.level])
    verifier = _Verifier(linter, graph, report)
    return {
        "host": verifier.host.value,
        "mode": verifier.mode.value,
        "findings": [_to_json(f, graph, verifier) for f in findings[:MOST_FINDINGS]],
        "more": max(0, len(findings) - MOST_FINDINGS),
    }


_ORDER = {level: position for position, level in enumerate(Level)}


def _of_the_editor(finding: Finding, sent: set[str] | None) -> bool:
    """A node that no server has: packs add kinds of nodes to the editor alone."""
    is_unknown = finding.code == "unknown-node" and finding.place is not None
    return is_unknown and sent is not None and finding.place is not None and finding.place.node_id not in sent


class _Verifier:
    """Checks a graph again with widgets changed."""

    def __init__(self, linter: Linter, graph: Graph, before: FileReport) -> None:
        assert linter.options.host is not None  # `_options` names both
        assert linter.options.offload is not None
        self.linter = linter
        self.graph = graph
        self.host = linter.options.host
        self.mode = linter.options.offload
        self.before = _bad(before)
        self.most = min(MOST_TRIED, max(2, MOST_TRIED_NODES // max(1, len(graph.nodes))))
        self.tried: dict[tuple[Change, ...], tuple[tuple[Change, ...], set[tuple[str, ...]]] | None] = {}

    def cure(self, finding: Finding, changes: tuple[Change, ...]) -> tuple[Change, ...] | None:
        """The changes as the editor makes them, if the finding is gone then and no other has come; else None."""
        if changes not in self.tried:
            self.tried[changes] = self._try(changes) if len(self.tried) < self.most else None
        made, after = self.tried[changes] or ((), {_key(finding)})
        return made if _key(finding) not in after and after <= self.before else None

    def _try(self, changes: tuple[Change, ...]) -> tuple[tuple[Change, ...], set[tuple[str, ...]]] | None:
        changed = applied(self.graph, changes)
        if changed is None:
            return None
        graph, made = changed
        return made, _bad(self.linter.check_graph(graph, IN_EDITOR))


def _bad(report: FileReport) -> set[tuple[str, ...]]:
    return {_key(f) for f in report.findings if f.level in (Level.BLOCK, Level.ERROR, Level.WARNING)}


def _key(f: Finding) -> tuple[str, ...]:
    return (f.level.value, f.code, f.place.node_id if f.place else "", f.message)


def _to_json(f: Finding, graph: Graph, verifier: _Verifier) -> dict[str, Any]:
    place = f.place
    path = place.node_id.split(":")[:-1] if place is not None and graph.form == "editor" else []
    trail, name = _carriers(f, graph)
    at: dict[tuple[str, ...], list[int | str]] = {}
    for link in trail:
        at.setdefault(link.path, []).append(int(link.id) if link.id.isdecimal() else link.id)
    return {
        "level": f.level.value,
        "code": f.code,
        "node": place.node_id if place is not None else None,
        "path": path,
        "title": shortened(place.title, MOST_CHARACTERS) if place is not None else "",
        "class_type": shortened(place.class_type, MOST_CHARACTERS) if place is not None else "",
        "input": f.data.get("input") or name or None,
        "links": at.get(tuple(path), []),
        "links_at": [{"path": list(where), "links": ids} for where, ids in at.items()],
        "message": f.message,
        "remedies": [
            {"text": text, "changes": [c._asdict() for c in changes]} for text, changes in _remedies(f, verifier)
        ],
        "data": {name: shortened(v, 1000) if isinstance(v, str) else v for name, v in f.data.items()},
    }


def _remedies(f: Finding, verifier: _Verifier) -> Iterable[tuple[str, tuple[Change, ...]]]:
    """(text, changes) of every way out, those that are a click first; no changes where none was found to cure it."""
    done: set[str] = set()
    for text, changes in candidates(f, verifier.graph, verifier.host, verifier.mode):
        made = verifier.cure(f, changes) if text not in done else None
        if made is not None:
            done.add(text)
            yield text, made
    yield from ((text, ()) for text in f.remedies if text not in done)


def _carriers(f: Finding, graph: Graph) -> tuple[list[FileLink], str]:
    """The links that carry what the finding is about, and the input of its node that they lead to."""
    if f.place is None or graph.file is None or f.place.node_id not in graph.nodes:
        return [], ""
    name = f.data.get("input")
    if isinstance(name, str) and name:
        return graph.file.trail(f.place.node_id, name), name
    if f.conflict is None:
        return [], ""
    origin, kind = f.conflict.held.origin.node_id, f.conflict.held.kind
    return _between(graph, origin, f.place.node_id, kind)


def _between(graph: Graph, origin: str, place: str, kind: str) -> tuple[list[FileLink], str]:
    """Links of the graph on a way from one node to another, along values of one kind."""
    feeds: dict[str, set[str]] = {}
    for node in graph.nodes.values():
        for link in node.links.values():
            feeds.setdefault(link.node_id, set()).add(node.id)
    behind = _reached(origin, feeds)
    found: dict[FileLink, None] = {}
    entry = ""
    rest, seen = [place], {place}
    while rest:
        node = graph.nodes[rest.pop()]
        for name, link in node.links.items():
            source = graph.nodes.get(link.node_id)
            if source is None or source.id not in behind or not _carries(source.output_types, link.output, kind):
                continue
            entry = entry or (name if node.id == place else "")
            found.update(dict.fromkeys(graph.file.trail(node.id, name) if graph.file is not None else ()))
            if source.id != origin and source.id not in seen:
                seen.add(source.id)
                rest.append(source.id)
    return list(found), entry


def _carries(types: tuple[str, ...] | None, output: int, kind: str) -> bool:
    if types is None or not 0 <= output < len(types):
        return True
    return not {kind, "*", "COMFY_MATCHTYPE_V3"}.isdisjoint(part.strip() for part in types[output].split(","))


def _reached(start: str, feeds: Mapping[str, set[str]]) -> set[str]:
    found, rest = {start}, [start]
    while rest:
        for fed in feeds.get(rest.pop(), ()):
            if fed not in found:
                found.add(fed)
                rest.append(fed)
    return found
