"""Values of a file that no model can compute with."""

from __future__ import annotations

from torch import Tensor

from ..errors import FileError, WeightError
from ..kernels.compare import finite
from ..weight import QuantizedWeight
from .model_file import Entry

BLOCK_NBYTES = 1 << 22
# dtype -> the bytes that are nan or inf, as `kernels.compare.finite` has them
_NO_NUMBERS = {
    "F8_E4M3": (0x7F, 0xFF),
    "F8_E5M2": (*range(0x7C, 0x80), *range(0xFC, 0x100)),
}


def check_scales(name: str, weight: QuantizedWeight, codes: bool = True) -> None:
    """Refuse nan and inf in what codes are multiplied with, and in codes that are 8-bit floats.

    The codes of other formats cannot be nan, and dequantizing a weight to look at it would take its size again.

    Args:
        codes: look at the codes too.
    Raises:
        WeightError: names the tensor.
    """
    for part, tensor in weight.tensors.items():
        looked_at = codes and tensor.itemsize == 1 if part == "qdata" else True
        if looked_at and tensor.is_floating_point() and not finite(tensor):
            raise _refusal(name, part)


def check_codes(name: str, entry: Entry) -> None:
    """Refuse nan and inf in a tensor of 8-bit floats, read past its map so that no page of that stays in memory.

    Raises:
        WeightError: names the weight.
        FileError: the file cannot be read.
    """
    bad = [bytes([code]) for code in _NO_NUMBERS.get(entry.dtype, ())]
    if not bad:
        return
    left, block = entry.nbytes, bytearray(min(BLOCK_NBYTES, entry.nbytes))
    try:
        with open(entry.file, "rb", buffering=0) as file:
            file.seek(entry.start)
            while left:
                count = file.readinto(memoryview(block)[: min(left, len(block))])
                if not count:
                    raise FileError(f"{entry.file.name}: became shorter while it was read.\nWait until it is written.")
                if any(block.find(code, 0, count) >= 0 for code in bad):
                    raise _refusal(name, "qdata")
                left -= count
    except OSError as err:
        raise FileError(f"{entry.file}: cannot be read: {err.strerror}.") from err


def _refusal(name: str, part: str) -> WeightError:
    return WeightError(
        f"'{name}': its {part} holds nan or inf, so its values are not numbers.\n"
        "The file is damaged, or its weights overflowed when it was made; get another one."
    )


def check_plain(name: str, tensor: Tensor) -> None:
    """Raises:
    WeightError: nan or inf; a matrix of integers, which are codes of something.
    """
    if not finite(tensor):
        raise WeightError(f"'{name}': holds nan or inf.\nThe file is damaged; get another one.")
    if name.endswith(".weight") and tensor.ndim > 1 and not tensor.is_floating_point():
        raise WeightError(
            f"'{name}': is a matrix of {str(tensor.dtype).removeprefix('torch.')}, which are codes and no weights.\n"
            "The file lost its scales, or is of a kind that is not known here; get another one."
        )
