"""Jobs on the real platform: lent devices, taken back by a flood of chat, and the same result in the end."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.jobs import EXAMPLE, shims, spawned
from tests.support.platform import Platform, start_platform, wait_until
from tidemill.store.accounts import verify_books
from tidemill.store.balance_leases import leased
from tidemill.store.device_meters import verify_meters
from tidemill.store.engine import open_store, store_url
from tidemill.store.tenants import list_tenants

pytestmark = pytest.mark.slow

CONFIG = """
[models.smollm2-135m-instruct]
engine = "llamacpp"
devices = 1
min_replicas = 1
max_replicas = 2
parallel = 2
scale_down_seconds = 5
{objective}

[prices.smollm2-135m-instruct]
input = "0.10"
output = "0.40"

[device_prices.cpu]
hour = "3.6"
preemptible_hour = "1.8"

[[nodes.local.devices]]
kind = "cpu"
count = 2
"""
OBJECTIVE = "objective = { ttft_seconds = 0.3, tpot_seconds = 0.05 }"
STEPS = ("--steps", "1500", "--every", "100")
FLOOD = 12
OVER = ("succeeded", "failed", "cancelled", "expired")


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[Platform]:
    started = start_platform(tmp_path, CONFIG.format(objective=OBJECTIVE))
    yield started
    started.kill9_all()


def submit(platform: Platform, *command: str, **wish: Any) -> str:
    with platform.admin as admin:
        answer = admin.post("jobs", json={"tenant": "demo", "command": list(command), **wish})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])


def reach(platform: Platform, job: str, *states: str, within_s: float = 60.0) -> Any:
    wait_until(lambda: platform.job(job)["state"] in states, within_s)
    return platform.job(job)


def says(platform: Platform, job: str, text: str) -> None:
    def said() -> bool:
        with platform.admin as admin:
            answer = admin.get("jobs/logs", params={"job": job})
            return answer.status_code == 200 and text in answer.json()["text"]

    wait_until(said, 60.0)


def artifact(platform: Platform, job: str) -> Any:
    with platform.admin as admin:
        return admin.get("jobs/artifact", params={"job": job, "path": "result.json"}).json()


async def flood(platform: Platform, until: Any) -> int:
    """People who chat, one answer after the other, until `until()`; gives how many answers they got."""
    answers = 0
    async with httpx.AsyncClient(timeout=120) as client:

        async def person(number: int) -> None:
            nonlocal answers
            while not until():
                body = {
                    "model": "smollm2-135m-instruct",
                    "messages": [{"role": "user", "content": f"{number}: tell me about the tide."}],
                    "max_tokens": 60,
                }
                answer = await client.post(
                    f"{platform.url}/chat/completions",
                    json=body,
                    headers={"authorization": f"Bearer {platform.key}"},
                )
                assert answer.status_code == 200, answer.text
                answers += 1

        await asyncio.gather(*(person(number) for number in range(FLOOD)))
    return answers


def check_books(platform: Platform) -> None:
    """Of a stopped platform: each device-second is charged once, and nothing is held any more."""
    store = open_store(store_url(None, platform.data), read_only=True)
    try:
        with store.read() as connection:
            assert verify_meters(connection) == []
            assert all(not found for found in verify_books(connection).values())
            assert all(leased(connection, tenant.tenant_id) == 0 for tenant in list_tenants(connection))
    finally:
        store.close()


@pytest.mark.timeout(300)
def test_a_flood_takes_the_devices_back_and_the_result_is_the_same(platform: Platform, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    environment = {**os.environ, "TIDEMILL_CHECKPOINT_DIR": str(alone), "TIDEMILL_ARTIFACT_DIR": str(alone)}
    subprocess.run([sys.executable, str(EXAMPLE), *STEPS], check=True, env=environment, capture_output=True)

    job = submit(platform, sys.executable, str(EXAMPLE), *STEPS, "--pause", "0.02", estimate="10m", grace="10s")
    says(platform, job, "step 100:")

    preempted: list[float] = []

    def given_back() -> bool:
        if not preempted and platform.job(job)["history"][0]["outcome"] is not None:
            preempted.append(time.monotonic())
        return bool(preempted)

    async def crowd() -> int:
        looking = asyncio.create_task(asyncio.to_thread(wait_until, given_back, 60.0))
        answers = await flood(platform, lambda: bool(preempted) or looking.done())
        await looking
        return answers

    assert asyncio.run(crowd()) > 0
    first = platform.job(job)["history"][0]
    assert first["outcome"] == "preempted", first

    done = reach(platform, job, *OVER, within_s=150.0)
    assert done["state"] == "succeeded" and done["attempts"] >= 2, done
    assert artifact(platform, job) == json.loads((alone / "result.json").read_text())
    usage = platform.usage("demo")
    assert [row["tier"] for row in usage["devices"]] == ["preemptible"]
    assert {row["job_id"] for row in usage["device_records"]} == {job}
    assert len(usage["device_records"]) == done["attempts"]
    platform.stop()
    check_books(platform)
    month = time.strftime("%Y-%m", time.gmtime())
    invoice = platform.cli("invoice", "--tenant", "demo", "--month", month)
    (line,) = invoice["device_lines"]
    assert line["amount"] == done["charge"] and line["meters"] == done["attempts"]


@pytest.mark.timeout(200)
@pytest.mark.parametrize("everything", [False, True])
def test_kill_9_of_the_platform_and_of_everything(tmp_path: Path, everything: bool) -> None:
    platform = start_platform(tmp_path, CONFIG.format(objective=""))
    try:
        job = submit(platform, sys.executable, str(EXAMPLE), *STEPS, "--pause", "0.005", grace="5s")
        says(platform, job, "step 200:")
        if everything:
            # A stopped supervisor sees nothing of the deaths, and no shim lives to see the supervisor's:
            # killed one after the other, a shim had the time to say "stopped" before its own turn came.
            (supervisor,) = platform.pids("supervisor")
            os.kill(supervisor, signal.SIGSTOP)
            for pid in [*shims(supervisor), *spawned(job)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        platform.kill9("supervisor")
        platform.start()
        done = reach(platform, job, *OVER, within_s=90.0)
        assert done["state"] == "succeeded" and done["attempts"] == 2, done
        assert [each["outcome"] for each in done["history"]] == ["lost" if everything else "stopped", "succeeded"]
        with platform.admin as admin:
            again = admin.get("jobs/logs", params={"job": job, "attempt": 2}).json()["text"]
        assert "begins at step 0" not in again
        platform.stop()
        check_books(platform)
    finally:
        platform.kill9_all()


@pytest.mark.timeout(120)
def test_the_command_line(platform: Platform, tmp_path: Path) -> None:
    made = platform.cli(
        *("job", "submit", "--tenant", "demo", "--name", "hello", "--env", "GREETING=hi", "--kind", "cpu"),
        *("--deadline", "6h", "--wait", "--"),
        *("sh", "-c", "echo $GREETING; echo it > $TIDEMILL_ARTIFACT_DIR/out.txt"),
    )
    assert made["state"] == "succeeded" and made["name"] == "hello"
    assert platform.cli("job", "logs", "hello")["text"] == "hi\n"
    assert [each["path"] for each in platform.cli("job", "artifacts", "hello")["artifacts"]] == ["out.txt"]
    platform.cli("job", "artifacts", "hello", "out.txt", "--to", str(tmp_path / "got.txt"))
    assert (tmp_path / "got.txt").read_text() == "it\n"
    assert [job["id"] for job in platform.cli("job", "list", "--state", "succeeded")["jobs"]] == [made["id"]]
    assert platform.cli("queue", "set", "night", "--quota", "1")["quota"] == 1
    assert platform.cli("queue", "list")["queues"][0]["name"] == "night"
    deaf = submit(platform, "sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.1; done", grace="1s", queue="night")
    says(platform, deaf, "up")
    platform.cli("job", "cancel", deaf)
    assert reach(platform, deaf, *OVER)["state"] == "cancelled"
    reserved = platform.cli(
        *("reservation", "create", "--tenant", "demo", "--kind", "cpu", "--devices", "1", "--from", "1h", "--to", "2h")
    )
    assert (reserved["state"], reserved["price_per_hour"]) == ("booked", "3.60")
    assert platform.cli("reservation", "cancel", reserved["id"])["state"] == "cancelled"
    platform.stop()
    assert platform.cli("job", "show", made["id"])["charge"] == made["charge"] != "0.00"
    assert platform.cli("reservation", "list", "--all")["reservations"][0]["state"] == "cancelled"
    check_books(platform)


NO_MODELS = """
[device_prices.cpu]
hour = "3.6"

