"""The live table: what is in it when the process is shot, at any instruction."""

import os
import random
import signal
import struct
import time
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.meter.values import START_US, opened
from tests.store.values import ZONE
from tests.support.disk import fill_up, small_disk
from tests.support.examples import examples
from tidemill.ledger.components import MAX_TOKENS
from tidemill.ledger.posting import charge_batches
from tidemill.ledger.usage import RequestStatus
from tidemill.meter.live import MAX_OPENED, SLOT_BYTES, LiveTable, TooManyOpen, Unfinished, read_unfinished
from tidemill.meter.loader import finish_record


def unfinished(path: Path) -> dict[str, Unfinished]:
    return {each.opened.request_id: each for each in read_unfinished(path)}


def test_what_is_open_is_read_with_its_last_counts(tmp_path: Path) -> None:
    path = tmp_path / "live"
    table = LiveTable(path, 8)
    first = table.open(opened("req_1"), 100)
    second = table.open(opened("req_2"), 200)
    third = table.open(opened("req_3"), 300)
    table.count(first, 5, 2, 1, START_US + 9, 100, True)
    table.count(first, 5, 2, 7, START_US + 9, 100, False)
    table.close_slot(second)
    assert table.open_requests == 2
    assert unfinished(path) == {
        "req_1": Unfinished(opened("req_1"), 5, 2, 7, START_US + 9, 100, False),
        "req_3": Unfinished(opened("req_3"), 0, 0, 0, 0, 300, False),
    }
    table.close_slot(first)
    table.close_slot(third)
    assert read_unfinished(path) == []


@examples(0.5)
@given(slot=st.integers(0, 7), completion=st.integers(0, 2**63))
def test_a_count_of_completion_tokens_alone_changes_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, slot: int, completion: int
) -> None:
    path = tmp_path_factory.mktemp("live") / "live"
    table = LiveTable(path, 8)
    slots = [table.open(opened(f"req_{number}"), 100 + number) for number in range(8)]
    for number, each in enumerate(slots):
        table.count(each, 50 + number, 20, 1, START_US + number, 100 + number, True)
    before = unfinished(path)
    table.count_completion(slots[slot], completion)
    changed = before[f"req_{slot}"]
    before[f"req_{slot}"] = msgspec.structs.replace(changed, completion=completion)
    assert unfinished(path) == before
    table.close()


def test_a_slot_that_is_used_again_remembers_nothing(tmp_path: Path) -> None:
    path = tmp_path / "live"
    table = LiveTable(path, 1)
    slot = table.open(opened("x" * 48), 100)
    table.count(slot, 5, 2, 7, START_US, 100, True)
    table.close_slot(slot)
    assert table.open(opened("y"), 7) == slot
    assert read_unfinished(path) == [Unfinished(opened("y"), 0, 0, 0, 0, 7, False)]


def test_it_is_full_at_its_end_and_not_before(tmp_path: Path) -> None:
    table = LiveTable(tmp_path / "live", 3)
    slots = [table.open(opened(f"req_{number}"), 0) for number in range(3)]
    assert sorted(slots) == [0, 1, 2]
    with pytest.raises(TooManyOpen) as full:
        table.open(opened("req_4"), 0)
    assert (full.value.status, full.value.code) == (503, "overloaded")
    table.close_slot(1)
    assert table.open(opened("req_5"), 0) == 1


def test_a_request_too_long_for_a_slot_takes_none(tmp_path: Path) -> None:
    table = LiveTable(tmp_path / "live", 3)
    with pytest.raises(ValueError, match=f"at most {MAX_OPENED} bytes"):
        table.open(opened("x" * 1000), 0)
    assert table.open_requests == 0


def test_no_file_no_requests(tmp_path: Path) -> None:
    assert read_unfinished(tmp_path / "absent") == []
    (tmp_path / "short").write_bytes(b"x")
    assert read_unfinished(tmp_path / "short") == []


def test_a_new_table_is_empty_whatever_was_there(tmp_path: Path) -> None:
    path = tmp_path / "live"
    LiveTable(path, 2).open(opened(), 0)
    LiveTable(path, 2)
    assert read_unfinished(path) == []


def test_its_blocks_are_its_own(tmp_path: Path) -> None:
    LiveTable(tmp_path / "live", 64)
    status = (tmp_path / "live").stat()
    assert status.st_blocks * 512 >= status.st_size == 64 * SLOT_BYTES


def test_a_disk_that_fills_up_never_kills_the_process(tmp_path: Path) -> None:
    """A store to a mapped page without a block behind it would be a SIGBUS; here in a child, to be sure."""
    with small_disk(tmp_path / "disk", 128) as disk:
        child = os.fork()
        if child == 0:
            table = LiveTable(disk / "live", 64)
            fill_up(disk)
            for number in range(64):
                table.open(opened(f"req_{number}"), 1)
            table.flush()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert len(read_unfinished(disk / "live")) == 64


def test_a_disk_without_room_gives_no_table(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64) as disk:
        fill_up(disk)
        with pytest.raises(OSError, match="No space left"):
            LiveTable(disk / "live", 64)


