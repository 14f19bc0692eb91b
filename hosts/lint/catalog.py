"""What is known of node classes without importing them: their inputs, outputs, and the folders of their files.

Four sources, the first that knows a class decides: a server's /object_info, the classes of this pack and of the
embedded host, `core_nodes.txt` (recorded from ComfyUI by `record_nodes.py`), and `pack_nodes.txt` (loaders of other
packs, written by hand from their sources). One line a class:

    UNETLoader unet_name:@diffusion_models weight_dtype:COMBO=["default","fp8_e4m3fn"] > MODEL
"""

from __future__ import annotations

import functools
import http.client
import json
import re
import urllib.error
import urllib.request
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...quantizers.errors import FileError
from ..standalone.workflow import NodeSpec

CORE = Path(__file__).with_name("core_nodes.txt")
PACKS = Path(__file__).with_name("pack_nodes.txt")
NUMBERS = ("INT", "FLOAT")
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COLOR")
DYNAMIC = "COMFY_DYNAMICCOMBO_V3"  # a widget whose value decides which widgets follow
# Types of values that hold model weights.
KINDS = ("MODEL", "CLIP", "VAE", "CONTROL_NET")
# Types that take or give values of any type.
ANY_TYPES = ("*", "COMFY_MATCHTYPE_V3", "COMFY_AUTOGROW_V3", "COMFY_DYNAMICSLOT_V3")
# The editor adds a widget for these even where the class does not ask for it.
SEEDS = ("seed", "noise_seed")
REPLACED = "# replaced: "  # before the JSON of a server's /node_replacements
IN_ITS_FOLDER = "*"  # in place of a folder: the value is FOLDER/NAME
# Folders of the inputs of the pack's own loaders.
PACK_FOLDERS: Mapping[str, Mapping[str, str]] = {
    "LoadGGUF": {"gguf_name": "unet_gguf"},
    "LoadAndQuantize": {"model_name": "diffusion_models"},
    "LoadQuantized": {"model_name": "quantized"},
    "LoadGGUFTextEncoder": {f"clip_name{i}": "text_encoders" for i in (1, 2, 3, 4)},
    "FitModel": {"model_name": "diffusion_models"},
    "InspectModel": {"model_name": IN_ITS_FOLDER},
    "RepairModel": {"model_name": IN_ITS_FOLDER},
    "ConvertModel": {"model_name": IN_ITS_FOLDER},
}
MULTIGPU = re.compile(r"(DisTorch2?)?MultiGPU$")
SERVER_TIMEOUT_S = 20


@dataclass(frozen=True)
class Input:
    """One input of a class.

    Attributes:
        control: the editor writes one more value behind this one, such as `randomize`.
        folder: model folder that the choices are read from.
        choices: None where they are not known.
        low: smallest number that it takes; None where nothing says.
        widget: the editor draws a widget for it.
    """

    name: str
    type: str
    required: bool = True
    control: bool = False
    folder: str = ""
    choices: tuple[Any, ...] | None = None
    widget: bool = False
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class NodeType:
    """A node class.

    Attributes:
        outputs: types; None where they are not known.
        pack: where the class comes from, as text; empty for ComfyUI itself.
        detailed: whether `inputs` and `outputs` are known at all.
        replaced_by: the id that ComfyUI puts in the place of this older one.
        drops_inputs: and then the server forgets its inputs: only the editor keeps them.
    """

    name: str
    inputs: Mapping[str, Input] = field(default_factory=lambda: dict[str, Input]())
    outputs: tuple[str, ...] | None = None
    output_node: bool = False
    pack: str = ""
    detailed: bool = False
    replaced_by: str = ""
    drops_inputs: bool = False

    def with_folder(self, name: str, folder: str) -> NodeType:
        return replace(self, inputs={**self.inputs, name: replace(self.inputs[name], folder=folder)})

    def with_choices(self, name: str, choices: tuple[Any, ...] | None) -> NodeType:
        return replace(self, inputs={**self.inputs, name: replace(self.inputs[name], choices=choices)})


