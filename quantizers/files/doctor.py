"""Find what is wrong in a model file, say what loaders make of it, and whether the fix is certain.

Three sources: the header (`safetensors_header.parse`), the schemes of quantized weights (`scan`), and the file as a
whole (`whole_file`, `tensor_values`). What loaders do was read in, and tried with, ComfyUI 0.33.0, safetensors 0.8 and
diffusers 0.39; each text names whose behaviour it is.

Severities: an `error` breaks the file for the loaders that it was made for; a `warning` does so for some, or costs
something; a `note` does not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from .edits import Edit, merged
from .faults import STOCK_LOADERS, Fault
from .fixes import Fixer
from .model_file import ModelFile, open_damaged
from .schemes.scan import scan
from .whole_file import Found, half_prefixed, marker_place, metadata_format, misplaced, mixture, parts, scale_forms

_REFUSED = "safetensors refuses the whole file, and with it every loader."
_STRICT = (
    "safetensors refuses the whole file, and with it diffusers and transformers; ComfyUI's reader for dynamic VRAM "
    "takes it."
)
_NOT_HERE = "Not read by this pack; safetensors takes it."
EFFECTS = {
    **{f"header-{code}": _REFUSED for code in ("entry", "dtype", "shape", "offsets", "size")},
    **{f"header-{code}": _STRICT for code in ("hole", "overlap", "trailing", "metadata")},
    **{f"header-{code}": _NOT_HERE for code in ("name", "dimensions")},
    "header-truncated": "safetensors refuses the whole file; ComfyUI says that it is corrupt or incomplete.",
    "header-duplicate": "Loaders take one of the two, and not all of them the same one.",
    "header-path": "Loads; who makes file names of it writes elsewhere.",
}


class Severity(str, Enum):
    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, with all tensors that it is wrong with.

    Attributes:
        code: kebab-case, permanent.
        tensors: or layers, or metadata keys; empty for the whole file.
        text: got and expected, of the first of them.
        effect: what loaders make of it.
        fix: what a repair does; empty where no fix is certain.
        edit: the same as a change to the file.
    """

    code: str
    severity: Severity
    tensors: tuple[str, ...]
    text: str
    effect: str
    fix: str = ""
    edit: Edit | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "code": self.code, "severity": self.severity.value, "tensors": list(self.tensors), "text": self.text,
            "effect": self.effect, "fix": self.fix,
        }  # fmt: skip

    def __str__(self) -> str:
        more = f" (and {len(self.tensors) - 1} more)" if len(self.tensors) > 1 else ""
        lines = [f"{self.severity.value}: {self.code}: {self.text}{more}"]
        if self.effect:
            lines.append(f"    in the loader: {self.effect}")
        lines.append(f"    repair: {self.fix}." if self.fix else "    repair: none that is certain.")
        return "\n".join(lines)


@dataclass(frozen=True)
class Diagnosis:
    """What was found in a file; `str` is the text, `to_dict` the report.

    Attributes:
        tensors, layers: how many the header has, and how many of them are quantized weights.
        deep: the values of all tensors were read, not of the small ones alone.
        state: of `file_state` of each file, from before it was looked at.
    """

    path: Path
    tensors: int
    layers: int
    deep: bool
    findings: tuple[Finding, ...]
    state: Mapping[Path, dict[str, int]] = field(default_factory=lambda: dict[Path, dict[str, int]](), compare=False)

    @property
    def worst(self) -> Severity | None:
        return next((s for s in Severity if any(f.severity is s for f in self.findings)), None)

    @property
    def edit(self) -> Edit | None:
        """All certain fixes together; None where there is none."""
        edits = [f.edit for f in self.findings if f.edit is not None]
        return merged(edits) if edits else None

    def count(self, severity: Severity) -> int:
        return sum(f.severity is severity for f in self.findings)

    def to_dict(self) -> dict[str, Any]:
        return {
            "file": str(self.path), "tensors": self.tensors, "layers": self.layers, "deep": self.deep,
            "findings": [f.to_dict() for f in self.findings],
        }  # fmt: skip

    def __str__(self) -> str:
        counts = ", ".join(f"{n} {s.value}{'s' * (n > 1)}" for s in Severity if (n := self.count(s)))
        read = "all values read" if self.deep else "values of small tensors read; --deep reads all"
        head = f"{self.path.name}: {self.tensors} tensors, {self.layers} quantized layers; {read}"
        return "\n".join([f"{head}: {counts or 'nothing wrong found'}.", *map(str, self.findings)])