[[nodes.local.devices]]
kind = "cpu"
count = 2

[jobs]
tenants = {tenants}
"""


@pytest.mark.timeout(120)
def test_a_tenant_with_its_key(tmp_path: Path) -> None:
    with start_platform(tmp_path, NO_MODELS.format(tenants="true")) as platform:
        other = platform.new_tenant("other")
        ours = httpx.Client(base_url=platform.url, headers={"authorization": f"Bearer {platform.key}"}, timeout=30)
        theirs = httpx.Client(base_url=platform.url, headers={"authorization": f"Bearer {other}"}, timeout=30)
        script = "echo $MODE; echo made > $TIDEMILL_ARTIFACT_DIR/it"
        answer = ours.post("jobs", json={"command": ["sh", "-c", script], "env": {"MODE": "fast"}, "name": "mine"})
        assert answer.status_code == 200, answer.text
        job = answer.json()["id"]
        wait_until(lambda: ours.get(f"jobs/{job}").json()["status"] == "succeeded", 60.0)
        whole = ours.get(f"jobs/{job}").json()
        assert whole["object"] == "job" and float(whole["charge"]) > 0 and whole["attempts"] == 1
        log = ours.get(f"jobs/{job}/logs")
        assert log.text == "fast\n" and log.headers["x-next-cursor"] == "5"
        assert [each["path"] for each in ours.get(f"jobs/{job}/artifacts").json()["data"]] == ["it"]
        assert ours.get(f"jobs/{job}/artifact", params={"path": "it"}).text == "made\n"
        assert ours.get(f"jobs/{job}/artifact", params={"path": "../work"}).status_code == 404
        assert [each["id"] for each in ours.get("jobs").json()["data"]] == [job]
        assert ours.post(f"jobs/{job}/cancel").status_code == 409
        mistakes: list[dict[str, Any]] = [{"command": []}, {"workdir": "/"}, {"deadline_seconds": 0}]
        for wrong in mistakes:
            assert ours.post("jobs", json={"command": ["x"], **wrong}).status_code == 400
        assert theirs.get("jobs").json()["data"] == []
        for path in (f"jobs/{job}", f"jobs/{job}/logs", f"jobs/{job}/artifacts", "jobs/mine"):
            assert theirs.get(path).status_code == 404, path
        assert theirs.post(f"jobs/{job}/cancel").status_code == 404
    check_books(platform)


@pytest.mark.timeout(120)
def test_tenants_run_nothing_unless_the_operator_says_so(tmp_path: Path) -> None:
    with start_platform(tmp_path, NO_MODELS.format(tenants="false")) as platform:
        headers = {"authorization": f"Bearer {platform.key}"}
        answer = httpx.post(f"{platform.url}/jobs", json={"command": ["true"]}, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "not_allowed")
        assert httpx.get(f"{platform.url}/jobs", headers=headers).status_code == 403
