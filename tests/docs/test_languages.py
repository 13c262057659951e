"""README.zh-CN.md says what README.md says: the same blocks, links, headings and tables, in the same order."""

import re
from pathlib import Path

import pytest

from tests.docs.examples import steps_of

ROOT = Path(__file__).parents[2]
ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"


def prose_of(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def code_of(block: str) -> str:
    """A block without its comments, which are for readers."""
    return re.sub(r"\s+# .*$", "", block, flags=re.MULTILINE)


def links_of(page: Path) -> list[str]:
    """Where it leads, but for headings of its own and the other language."""
    targets = re.findall(r"\]\(([^)]+)\)", prose_of(page))
    return [target for target in targets if not target.startswith(("#", "README"))]


def outline_of(page: Path) -> list[str]:
    """The kind of each line that is a heading, a point or a row; a row with its number of cells."""
    kinds = re.findall(r"^(#+ |- |\|.*)", prose_of(page), flags=re.MULTILINE)
    return [kind if kind[0] != "|" else f"| {kind.count('|')}" for kind in kinds]


def figures_of(page: Path) -> list[str]:
    """The figures of the part that comes from the benchmark, sorted, as sentences are built otherwise."""
    found = re.search(r"<!-- figures: begin.*?-->(.*?)<!-- figures: end -->", page.read_text("utf-8"), re.DOTALL)
    assert found
    return sorted(re.findall(r"\d+(?:\.\d+)?", found[1].replace(",", "")))


def test_the_blocks_are_the_same() -> None:
    steps = [[(step.kind, code_of(step.text)) for step in steps_of(page)] for page in (ENGLISH, CHINESE)]
    assert steps[0] == steps[1]


@pytest.mark.parametrize("part", [links_of, outline_of, figures_of], ids=["links", "outline", "figures"])
def test_what_it_is_made_of_is_the_same(part) -> None:  # type: ignore[no-untyped-def]
    assert part(ENGLISH) == part(CHINESE)


def test_each_page_leads_to_the_other() -> None:
    assert "](README.zh-CN.md)" in prose_of(ENGLISH) and "](README.md)" in prose_of(CHINESE)
