"""`tidemill demo`, played for real: what it tells is checked here once more, from its own figures."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from decimal import Decimal
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tidemill.cli import demo_burst

WITHIN_S = 600.0
"""A good deal more than the minute that it takes, for a machine on which other tests run."""
pytestmark = [pytest.mark.platform, pytest.mark.timeout(WITHIN_S + 60)]


def demo(tmp_path: Path, *arguments: str | Path) -> "subprocess.Popen[str]":
    """Start the demo with `tmp_path` as its directory for temporary files."""
    command = [sys.executable, "-m", "tidemill", "demo", *map(str, arguments)]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "TIDEMILL_DATA": "/nowhere", "PYTHONIOENCODING": "utf-8"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )


def left_behind(tmp_path: Path) -> list[str]:
    """Directories of the demo, and processes that know of them."""
    found = [path.name for path in tmp_path.glob("tidemill-demo-*")]
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(tmp_path).encode() in words:
                found.append(entry.name)
    return found


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The facts of one run, and where its pictures are."""
    directory = tmp_path_factory.mktemp("demo")
    process = demo(directory, "--json", "--svg", directory / "demo.svg", "--svg-short", directory / "demo-short.svg")
    out, err = process.communicate(timeout=WITHIN_S)
    assert process.returncode == 0, err
    assert left_behind(directory) == []
    return json.loads(out), directory


def test_every_claim_holds(told: tuple[Any, Path]) -> None:
    facts, _ = told
    assert len(facts["holds"]) == 8
    assert all(facts["holds"].values()), facts["holds"]


def test_the_limit_holds(told: tuple[Any, Path]) -> None:
    facts, _ = told
    assert facts["answered"] + facts["refused"] == 200
    assert facts["answered"] == demo_burst.ENOUGH_FOR == 10
    assert Decimal(facts["lowest_balance"]) >= 0


def test_a_stream_is_stopped_when_the_balance_is_used_up(told: tuple[Any, Path]) -> None:
    facts, _ = told
    shoal = facts["tenants"]["shoal"]
    last = shoal["records"][-1]
    assert facts["stopped_with"] == "insufficient_quota"
    assert (last["status"], last["streamed"]) == ("balance_exhausted", True)
    assert 1 < last["completion_tokens"] == facts["stopped_after_tokens"] < 1000
    assert Decimal(shoal["balance"]) < Decimal("0.001"), "what is left pays for no prompt with an answer"


def test_the_money_adds_up(told: tuple[Any, Path]) -> None:
    facts, _ = told
    for statement in facts["tenants"].values():
        charges = sum(Decimal(record["charge"]) for record in statement["records"])
        assert charges == Decimal(statement["charge"])
        assert Decimal(statement["granted"]) - charges == Decimal(statement["balance"])
    invoice = facts["invoice"]
    assert invoice["currency"] == "CNY"
    assert sum(Decimal(line["amount"]) for line in invoice["lines"]) == Decimal(invoice["subtotal"])
    assert invoice["subtotal"] == facts["tenants"]["海州云"]["charge"]
    assert facts["margin"]["other_currencies"] == {"CNY": invoice["subtotal"]}
    earned = sum(Decimal(facts["tenants"][name]["charge"]) for name in ("acme", "shoal"))
    assert Decimal(facts["margin"]["revenue"]) == earned
    assert Decimal(facts["margin"]["cost"]) > 0


def test_the_meter_is_right(told: tuple[Any, Path]) -> None:
    facts, _ = told
    assert facts["client_tokens"] == facts["metered_tokens"] > 0
    (replica,) = facts["reconciliation"]["replicas"]
    assert replica["difference"] == {"prompt_tokens": 0, "completion_tokens": 0}
    assert sum(replica["engine"].values()) == facts["metered_tokens"]


@pytest.mark.parametrize(
    ("name", "only"), [("demo.svg", ["AMOUNT DUE CNY", "7 The margin", "✓"]), ("demo-short.svg", ["The margin"])]
)
def test_the_pictures(told: tuple[Any, Path], name: str, only: list[str]) -> None:
    text = (told[1] / name).read_text(encoding="utf-8")
    assert len(text) < 100_000
    assert not re.findall(r"(?:src|href)=|url\(\"?http", text), "nothing is fetched from elsewhere"
    shown = " ".join(ElementTree.fromstring(text).itertext()).replace("\xa0", " ")
    said = [
        "海州云",
        "enough for 10",
        "10 answered, 190 refused with 402 insufficient_quota",
        "meter reconcile",
        "equal",
    ]
    for words in [*said, *only]:
        assert words in shown
    assert not re.search(r"sk-tm-[A-Za-z0-9]{8}", shown), "no whole key is in the picture"


def test_stopped_in_the_middle_it_leaves_nothing_behind(tmp_path: Path) -> None:
    process = demo(tmp_path)
    assert process.stdout is not None
    for line in process.stdout:
        if "Streams side by side" in line:
            break
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=WITHIN_S)
    assert (process.returncode, err) == (130, "")
    deadline = time.monotonic() + 10
    while left_behind(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left_behind(tmp_path) == []
