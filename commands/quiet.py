"""What libraries say when they are imported to be asked whether they work."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_libraries(debug: bool) -> Iterator[None]:
    """Hold back what libraries log when they are imported to be probed; what keeps one from working is its reason."""
    before = logging.root.manager.disable
    logging.disable(before if debug else logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
