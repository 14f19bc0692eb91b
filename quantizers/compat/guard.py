"""The check of OffloadCompat once more, right before a model runs.

Between the node and the sampler other nodes may quantize the model, and the host may change its memory mode. The guard
travels with the model object, remembers what it last found in order, and looks again only when something changed.
Checking at every step was not chosen: neither the modules nor the host's mode changes between steps.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from ..errors import OffloadConflict
from .find import find_carriers
from .modes import HostName, OffloadMode, VerdictLevel
from .remedies import Space
from .rules import Verdict, check, explain

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)
LATE = "Found right before the model ran: it was changed after OffloadCompat, or the host's memory mode was."
_REMEMBERED = 16  # components and modes: a graph runs a few models in turn, each before and after it is loaded
Verdicts = dict[str, list[Verdict]]


class Action(str, Enum):
    """What OffloadCompat does about a conflict."""

    BLOCK = "block"
    WARN = "warn"
    REPORT = "report"


@dataclass(frozen=True)
class Guard:
    """The settings of an OffloadCompat node, and what it found in order.

    Attributes:
        mode: what the user chose; None is whatever the host does. What the host does is checked in both cases.
        variant: of the chosen mode; None is not known.
    """

    host: HostName
    action: Action = Action.BLOCK
    mode: OffloadMode | None = None
    variant: str | None = None
    _passed: dict[object, int] = field(
        default_factory=lambda: dict[object, int](), init=False, repr=False, compare=False
    )

    def __call__(
        self, components: Mapping[str, nn.Module], mode: OffloadMode, variant: str | None, space: Space | None = None
    ) -> None:
        """To be called right before the components run; cheap when nothing changed since the last call.

        Args:
            mode, variant: what the host does with them now.
        Raises:
            OffloadConflict: action is block, and a component cannot run so.
        """
        known, now = (*components, mode, variant), fingerprint(components)
        if self._passed.get(known) == now:
            return
        self.act(self.examine(components, mode, variant, space), LATE)
        self._remember(known, now)

    def examine(
        self, components: Mapping[str, nn.Module], mode: OffloadMode, variant: str | None, space: Space | None = None
    ) -> Verdicts:
        """Verdicts by component, of the chosen mode and of what the host does now; components without any are left out.

        With a chosen mode, what the host does adds only what is worse than ok: the report is about the chosen one.
        """
        chosen = (self.mode, self.variant) if self.mode is not None else (mode, variant)
        if chosen == (mode, None):
            chosen = (mode, variant)
        found = {name: find_carriers(module) for name, module in components.items()}
        verdicts: Verdicts = {}
        for name, layers in found.items():
            verdicts[name] = check(layers, chosen[0], host=self.host, variant=chosen[1], space=space)
            if chosen[0] is not mode:
                now = check(layers, mode, host=self.host, variant=variant, space=space)
                verdicts[name] += [v for v in now if v.level in (VerdictLevel.BLOCK, VerdictLevel.WARN)]
        return {name: of_one for name, of_one in verdicts.items() if of_one}

    def act(self, verdicts: Verdicts, note: str = "") -> None:
        """Stop, warn or say nothing, as the action is.

        Args:
            note: goes after the first line of a conflict.
        Raises:
            OffloadConflict: as for calling.
        """
        blocks = [(name, v) for name, of_one in verdicts.items() for v in of_one if v.level is VerdictLevel.BLOCK]
        if blocks and self.action is Action.BLOCK:
            first, *rest = "\n".join(explain(v, name) for name, v in blocks).splitlines()
            raise OffloadConflict("\n".join([first, *([note] if note else []), *rest]))
        for name, of_one in verdicts.items():
            for verdict in of_one:
                if self.action is not Action.REPORT and verdict.level is not VerdictLevel.OK:
                    log.warning("%s: %s", name, verdict.headline)

    def passed(self, components: Mapping[str, nn.Module], mode: OffloadMode, variant: str | None) -> None:
        """Remember components that were examined and let through."""
        self._remember((*components, mode, variant), fingerprint(components))

    def _remember(self, key: object, state: int) -> None:
        if len(self._passed) >= _REMEMBERED and key not in self._passed:
            self._passed.pop(next(iter(self._passed)))
        self._passed[key] = state


def fingerprint(components: Mapping[str, nn.Module]) -> int:
    """Changes when a module is replaced, wrapped or hooked, or a parameter or buffer becomes one of another class.

    Values, devices and dtypes do not count: hosts change those while they load.
    """
    seen: list[object] = list(components)
    stack: list[nn.Module | None] = list(components.values())
    see, look, many = seen.append, stack.extend, seen.extend
    while stack:
        module = stack.pop()
        if module is None:
            continue
        kept = module.__dict__
        # By id and class: a new module may be given the address of one that was freed.
        see(id(module))
        see(type(module))
        if parameters := kept["_parameters"]:
            many(map(type, parameters.values()))
        if buffers := kept["_buffers"]:
            many(map(type, buffers.values()))
        if "_hf_hook" in kept or "_diffusers_hook" in kept:
            see(True)
        if modules := kept["_modules"]:
            look(modules.values())
    return hash(tuple(seen))
