"""The tide on the real model: a model at zero that the first request wakes, a flood, and lines beside people."""

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support.platform import Platform, start_platform, wait_until

PRICES = """
[prices.smol]
input = "1.00"
output = "2.00"
"""

SLEEPER = f"""
[models.smol]
engine = "llamacpp"
parallel = 4
context = 1024
devices = 1
min_replicas = 0
max_replicas = 1
scale_down_seconds = 3
{PRICES}
"""


def chat(platform: Platform, key: str, *, path: str = "/chat/completions", **fields: Any) -> httpx.Response:
    body = {"model": "smol", "max_tokens": 8, "messages": [{"role": "user", "content": "Say hello."}], **fields}
    return httpx.post(f"{platform.url}{path}", json=body, headers={"authorization": f"Bearer {key}"}, timeout=120)


def replicas(platform: Platform) -> list[Any]:
    with platform.admin as admin:
        answer = admin.get("fleet")
        assert answer.status_code == 200, answer.text
        return list(answer.json()["replicas"])


@pytest.fixture(scope="module")
def sleeper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with start_platform(tmp_path_factory.mktemp("sleeper"), SLEEPER) as platform:
        yield platform


def test_the_first_request_wakes_a_model_at_zero_and_is_answered(sleeper: Platform) -> None:
    key = sleeper.new_tenant("early")
    assert replicas(sleeper) == []
    assert httpx.get(sleeper.url.removesuffix("/v1") + "/readyz").json()["models"] == {"smol": "asleep"}
    answer = chat(sleeper, key)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] > 0
    (replica,) = replicas(sleeper)
    assert replica["phase"] == "ready" and len(replica["devices"]) == 1
    record = sleeper.record("early")
    assert record["status"] == "ok"


