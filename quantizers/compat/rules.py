"""From a module to verdicts: which quantized layers it holds, and what an offload mode would do to them.

Layers are recognised by the class names of the layer and of its parameters, and by the package that defines them. No
library is imported: a model can hold quanto layers only if quanto is loaded already, and the check must not cost the
seconds that importing the others takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from ..errors import OffloadConflict
from .matrix import Row, find_row, ok_modes
from .modes import Carrier, OffloadMode, VerdictLevel

if TYPE_CHECKING:
    from torch import nn

_QUANTO = ("optimum.quanto.", "quanto.")
# NNCF keeps the decompressor of the parameter `x.y.weight` under this name, with the parameter's as `x:y:weight__0`.
_NNCF_HOOKS = "__nncf_hooks.post_hooks."
# ComfyUI-GGUF wraps full-precision tensors in the same class.
_GGML_PLAIN = ("gguf-f32", "gguf-f16", "gguf-none")


@dataclass(frozen=True)
class Found:
    """Quantized layers of one kind inside a module.

    Attributes:
        name: dotted name of the first one; empty when it is the module itself.
        layers: how many there are.
        kind: class that holds the weight, such as `Params4bit`.
        frozen: False for quanto layers whose weights are still in full precision; `format_id` is what they will be.
    """

    name: str
    carrier: Carrier
    format_id: str
    layers: int
    kind: str = ""
    frozen: bool = True

    @property
    def key(self) -> str:
        """How the table names it: the format id, or a state that behaves otherwise."""
        if not self.frozen:
            return "quanto-unfrozen"
        return f"comfyui-{self.format_id}" if self.kind == "GGMLTensor" else self.format_id


@dataclass(frozen=True)
class Verdict:
    """What is known of one `Found` under one mode; `row` is None when nothing is."""

    level: VerdictLevel
    found: Found
    mode: OffloadMode
    cause: str
    remedies: tuple[str, ...]
    row: Row | None = None

    @property
    def headline(self) -> str:
        """One sentence that stands alone."""
        f = self.found
        layers = f"{f.carrier.value} layers, {f.layers} of them" if f.layers != 1 else f"one {f.carrier.value} layer"
        said = {
            VerdictLevel.OK: "can run",
            VerdictLevel.WARN: "may run badly",
            VerdictLevel.BLOCK: "cannot run",
            VerdictLevel.UNKNOWN: "is not known to run",
        }[self.level]
        how = "without offload" if self.mode is OffloadMode.NONE else f"with {self.mode.value} offload"
        frozen = "" if f.frozen else ", not frozen"
        return f"{f.format_id} ({layers}{frozen}) {said} {how}: {self.cause}."

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        row, f = self.row, self.found
        return {
            "level": self.level.value,
            "mode": self.mode.value,
            "carrier": f.carrier.value,
            "format_id": f.format_id,
            "layers": f.layers,
            "first_layer": f.name,
            "kind": f.kind,
            "frozen": f.frozen,
            "cause": self.cause,
            "remedies": list(self.remedies),
            "when": row.when if row else "",
            "evidence": row.evidence if row else "none",
            "source": row.source if row else "",
            "raw_error": row.raw_error if row else "",
            "versions": row.versions if row else "",
            "note": row.note if row else "",
        }


def find_carriers(module: nn.Module) -> list[Found]:
    """The quantized layers inside `module`, grouped by carrier, format and kind, in order of first appearance."""
    groups: dict[tuple[Carrier, str, str, bool], list[str]] = {}
    for name, layer in cast("Iterator[tuple[str, nn.Module]]", module.named_modules()):
        # A layer counts once for each kind that it holds, however many of its parameters are of that kind.
        for kind in dict.fromkeys(_identify(layer)):
            groups.setdefault(kind, []).append(_owner(name))
    return [
        Found(names[0], carrier, format_id, len(names), kind, frozen)
        for (carrier, format_id, kind, frozen), names in groups.items()
    ]


def check(found: Sequence[Found], mode: OffloadMode, *, split: bool | None = None) -> list[Verdict]:
    """One verdict for each entry of `found`, in order; never silent.

    Args:
        split: whether some layers of the component will be kept in host memory or on disk while it runs. None means
            not known, and is treated as True, because balanced exists to split.
    """
    return [_judge(f, mode, split) for f in found]


def raise_on_block(verdicts: Sequence[Verdict], component: str) -> None:
    """Refuse a component before it runs.

    Raises:
        OffloadConflict: a verdict is block. Its first line names the format, the mode and why.
    """
    blocks = [v for v in verdicts if v.level is VerdictLevel.BLOCK]
    if blocks:
        raise OffloadConflict("\n".join(_explain(v, component) for v in blocks))


def _judge(found: Found, mode: OffloadMode, split: bool | None) -> Verdict:
    row = find_row(found.carrier, found.key, mode, split=split)
    if row is not None:
        return Verdict(row.verdict, found, mode, row.cause, row.remedies, row)
    holder = f"held by {found.kind}" if found.kind else f"in {found.carrier.value} layers"
    cause = f"no measurement or document covers {found.format_id} {holder} in this mode"
    modes = ", ".join(f"mode {m.value}" for m in ok_modes(found.carrier, found.key))
    remedies = (f"Known to work with it: {modes}.",) if modes else ()
    return Verdict(VerdictLevel.UNKNOWN, found, mode, cause, remedies)


def _explain(verdict: Verdict, component: str) -> str:
    lines = [f"{component}: {verdict.headline}"]
    if verdict.row is not None and verdict.row.raw_error:
        first = f" at '{verdict.found.name}'" if verdict.found.name else ""
        lines.append(f"Without this check the library stops{first} with `{verdict.row.raw_error}`.")
    return "\n".join([*lines, "Ways out:", *(f"- {remedy}" for remedy in verdict.remedies[:2])])


_Kind = tuple[Carrier, str, str, bool]


def _owner(name: str) -> str:
    """The layer that a found module belongs to; itself but for NNCF's decompressors."""
    before, hooks, after = name.partition(_NNCF_HOOKS)
    return before + after.rpartition("__")[0].replace(":", ".").removesuffix(".weight") if hooks else name


