"""Sizes: a file is one subject, a function fits on a screen."""

from pathlib import Path

from tests.source.allowed import LONG_FILES, LONG_FUNCTIONS
from tests.source.tree import SOURCE, Source

FILE_LINES = 400
FUNCTION_LINES = 70


def long_files(source: Source) -> set[str]:
    return {name for name, text in source.texts.items() if len(text.splitlines()) > FILE_LINES}


def long_functions(source: Source) -> set[tuple[str, str]]:
    return {(each.file, each.name) for each in source.functions() if each.lines > FUNCTION_LINES}


def test_a_file_has_at_most_400_lines() -> None:
    """A longer one has a second subject: find it."""
    assert long_files(SOURCE) == LONG_FILES.keys()


def test_a_function_has_at_most_70_lines() -> None:
    assert long_functions(SOURCE) == LONG_FUNCTIONS.keys()


def test_these_rules_can_fail(tmp_path: Path) -> None:
    body = "    x = 1\n" * FUNCTION_LINES
    (tmp_path / "long.py").write_text(f"def f():\n{body}" + "\n" * FILE_LINES)
    (tmp_path / "short.py").write_text(f"def f():\n{body}".removesuffix("    x = 1\n"))
    source = Source(tmp_path)
    assert long_files(source) == {"long.py"} and long_functions(source) == {("long.py", "f")}
