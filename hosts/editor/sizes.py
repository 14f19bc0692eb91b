"""How large a model becomes in each format, for the widget that the user is choosing in: from headers alone.

The model is looked for upstream of the node. Its layers are named, and held in the dtypes, as the host does when it
loads the file, so that rules for single layers match and the number is the one that the run reports.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...nodes.common import ALL, FROM_CONFIG, patterns
from ...quantizers.choices import AUTO, OnFailure, OnQuantized
from ...quantizers.errors import FileError, QuantwireError, SpecError
from ...quantizers.files.gguf_parts import named_parts
from ...quantizers.measure.parts import ModelPart, Role, parts_of_file
from ...quantizers.measure.units import show_size
from ...quantizers.registry import format_ids
from ...quantizers.rules import KEEP, Rule, layer_name, matches, parse_rules
from ...quantizers.spec import QuantSpec, canonical
from .. import current
from ..lint.graph import UNKNOWN, Graph, Node, shortened
from ..lint.lint import Linter
from ..lint.sources import QUANTIZERS, configs
from . import session
from .upstream import NotKnown, file_of, files_behind, source_of

log = logging.getLogger(__name__)
ROLES = {"MODEL": Role.DIFFUSION, "CLIP": Role.TEXT, "CONTROL_NET": Role.CONTROLNET}
LOADERS = ("LoadAndQuantize", "FitModel")
CONVERTER = "ConvertModel"
MOST_FILES, MOST_SIZES = 64, 8192
Stamp = tuple[tuple[str, int, int], ...]
_parts: dict[tuple[str, Role, Stamp], tuple[ModelPart, ...]] = {}
_sizes: dict[tuple[str, Role, Stamp, str, str], int | str] = {}


@dataclass(frozen=True)
class Wanted:
    """What a node asks for beside the format.

    Attributes:
        config: from a QuantConfig; rules of QuantRules are in `rules`.
        own: part -> format of its own, or `keep`.
        lenient: layers that cannot be quantized stay at full precision.
    """

    parts: tuple[ModelPart, ...]
    stamp: Stamp
    role: Role
    config: QuantSpec | None = None
    rules: tuple[Rule, ...] = ()
    exclude: tuple[str, ...] = ()
    own: Mapping[str, str] | None = None
    lenient: bool = False


def sizes(data: Any, nodes: Sequence[str], formats: Sequence[str] | None = None) -> dict[str, Any]:
    """Node -> its answer: `base_nbytes`, `sizes` (format -> bytes), `text` (format -> a few words) and `refused`
    (format -> why); or `reason` alone, where nothing is known.

    Args:
        data: a workflow in either form.
        nodes: ids as the host runs them.
        formats: None: the one that the node is set to. Each takes a plan of the whole model, of FLUX about 0.1 s.
    Raises:
        WorkflowError: it is no workflow.
    """
    if len(_parts) > MOST_FILES:
        _parts.clear()
    if len(_sizes) > MOST_SIZES:
        _sizes.clear()
    linter = session.linter()
    graph = linter.read(data, "the workflow")
    return {node_id: _answer(linter, graph, node_id, formats) for node_id in nodes}


def _answer(linter: Linter, graph: Graph, node_id: str, formats: Sequence[str] | None) -> dict[str, Any]:
    node = graph.nodes.get(node_id)
    if node is None:
        return {"reason": "the node does not run."}
    try:
        if node.class_type == CONVERTER:
            return _converted(linter, graph, node, formats)
        wanted = _wanted(linter, graph, node)
        chosen = formats if formats is not None else _chosen_in(graph, node)
        return _told(sum(map(_base, wanted.parts)), {f: _nbytes(wanted, f) for f in chosen})
    except NotKnown as err:
        return {"reason": str(err)}
    except (QuantwireError, OSError) as err:
        return {"reason": str(err).partition("\n")[0]}
    except Exception as err:  # the other nodes of the request keep their answers; the log says why
        log.exception("quantwire: no size for node %s", shortened(node_id, 60))
        return {"reason": f"the server failed with {type(err).__name__}; its log says why."}


def _chosen_in(graph: Graph, node: Node) -> list[str]:
    """The format that a node is set to; all of them for FitModel, which chooses one."""
    if node.class_type == "FitModel":
        return format_ids()
    return [_text(graph, node, "format", None)]


def _text(graph: Graph, node: Node, name: str, default: str | None = "") -> str:
    """The text in a widget; the default, if there is one, where nothing is in it.

    Raises:
        NotKnown: it comes through a link, or is no text.
    """
    found = graph.literal(node, name)
    if found is UNKNOWN:
        raise NotKnown(f"`{name}` comes from a link.")
    if found is None and default is not None:
        return default
    if not isinstance(found, str):
        raise NotKnown(f"`{name}` is {shortened(repr(found), 60)}, and no text.")
    return found


def _told(base: int, found: Mapping[str, tuple[int | str, str]]) -> dict[str, Any]:
    known = {f: n for f, (n, _) in found.items() if isinstance(n, int)}
    return {
        "base_nbytes": base,
        "sizes": known,
        "text": {
            f: f"{found[f][1]}{show_size(n)}" + (f", {100 * n / base:.0f} %" if base else "") for f, n in known.items()
        },
        "refused": {f: n for f, (n, _) in found.items() if isinstance(n, str)},
    }


# --- what a node wants -------------------------------------------------------------------------------------------


def _wanted(linter: Linter, graph: Graph, node: Node) -> Wanted:
    """Raises NotKnown, FileError, SpecError."""
    if node.class_type in LOADERS:
        paths, role = (file_of(linter, node, "model_name"),), Role.DIFFUSION
    elif node.class_type in QUANTIZERS:
        kind = QUANTIZERS[node.class_type]
        paths, role = files_behind(linter, graph, node, kind), ROLES[kind]
    else:
        raise NotKnown(f"{node.class_type} has no format.")
    stamp = tuple(_state(path) for path in paths)
    parts = _parts_of(paths, role, stamp)
    dequantize = graph.literal(node, "on_quantized") == OnQuantized.DEQUANTIZE.value
    held = next((p for p in parts if p.formats), None)
    if held is not None and not dequantize and node.class_type != "FitModel":
        raise NotKnown(f"{held.source} is quantized already ({', '.join(held.formats)}).")
    config, rules = _config(graph, node)
    keep = _text(graph, node, "keep_layers")
    chosen, own = _encoders(graph, node, parts)
    lenient = graph.literal(node, "on_failure") == OnFailure.FULL_PRECISION.value
    return Wanted(chosen, stamp, role, config, rules, patterns(keep), own, lenient)


def _config(graph: Graph, node: Node) -> tuple[QuantSpec | None, tuple[Rule, ...]]:
    """What is linked to `config`, put together as the nodes do."""
    link = node.links.get("config")
    if link is None:
        return None, ()
    found = list(configs(graph, node))
    source = source_of(graph, link)
    if not found or source.class_type not in ("QuantConfig", "QuantRules"):
        raise NotKnown(f"{source.place} makes the config when the graph runs.")
    config: QuantSpec | None = None
    rules: tuple[Rule, ...] = ()
    for one in reversed(found):
        if isinstance(one, QuantSpec):
            config = one
        else:
            rules += tuple(map(canonical, parse_rules(one)))
    return config, rules


def _encoders(
    graph: Graph, node: Node, parts: tuple[ModelPart, ...]
) -> tuple[tuple[ModelPart, ...], Mapping[str, str] | None]:
    """The parts that are quantized, and the formats that `per_encoder` gives some of them."""
    which, text = _text(graph, node, "encoders", ALL), _text(graph, node, "per_encoder")
    rules = {rule.pattern: rule.target for rule in map(canonical, parse_rules(text))}
    if which == ALL and not rules:
        return parts, None
    if len(parts) > 1:
        raise NotKnown("which of the files is which encoder is known when the graph runs.")
    # One file is one encoder, whatever it is called; another name is refused by the run.
    return parts, {parts[0].name: [*rules.values()][-1]} if rules else None


# --- what becomes of it ------------------------------------------------------------------------------------------


def _nbytes(wanted: Wanted, format_id: str) -> tuple[int | str, str]:
    """(bytes, or why the format is none for the model; words before the size)."""
    try:
        if format_id == AUTO:
            chosen = _chosen(wanted)
            return _nbytes(wanted, chosen)[0], f"{chosen}: "
        spec = _spec(wanted, format_id)
    except (SpecError, FileError) as err:
        return str(err).partition("\n")[0], ""
    total = 0
    for index, part in enumerate(wanted.parts):
        got = _of_part(wanted, index, part, spec)
        if isinstance(got, str):
            return got, ""
        total += got
    return total, f"{spec.format_id}: " if format_id == FROM_CONFIG else ""


def _spec(wanted: Wanted, format_id: str) -> QuantSpec:
    """As the nodes put it together; for formats that the config is not for, without its options."""
    config = wanted.config
    if format_id == FROM_CONFIG:
        if config is None:
            raise SpecError("no QuantConfig is linked to `config`.")
        spec = config
    else:
        spec = config if config is not None and config.format_id == format_id else QuantSpec(format_id)
    return replace(spec, exclude=(*spec.exclude, *wanted.exclude), rules=(*spec.rules, *wanted.rules))


def _of_part(wanted: Wanted, index: int, part: ModelPart, spec: QuantSpec) -> int | str:
    """Bytes of one part, or why it cannot be."""
    own = (wanted.own or {}).get(part.name)
    if own is not None and own.lower() == KEEP:
        return _base(part)
    if own is not None:
        chosen = QuantSpec.from_uri(own)
        spec = replace(chosen, include=spec.include, exclude=spec.exclude, rules=spec.rules)
    spec = _narrowed(spec, part, wanted.parts)
    key = (current().name, wanted.role, wanted.stamp, f"{index} {part.name} {wanted.lenient}", spec.to_uri())
    if key not in _sizes:
        try:
            plan = part.plan(spec)
            if not wanted.lenient:
                plan.raise_on_refusal(among=())
            _sizes[key] = plan.nbytes_out
        except SpecError as err:
            _sizes[key] = str(err).partition("\n")[0]
    return _sizes[key]


def _narrowed(spec: QuantSpec, part: ModelPart, parts: Sequence[ModelPart]) -> QuantSpec:
    """Without the patterns that name layers of other parts only."""
    if len(parts) == 1 or not (spec.include or spec.exclude or spec.rules):
        return spec
    layers = {p.name: [layer_name(s.meta.name) for s in p.slots if s.linear] for p in parts}

    def here(pattern: str) -> bool:
        others = (layer for name, found in layers.items() if name != part.name for layer in found)
        return any(matches(pattern, n) for n in layers[part.name]) or not any(matches(pattern, n) for n in others)

    return replace(
        spec,
        include=tuple(filter(here, spec.include)),
        exclude=tuple(filter(here, spec.exclude)),
        rules=tuple(r for r in spec.rules if here(r.pattern)),
    )


def _chosen(wanted: Wanted) -> str:
    """What `auto` would choose with the memory that is free now."""
    from ...quantizers.auto import candidates, choose_format, predict_sizes
    from ..fit import device_of

    device = device_of(current())
    parts = [(part.slots, wanted.rules, wanted.exclude) for part in wanted.parts]
    return choose_format(device, *predict_sizes(parts, candidates(device)), {}).format_id


def _converted(linter: Linter, graph: Graph, node: Node, formats: Sequence[str] | None) -> dict[str, Any]:
    """The whole file, by the converter's own plan."""
    from ...nodes import conversion
    from ...quantizers.rules import RuleSet

    name, kind = _text(graph, node, "model_name"), _text(graph, node, "type", None)
    if not name:
        raise NotKnown("no file is chosen in `model_name`.")
    texts = {n: _text(graph, node, n) for n in ("keep_layers", "imatrix_name", "calibration_name")}
    layout = _text(graph, node, "layout", "usual")
    config, rules = _config(graph, node)
    given = RuleSet(rules) if config is None else replace(config, rules=(*config.rules, *rules))
    source = conversion.resolve(name)
    found: dict[str, tuple[int | str, str]] = {}
    for one in formats if formats is not None else [kind]:
        try:
            inputs = conversion.inputs_of(name, one, "", **texts)
            plan = conversion.run(inputs, given, True, True, "" if layout == "usual" else layout)
            found[one] = (int(plan.to_dict()["nbytes"]), "")
        except QuantwireError as err:
            found[one] = (str(err).partition("\n")[0], "")
    return _told(sum(path.stat().st_size for path in named_parts(source)), found)


# --- files -------------------------------------------------------------------------------------------------------


def _base(part: ModelPart) -> int:
    return part.held_nbytes if part.formats else part.full_nbytes


def _parts_of(paths: Sequence[Path], role: Role, stamp: Stamp) -> tuple[ModelPart, ...]:
    key = (current().name, role, stamp)
    if key not in _parts:
        found = [part for path in paths for part in _held(path, role)]
        if not found:
            raise NotKnown(f"there is no {role.value} in {', '.join(p.name for p in paths)}.")
        _parts[key] = tuple(found)
    return _parts[key]


def _held(path: Path, role: Role) -> list[ModelPart]:
    """The parts of a file that a loader makes such a value of, with layers as the host names and holds them."""
    from ..fit import as_loaded

    parts = [part for part in parts_of_file(path) if part.role is role]
    if role is not Role.DIFFUSION or any(part.formats for part in parts):
        return parts
    return [as_loaded(current(), path, part)[0] for part in parts]


def _state(path: Path) -> tuple[str, int, int]:
    stat = path.stat()
    return str(path), stat.st_mtime_ns, stat.st_size