def _identify(layer: nn.Module) -> Iterator[_Kind]:
    """(carrier, format id, class that holds the weight, frozen) for each quantized weight that the layer itself owns.

    Reads parameters by `named_parameters`, never as attributes: `QuantizedLinear.weight` dequantizes when touched.
    """
    format_id = getattr(layer, "format_id", None)
    if type(layer).__name__ == "QuantizedLinear" and isinstance(format_id, str):
        yield Carrier.QUANTWIRE, format_id, "QuantizedLinear", True
        return
    held = [k for _, p in layer.named_parameters(recurse=False) if (k := _identify_parameter(p)) is not None]
    yield from held
    if held:
        return
    classes = _classes(layer)
    if "Linear8bitLt" in classes and _from(classes["Linear8bitLt"], ("bitsandbytes.",)):
        yield Carrier.LIBRARY, "bnb-int8", "Linear8bitLt", True
    elif "QModuleMixin" in classes and _from(classes["QModuleMixin"], _QUANTO):
        qtype = getattr(layer, "weight_qtype", None)
        if qtype is not None:
            yield Carrier.LIBRARY, _quanto_id(qtype), type(layer).__name__, False
    elif "SDNQLayer" in classes and _from(classes["SDNQLayer"], ("sdnq.",)):
        dtype = getattr(getattr(layer, "sdnq_dequantizer", None), "weights_dtype", "unknown")
        yield Carrier.LIBRARY, f"sdnq-{dtype}".replace("_", "-"), type(layer).__name__, True
    elif "BaseWeightsDecompressor" in classes and _from(classes["BaseWeightsDecompressor"], ("nncf.",)):
        yield Carrier.LIBRARY, _nncf_id(type(layer).__name__), type(layer).__name__, True
    elif (storage := _cast_storage(layer)) is not None:
        yield Carrier.LIBRARY, f"layerwise-fp8-{storage}", "LayerwiseCastingHook", True


