"""What gateway processes tell each other."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.examples import examples
from tests.support.fleet import models
from tidemill.gateway.routing.models import ModelRoutes
from tidemill.gateway.routing.replica import ReplicaAttempt
from tidemill.gateway.routing.shared_state import (
    _MAX_KEYS,
    MAX_REPLICAS,
    PART_BYTES,
    RING_BYTES,
    SharedReplicaState,
    create_board,
)

KEYS = [1, -2, 2**62, -(2**63)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "board"
    create_board(path, 3)
    return path


def heard(board: SharedReplicaState) -> list[tuple[int, list[int]]]:
    events: list[tuple[int, list[int]]] = []
    board.hear(lambda replica, keys: events.append((replica, keys)))
    return events


def test_each_hears_the_others_and_not_itself(path: Path) -> None:
    one, two, three = (SharedReplicaState(path, index, 3) for index in range(3))
    one.tell_prompt(7, KEYS)
    two.tell_prompt(8, [5])
    assert heard(three) == [(7, KEYS), (8, [5])]
    assert heard(three) == [], "once"
    assert heard(one) == [(8, [5])]
    assert heard(two) == [(7, KEYS)]


def test_loads_add_up(path: Path) -> None:
    one, two, three = (SharedReplicaState(path, index, 3) for index in range(3))
    one.tell_load(0, 7, 100, 2)
    two.tell_load(0, 7, 50, 1)
    assert three.others_load(0, 7) == (150, 3)
    assert one.others_load(0, 7) == (50, 1)
    assert three.others_load(0, 99) == (0, 0), "another life of the replica"
    assert SharedReplicaState(path, 0, 3).others_load(0, 7) == (50, 1)
    assert three.others_load(0, 7) == (50, 1), "a new process in that place starts at nothing"
    one.tell_load(MAX_REPLICAS - 1, 9, 1, 1)
    assert three.others_load(MAX_REPLICAS - 1, 9) == (1, 1)


def test_who_comes_late_hears_what_is_new(path: Path) -> None:
    one = SharedReplicaState(path, 0, 3)
    one.tell_prompt(7, KEYS)
    late = SharedReplicaState(path, 1, 3)
    assert heard(late) == []
    one.tell_prompt(8, KEYS)
    assert heard(late) == [(8, KEYS)]


def test_who_is_far_behind_goes_on_from_now(path: Path) -> None:
    one, two = SharedReplicaState(path, 0, 3), SharedReplicaState(path, 1, 3)
    for _ in range(RING_BYTES // 100):
        one.tell_prompt(7, list(range(100)))
    assert heard(two) == []
    one.tell_prompt(8, KEYS)
    assert heard(two) == [(8, KEYS)]


def test_an_absurd_number_of_keys_is_cut(path: Path) -> None:
    one, two = SharedReplicaState(path, 0, 3), SharedReplicaState(path, 1, 3)
    one.tell_prompt(7, list(range(10_000)))
    assert heard(two) == [(7, list(range(_MAX_KEYS)))]


@examples(0.3)
@given(st.lists(st.lists(st.integers(0, 2**62), max_size=200), min_size=1, max_size=40), st.integers(1, 30))
def test_nothing_is_lost_over_many_rounds(tmp_path: Path, prompts: list[list[int]], rounds: int) -> None:
    path = tmp_path / "many"
    create_board(path, 2)
    one, two = SharedReplicaState(path, 0, 2), SharedReplicaState(path, 1, 2)
    for _ in range(rounds):
        for number, keys in enumerate(prompts):
            one.tell_prompt(number, keys)
        assert heard(two) == list(enumerate(prompts))
    one.close()
    two.close()


def test_rubbish_is_heard_without_harm(path: Path) -> None:
    two = SharedReplicaState(path, 1, 3)
    with path.open("r+b") as file:
        file.write(os.urandom(PART_BYTES))
    heard(two)
    two.others_load(0, 7)


async def test_routes_share(path: Path) -> None:
    """A prompt that went through one process finds its prefix through the other, and both know the load."""
    loop = asyncio.get_running_loop()
    spec = models("mock", 1, 2)
    one, two = (ModelRoutes(loop, SharedReplicaState(path, index, 3)) for index in range(2))
    for each in (one, two):
        each.update([spec])
    mine, theirs = one.by_name["mock"].replicas[1], two.by_name["mock"].replicas[1]
    attempt = ReplicaAttempt(mine, 1000, 0, KEYS)
    attempt.start(0.0, 100, 1)
    two.hear()
    assert theirs.prefix.match(KEYS) == len(KEYS)
    assert theirs.load() == mine.load() == (1000 + 100 * 5, 1)
    attempt.first_token()
    assert theirs.load() == (100 * 5, 1)
    attempt.finish()
    assert theirs.load() == (0, 0)


async def test_a_replica_that_is_gone_writes_no_more(path: Path) -> None:
    loop = asyncio.get_running_loop()
    routes, other = (ModelRoutes(loop, SharedReplicaState(path, index, 3)) for index in range(2))
    for each in (routes, other):
        each.update([models("mock", 1, 2)])
    attempt = ReplicaAttempt(routes.by_name["mock"].replicas[0], 1000)
    attempt.start(0.0, 100, 1)
    routes.update([models("mock", 3, 2)])  # another address: another replica in the same row
    attempt.finish()
    assert routes.by_name["mock"].replicas[0].load() == (0, 0)
    assert other.by_name["mock"].replicas[0].load() == (0, 0)


def test_processes_with_one_seed_hash_alike() -> None:
    code = "print(hash((1, hash(b'x' * 256))))"
    said = {
        subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": "42"}, capture_output=True).stdout
        for _ in range(2)
    }
    assert len(said) == 1
