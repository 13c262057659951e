"""Which platform a command finds, with which token, and what it says when there is none."""

import asyncio
import json
from pathlib import Path

import pytest

from tests.cli.conftest import Run, Up
from tests.control.world import TOKEN, FakePlatform, record
from tidemill.cli.locate import is_running
from tidemill.clock import EPOCH
from tidemill.control.changes import create_tenant, grant_credit

WRITES = [
    ["tenant", "create", "acme"],
    ["key", "create", "--tenant", "acme"],
    ["key", "revoke", "key_1"],
    ["credit", "grant", "--tenant", "acme", "--amount", "1"],
    ["meter", "reconcile"],
]
READS = [
    ["tenant", "list"],
    ["key", "list"],
    ["usage", "--tenant", "acme"],
    ["usage", "--tenant", "acme", "--month", "2026-10", "--records"],
    ["invoice", "--tenant", "acme", "--month", "2026-10"],
    ["model", "list"],
]


@pytest.fixture
def stopped(platform: FakePlatform, data: Path) -> FakePlatform:
    """A platform that has ended in order, with a tenant and some usage."""
    with platform.store.write() as connection:
        tenant = create_tenant(connection, name="acme", currency="USD", now=EPOCH)
        grant_credit(connection, tenant="acme", amount="10", now=EPOCH)
    platform.settled = [record(platform, f"req_{n}", tenant["id"]) for n in range(3)]
    (data / "lock").touch()
    (data / "meter").mkdir()
    return platform


def written(directory: Path) -> dict[str, int]:
    """When each file was written; without SQLite's locks and log, which its readers make too."""
    return {
        path.name: path.stat().st_mtime_ns for path in directory.iterdir() if path.suffix not in (".db-shm", ".db-wal")
    }


def end(platform: FakePlatform) -> None:
    asyncio.run(platform.drain_usage())
    platform.store.close()


@pytest.mark.parametrize("arguments", READS)
def test_a_stopped_platform_answers_as_a_running_one(
    run: Run, stopped: FakePlatform, up: Up, arguments: list[str]
) -> None:
    running = run(*arguments, "--json", "--data", up.data).json
    end(stopped)
    (up.data / "lock").unlink()
    before = written(up.data)
    outcome = run(*arguments, "--json", "--data", up.data)
    answer = outcome.json
    assert written(up.data) == before, "it is only read"
    assert outcome.err == f"note: the platform on {up.data} is stopped; this is what its data says.\n"
    if arguments[0] == "model":
        assert {model["state"] for model in answer["models"]} == {"stopped"}
        for each in (answer, running):
            each["models"] = [(model["name"], model["prices"]) for model in each["models"]]
    if arguments[0] == "invoice":
        del answer["as_of"], running["as_of"]
    assert answer == running
    assert run(*arguments, "--data", up.data).out


@pytest.mark.parametrize("arguments", WRITES)
def test_a_stopped_platform_changes_nothing(run: Run, stopped: FakePlatform, data: Path, arguments: list[str]) -> None:
    assert run(*arguments, "--data", data).complaint == (
        f"The platform on {data} is not running; this command needs it. Start it: tidemill up --data {data}"
    )


def test_a_killed_platform_can_be_read(run: Run, stopped: FakePlatform, data: Path) -> None:
    """Its write-ahead log is still there, and so is what the loader had not loaded."""
    asyncio.run(stopped.drain_usage())
    (data / "runtime.json").write_text(json.dumps({"pid": 1, "control_url": "http://127.0.0.1:1"}))
    (data / "meter" / "worker-1").mkdir()
    assert (data / "tidemill.db-wal").stat().st_size > 0
    outcome = run("usage", "--tenant", "acme", "--json", "--data", data)
    assert outcome.json["requests"] == 3
    assert "it was killed" in outcome.err
    assert "usage of its last moments is missing" in outcome.err


@pytest.mark.parametrize("arguments", READS + WRITES)
def test_no_platform_at_all(run: Run, tmp_path: Path, arguments: list[str]) -> None:
    missing = tmp_path / "none"
    assert run(*arguments, "--data", missing).complaint == (
        f"There is no data directory {missing}. Has `tidemill up` run? Give its data directory with --data."
    )
    file = tmp_path / "file"
    file.touch()
    assert "There is no data directory" in run(*arguments, "--data", file).complaint