class Catalog:
    """Node classes by id.

    Args:
        classes: the pack's own.
        embedded: those of the embedded host, which stand in for the nodes of ComfyUI that were recorded by id only.
        server: a server's node types, which decide alone.
    """

    def __init__(
        self,
        classes: Mapping[str, type],
        embedded: Mapping[str, type],
        server: Mapping[str, NodeType] | None = None,
    ) -> None:
        self._classes = classes
        self._embedded = embedded
        self.server = server
        self._made: dict[str, NodeType | None] = {}
        self._slips: dict[str, str] = {}

    def find(self, name: str) -> NodeType | None:
        """What is known of a class; None for an unknown one."""
        if name not in self._made:
            self._made[name] = self._find(name)
        return self._made[name]

    def names(self) -> Iterable[str]:
        """Ids of all known classes."""
        return self.server if self.server is not None else {**core_nodes(), **pack_nodes(), **self._classes}

    def meant(self, name: str) -> str:
        """The known id that an unknown one is a slip of the pen of; empty where there is none."""
        if name not in self._slips:
            self._slips[name] = next((known for known in self.names() if one_slip(name, known)), "")
        return self._slips[name]

    def _find(self, name: str) -> NodeType | None:
        if self.server is not None and name in self.server:
            return _merged(self.server[name], self._classes, name)
        if name in self._classes:
            return from_class(name, self._classes[name])
        found = core_nodes().get(name) or foreign(name)
        if name in self._embedded and (found is None or not found.detailed):
            # Its inputs have the same order; what ComfyUI gives out was not recorded.
            return replace(from_class(name, self._embedded[name]), pack="", outputs=None)
        return found


def _merged(server: NodeType, classes: Mapping[str, type], name: str) -> NodeType:
    """A server's entry with the folders that only the recorded one tells."""
    known = core_nodes().get(name) or foreign(name)
    for i in known.inputs.values() if known else ():
        if i.folder and i.name in server.inputs:
            server = server.with_folder(i.name, i.folder)
    for i, folder in PACK_FOLDERS.get(name, {}).items() if name in classes else ():
        if i in server.inputs:
            server = server.with_folder(i, folder)
    return server


def one_slip(written: str, meant: str) -> bool:
    """Whether one letter more, less, other or exchanged makes the difference; packs add signs and digits on purpose."""
    if abs(len(written) - len(meant)) > 1 or written == meant:
        return False
    if written.lower() == meant.lower():
        return True
    start = next((i for i, (a, b) in enumerate(zip(written, meant, strict=False)) if a != b), None)
    start = min(len(written), len(meant)) if start is None else start
    one, other = written[start:], meant[start:]
    while one and other and one[-1] == other[-1]:
        one, other = one[:-1], other[:-1]
    return (one + other).isalpha() and (max(len(one), len(other)) == 1 or (len(one) == 2 and one == other[::-1]))


def foreign(name: str) -> NodeType | None:
    """A loader of another pack; ComfyUI-MultiGPU wraps such loaders under names with a suffix."""
    base = MULTIGPU.sub("", name)
    found = pack_nodes().get(name) or pack_nodes().get(base)
    if found is None and base != name:
        found = core_nodes().get(base)
    if found is None or base == name:
        return found
    # It adds choices, such as the names of all devices.
    inputs = {n: replace(i, choices=None) for n, i in found.inputs.items()}
    return replace(found, name=name, inputs=inputs, pack="ComfyUI-MultiGPU")


def from_class(name: str, cls: type) -> NodeType:
    """A Python class as it declares itself now.

    Raises:
        WorkflowError: its INPUT_TYPES fails.
    """
    spec = NodeSpec.of(cls)
    inputs = {n: _input(n, spec.groups.get("required", {}), spec) for n in spec.names}
    for i, folder in PACK_FOLDERS.get(name, {}).items():
        inputs[i] = replace(inputs[i], folder=folder)
    outputs = tuple(map(str, getattr(cls, "RETURN_TYPES", ())))
    return NodeType(name, inputs, outputs, getattr(cls, "OUTPUT_NODE", False) is True, "quantwire", True)


def _input(name: str, required: Mapping[str, Any], spec: NodeSpec) -> Input:
    info = spec.get(name)
    assert info is not None  # the name comes from the spec
    choices = info.choices
    return _made_input(
        name, info.type_name, name in required, info.options, tuple(choices) if choices is not None else None
    )


