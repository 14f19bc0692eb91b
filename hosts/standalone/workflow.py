"""Workflow files in API form: reading, typed access, and overrides from the command line.

API form is what `POST /prompt` takes and what the editor's "Export (API)" writes:
`{node_id: {"class_type": ..., "inputs": {name: literal or [node_id, output_index]}, "_meta": {"title": ...}}}`,
also inside `{"prompt": {...}}`. Editor form (with layout) is refused rather than translated: turning its positional
widget values into named inputs needs the front end's own rules, which change from release to release.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ...quantizers.errors import FileError, WorkflowError, near


class NodePlace(NamedTuple):
    """Where something happened; as text: `node 12 'My title' (KSampler)`."""

    node_id: str
    title: str
    class_type: str

    def __str__(self) -> str:
        # The editor titles every node; a title that only repeats the type says nothing.
        title = f" {self.title!r}" if self.title and self.title != self.class_type else ""
        return f"node {self.node_id}{title} ({self.class_type})"


@dataclass(frozen=True)
class PromptNode:
    id: str
    class_type: str
    inputs: Mapping[str, Any]
    title: str = ""

    @property
    def place(self) -> NodePlace:
        return NodePlace(self.id, self.title, self.class_type)


@dataclass(frozen=True)
class Prompt:
    """A workflow's nodes by id, in file order. Never changed in place: overrides and checks make a new one."""

    nodes: Mapping[str, PromptNode]
    source: str = "the workflow"

    def to_json(self) -> dict[str, Any]:
        """The API form, as a deep copy: what the hidden input PROMPT gets and what goes into a saved image."""
        out: dict[str, Any] = {}
        for node in self.nodes.values():
            out[node.id] = {"class_type": node.class_type, "inputs": copy.deepcopy(dict(node.inputs))}
            if node.title:
                out[node.id]["_meta"] = {"title": node.title}
        return out


class Link(NamedTuple):
    node_id: str
    output: int


def as_link(value: object) -> Link | None:
    """`["4", 0]` as a Link; None for anything else. Any other list is no legal input value at all."""
    if not isinstance(value, list) or len(value) != 2:
        return None
    node_id, output = value
    if not isinstance(node_id, str) or not isinstance(output, int) or isinstance(output, bool):
        return None
    return Link(node_id, output)


# --- what a node class declares --------------------------------------------------------------------------------


@dataclass(frozen=True)
class InputSpec:
    type: Any
    """A type name, or the list of choices of an old-style COMBO."""
    options: Mapping[str, Any]
    group: str

    @property
    def choices(self) -> list[Any] | None:
        """The values of a COMBO; None for any other type, and for a COMBO that only the editor can fill."""
        if isinstance(self.type, (list, tuple)):
            return list(self.type)
        return list(self.options["options"]) if self.type == "COMBO" and "options" in self.options else None

    @property
    def type_name(self) -> str:
        return "COMBO" if isinstance(self.type, (list, tuple)) else str(self.type)


@dataclass(frozen=True)
class NodeSpec:
    """The answer of one INPUT_TYPES call; asking is not free, because file lists come from folder scans."""

    groups: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(cls, node_class: type) -> NodeSpec:
        """Raises WorkflowError: the class has no INPUT_TYPES, or it fails."""
        try:
            return cls(node_class.INPUT_TYPES())  # pyright: ignore[reportAttributeAccessIssue]
        except Exception as err:  # whatever a node's own code raises is one more problem of this workflow
            raise WorkflowError(f"{node_class.__name__}.INPUT_TYPES failed: {type(err).__name__}: {err}") from err

    def get(self, name: str) -> InputSpec | None:
        for group in ("required", "optional", "hidden"):
            declared = self.groups.get(group, {})
            # Asked with `in`, not iterated: packs accept any number of inputs through a dict that contains every name.
            if name in declared:
                info = declared[name]
                if isinstance(info, str):  # hidden inputs are declared by a bare name
                    return InputSpec(info, {}, group)
                return InputSpec(info[0], info[1] if len(info) > 1 else {}, group)
        return None

    @property
    def hidden(self) -> dict[str, str]:
        """Hidden inputs that the host fills, by name: PROMPT, UNIQUE_ID, ..."""
        return {name: kind for name, kind in self.groups.get("hidden", {}).items() if isinstance(kind, str)}

    @property
    def names(self) -> list[str]:
        return [*self.groups.get("required", {}), *self.groups.get("optional", {})]