def test_a_kill_in_the_middle_of_counting_loses_no_token(tmp_path: Path) -> None:
    """`kill -9` at forty moments of a process that does nothing but count."""
    for attempt in range(40):
        path = tmp_path / str(attempt)
        told, tell = os.pipe()
        child = os.fork()
        if child == 0:
            table = LiveTable(path, 2)
            slot = table.open(opened(), 777)
            for number in range(1, 1 << 40):
                table.count(slot, 5, 1, number, START_US + 1, 777, True)
                if number % 64 == 0:
                    os.write(tell, struct.pack("<Q", number))
        os.close(tell)
        told_until = struct.unpack("<Q", os.read(told, 8))[0]
        os.set_blocking(told, False)
        time.sleep(random.uniform(0, 0.005))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while words := os.read(told, 65536):
            told_until = struct.unpack("<Q", words[-8:])[0]
        os.close(told)
        (left,) = read_unfinished(path)
        assert (left.prompt, left.cached, left.hold, left.first_token_us, left.estimated) == (
            5,
            1,
            777,
            START_US + 1,
            True,
        )
        assert told_until <= left.completion <= told_until + 65


def test_a_kill_while_slots_come_and_go_leaves_them_readable(tmp_path: Path) -> None:
    for attempt in range(30):
        path = tmp_path / str(attempt)
        told, tell = os.pipe()
        child = os.fork()
        if child == 0:
            table = LiveTable(path, 4)
            stays = table.open(opened("req_stays"), 1)
            table.count(stays, 1, 0, 1, START_US, 1, False)
            os.write(tell, b"x")
            for number in range(1 << 40):
                table.close_slot(table.open(opened(f"req_{number}" + "x" * (number % 40)), number % 100))
        os.close(tell)
        os.read(told, 1)
        time.sleep(random.uniform(0, 0.005))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(told)
        found = unfinished(path)
        assert found.pop("req_stays").completion == 1
        assert len(found) <= 1
        for each in found.values():
            number = int(each.opened.request_id.removeprefix("req_").rstrip("x"))
            assert each == Unfinished(opened(each.opened.request_id), 0, 0, 0, 0, number % 100, False)


@examples(2)
@given(st.integers(0, SLOT_BYTES - 1), st.binary(min_size=1, max_size=70))
def test_a_half_written_slot_is_no_request_or_a_possible_one(at: int, rubbish: bytes) -> None:
    """Whatever a slot holds, reading it gives nothing, or a request that was opened, with figures that fit."""
    path = Path("/dev/shm" if os.access("/dev/shm", os.W_OK) else "/tmp") / f"tm-live-{os.getpid()}"
    try:
        table = LiveTable(path, 2)
        table.open(opened("req_1"), 100)
        table.count(0, 5, 2, 1, START_US + 1, 100, False)
        table.close()
        data = bytearray(path.read_bytes())
        data[at : at + len(rubbish)] = rubbish
        path.write_bytes(data)
        for left in read_unfinished(path):
            assert left.opened == opened("req_1")
            record = finish_record(left)
            assert record.charge + record.uncollected < 2**63 and record.hold < 2**63
            assert 0 <= record.usage.cached <= record.usage.prompt <= MAX_TOKENS >= record.usage.completion >= 0
            assert record.started_at <= record.finished_at
            charge_batches([record], ZONE)
    finally:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("state", [(1, 0, 0), (1, 5000, 0), (1, 2**32 - 1, 7), (2, 0, 0), (1, 1, 0)])
def test_a_slots_state_alone_is_no_request(tmp_path: Path, state: tuple[int, int, int]) -> None:
    """`1, 0, 0` is what a kill between the words of a slot's state may leave: the checksum of nothing is zero."""
    path = tmp_path / "live"
    LiveTable(path, 1)
    with path.open("r+b") as file:
        file.write(struct.pack("<III", *state))
    assert read_unfinished(path) == []


# What recovery makes of it


def test_recovery_bills_what_had_passed() -> None:
    record = finish_record(Unfinished(opened(), 1000, 200, 50, START_US + 5, 10**12, True))
    assert record.status is RequestStatus.GATEWAY_LOST
    assert (record.usage.prompt, record.usage.cached, record.usage.completion) == (1000, 200, 50)
    assert record.estimated
    assert record.charge == 800 * 4000 + 200 * 1000 + 50 * 16000
    assert record.finished_at == record.first_token_at


def test_recovery_bills_nothing_when_nothing_had_passed() -> None:
    record = finish_record(Unfinished(opened(), 0, 0, 0, 0, 10**12, False))
    assert (record.charge, record.usage.total, record.first_token_at) == (0, 0, None)
    assert record.finished_at == record.started_at


def test_recovery_never_bills_beyond_the_hold() -> None:
    record = finish_record(Unfinished(opened(), 1000, 200, 50, START_US + 5, 100, False))
    assert record.charge == 100 == record.hold
    assert record.uncollected == 800 * 4000 + 200 * 1000 + 50 * 16000 - 100
