"""Boundaries that import-linter cannot see: the moment in the pure core, credentials, and its own configuration."""

import re
import tomllib
from pathlib import Path
from typing import Any

from tests.source.tree import SOURCE, Source
from tests.support.paths import ROOT

PURE = ("ledger/", "tides/")
MOMENTS = ("now", "utcnow", "today")
CREDENTIALS = re.compile(r"b[\"']authorization[\"']", re.IGNORECASE)
READERS_OF_CREDENTIALS = ("gateway/auth/",)


def moments_in_the_core(source: Source) -> list[str]:
    """Where the pure core asks what time it is."""
    return [
        f"{file}:{line}"
        for moment in MOMENTS
        for file, line in source.calls(moment)
        if file.startswith(PURE)
        and re.search(rf"\b(datetime|date)\.{moment}\b", source.texts[file].splitlines()[line - 1])
    ]


def readers_of_credentials(source: Source) -> list[str]:
    return [file for file, text in source.texts.items() if CREDENTIALS.search(text)]


def contracts() -> list[dict[str, Any]]:
    document = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found: list[dict[str, Any]] = document["tool"]["importlinter"]["contracts"]
    return found


def test_the_pure_core_never_asks_what_time_it_is() -> None:
    """The moment is an argument: so tests need no clock, and the simulator has its own."""
    assert moments_in_the_core(SOURCE) == []


def test_credentials_are_read_in_one_place() -> None:
    outside = [file for file in readers_of_credentials(SOURCE) if not file.startswith(READERS_OF_CREDENTIALS)]
    assert outside == [] and readers_of_credentials(SOURCE)


def test_no_contract_leaves_a_room_out() -> None:
    """A layer in parentheses is optional: a room that is misspelt, or has gone, would pass in silence."""
    for contract in contracts():
        assert not any("(" in layer for layer in contract.get("layers", ())), contract["name"]
        if contract["type"] == "layers":
            assert contract.get("exhaustive") is True, f"{contract['name']}: a new module must say where it belongs"


def test_imports_for_types_alone_count_for_circles() -> None:
    document = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "exclude_type_checking_imports" not in document["tool"]["importlinter"]
    (circles,) = [contract for contract in contracts() if contract["type"] == "acyclic_siblings"]
    assert circles["ancestors"] == ["tidemill", "tidemill.**"] and "ignore_imports" not in circles


def test_these_rules_can_fail(tmp_path: Path) -> None:
    (tmp_path / "tides").mkdir()
    (tmp_path / "tides/plan.py").write_text("from datetime import datetime\n\nNOW = datetime.now()\nx = demand.now\n")
    (tmp_path / "door.py").write_text('key = headers.get(b"Authorization")\n')
    source = Source(tmp_path)
    assert moments_in_the_core(source) == ["tides/plan.py:3"]
    assert readers_of_credentials(source) == ["door.py"]
