"""Importing NNCF without its telemetry, and without what its import changes for everybody else.

NNCF 3.4 builds its telemetry object at import, and that writes a client id under the user's home even where `NNCF_CI`
then replaces the object; calls of its public functions send events through it. Here the package that sends,
`openvino_telemetry`, cannot be imported while NNCF is: NNCF falls back to a stub, as it does where that package is not
installed. The functions used here (`weight_lowering`) report nothing anyway, so an NNCF that somebody else imported
before is used as it is. The import also makes NNCF's logger class the default of the whole process; that is undone.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, cast

SENDER = "openvino_telemetry"
SWITCH = "NNCF_CI"  # NNCF's own switch: any value makes its telemetry a stub


@contextmanager
def _telemetry_off() -> Generator[None, None, None]:
    modules = cast("dict[str, ModuleType | None]", sys.modules)
    missing = object()
    sender: Any = modules.get(SENDER, missing)
    value, logger_class = os.environ.get(SWITCH), logging.getLoggerClass()
    modules[SENDER] = None  # makes `import openvino_telemetry` an ImportError
    os.environ[SWITCH] = "1"
    try:
        yield
    finally:
        logging.setLoggerClass(logger_class)
        if value is None:
            os.environ.pop(SWITCH, None)
        else:
            os.environ[SWITCH] = value
        if sender is missing:
            modules.pop(SENDER, None)
        else:
            modules[SENDER] = sender


def load(module: str) -> Any:
    """A module of NNCF; `nncf.torch`, which has a tracer and loads C++ tooling, is not needed for any used here."""
    if "nncf" in sys.modules:
        return importlib.import_module(module)
    with _telemetry_off():
        return importlib.import_module(module)
