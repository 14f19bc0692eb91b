"""Importing torchao without what it says at import."""

from __future__ import annotations

import importlib
import logging
import re
import sys
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

# torchao 0.18 tries each of its CUDA extensions and warns for those that do not load, which is all of them on a CPU;
# torch 2.13 warns that torchao registers an enum. Neither concerns what is used here.
_HARMLESS = {
    "torchao": re.compile(r"Failed to load .*_C_"),
    "torch.utils._pytree": re.compile(r"Calling register_constant\(\) on Enum subclasses"),
}


class _Without(logging.Filter):
    def __init__(self, pattern: re.Pattern[str]) -> None:
        super().__init__()
        self.pattern = pattern

    def filter(self, record: logging.LogRecord) -> bool:
        return self.pattern.search(record.getMessage()) is None


@contextmanager
def _quiet() -> Generator[None, None, None]:
    filters = {name: _Without(pattern) for name, pattern in _HARMLESS.items()}
    for name, item in filters.items():
        logging.getLogger(name).addFilter(item)
    try:
        with warnings.catch_warnings():  # torchao adds a filter of its own for the whole process
            yield
    finally:
        for name, item in filters.items():
            logging.getLogger(name).removeFilter(item)


def load(module: str) -> Any:
    """A module of torchao, untyped: the library's annotations are partial."""
    if module not in sys.modules:
        with _quiet():
            importlib.import_module(module)
    return sys.modules[module]
