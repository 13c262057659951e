"""Logs in parts, artefacts that lead nowhere else, and a clean environment."""

import os
from pathlib import Path

import pytest

from tidemill.errors import BadInput, NotFound
from tidemill.store.job_files import LOG_PIECE, JobFiles
from tidemill.work.jobs import process as job_exec

JOB = "job_0123456789abcdef"


@pytest.fixture
def files(tmp_path: Path) -> JobFiles:
    found = JobFiles(tmp_path / "jobs")
    found.prepare(JOB, 1)
    return found


def whole_log(files: JobFiles, cursor: str = "") -> tuple[bytes, str]:
    text = b""
    while True:
        piece = files.read_log(JOB, 1, 0, cursor)
        if piece.next == cursor and not piece.data:
            return text, cursor
        text, cursor = text + piece.data, piece.next


def test_a_log_in_parts_and_as_it_is_rotated(files: JobFiles) -> None:
    path = files.log(JOB, 1, 0)
    path.write_bytes(b"a" * LOG_PIECE + b"b" * 10)
    text, cursor = whole_log(files)
    assert text == path.read_bytes() and cursor == str(LOG_PIECE + 10)
    with path.open("ab") as file:
        file.write(b"c" * 5)
    # as the shim does when it has grown too long
    path.with_name(path.name + ".1").write_bytes(path.read_bytes())
    path.write_bytes(b"d")
    assert whole_log(files, cursor)[0] == b"cccccd"
    assert whole_log(files)[0] == b"a" * LOG_PIECE + b"b" * 10 + b"cccccd"


@pytest.mark.parametrize("cursor", ["x", "-1", "new:3", "old:", "1" * 30, "old:x"])
def test_a_cursor_is_one_that_was_given(files: JobFiles, cursor: str) -> None:
    files.log(JOB, 1, 0).write_bytes(b"a")
    with pytest.raises(BadInput, match="is not a `next` of an earlier part"):
        files.read_log(JOB, 1, 0, cursor)
    with pytest.raises(NotFound):
        files.read_log(JOB, 2, 0)
    with pytest.raises(NotFound):
        files.read_log("../jobs", 1, 0)


def test_artefacts_lead_nowhere_else(files: JobFiles, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    root = files.artifacts_of(JOB)
    (root / "deep").mkdir()
    (root / "deep" / "weights.bin").write_bytes(b"w")
    (root / "名前 x").write_bytes(b"u")
    (root / "link").symlink_to(tmp_path / "secret")
    (root / "away").symlink_to(tmp_path)
    os.mkfifo(root / "pipe")
    assert [(each.path, each.bytes) for each in files.artifacts(JOB)] == [("deep/weights.bin", 1), ("名前 x", 1)]
    for name in ("deep/weights.bin", "名前 x"):
        os.close(files.open_artifact(JOB, name))
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for name in (
        *("../work", "../../../secret", "/etc/passwd", "", ".", "deep", "deep/..", "link", "away/secret", "pipe"),
        *("deep//weights.bin", "nothing", "deep/weights.bin/x", "a\0b", "deep/../deep/weights.bin"),
    ):
        with pytest.raises(NotFound):
            files.open_artifact(JOB, name)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    root.rename(root.with_name("old"))
    root.symlink_to(tmp_path)
    with pytest.raises(NotFound):
        files.open_artifact(JOB, "secret")


def test_a_link_to_what_a_job_may_not_read_is_no_artefact(tmp_path: Path) -> None:
    """Kernels can be told to let anybody make hard links to anybody's files."""
    files = JobFiles(tmp_path / "jobs", user="nobody")
    root = files.artifacts_of(JOB)
    root.mkdir(parents=True)
    (tmp_path / "secret").write_text("s")
    (root / "link").hardlink_to(tmp_path / "secret")
    (root / "own").write_text("o")
    os.close(files.open_artifact(JOB, "own"))
    with pytest.raises(NotFound):
        files.open_artifact(JOB, "link")


def test_what_a_job_inherits() -> None:
    here = {
        "PATH": "/bin",
        "HOME": "/home/op",
        "PGPASSWORD": "p",
        "AWS_SECRET_ACCESS_KEY": "k",
        "LD_PRELOAD": "evil.so",
        "CUDA_VISIBLE_DEVICES": "3",
        "TIDEMILL_RANK": "0",
        "LC_ALL": "C",
        "PYTHONPATH": "/x",
        "TIDEMILL_GIVEN_PYTHONPATH": "/own",
        "TIDEMILL_GIVEN_PATH": "/own/bin",
    }
    assert job_exec.clean(here) == {
        "PATH": "/own/bin",
        "HOME": "/home/op",
        "CUDA_VISIBLE_DEVICES": "3",
        "TIDEMILL_RANK": "0",
        "LC_ALL": "C",
        "PYTHONPATH": "/own",
    }


def test_pids_are_known_again_by_when_they_began(files: JobFiles) -> None:
    files.note_pids(JOB, 1, [os.getpid(), None])
    assert files.any_alive(JOB, 1)
    path = files._attempt(JOB, 1) / "pids"
    pid, begun = path.read_text().split()
    path.write_text(f"{pid} {int(begun) + 1}")
    assert not files.any_alive(JOB, 1)
    assert not files.any_alive(JOB, 7)
