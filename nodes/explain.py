"""Raw errors of libraries in the pack's nodes, explained: once, around the FUNCTION of every node class.

The embedded host does the same for every node that it runs, the core nodes among them. In ComfyUI nobody else is there
to do it for ours, and other packs' nodes are not touched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ..quantizers.errors import QuantwireError


def explain_errors(node: type) -> None:
    """Wrap the class's FUNCTION, whose signature stays as it is."""
    name: str = getattr(node, "FUNCTION")  # noqa: B009 - the contract's attribute, unknown to `type`
    setattr(node, name, _explaining(getattr(node, name)))


def _explaining(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except QuantwireError:
            raise
        except Exception as err:  # which library raised it is what is asked; what nobody knows goes on as it is
            # Imported here: the module brings torch's part of the pack, which must not slow the host's start.
            from ..quantizers.compat.translate import raise_translated

            raise_translated(err)
            raise

    return run
