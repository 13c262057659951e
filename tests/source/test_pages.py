"""What pages and docstrings say: files that they name exist, and a docstring begins with one short line."""

import re
from pathlib import Path

from tests.source.allowed import LONG_FIRST_LINES
from tests.source.tree import SOURCE, Source
from tests.support.paths import ROOT

PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]
FIRST_LINE = 100
FILE = re.compile(r"`((?:[\w.-]+/)+[\w-]+\.(?:py|toml|md))`")
"""A path of a file, as pages name it; one without a folder is a file of the reader's."""


def missing_files(page: Path, *roots: Path) -> list[str]:
    """Files that a page names and that are below none of these directories."""
    named = FILE.findall(page.read_text(encoding="utf-8"))
    return [name for name in named if not any((root / name).is_file() for root in roots)]


def long_first_lines(source: Source) -> list[tuple[str, str]]:
    return [(file, line) for file, line in source.first_lines() if len(line) > FIRST_LINE]


def test_files_that_the_pages_name_exist() -> None:
    roots = (ROOT / "src/tidemill", ROOT)
    missing = {page.relative_to(ROOT).as_posix(): found for page in PAGES if (found := missing_files(page, *roots))}
    assert missing == {}


def test_each_term_of_the_glossary_has_a_line_and_a_file() -> None:
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \|$", (ROOT / "docs/glossary.md").read_text("utf-8"), re.MULTILINE)
    terms = {term: (meaning, file) for term, meaning, file in rows if term not in ("term", "---")}
    assert len(terms) >= 30 and list(terms) == sorted(terms, key=lambda term: term.removeprefix("the "))
    assert all(FILE.fullmatch(file) for _, file in terms.values())


def test_each_decision_is_in_the_index_with_its_status_and_date() -> None:
    index = (ROOT / "docs/decisions/README.md").read_text(encoding="utf-8")
    for page in sorted(ROOT.glob("docs/decisions/0*.md")):
        row = rf"^\| \[{page.name[:4]}\]\({re.escape(page.name)}\) \| .+ \| .+ \| \d{{4}}-\d\d-\d\d \|$"
        assert re.search(row, index, re.MULTILINE), f"{page.name} is not in docs/decisions/README.md"


def test_a_docstring_begins_with_one_line_of_at_most_100_characters() -> None:
    """The first line says what a caller gets; what else there is to say follows in a paragraph."""
    found = long_first_lines(SOURCE)
    assert len(found) <= LONG_FIRST_LINES, f"begin these with a short line, or others of {len(found)}: {found[:20]}"
    assert len(found) > LONG_FIRST_LINES - 10, f"write {len(found)} into LONG_FIRST_LINES: it may only shrink"


def test_these_rules_can_fail(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("See `a/b.py` and `a/gone.py`, and write `tidemill.toml`.")
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b.py").write_text(f'"""{"x" * 101}"""\n\ndef f():\n    """{"x" * 100}"""\n')
    assert missing_files(page, tmp_path) == ["a/gone.py"]
    assert [file for file, _ in long_first_lines(Source(tmp_path))] == ["a/b.py"]
