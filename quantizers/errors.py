"""The pack's exceptions.

The first line of every message stands alone, because a node editor shows only that: what failed, where, what was got
and expected. What to do about it follows on the same or the next line. The command line maps the types to exit codes:
`OffloadConflict` is 3, every other `QuantwireError` is 2 (bad workflow or input), anything else is 4 (a node failed).
Out-of-memory errors are never wrapped: hosts recognise them by type.
"""

from __future__ import annotations

from collections.abc import Iterable


class QuantwireError(Exception):
    """Base of everything that the pack raises on purpose."""


class SpecError(QuantwireError):
    """A format, option or layer that cannot be quantized as asked."""


class BackendUnavailable(QuantwireError):
    """The library behind a format is missing, too old, or does not run on this machine."""


class WeightError(QuantwireError):
    """A tensor whose values or state forbid the operation: nan, inf, already quantized."""


class FileError(QuantwireError):
    """A file that is missing, truncated, corrupt or of another kind."""


class WorkflowError(QuantwireError):
    """A workflow that cannot run as written."""


class OffloadConflict(QuantwireError):
    """A quantized model that would break under the offload mode it is about to run with."""


def near(name: str, valid: Iterable[str], limit: int = 3) -> str:
    """`" Did you mean a, b?"` for the closest valid names, or an empty string; case, `_` and `-` do not count."""
    import difflib  # only an error needs it

    names: dict[str, str] = {}
    for each in valid:
        names.setdefault(_folded(each), each)
    close = difflib.get_close_matches(_folded(name), list(names), n=limit, cutoff=0.5)
    return f" Did you mean {', '.join(names[c] for c in close)}?" if close else ""


def _folded(name: str) -> str:
    return name.lower().replace("_", "-")