def test_it_goes_back_to_zero_and_many_can_wake_it_together(sleeper: Platform) -> None:
    wait_until(lambda: replicas(sleeper) == [], 60.0, every_s=0.3)
    key = sleeper.new_tenant("many")
    found: list[httpx.Response] = []
    threads = [
        threading.Thread(target=lambda stream=stream: found.append(chat(sleeper, key, stream=stream)))
        for stream in (False, True, False, True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in found] == [200] * 4, [answer.text for answer in found]
    assert len(sleeper.usage("many")["records"]) == 4


def test_why_says_what_each_device_does(sleeper: Platform) -> None:
    why = sleeper.cli("fleet", "why")
    assert why["devices"] and all(each["device"] and each["why"] for each in why["devices"])
    listed = sleeper.cli("fleet", "list")
    assert [model["name"] for model in listed["models"]] == ["smol"]


ELASTIC = f"""
[models.smol]
engine = "llamacpp"
parallel = 2
context = 1024
devices = 1
min_replicas = 1
max_replicas = 2
scale_down_seconds = 3
filler = "beside"

[models.broken]
engine = "llamacpp"
path = "broken.gguf"
devices = 1
min_replicas = 0
max_replicas = 1
scale_down_seconds = 3
wake_seconds = 20

[[nodes.local.devices]]
kind = "cpu"
count = 2
{PRICES}
[prices.broken]
input = "1.00"
output = "2.00"
"""


@pytest.fixture(scope="module")
def elastic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    path = tmp_path_factory.mktemp("elastic")
    (path / "broken.gguf").write_bytes(b"GGUF this is none")
    with start_platform(path, ELASTIC) as platform:
        yield platform


def ready(platform: Platform, model: str = "smol") -> int:
    found = [each for each in replicas(platform) if each["model"] == model]
    return sum(each["phase"] == "ready" and not each["batch_only"] for each in found)


def test_a_flood_gets_a_second_replica_that_goes_again(elastic: Platform) -> None:
    key = elastic.new_tenant("crowd")
    assert ready(elastic) == 1
    statuses: list[int] = []

    def talk() -> None:
        for _ in range(3):
            statuses.append(chat(elastic, key, max_tokens=150, ignore_eos=True).status_code)

    threads = [threading.Thread(target=talk) for _ in range(8)]
    for thread in threads:
        thread.start()
    wait_until(lambda: ready(elastic) == 2, 60.0, every_s=0.2)
    for thread in threads:
        thread.join()
    assert set(statuses) == {200}
    records = elastic.usage("crowd")["records"]
    assert len(records) == 24 and {each["status"] for each in records} == {"ok"}
    assert len({each["replica"].partition("#")[0] for each in records}) == 2, "the second one has worked"
    wait_until(lambda: len(replicas(elastic)) == 1, 90.0, every_s=0.3)


def test_lines_are_worked_on_beside_people_and_the_engine_goes_with_the_last(elastic: Platform) -> None:
    key = elastic.new_tenant("patient")
    lines = [
        {
            "custom_id": f"r{number}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": "smol", "max_tokens": 8, "messages": [{"role": "user", "content": f"Say {number}."}]},
        }
        for number in range(60)
    ]
    headers = {"authorization": f"Bearer {key}"}
    text = "".join(json.dumps(line) + "\n" for line in lines)
    files: dict[str, Any] = {"file": ("in.jsonl", text.encode()), "purpose": (None, "batch")}
    file = httpx.post(f"{elastic.url}/files", files=files, headers=headers, timeout=60).json()
    wish = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    batch = httpx.post(f"{elastic.url}/batches", json=wish, headers=headers, timeout=60).json()
    wait_until(lambda: any(each["beside"] for each in replicas(elastic)), 30.0, every_s=0.1)
    assert chat(elastic, key).status_code == 200, "people are served meanwhile"

    def done() -> bool:
        found = httpx.get(f"{elastic.url}/batches/{batch['id']}", headers=headers, timeout=60).json()
        return bool(found["status"] == "completed" and found["request_counts"]["completed"] == 60)

    wait_until(done, 120.0, every_s=0.5)
    records = elastic.usage("patient")["records"]
    people = {each["replica"].partition("#")[0] for each in records if not each["request_id"].startswith("batch_")}
    beside = {each["replica"].partition("#")[0] for each in records if each["request_id"].startswith("batch_")} - people
    assert beside, "an engine of their own has worked on lines"
    wait_until(lambda: not any(each["beside"] for each in replicas(elastic)), 60.0, every_s=0.3)


def test_an_engine_that_does_not_start_is_nobody_elses_trouble(elastic: Platform) -> None:
    key = elastic.new_tenant("unlucky")
    answer = chat(elastic, key, model="broken")
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "model_not_ready"
    assert chat(elastic, key).status_code == 200
    (record,) = elastic.usage("unlucky")["records"]
    assert record["model"] == "smol"
    wait_until(lambda: [each["model"] for each in replicas(elastic)] == ["smol"], 90.0, every_s=0.3)


def test_a_device_is_taken_out_and_put_back(elastic: Platform) -> None:
    wait_until(lambda: ready(elastic) == 1, 60.0, every_s=0.2)
    (replica,) = replicas(elastic)
    (device,) = replica["devices"]
    key = elastic.new_tenant("mover")
    assert elastic.cli("fleet", "drain", device, "--why", "its fan is loud") == {"name": device, "drained": True}

    def moved() -> bool:
        found = replicas(elastic)
        return len(found) == 1 and found[0]["phase"] == "ready" and found[0]["devices"] != [device]

    wait_until(moved, 60.0, every_s=0.2)
    assert chat(elastic, key).status_code == 200
    (note,) = (each for each in elastic.cli("fleet", "why")["devices"] if each["device"] == device)
    assert note["holder"] == "drained" and "its fan is loud" in note["why"]
    assert elastic.cli("fleet", "undrain", device) == {"name": device, "drained": False}
    wait_until(lambda: _holder(elastic, device) == "free", 10.0, every_s=0.2)


def _holder(platform: Platform, device: str) -> str:
    return next(str(each["holder"]) for each in platform.cli("fleet", "devices")["devices"] if each["device"] == device)
