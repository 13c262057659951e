"""The data directory: one platform at a time, and its secrets for its owner only."""

import fcntl
import os
import stat
import threading
import time
from pathlib import Path

import pytest

from tidemill.app.datadir import LOG_BYTES, DataDir, Runtime
from tidemill.errors import ConfigError, Conflict


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TIDEMILL_ADMIN_TOKEN", raising=False)
    umask = os.umask(0)
    os.umask(umask)
    monkeypatch.setattr("tidemill.app.datadir.os.umask", lambda mask: umask)  # of the test's own process


def test_it_makes_what_is_missing(tmp_path: Path) -> None:
    data = DataDir(tmp_path / "deep" / "data")
    data.open()
    assert mode(data.path) == mode(data.meter) == mode(data.path / "logs") == 0o700
    data.close()


def test_a_second_platform_is_told_where_the_first_one_is(tmp_path: Path) -> None:
    first, second = DataDir(tmp_path), DataDir(tmp_path)
    first.open()
    with pytest.raises(Conflict, match=f"is already running on the data directory {tmp_path}\\.") as refused:
        second.open()
    assert "another --data" in refused.value.hint
    first.announce(Runtime(pid=123, url="http://127.0.0.1:8080/v1", control_url="http://127.0.0.1:8081"))
    with pytest.raises(Conflict, match=r"\(process 123, http://127.0.0.1:8080/v1\)"):
        second.open()
    assert (tmp_path / "runtime.json").exists()  # the second has not taken it away
    first.close()
    assert not (tmp_path / "runtime.json").exists()
    second.open()
    second.close()


def test_one_who_only_looks_does_not_stop_a_start(tmp_path: Path) -> None:
    """A command that looks whether a platform runs holds the lock for a moment."""
    fd = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_EX)

    def let_go() -> None:
        time.sleep(0.15)
        os.close(fd)

    thread = threading.Thread(target=let_go)
    thread.start()
    data = DataDir(tmp_path)
    data.open()
    data.close()
    thread.join()


def test_a_killed_platforms_announcement_is_no_lock(tmp_path: Path) -> None:
    (tmp_path / "runtime.json").write_text("{ not json")
    data = DataDir(tmp_path)
    data.open()
    data.close()


def test_a_place_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file/data cannot be used: Not a directory"):
        DataDir(tmp_path / "file" / "data").open()


def test_the_admin_token_is_made_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = DataDir(tmp_path)
    token = data.admin_token()
    assert token.startswith("tm-admin-") and len(token) > 40
    assert mode(tmp_path / "admin-token") == 0o600
    assert data.admin_token() == DataDir(tmp_path).admin_token() == token
    monkeypatch.setenv("TIDEMILL_ADMIN_TOKEN", " given ")
    assert data.admin_token() == "given"
    assert (tmp_path / "admin-token").read_text() == token + "\n"


def test_a_secret_is_written_whole_and_for_its_owner(tmp_path: Path) -> None:
    data = DataDir(tmp_path)
    umask = os.umask(0)
    try:
        data.write("first-key", "sk-1\n")
        data.write("first-key", "sk-2\n")
    finally:
        os.umask(umask)
    assert (tmp_path / "first-key").read_text() == "sk-2\n"
    assert mode(tmp_path / "first-key") == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["first-key"]


def test_a_log_goes_on_until_it_is_long(tmp_path: Path) -> None:
    data = DataDir(tmp_path)
    data.open()
    for text in (b"one\n", b"two\n"):
        fd = data.log_file("engine-org/model/0")
        os.write(fd, text)
        os.close(fd)
    path = tmp_path / "logs" / "engine-org-model-0.log"
    assert path.read_bytes() == b"one\ntwo\n"
    os.truncate(path, LOG_BYTES + 1)
    os.close(data.log_file("engine-org/model/0"))
    assert path.stat().st_size == 0
    data.close()


def test_what_a_killed_gateway_left_in_its_first_moment_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / ".gw0-abc.new").mkdir()
    (tmp_path / ".gw0-abc.new" / "lock").touch()
    data = DataDir(tmp_path)
    data.open()
    assert not (tmp_path / ".gw0-abc.new").exists()
    data.close()