def _identify_parameter(parameter: object) -> _Kind | None:
    classes = _classes(parameter)
    kind = type(parameter).__name__
    if "Params4bit" in classes and _from(classes["Params4bit"], ("bitsandbytes.",)):
        return Carrier.LIBRARY, f"bnb-{getattr(parameter, 'quant_type', 'unknown')}", kind, True
    if "Int8Params" in classes and _from(classes["Int8Params"], ("bitsandbytes.",)):
        return Carrier.LIBRARY, "bnb-int8", kind, True
    if "QTensor" in classes and _from(classes["QTensor"], _QUANTO):
        return Carrier.LIBRARY, _quanto_id(getattr(parameter, "qtype", None)), kind, True
    if "TorchAOBaseTensor" in classes and _from(classes["TorchAOBaseTensor"], ("torchao.",)):
        return Carrier.LIBRARY, _torchao_id(parameter), kind, True
    if "QuantizedTensor" in classes and _from(classes["QuantizedTensor"], ("comfy_kitchen.",)):
        params = getattr(parameter, "_params", None)
        ours = getattr(params, "format_id", None)
        if isinstance(ours, str):
            return Carrier.QUANTWIRE, ours, kind, True
        return Carrier.HOST, f"comfyui {getattr(parameter, '_layout_cls', 'unknown layout')}", kind, True
    if "GGUFParameter" in classes and _from(classes["GGUFParameter"], ("diffusers.",)):
        return Carrier.LIBRARY, _gguf_id(getattr(parameter, "quant_type", None)), kind, True
    # By name alone: a custom node's package is named after the folder that it was cloned into.
    if "GGMLTensor" in classes:
        format_id = _gguf_id(getattr(parameter, "tensor_type", None))
        return None if format_id in _GGML_PLAIN else (Carrier.LIBRARY, format_id, kind, True)
    return None


def _classes(obj: object) -> dict[str, str]:
    """Class name -> defining module, for the class of `obj` and its bases."""
    return {cls.__name__: cls.__module__ for cls in type(obj).__mro__}


def _from(module: str, packages: tuple[str, ...]) -> bool:
    return f"{module}.".startswith(packages)


def _quanto_id(qtype: object) -> str:
    """`quanto-qfloat8-e4m3fn` for the qtype named `qfloat8_e4m3fn`."""
    return f"quanto-{getattr(qtype, 'name', 'unknown')}".replace("_", "-")


def _gguf_id(quant_type: object) -> str:
    """`gguf-q4-k` for `GGMLQuantizationType.Q4_K`; a bare number keeps its number."""
    return f"gguf-{getattr(quant_type, 'name', quant_type)}".lower().replace("_", "-")


def _torchao_id(tensor: object) -> str:
    """`torchao-int8wo` for an Int8Tensor, `torchao-int8dyn` when it quantizes activations too; else by its class.

    Int4 has a class for each packing (Int4OpaqueTensor on CPUs); they hold the same values.
    """
    kind = type(tensor).__name__.removesuffix("Tensor").lower()
    kind = "int4" if kind.startswith("int4") else kind
    if kind not in ("int8", "int4", "float8"):
        return f"torchao-{kind}"
    return f"torchao-{kind}{'wo' if getattr(tensor, 'act_quant_kwargs', None) is None else 'dyn'}"


def _nncf_id(name: str) -> str:
    """`nncf-int8-asym` for `INT8AsymmetricWeightsDecompressor`; others by their class."""
    short = name.removesuffix("WeightsDecompressor").lower()
    for end, word in (("asymmetric", "-asym"), ("symmetric", "-sym")):
        if short.endswith(end):
            return f"nncf-{short.removesuffix(end)}{word}"
    return f"nncf-{short}"


def _cast_storage(layer: nn.Module) -> str | None:
    """`e4m3fn` or `e5m2` where diffusers' layerwise casting keeps the weight in that; None elsewhere."""
    registry = getattr(layer, "_diffusers_hook", None)
    if "layerwise_casting" not in getattr(registry, "hooks", ()):
        return None
    weight: object = dict(layer.named_parameters(recurse=False)).get("weight")
    name = str(getattr(weight, "dtype", ""))
    return name.removeprefix("torch.float8_") if name.startswith("torch.float8_") else None