@pytest.mark.parametrize("arguments", READS)
def test_an_empty_directory(run: Run, tmp_path: Path, arguments: list[str]) -> None:
    outcome = run(*arguments, "--data", tmp_path)
    assert outcome.code == 1 and outcome.err.splitlines()[-1].startswith("error: There is no database at ")
    (tmp_path / "tidemill.db").touch()
    assert "is empty. Start the platform once with `tidemill up`." in run(*arguments, "--data", tmp_path).err
    (tmp_path / "tidemill.db").write_bytes(b"not a database" * 1000)
    outcome = run(*arguments, "--data", tmp_path)
    assert outcome.code == 1 and "not a database" in outcome.err


def test_data_of_another_version(run: Run, stopped: FakePlatform, data: Path) -> None:
    with stopped.store.write() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    assert "of another version of Tidemill (schema 9999)" in run("tenant", "list", "--data", data).err


def test_a_platform_that_is_starting(run: Run, up: Up) -> None:
    for content in (None, "", "{", "{}", "[]"):
        (up.data / "runtime.json").unlink(missing_ok=True)
        if content is not None:
            (up.data / "runtime.json").write_text(content)
        assert "is starting or stopping. Try again" in run("tenant", "list", "--data", up.data).complaint


def test_a_platform_that_does_not_answer(run: Run, up: Up) -> None:
    (up.data / "runtime.json").write_text(json.dumps({"control_url": "http://127.0.0.1:1"}))
    complaint = run("tenant", "list", "--data", up.data).complaint
    assert complaint == "The platform at http://127.0.0.1:1 does not answer (Connection refused). Is it running?"


def test_asking_whether_it_runs_leaves_the_lock_alone(up: Up, tmp_path: Path) -> None:
    assert is_running(up.data) and is_running(up.data)
    assert not is_running(tmp_path)


def test_the_token_of_the_environment_comes_first(run: Run, up: Up, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEMILL_ADMIN_TOKEN", "wrong")
    assert "not the admin token" in run("tenant", "list", "--data", up.data).complaint
    monkeypatch.setenv("TIDEMILL_ADMIN_TOKEN", f" {TOKEN}\n")
    (up.data / "admin-token").unlink()
    assert run("tenant", "list", "--json", "--data", up.data).json == {"tenants": []}


def test_no_token_to_be_found(run: Run, up: Up, monkeypatch: pytest.MonkeyPatch) -> None:
    (up.data / "admin-token").unlink()
    assert "Set TIDEMILL_ADMIN_TOKEN" in run("tenant", "list", "--data", up.data).complaint
    monkeypatch.setenv("TIDEMILL_ADMIN_TOKEN", "ä token")
    assert "letters and digits" in run("tenant", "list", "--data", up.data).complaint


def test_the_directory_of_the_environment(run: Run, up: Up, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TIDEMILL_DATA", str(up.data))
    assert run("tenant", "list", "--json").json == {"tenants": []}
    assert "no data directory nowhere" in run("tenant", "list", "--data", "nowhere").complaint
    monkeypatch.delenv("TIDEMILL_DATA")
    monkeypatch.chdir(up.data.parent)
    assert run("tenant", "list", "--json").json == {"tenants": []}, "./data by default"


def test_a_platform_elsewhere(run: Run, up: Up, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TIDEMILL_CONTROL_URL", up.url + "/")
    assert run("tenant", "list").complaint == (
        "The admin token of that platform is not known; set TIDEMILL_ADMIN_TOKEN."
    ), "the token in ./data stays here"
    monkeypatch.setenv("TIDEMILL_ADMIN_TOKEN", TOKEN)
    assert run("tenant", "list", "--json").json == {"tenants": []}
    assert "no data directory nowhere" in run("tenant", "list", "--data", "nowhere").complaint, "a flag comes first"
    monkeypatch.delenv("TIDEMILL_CONTROL_URL")
    assert run("tenant", "list", "--json", "--control-url", up.url).json == {"tenants": []}
    monkeypatch.delenv("TIDEMILL_ADMIN_TOKEN")
    both = run("tenant", "list", "--json", "--control-url", up.url, "--data", up.data)
    assert both.json == {"tenants": []}, "both were named"


@pytest.mark.parametrize("url", ["nonsense", "ftp://host", "http://", "http://host:port", "http://host:99999"])
def test_no_address(run: Run, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEMILL_ADMIN_TOKEN", TOKEN)
    assert "is not the address of a control plane" in run("tenant", "list", "--control-url", url).complaint
