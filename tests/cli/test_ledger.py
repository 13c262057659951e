"""`tidemill ledger check`: on a running platform and on a stopped one's data, with an exit code for scripts."""

import json

from sqlalchemy import update

from tests.cli.conftest import Run, Up
from tests.cli.test_finding import end, stopped
from tests.control.world import FakePlatform
from tidemill.store.tables.money import accounts

__all__ = ["stopped"]


def spoil(platform: FakePlatform) -> None:
    with platform.store.write() as connection:
        connection.execute(update(accounts).values(balance=accounts.c.balance + 1))


def test_a_running_platform(run: Run, stopped: FakePlatform, up: Up) -> None:
    at = ("--data", up.data)
    outcome = run("ledger", "check", *at)
    assert outcome.code == 0 and outcome.out.startswith("equal: ") and "accounts" in outcome.out
    spoil(up.platform)
    outcome = run("ledger", "check", *at)
    assert outcome.code == 1
    *lines, last = outcome.out.splitlines()
    assert last.startswith("differs: ") and all("its stored balance is" in line for line in lines)
    found = run("ledger", "check", "--json", *at)
    assert found.code == 1 and json.loads(found.out)["differences"] == lines


def test_a_stopped_platform(run: Run, stopped: FakePlatform, data: object) -> None:
    end(stopped)
    outcome = run("ledger", "check", "--json", "--data", str(data))
    assert outcome.json["equal"] and outcome.json["checked"]["transactions"] >= 2
