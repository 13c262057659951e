"""Logs: one event a line on standard error, readable on a terminal, JSON elsewhere. Secrets never enter them."""

import contextlib
import logging
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


def configure_logs() -> None:
    """Set structlog up for this process."""
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer() if sys.stderr.isatty() else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(cast(TextIO, _UnfailingStream(sys.stderr))),
        cache_logger_on_first_use=True,
    )
