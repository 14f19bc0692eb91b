"""Whether all blocks of a diffusion model are there, as far as its names tell.

Loaders count blocks upwards until one is missing, and initialise tensors that a file lacks, so a file with a gap loads
as a smaller or partly random model.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

from ..errors import FileError

# `double_blocks.3.img_attn.qkv.weight`; not the members of a Sequential (`layers.2.weight`), which may skip numbers.
_BLOCK = re.compile(r"(?<![^.])(\w*(?:blocks|layers|refiner)\.(?:block)?)(\d+)\.(?=[^.]+\.)")
_UNEVEN = re.compile(r"(input_blocks|output_blocks|block\d+\.blocks)\.$")  # UNets' and Cosmos 1's differ
_LAST_WITHOUT = "context_block."  # the last block of SD 3 has no way out for the text
ENOUGH = 3  # blocks from which what all but one have is taken for what all should have
SHOWN = 5

Stacks = dict[str, dict[int, set[str]]]  # stack with its prefix -> number -> rest of the names


def _stacks(names: Iterable[str]) -> Stacks:
    found: Stacks = defaultdict(lambda: defaultdict(set))
    for name in names:
        for match in _BLOCK.finditer(name):
            found[name[: match.start(2)]][int(match[2])].add(name[match.end() :])
    return found


def refuse_gaps(label: str, names: Iterable[str]) -> None:
    """Raises:
    FileError: a stack whose blocks are not numbered from 0 without a gap.
    """
    for stack, blocks in _stacks(names).items():
        missing = [i for i in range(max(blocks)) if i not in blocks]
        if missing:
            shown = ", ".join(f"{stack}{i}" for i in missing[:SHOWN])
            more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
            raise FileError(
                f"{label}: no whole model: {shown}{more} missing, {stack}{max(blocks)} is there.\n"
                "Give the whole model: of one in several parts the index or folder, or download it again."
            )


def missing_from_one(names: Iterable[str]) -> list[str]:
    """Names that one block of a stack lacks and all others have."""
    missing: list[str] = []
    for stack, blocks in _stacks(names).items():
        if len(blocks) < ENOUGH or _UNEVEN.search(stack):
            continue
        last = max(blocks)
        for rest in sorted(set[str]().union(*blocks.values())):
            without = [i for i, rests in blocks.items() if rest not in rests]
            if len(without) == 1 and not (without == [last] and rest.startswith(_LAST_WITHOUT)):
                missing.append(f"{stack}{without[0]}.{rest}")
    return missing
