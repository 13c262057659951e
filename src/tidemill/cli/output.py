"""The output of commands: tables for people, one JSON document for programs, one-line errors."""

import json
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console

Justify = Literal["left", "right"]

_NUMBER = re.compile(r"(-?)([0-9]+)(\.[0-9]+|)")

PIPE_COLUMNS = 1000
"""Width of a table that goes into a file or a pipe, where no terminal breaks its lines."""


def print_json(document: Any) -> None:
    """Print one JSON document."""
    ascii_only = "utf" not in (sys.stdout.encoding or "").lower()
    print(json.dumps(document, ensure_ascii=ascii_only, indent=2))


def print_text(text: str) -> None:
    """Print text as it is, whatever it contains."""
    _writable()
    sys.stdout.write(text if text.endswith("\n") else text + "\n")


def print_table(columns: Sequence[tuple[str, Justify]], rows: Sequence[Sequence[str]], *, footer: bool = False) -> None:
    """Print a table; with `footer` the last row is set off as the sum of the others.

    Nothing is ever cut off.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title, justify in columns:
        # A number that is broken over two lines is read wrong; a name is not.
        table.add_column(title, justify=justify, overflow="fold", no_wrap=justify == "right")
    for index, row in enumerate(rows):
        last = footer and index == len(rows) - 1
        # Text, not str: a tenant may be named "[red]".
        table.add_row(*(Text(cell) for cell in row), style="bold" if last else None)
    _console().print(table)


def _console() -> "Console":
    from rich.console import Console

    _writable()
    terminal = sys.stdout.isatty()
    return Console(file=sys.stdout, highlight=False, emoji=False, width=None if terminal else PIPE_COLUMNS)


def _writable() -> None:
    """Let a terminal that knows no Chinese get escapes instead of a failure."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None and "utf" not in (sys.stdout.encoding or "").lower():
        reconfigure(errors="backslashreplace")


def complain(message: str, *, hint: str = "", kind: str = "error") -> None:
    """Say what is wrong and what to do, in one line on standard error."""
    line = " ".join(f"{kind}: {message} {hint}".split())
    encoding = sys.stderr.encoding or "utf-8"
    print(line.encode(encoding, "backslashreplace").decode(encoding), file=sys.stderr)


def grouped(number: int | str) -> str:
    """A count or a decimal amount with commas between the thousands, for people."""
    match = _NUMBER.fullmatch(str(number))
    return f"{match[1]}{int(match[2]):,}{match[3]}" if match else str(number)


def moment(instant: str | None) -> str:
    """An ISO instant as `2026-11-24 15:04:05` UTC, or nothing."""
    return "" if instant is None else instant[:19].replace("T", " ")


def split_list(text: str) -> list[str]:
    """The parts of a list that was written with commas."""
    return [part.strip() for part in text.split(",") if part.strip()]
