"""`tidemill batch` on a platform that really runs: a tenant's developer with a key, and the operator beside."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.mock import Mock
from tests.support.platform import Platform, start_platform, wait_until

DRAIN_S = 60


@pytest.fixture(scope="module")
def engine() -> Iterator[Mock]:
    with Mock("--chunks", "5") as mock:
        yield mock


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory, engine: Mock) -> Iterator[Platform]:
    with start_platform(
        tmp_path_factory.mktemp("batch"), f"[gateway]\ndrain_seconds = {DRAIN_S}\n" + engine.config("mock")
    ) as platform:
        yield platform


def line(custom_id: str, **fields: Any) -> str:
    body = {"model": "mock", "messages": [{"role": "user", "content": "one two"}], "max_tokens": 5, **fields}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body})


def command(platform: Platform, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """A command as a person gives it."""
    words = [sys.executable, "-m", "tidemill", "batch", *map(str, arguments), "--data", str(platform.data)]
    return subprocess.run(words, capture_output=True, text=True, timeout=60)


def test_a_file_becomes_results(platform: Platform, tmp_path: Path) -> None:
    key = platform.new_tenant("dev")
    file = tmp_path / 'n"ight.jsonl'
    file.write_text("\n".join([line(f"r{number}") for number in range(20)] + [line("bad", stream=True)]))
    submitted = command(platform, "submit", file, "--key", key, "--wait")
    assert submitted.returncode == 0, submitted.stderr
    batch_id = submitted.stdout.strip()
    assert "completed, 20 of 21 lines done, 1 failed" in submitted.stderr
    results = command(platform, "results", batch_id, "--key", key)
    found = [json.loads(text) for text in results.stdout.splitlines()]
    assert sorted(each["custom_id"] for each in found) == sorted(f"r{number}" for number in range(20))
    (failed,) = [
        json.loads(text)
        for text in command(platform, "results", batch_id, "--key", key, "--errors").stdout.splitlines()
    ]
    assert (failed["custom_id"], failed["response"]["status_code"]) == ("bad", 400)
    assert len(platform.cli("batch", "results", batch_id, "--key", key)["results"]) == 20

    (listed,) = platform.cli("batch", "list", "--tenant", "dev")["batches"]
    assert (listed["id"], listed["status"], listed["completed"], listed["failed"]) == (batch_id, "completed", 20, 1)
    assert platform.cli("batch", "show", batch_id)["charge"] == platform.cli("usage", "--tenant", "dev")["charge"]
    assert command(platform, "show", batch_id).returncode == 0
    stranger = command(platform, "results", batch_id, "--key", platform.new_tenant("stranger"))
    assert stranger.returncode == 1 and "No such Batch object" in stranger.stderr


def test_an_operator_cancels_a_tenants_batch(platform: Platform, tmp_path: Path) -> None:
    key = platform.new_tenant("long", credit="100")
    platform.cli("limit", "set", "--tenant", "long", "--budget", "0.000000001", "--per", "day")  # so its lines wait
    file = tmp_path / "long.jsonl"
    file.write_text("\n".join(line(f"r{number}") for number in range(200)))
    made = platform.cli("batch", "submit", str(file), "--key", key)
    assert made["status"] == "validating"
    early = command(platform, "results", made["id"], "--key", key)
    assert early.returncode == 1 and "its results are available when it has ended" in early.stderr
    assert platform.cli("batch", "cancel", made["id"])["status"] == "cancelling"
    wait_until(lambda: platform.cli("batch", "show", made["id"])["status"] == "cancelled", 20)
    assert [each["id"] for each in platform.cli("batch", "list", "--open")["batches"]] == []


def test_a_wrong_file_and_a_wrong_key_say_what_is_wrong(platform: Platform, tmp_path: Path) -> None:
    key = platform.new_tenant("wrong")
    file = tmp_path / "wrong.jsonl"
    file.write_text('{"custom_id": "r1"}\n')
    failed = command(platform, "submit", file, "--key", key, "--wait")
    assert failed.returncode == 0 and "line 1: " in failed.stderr and "failed, 0 of" in failed.stderr
    refused = command(platform, "submit", file, "--key", "sk-tm-wrong")
    assert refused.returncode == 1 and "This API key does not exist or was revoked." in refused.stderr
    endpoint = command(platform, "submit", file, "--key", key, "--endpoint", "/v1/audio")
    assert "is not supported for batches" in endpoint.stderr


def test_a_second_signal_ends_the_lines_in_flight_and_the_next_start_runs_them_again(
    platform: Platform, engine: Mock, tmp_path: Path
) -> None:
    key = platform.new_tenant("impatient")
    file = tmp_path / "slow.jsonl"
    file.write_text(line("slow", max_tokens=2000))
    engine.behave(interval_ms=50)
    try:
        batch_id = platform.cli("batch", "submit", str(file), "--key", key)["id"]
        wait_until(lambda: engine.counter("vllm:num_requests_running") > 0, 20)
        assert platform.process is not None
        began = time.monotonic()
        for _ in range(2):
            platform.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
        platform.process.wait(60)
        assert time.monotonic() - began < DRAIN_S / 2
    finally:
        engine.behave(interval_ms=0)
    assert platform.cli("batch", "show", batch_id)["status"] == "in_progress"
    platform.start()
    wait_until(lambda: platform.cli("batch", "show", batch_id)["status"] == "completed", 30)
    assert platform.cli("batch", "show", batch_id)["completed"] == 1
    assert platform.cli("usage", "--tenant", "impatient")["completion_tokens"] == 2000, "billed once"