def from_object_info(name: str, entry: Mapping[str, Any], given: Collection[str] = ()) -> NodeType:
    """An entry of /object_info; what has another shape than expected is left out.

    Args:
        given: types that some node gives out; empty: not known.
    """
    inputs: dict[str, Input] = {}
    groups = entry.get("input")
    order = entry.get("input_order")
    for group in ("required", "optional"):
        declared = groups.get(group) if isinstance(groups, dict) else None
        declared = declared if isinstance(declared, dict) else {}
        names = order.get(group) if isinstance(order, dict) else None
        for key in names if isinstance(names, list) else declared:
            info = declared.get(key) if isinstance(key, str) else None
            if not isinstance(info, list) or not info:
                continue
            options = info[1] if len(info) > 1 and isinstance(info[1], dict) else {}
            kind, choices = info[0], None
            if isinstance(kind, list):
                kind, choices = "COMBO", tuple(kind)
            elif kind == "COMBO" and isinstance(options.get("options"), list):
                choices = tuple(options["options"])
            if not choices or any(str(name).endswith("_upload") and on for name, on in options.items()):
                # The editor fills an empty list; nodes with an upload take names as `x.png [output]` too.
                choices = None
            made = _made_input(key, str(kind), group == "required", options, choices)
            if given and _unmade(made.type, given) and not options.get("forceInput"):
                made = replace(made, widget=True)
            inputs[key] = made
    outputs = entry.get("output")
    types = tuple(o if isinstance(o, str) else "COMBO" for o in outputs) if isinstance(outputs, list) else None
    return NodeType(name, inputs, types, entry.get("output_node") is True, "", True)


def _unmade(kind: str, given: Collection[str]) -> bool:
    """What no node gives out can only come from a widget of the editor, such as the camera of Load3D."""
    return not kind.startswith("COMFY_") and not any(p.strip() in (*ANY_TYPES, *given) for p in kind.split(","))


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _made_input(
    name: str, kind: str, required: bool, options: Mapping[str, Any], choices: tuple[Any, ...] | None
) -> Input:
    # The editor has widgets of its own for further types, such as the curve of CurveEditor.
    drawn = is_widget(kind) or "socketless" in options or "widgetType" in options
    control = bool(options.get("control_after_generate")) or (kind == "INT" and name in SEEDS)
    low, high = (_number(options.get(key)) if kind in NUMBERS else None for key in ("min", "max"))
    return Input(name, kind, required, control, "", choices, drawn and not options.get("forceInput"), low, high)


def _number(value: object) -> float | None:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def is_widget(kind: str) -> bool:
    """Whether the editor draws a widget for a type; one of several such types, too."""
    return all(part.strip() in (*WIDGETS, DYNAMIC) for part in kind.split(","))


@functools.cache
def core_nodes() -> Mapping[str, NodeType]:
    return _read(CORE, "")


@functools.cache
def pack_nodes() -> Mapping[str, NodeType]:
    return _read(PACKS, "another pack")


def _read(path: Path, pack: str) -> dict[str, NodeType]:
    """The classes of one file; `# pack: NAME` names the pack of the lines below it."""
    found: dict[str, NodeType] = {}
    replaced: Any = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# pack:"):
            pack = line.removeprefix("# pack:").strip()
        if line.startswith(REPLACED):
            replaced = json.loads(line.removeprefix(REPLACED))
        if line and not line.startswith("#"):
            node_type = from_line(line, pack)
            found[node_type.name] = node_type
    return with_replaced(found, replaced)


def with_replaced(types: dict[str, NodeType], replaced: Mapping[str, Any]) -> dict[str, NodeType]:
    """The older ids too that ComfyUI replaces itself, of those that have a class to be replaced by.

    Args:
        replaced: as a server's /node_replacements tells; what has another shape is left out.
    """
    older: dict[str, NodeType] = {}
    for name, entries in replaced.items():
        entry = entries[0] if isinstance(entries, list) and entries else None
        new = types.get(str(entry.get("new_node_id"))) if isinstance(entry, dict) else None
        if new is None or name in types:
            continue
        listed = _listed(entry.get("input_mapping"))
        pairs = [(m.get("old_id"), new.inputs.get(str(m.get("new_id")))) for m in listed if isinstance(m, dict)]
        inputs = {o: replace(i, name=o) for o, i in pairs if isinstance(o, str) and i is not None}
        older[name] = replace(new, name=name, inputs=inputs if listed else new.inputs, replaced_by=new.name)
        if not listed and any(i.required for i in new.inputs.values()):
            older[name] = replace(older[name], drops_inputs=True)
    return {**types, **older}