def diagnose(path: Path, deep: bool = False, configs: Mapping[str, Mapping[str, Any]] | None = None) -> Diagnosis:
    """Look for everything that is known to be wrong in files.

    Args:
        deep: read the values of all tensors, and not of those up to 1 MiB alone.
        configs: the JSON files of the component's folder, for a copy that stands elsewhere.
    Raises:
        FileError: no file of a model, or nothing of its header is readable.
    """
    file, headers = open_damaged(path)
    if configs:
        file = dataclasses.replace(file, configs=configs)
    faults = [fault for header in headers for fault in header.faults]
    codes = frozenset(fault.code for fault in faults)
    found = scan(file)
    raw = next((header.raw_metadata for header in headers if header.raw_metadata is not None), None)
    fixer = Fixer(file, found, raw, codes)
    results = [_from_header(fault, fixer) for fault in faults]
    if "header-truncated" not in codes:  # what is gone would be reported as wrong
        own = [
            *parts(file, headers),
            *misplaced(file, found),
            *scale_forms(file, found),
            *mixture(found),
            *half_prefixed(found),
        ]
        own += [*metadata_format(file, headers), *marker_place(file)]
        named = {module for fault, *_ in own if fault.code in _ORPHANS for module in (fault.tensor,)}
        results += own
        for fault in found.faults:
            if not (fault.code in _ORPHANS and _module(fault.tensor) in named):
                results.append((fault, _severity(fault), fixer.fix(fault)))
        results += _values(file, fixer, deep)
    return Diagnosis(path, len(file.entries), len(found.layers), deep, tuple(_grouped(results)), file.state)


_ORPHANS = ("scale-without-weight", "prefix-mismatch", "weight-missing")


def _severity(fault: Fault) -> str:
    """A layer that can be used here may still be one that ComfyUI cannot use."""
    return "error" if fault.fatal or set(STOCK_LOADERS) <= set(fault.misread_by) else "warning"


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _from_header(fault: Fault, fixer: Fixer) -> Found:
    text = fault.text.splitlines()[0].removeprefix("corrupt safetensors header: ").removeprefix("corrupt: ")
    severity = "error" if fault.fatal else "note"
    return Fault(fault.code, fault.tensor, text, EFFECTS.get(fault.code, ""), fault.fatal), severity, fixer.fix(fault)


def _values(file: ModelFile, fixer: Fixer, deep: bool) -> Iterator[Found]:
    from .tensor_values import duplicates, not_finite

    for fault in not_finite(file, fixer.scan, deep):
        yield fault, "error", None
    for fault in duplicates(file, deep):
        yield fault, "note", None


def _grouped(results: list[Found]) -> Iterator[Finding]:
    """One finding for all tensors with the same fault and the same kind of fix; the worst first."""
    groups: dict[tuple[str, str, str, str], list[Found]] = {}
    for fault, severity, fix in results:
        groups.setdefault((severity, fault.code, fault.effect, fix[0] if fix else ""), []).append(
            (fault, severity, fix)
        )
    order: Mapping[str, int] = {s.value: i for i, s in enumerate(Severity)}
    for (severity, code, effect, what), group in sorted(groups.items(), key=lambda item: order[item[0][0]]):
        tensors = dict.fromkeys(fault.tensor for fault, *_ in group if fault.tensor)
        edits = [fix[1] for *_, fix in group if fix is not None]
        edit = merged(edits) if edits else None
        yield Finding(code, Severity(severity), tuple(tensors), group[0][0].text, effect, what, edit)
