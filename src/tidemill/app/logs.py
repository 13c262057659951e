"""Logs: one event a line on standard error. Secrets never enter them.

They are for people on a terminal, and where standard output goes to the same place: what a command tells people is
there, and one file has one form. Elsewhere they are JSON.
"""

import contextlib
import logging
import os
import sys
from typing import TextIO, cast

import structlog


class _UnfailingStream:
    """Standard error, whose failure (a full disk under a log file) must not become that of a request."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


def shared_with_output() -> bool:
    """Standard error and standard output are the same file, pipe or terminal."""
    try:
        out, err = os.fstat(sys.stdout.fileno()), os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):  # closed, or no file at all
        return False
    return (out.st_dev, out.st_ino) == (err.st_dev, err.st_ino)


def configure_logs() -> None:
    """Set structlog up for this process."""
    renderer: structlog.typing.Processor
    if sys.stderr.isatty() or shared_with_output():
        renderer = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    else:
        renderer = structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([] if isinstance(renderer, structlog.dev.ConsoleRenderer) else [structlog.processors.format_exc_info]),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(cast(TextIO, _UnfailingStream(sys.stderr))),
        cache_logger_on_first_use=True,
    )
