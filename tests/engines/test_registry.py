"""The registry is the one table: what a kind of engine needs is in its own file and its row."""

import ast
from typing import get_args

import pytest

from tests.support.paths import ROOT
from tidemill.app.config.schema import models
from tidemill.engines.registry import ENGINES, LAUNCHERS, engine_of

SOURCE = ROOT / "src/tidemill"

NAMED_ELSEWHERE = {
    "app/config/schema/platform.py": {"llamacpp"},  # what runs when nothing is configured
    "cli/model.py": {"vllm"},  # whose launch line is shown when none is named
    "control/api/models.py": {"llamacpp", "openai"},  # examples in the API's document
    "gateway/protocols/dialect.py": {"openai", "anthropic"},  # APIs of clients, not engines
}


def test_no_kind_is_named_outside_of_the_engines() -> None:
    found: dict[str, set[str]] = {}
    for file in SOURCE.rglob("*.py"):
        path = file.relative_to(SOURCE).as_posix()
        if path.startswith("engines/"):
            continue
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Constant) and node.value in ENGINES:
                found.setdefault(path, set()).add(str(node.value))
    assert found == NAMED_ELSEWHERE


def test_the_configuration_offers_what_the_registry_has() -> None:
    assert get_args(models.EngineName) == tuple(ENGINES)


@pytest.mark.parametrize("kind", ENGINES)
def test_a_row_is_what_its_engine_is(kind: str) -> None:
    row, engine = ENGINES[kind], engine_of(kind, owned=True)
    assert row.name == engine.kind == kind and engine.owned
    assert (row.launcher is not None) is (kind in LAUNCHERS)
    assert not (row.embedded and row.launcher) and row.runs_here >= row.embedded
    assert row.runs_here or engine.probes
