"""The check of OffloadCompat once more, right before a model runs.

Between the node and the sampler other nodes may quantize the model, and the host may change its memory mode. The guard
travels with the model object, remembers what it last found in order, and looks again only when something changed.
Checking at every step was not chosen: neither the modules nor the host's mode changes between steps.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING

from ..errors import OffloadConflict
from .find import Found, find_carriers
from .installed import installed
from .modes import HostName, OffloadMode, VerdictLevel
from .remedies import Space
from .rules import Verdict, check, explain, ways_out

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)
LATE = "Found right before the model ran: it was changed after OffloadCompat, or the host's memory mode was."
_REMEMBERED = 32  # components and modes: a graph runs a few models in turn, each before and after it is loaded
_WHOLE = (OffloadMode.BALANCED, "whole")
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
        variant: of the chosen mode; None is not known. Another one of the same mode, that the host has in force, is
            checked too.
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
        now = {name: fingerprint({name: module}) for name, module in components.items()}
        changed = {n: m for n, m in components.items() if self._passed.get((n, mode, variant)) != now[n]}
        if changed:
            self.act(self.examine(changed, mode, variant, space), LATE)
            self._remember(now, mode, variant)

    def examine(
        self, components: Mapping[str, nn.Module], mode: OffloadMode, variant: str | None, space: Space | None = None
    ) -> Verdicts:
        """Verdicts by component, of the chosen mode and of what the host does now; components without any are left out.

        With a chosen mode, what the host does adds only what is worse than ok: the report is about the chosen one.
        """
        now, chosen = (mode, variant), (mode, variant) if self.mode is None else (self.mode, self.variant)
        # Whether balanced offload splits a component is told by its size, and not by the user.
        if self.mode is mode and (self.variant is None or now == _WHOLE):
            chosen = now
        verdicts: Verdicts = {}
        for name, module in components.items():
            layers = find_carriers(module)
            verdicts[name] = self._judge(module, layers, *chosen, space)
            if chosen != now:
                done = self._judge(module, layers, *now, space)
                verdicts[name] += [v for v in done if v.level in (VerdictLevel.BLOCK, VerdictLevel.WARN)]
        return {name: of_one for name, of_one in verdicts.items() if of_one}

    def _judge(
        self,
        module: nn.Module,
        layers: Sequence[Found],
        mode: OffloadMode,
        variant: str | None,
        space: Space | None,
    ) -> list[Verdict]:
        """Balanced offload of a component that fits: accelerate puts its hooks on all the same, which is what the table
        measures. Without hooks, as in the embedded host, the component moves as in mode model."""
        if (mode, variant) != _WHOLE or installed((module,)) is not None:
            return check(layers, mode, host=self.host, variant=variant, space=space)
        moved = check(layers, OffloadMode.MODEL, host=self.host, variant="", space=space)
        return [replace(v, mode=mode, variant=variant) for v in moved]

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
                    log.warning("%s", "\n".join([f"{name}: {verdict.headline}", *ways_out(verdict)]))

    def passed(self, components: Mapping[str, nn.Module], mode: OffloadMode, variant: str | None) -> None:
        """Remember components that were examined and let through."""
        self._remember({name: fingerprint({name: module}) for name, module in components.items()}, mode, variant)

    def _remember(self, states: Mapping[str, int], mode: OffloadMode, variant: str | None) -> None:
        for name, state in states.items():
            key = (name, mode, variant)
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
