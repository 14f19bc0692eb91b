"""Write a fixed copy of a safetensors file: the certain fixes of a diagnosis, and nothing else.

Tensors are copied in blocks, so memory does not grow with the file. The copy takes its name only after it was
diagnosed itself: a repair that would bring in a fault of its own leaves nothing behind.
"""

from __future__ import annotations

import dataclasses
import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import FileError
from .doctor import Diagnosis, Severity, diagnose
from .edits import Edit, Form, New
from .journal import Partial, partial
from .locate import Container
from .model_file import Entry, ModelFile, open_damaged
from .pieces import Pieces
from .schemes.comfy import METADATA
from .schemes.own import KEY

if TYPE_CHECKING:
    from torch import Tensor

NOTE = "quantwire_repair"
BLOCK_NBYTES = 8 << 20
MAX_FORM_NBYTES = 256 << 20  # what is made another form is held in memory; scales are far smaller
ALIGNMENT = 8


@dataclass(frozen=True)
class Repair:
    """What a repair did.

    Attributes:
        before, after: the diagnosis of the file, and of the copy.
    """

    target: Path
    before: Diagnosis
    after: Diagnosis

    @property
    def fixes(self) -> list[str]:
        return [f"{f.code}: {f.fix}" for f in self.before.findings if f.fix]

    def to_dict(self) -> dict[str, Any]:
        return {
            "target": str(self.target), "fixes": self.fixes, "before": self.before.to_dict(),
            "after": self.after.to_dict(),
        }  # fmt: skip

    def __str__(self) -> str:
        done = "\n".join(f"  {fix}." for fix in self.fixes)
        left = f"Left in it:\n{self.after}" if self.after.findings else "Nothing wrong is left."
        return f"{self.target}: written, with {len(self.fixes)} fixes:\n{done}\n{left}"


def repair(
    path: Path, target: Path, overwrite: bool = False, deep: bool = False, before: Diagnosis | None = None
) -> Repair:
    """Diagnose a file, and write a copy with all certain fixes.

    Args:
        before: the diagnosis, where it was made already.
    Raises:
        FileError: nothing to fix, a file of another kind or in several parts, the target is the file itself or is
            there already, or the copy would be worse.
    """
    before = before or diagnose(path, deep)
    file, _ = open_damaged(path)
    if before.state and before.state != file.state:
        raise FileError(f"{path.name}: is another file than the one that was looked at.\nRun again.")
    _refuse(file, before, target)
    edit = before.edit
    if edit is None:
        left = "its faults have no certain fix" if before.findings else "nothing wrong was found"
        raise FileError(f"{path.name}: nothing to repair: {left}.\nNo file was written.")
    tensors = list(_planned(file, edit))
    head = _header(file, before, edit, tensors)
    total = len(head) + sum(nbytes for *_, nbytes in tensors)
    what = {"repair": str(path), "state": {p.name: s for p, s in file.state.items()}}
    with partial(target, total, what, resumable=False, overwrite=overwrite, inputs=file.located.files) as out:
        _write(out, head, file, tensors)
        file.check_unchanged()
        after = diagnose(out.path, deep, file.configs)
        _refuse_worse(before, after)
    return Repair(target, before, dataclasses.replace(after, path=target))


def _refuse(file: ModelFile, before: Diagnosis, target: Path) -> None:
    name = file.path.name
    if file.container is not Container.SAFETENSORS:
        todo = "Give one of its parts." if file.container is Container.SHARDED else "Get the file again."
        raise FileError(f"{name}: {file.container.value} is not repaired, single safetensors files are.\n{todo}")
    if KEY in file.metadata:
        raise FileError(
            f"{name}: a file of this pack, with a checksum over all of it, is not repaired.\nMake it again."
        )
    if any(f.code == "header-truncated" for f in before.findings):
        raise FileError(f"{name}: truncated data cannot be repaired.\nDownload it again.")
    if os.path.lexists(target) and not target.is_file():
        raise FileError(f"{target}: is there already, and no file (or a link to none).\nGive another name.")


def _refuse_worse(before: Diagnosis, after: Diagnosis) -> None:
    """Raises:
    FileError: the copy has an error that the file did not have.
    """
    known = {(f.code, tensor) for f in before.findings for tensor in (*f.tensors, "")}
    for finding in after.findings:
        if finding.severity is Severity.ERROR and any((finding.code, t) not in known for t in finding.tensors or ("",)):
            raise FileError(
                f"{before.path.name}: not repaired: the copy would have a fault of its own: {finding.text}\n"
                "Please report this with the output of `quantwire doctor --json`."
            )