# --- reading ----------------------------------------------------------------------------------------------------


def load_workflow(path: str | Path) -> Prompt:
    """Read an API-form workflow file.

    Raises:
        FileError: no such file, or not readable as text.
        WorkflowError: not JSON, in editor form, or not a mapping of nodes.
    """
    return parse_workflow(read_json(path), str(path))


def read_json(path: str | Path) -> Any:
    """The parsed text of a workflow file of either form.

    Raises:
        FileError: no such file, or not readable as text.
        WorkflowError: not JSON.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as err:
        kind = "is a folder, not a workflow file" if path.is_dir() else "does not exist"
        raise FileError(f"{path}: {kind}.{_json_files_beside(path)}") from err
    except UnicodeDecodeError as err:
        raise FileError(f"{path}: not a text file; expected a workflow as UTF-8 JSON.") from err
    except OSError as err:
        raise FileError(f"{path}: cannot be read: {err.strerror}.") from err
    try:
        return json.loads(text)
    except json.JSONDecodeError as err:
        raise WorkflowError(f"{path}: invalid JSON at line {err.lineno}, column {err.colno}: {err.msg}.") from err
    except (ValueError, RecursionError) as err:  # a number of thousands of digits, brackets nested as deep
        reason = "too deeply nested" if isinstance(err, RecursionError) else str(err)
        raise WorkflowError(f"{path}: the JSON cannot be read: {reason}.") from err


def _json_files_beside(path: Path) -> str:
    folder = path if path.is_dir() else path.parent
    names = sorted(p.name for p in folder.glob("*.json")) if folder.is_dir() else []
    shown_folder = "this folder" if folder == Path() else str(folder)  # `.` reads as an end of the sentence
    if not names:
        return f"\nThere is no .json file in {shown_folder}."
    shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    return f"{near(path.name, names)}\n.json files in {shown_folder}: {shown}"


def parse_workflow(data: object, source: str = "the workflow") -> Prompt:
    """Check the shape of parsed JSON and take a copy; classes and values are checked by `validate`.

    Raises:
        WorkflowError: every entry that is not a node is listed.
    """
    if isinstance(data, Mapping) and isinstance(data.get("prompt"), Mapping) and "class_type" not in data["prompt"]:
        data = data["prompt"]
    if not isinstance(data, Mapping):
        raise WorkflowError(f"{source}: expected a JSON object of nodes by id, got {type(data).__name__}.")
    if isinstance(data.get("nodes"), list) and "links" in data:
        raise WorkflowError(
            f'{source}: this is the editor\'s own form (it has "nodes" and "links"); '
            "export it in API form: in ComfyUI, Workflow > Export (API)."
        )
    if not data:
        raise WorkflowError(f"{source}: the workflow has no nodes.")
    nodes: dict[str, PromptNode] = {}
    problems: list[str] = []
    for node_id, entry in data.items():
        fault = _shape_fault(entry)
        if fault:
            problems.append(f"{node_id!r}: {fault}")
            continue
        meta = entry.get("_meta")
        title = meta.get("title") if isinstance(meta, Mapping) else None
        title = title if isinstance(title, str) else ""
        try:
            inputs = copy.deepcopy(dict(entry.get("inputs", {})))
        except RecursionError:
            problems.append(f"{node_id!r}: its inputs are too deeply nested")
            continue
        nodes[str(node_id)] = PromptNode(str(node_id), entry["class_type"], inputs, title)
    if problems:
        more = f" ({len(problems)} such entries)\n" + "\n".join(problems) if len(problems) > 1 else ""
        raise WorkflowError(f"{source}: not a workflow in API form: {problems[0]}{more}")
    return Prompt(nodes, source)


def _shape_fault(entry: object) -> str | None:
    if not isinstance(entry, Mapping):
        return f"expected a node object, got {type(entry).__name__}"
    if not isinstance(entry.get("class_type"), str):
        return 'the node has no "class_type"'
    if not isinstance(entry.get("inputs", {}), Mapping):
        return '"inputs" is not an object'
    return None


# --- overrides --------------------------------------------------------------------------------------------------


def apply_overrides(prompt: Prompt, overrides: Iterable[str], node_classes: Mapping[str, type] | None = None) -> Prompt:
    """A copy of the prompt with inputs replaced.

    Args:
        overrides: `NODE.INPUT=VALUE`. NODE is a node id, else a title, else a class_type, and must be unique. VALUE is
            JSON if it parses as such, else text; a STRING or COMBO input takes it as text even then (`4`, `true`).
        node_classes: tells the inputs that a node has and their types; without it, or for a class that it lacks, only
            inputs that the workflow already sets can be named, and the type is that of the present value.
    Raises:
        WorkflowError: malformed override; unknown or ambiguous node; unknown input; a value of the wrong type.
    """
    for text in overrides:
        left, equals, raw = text.partition("=")
        if not equals or "." not in left:
            raise WorkflowError(
                f"override {text!r}: expected NODE.INPUT=VALUE, where NODE is a node id, a title or a class_type."
            )
        node, name, spec = _target(prompt, left.strip(), node_classes or {}, f"override {text!r}")
        value = _override_value(spec, node.inputs.get(name), raw, f"override {text!r}: {node.place}.{name}")
        nodes = {**prompt.nodes, node.id: replace(node, inputs={**node.inputs, name: value})}
        prompt = replace(prompt, nodes=nodes)
    return prompt


def _target(
    prompt: Prompt, left: str, node_classes: Mapping[str, type], where: str
) -> tuple[PromptNode, str, InputSpec | None]:
    first_error: WorkflowError | None = None
    # Titles such as "FLUX.1 dev" and dynamic input names both hold dots, so every split is tried, the last dot first.
    for node_name, name in _splits(left):
        found = _find(prompt, node_name)
        if len(found) == 1:
            node, node_class = found[0], node_classes.get(found[0].class_type)
            spec = NodeSpec.of(node_class) if node_class else None
            info = spec.get(name) if spec else None
            if (info and info.group != "hidden") or (spec is None and name in node.inputs):
                return node, name, info
            names = spec.names if spec else list(node.inputs)
            first_error = first_error or WorkflowError(
                f"{where}: {node.place} has no input {name!r}.{near(name, names)}\nIts inputs: {', '.join(names)}"
            )
        elif found:
            places = "; ".join(str(n.place) for n in found)
            first_error = first_error or WorkflowError(
                f"{where}: {node_name!r} names {len(found)} nodes: {places}.\nUse the id, or a title that only one has."
            )
    if first_error:
        raise first_error
    node_name = left.rpartition(".")[0]
    labels = {label for n in prompt.nodes.values() for label in (n.id, n.title, n.class_type) if label}
    places = "; ".join(str(n.place) for n in prompt.nodes.values())
    hint = near(node_name, labels)
    raise WorkflowError(f"{where}: there is no node {node_name!r}.{hint}\nThe workflow has: {places}")


def _splits(left: str) -> Iterator[tuple[str, str]]:
    position = left.rfind(".")
    while position >= 0:
        yield left[:position].strip(), left[position + 1 :].strip()
        position = left.rfind(".", 0, position)


def _find(prompt: Prompt, name: str) -> list[PromptNode]:
    if name in prompt.nodes:
        return [prompt.nodes[name]]
    titled = [n for n in prompt.nodes.values() if n.title == name]
    return titled or [n for n in prompt.nodes.values() if n.class_type == name]


def _override_value(spec: InputSpec | None, current: object, raw: str, where: str) -> Any:
    try:
        parsed = json.loads(raw)
    except (ValueError, RecursionError):
        parsed = raw
    kind = spec.type_name if spec else ""
    if kind not in ("INT", "FLOAT", "BOOLEAN", "STRING", "COMBO"):
        # An int now may be a float next (`8` is how JSON writes the FLOAT 8.0), so both count as a number.
        kinds = {bool: "BOOLEAN", int: "NUMBER", float: "NUMBER", str: "STRING"}
        kind = kinds.get(type(current), "")
    if kind not in ("STRING", "COMBO") and as_link(parsed):
        return parsed
    number = parsed if isinstance(parsed, (int, float)) and not isinstance(parsed, bool) else None
    if kind == "COMBO" and spec and parsed in (spec.choices or []):
        return parsed
    if kind in ("STRING", "COMBO"):
        return parsed if isinstance(parsed, str) else raw
    if kind == "INT" and number is not None and float(number).is_integer():
        return int(number)
    if kind == "FLOAT" and number is not None:
        return float(number)
    if kind == "BOOLEAN" and raw.strip().lower() in ("true", "false", "1", "0"):
        return raw.strip().lower() in ("true", "1")
    if kind in ("INT", "FLOAT", "BOOLEAN") or (kind == "NUMBER" and number is None):
        raise WorkflowError(f"{where}: expected {kind}, got {raw!r}.")
    return parsed
