"""The log while the server runs: its last lines for the editor's panel, and less noise from broken requests."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

MAX_LINES = 300
MAX_LINE = 2000
MAX_READERS = 32
TERMINAL = {"cols": 120, "rows": 40}


class LogLines(logging.Handler):
    """The last lines of the log, as the editor's panel reads them.

    Args:
        tell: called with each new line and each client id in `readers`, from the thread that logs.
    """

    def __init__(self, tell: Callable[[dict[str, str], str], None]) -> None:
        super().__init__()
        self.lines: deque[dict[str, str]] = deque(maxlen=MAX_LINES)
        self.readers: tuple[str, ...] = ()
        self._tell = tell

    def subscribe(self, client_id: str, enabled: bool) -> None:
        """Only the latest readers are kept, since none says goodbye when its page is closed."""
        others = tuple(r for r in self.readers if r != client_id)[1 - MAX_READERS :]
        self.readers = (*others, client_id) if enabled else others

    def emit(self, record: logging.LogRecord) -> None:
        try:
            stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(record.created))
            line = {"t": stamp, "m": f"{record.levelname}: {record.getMessage()[:MAX_LINE]}\n"}
            self.lines.append(line)
            for client_id in self.readers:
                self._tell(line, client_id)
        except Exception:  # a library's slip in its logging must not fail the run that it logs in
            self.handleError(record)


def quieter(record: logging.LogRecord) -> bool:
    """What is no HTTP is one line: aiohttp logs it with a traceback of its own parser."""
    from aiohttp.http import HttpProcessingError

    cause = record.exc_info[1] if record.exc_info else None
    if isinstance(cause, HttpProcessingError):
        record.msg, record.args = "refused what is no HTTP request: %.200r", (cause.message,)
        record.exc_info, record.levelno, record.levelname = None, logging.WARNING, "WARNING"
    return True


@contextmanager
def kept(handler: logging.Handler) -> Iterator[None]:
    """Log to `handler` too, inside the block."""
    http = logging.getLogger("aiohttp.server")
    logging.getLogger().addHandler(handler)
    http.addFilter(quieter)
    try:
        yield
    finally:
        http.removeFilter(quieter)
        logging.getLogger().removeHandler(handler)
