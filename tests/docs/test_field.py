"""docs/field.md: each complaint of the field that concerns the data plane is there, with tests that exist."""

import ast
import re

import pytest

from tests.support.paths import ROOT

PAGE = (ROOT / "docs/field.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in PAGE.splitlines()
    if line.startswith("| ") and "shown by" not in line
]
ISSUES = {
    "BerriAI/litellm": (14457, 15740, 17814, 26672, 27954, 28247, 34934, 35273, 35358, 35766, 35958, 36426, 36926)
    + (38121, 38193, 40100),
    "QuantumNous/new-api": (4168, 4463, 5235, 5288, 6609, 6731, 7062),
    "songquanpeng/one-api": (2440,),
    "maximhq/bifrost": (3357, 3547),
    "envoyproxy/ai-gateway": (2563,),
    "gpustack/gpustack": (1842, 4520, 4523),
}
"""What was found in the trackers of those that people run."""


def named_by(row: list[str]) -> list[str]:
    return re.findall(r"`(tests/[\w/]+\.py::\w+)`", row[-1])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:60])
def test_each_row_names_tests_that_exist(row: list[str]) -> None:
    named = named_by(row)
    assert named, f"nothing shows: {row[0]}"
    for each in named:
        path, _, name = each.partition("::")
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        assert name in functions, f"there is no {each}"


@pytest.mark.parametrize("peer", list(ISSUES))
def test_each_issue_is_answered(peer: str) -> None:
    seen = {
        int(number)
        for row in ROWS
        if len(row) == 4
        for place in row[1].split(";")
        if place.strip().startswith(peer)
        for number in re.findall(r"\d+", place.removeprefix(peer))
    }
    assert seen == set(ISSUES[peer])


def test_each_test_of_the_field_is_in_the_page() -> None:
    named = {each for row in ROWS for each in named_by(row)}
    for path in sorted((ROOT / "tests/field").glob("test_*.py")):
        for name in re.findall(r"^(?:async )?def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE):
            assert f"tests/field/{path.name}::{name}" in named, f"{path.name}::{name} shows what no row names"
