"""Libraries that may not be there."""

from __future__ import annotations

import importlib
from typing import Any


class Unavailable(Exception):
    """The cell cannot be probed here; the text says why."""


def load(module: str, package: str = "") -> Any:
    """Import a module of an optional library.

    Args:
        package: its name on PyPI, where it is another than that of the module.

    Raises:
        Unavailable: it is not installed, or cannot be imported.
    """
    package = package or module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as err:
        if err.name is not None and (module == err.name or module.startswith(f"{err.name}.")):
            raise Unavailable(f"{package} is not installed") from err
        raise Unavailable(f"{package} cannot be imported: {err}") from err
    except (ImportError, OSError, RuntimeError) as err:
        raise Unavailable(f"{package} cannot be imported: {err}") from err