def to_line(node_type: NodeType) -> str:
    mark = "!" if node_type.output_node else ""
    name = json.dumps(node_type.name) if " " in node_type.name else node_type.name
    if not node_type.detailed:
        return f"{name}{mark}"
    words = [_word(i) for i in node_type.inputs.values()]
    return " ".join([f"{name}{mark}", *words, ">", *(o.replace(" ", "") for o in node_type.outputs or ())])


def _word(i: Input) -> str:
    kind = f"@{i.folder}" if i.folder else i.type.replace(" ", "")
    marks = f"{'' if i.required else '?'}{'+' if i.control else ''}{'' if is_widget(i.type) is i.widget else '!'}"
    tail = ""
    if i.choices is not None and not i.folder:
        tail = "=" + json.dumps(i.choices, separators=(",", ":"), ensure_ascii=False).replace(" ", "\\u0020")
    elif i.low is not None or i.high is not None:
        tail = "=" + "..".join("" if side is None else json.dumps(side) for side in (i.low, i.high))
    return f"{i.name.replace(' ', '_')}:{kind}{marks}{tail}"


def from_line(line: str, pack: str) -> NodeType:
    name, rest = line, ""
    if line.startswith('"'):
        end = line.index('"', 1) + 1
        name, rest = json.loads(line[:end]) + ("!" if line[end : end + 1] == "!" else ""), line[end:].lstrip("!")
    else:
        name, _, rest = line.partition(" ")
    words, arrow, outputs = f" {rest.strip()} ".partition(" > ")
    inputs = {i.name: i for i in map(_parsed, words.split())}
    types = tuple(outputs.split()) if arrow else None
    return NodeType(name.removesuffix("!"), inputs, types, name.endswith("!"), pack, bool(arrow))


def _parsed(word: str) -> Input:
    name, _, kind = word.partition(":")
    kind, _, tail = kind.partition("=")
    bare = kind.rstrip("?+!")
    marks = kind[len(bare) :]
    folder = bare.removeprefix("@") if bare.startswith("@") else ""
    bare = "COMBO" if folder else bare
    widget = is_widget(bare) is not ("!" in marks)
    choices = tuple(json.loads(tail)) if tail.startswith("[") else None
    low, _, high = tail.partition("..") if choices is None else ("", "", "")
    sides = (json.loads(side) if side else None for side in (low, high))
    return Input(name, bare, "?" not in marks, "+" in marks, folder, choices, widget, *sides)


def ask_server(url: str) -> dict[str, NodeType]:
    """The node types of a running ComfyUI.

    Raises:
        FileError: no answer, or another program's.
    """
    url = url.rstrip("/")
    if not url.startswith(("http://", "https://")):
        url = f"http://{url}"
    data = _answer(f"{url}/object_info", url)
    if not isinstance(data, dict) or not all(isinstance(v, dict) for v in data.values()):
        raise FileError(f"--server: {url}/object_info is no list of nodes.\nGive the address of a ComfyUI server.")
    outputs = (o for entry in data.values() for o in _listed(entry.get("output")) if isinstance(o, str))
    given = {part.strip() for kind in outputs for part in kind.split(",")}
    types = {name: from_object_info(name, entry, given) for name, entry in data.items()}
    try:
        replaced = _answer(f"{url}/node_replacements", url)
    except FileError:  # older servers have none
        replaced = {}
    return with_replaced(types, replaced if isinstance(replaced, dict) else {})


def _answer(address: str, url: str) -> Any:
    try:
        with urllib.request.urlopen(address, timeout=SERVER_TIMEOUT_S) as answer:
            return json.load(answer)
    except (OSError, ValueError, RecursionError, http.client.HTTPException) as err:  # HTTPException: also a bad address
        reason = err.reason if isinstance(err, urllib.error.URLError) else str(err) or type(err).__name__
        raise FileError(
            f"--server: {url} does not answer as a ComfyUI server: {reason}.\n"
            "Start ComfyUI there, or leave --server out to check against the recorded list of nodes."
        ) from err
