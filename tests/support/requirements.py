"""What some tests need and not every machine has: told in a line at the end, or failed for where CI asks for all.

A test that cannot run skips with a reason of the form "PostgreSQL is not installed (apt-get install postgresql)".
"""

import os
import re
from collections import Counter
from collections.abc import Iterable
from typing import NoReturn

import pytest

ALL = bool(os.environ.get("TIDEMILL_TEST_ALL"))
"""Nothing may be left out: what is missing fails the test. CI sets it."""

_MISSING = re.compile(r"(?:Skipped: )?(?P<what>\w[\w .]*) is not installed \((?P<how>.+)\)$")


def not_installed(what: str, how: str) -> NoReturn:
    """Leave the test out, as `what` is missing; `how` is the command that gives it."""
    pytest.skip(f"{what} is not installed ({how})")


def need_module(name: str, what: str, how: str) -> None:
    """Leave the test out where a Python module is missing."""
    try:
        __import__(name)
    except ModuleNotFoundError:
        not_installed(what, how)


def missing(reason: str) -> tuple[str, str] | None:
    """What a skipped test has missed, and how to have it; None when it was skipped for another reason."""
    found = _MISSING.match(reason)
    return (found["what"], found["how"]) if found else None


def summary(reasons: Iterable[str]) -> str:
    """The line for the reasons of all skipped tests; empty when nothing was missing."""
    counts = Counter(found for found in map(missing, reasons) if found is not None)
    parts = [f"{count} that need {what} ({how})" for (what, how), count in sorted(counts.items())]
    return "tests left out: " + ", ".join(parts) if parts else ""