# name in the copy, dtype, shape, what it is made of, bytes
Planned = tuple[str, str, tuple[int, ...], "Entry | New | tuple[Entry, Form]", int]


def _planned(file: ModelFile, edit: Edit) -> Iterator[Planned]:
    """The tensors of the copy, in the file's order; new ones last."""
    from .safetensors_header import DTYPE_BITS

    for entry in file.entries.values():
        name, form = edit.rename.get(entry.name, entry.name), edit.form.get(entry.name)
        if name in edit.add or entry.name in edit.drop:
            continue
        if form is None:
            yield name, entry.dtype, entry.shape, entry, entry.nbytes
            continue
        nbytes = DTYPE_BITS[form.dtype] // 8
        for n in form.shape:
            nbytes *= n
        if max(nbytes, entry.nbytes) > MAX_FORM_NBYTES:
            raise FileError(f"{file.path.name}: '{entry.name}' is too large for scales.\nGet the file again.")
        yield name, form.dtype, form.shape, (entry, form), nbytes
    for name, new in edit.add.items():
        yield name, new.dtype, new.shape, new, len(new.data)


def _header(file: ModelFile, before: Diagnosis, edit: Edit, tensors: list[Planned]) -> bytes:
    # The copy has metadata in any case, and some loaders refuse metadata without a format.
    metadata = {"format": "pt", **file.metadata, **edit.metadata}
    if edit.layers:
        value: dict[str, Any] = json.loads(metadata[METADATA])
        layers = {key: conf for key, conf in {**value["layers"], **edit.layers}.items() if conf is not None}
        metadata[METADATA] = json.dumps({**value, "layers": layers})
    fixed = [{"code": f.code, "fix": f.fix, "tensors": len(f.tensors)} for f in before.findings if f.fix]
    metadata[NOTE] = json.dumps({"file": file.path.name, "fixes": fixed})
    entries: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for name, dtype, shape, _, nbytes in tensors:
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    if len(entries) != len(tensors) + 1:
        raise FileError(f"{file.path.name}: two tensors would have one name.\nGet the file again.")
    raw = json.dumps(entries, separators=(",", ":")).encode()
    raw = raw.ljust(-(-len(raw) // ALIGNMENT) * ALIGNMENT)
    return struct.pack("<Q", len(raw)) + raw


def _write(out: Partial, head: bytes, file: ModelFile, tensors: list[Planned]) -> None:
    out.write(head, 0)
    at = len(head)
    with open(file.located.files[0], "rb", buffering=0) as source:
        for name, _, _, content, nbytes in tensors:
            if isinstance(content, New):
                out.write(content.data, at)
            elif isinstance(content, Entry):
                _copy(out, source, content, at)
            else:
                out.write(_formed(file, *content), at)
            out.finished(name, nbytes, None)
            at += nbytes


def _copy(out: Partial, source: Any, entry: Entry, at: int) -> None:
    source.seek(entry.start)
    block = memoryview(bytearray(min(BLOCK_NBYTES, entry.nbytes)))
    left = entry.nbytes
    while left:
        read = source.readinto(block[: min(left, len(block))])
        if not read:
            raise FileError(f"{entry.file.name}: became shorter while it was read.\nWait until it is written.")
        out.write(block[:read], at)
        at, left = at + read, left - read


def _formed(file: ModelFile, entry: Entry, form: Form) -> bytes:
    """The bytes of a tensor in another dtype or shape."""
    import torch

    from .quantized_file import DTYPES

    with Pieces() as pieces:
        tensor = torch.cat([*pieces.flat(entry)]).reshape(entry.shape)
    tensor = _tiled(tensor, form.shape) if form.tiles else tensor.to(DTYPES[form.dtype]).reshape(form.shape)
    return cast(Any, tensor.contiguous().reshape(-1).view(torch.uint8).numpy()).tobytes()


def _tiled(scales: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Block scales (N, G) in tiles of 128 x 4, each as 32 rows of 4 x 4; what is beyond the matrix is zero.

    Source: docs.nvidia.com/cuda/cublas, layout of the scaling factors of 1D blocks.
    """
    import torch

    rows, columns = shape
    whole = torch.zeros(shape, dtype=torch.uint8)
    whole[: scales.shape[0], : scales.shape[1]] = scales.view(torch.uint8)
    tiles = whole.reshape(rows // 128, 4, 32, columns // 4, 4)  # block row, quarter, row of it, block column, column
    return tiles.permute(0, 3, 2, 1, 4).reshape(shape)
