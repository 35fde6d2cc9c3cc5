"""Logging: standard library loggers, one line per message, with the id of the request, job or VM it belongs to."""

import contextlib
import contextvars
import logging
import sys
import time
from collections.abc import Iterator

FORMAT = "%(asctime)s,%(msecs)03d%(zone)s %(levelname)-7s (%(threadName)s) [%(name)s] %(context)s%(message)s"

# What a line belongs to: a request's id, "job ID", "vm ID". Each thread of a pool sets it for its piece of work.
context: contextvars.ContextVar[str] = contextvars.ContextVar("context", default="")


def get(name: str) -> logging.Logger:
    """The logger of a room, e.g. `storage.images`."""
    return logging.getLogger(f"vdsm.{name}")


@contextlib.contextmanager
def about(what: str) -> Iterator[None]:
    """All lines of this thread or task inside the block belong to `what`."""
    token = context.set(what)
    try:
        yield
    finally:
        context.reset(token)


class _Context(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        what = context.get()
        record.context = f"{what}: " if what else ""
        record.zone = time.strftime("%z", time.localtime(record.created))
        return True


def setup(level: str = "INFO", path: str = "") -> None:
    """Sends all lines to `path` (appended), or to standard error. Called once by each process's main."""
    handler: logging.Handler = logging.FileHandler(path) if path else logging.StreamHandler(sys.stderr)
    handler.addFilter(_Context())
    handler.setFormatter(logging.Formatter(FORMAT, datefmt="%Y-%m-%d %H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
