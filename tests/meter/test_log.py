"""The usage log: one commit for many, no promise without room, and no lie when the disk fails."""

import asyncio
import errno
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.meter.values import opened, settled
from tests.support.disk import fill_up, small_disk
from tidemill.ledger.components import CATALOGUE
from tidemill.ledger.pricing import Price
from tidemill.ledger.usage import TokenUsage
from tidemill.meter import log as log_module
from tidemill.meter.frames import HEADER, allocate_segment, read_frames, segment_numbers
from tidemill.meter.frames import frame as make_frame
from tidemill.meter.live import MAX_OPENED
from tidemill.meter.log import RECORD_RESERVE, LogFull, UsageLog
from tidemill.meter.records import encode_opened, encode_settled

SEGMENT = 8192
START = (1, 0)


@asynccontextmanager
async def a_log(directory: Path, segment_bytes: int = SEGMENT) -> AsyncIterator[UsageLog]:
    log = UsageLog(directory, asyncio.get_running_loop(), segment_bytes=segment_bytes)
    try:
        yield log
    finally:
        log.close()


def on_disk(directory: Path) -> list[bytes]:
    return [each.payload for each in read_frames(directory, START)]


async def settle(log: UsageLog, payload: bytes) -> None:
    log.reserve()
    await log.append(payload)


class Disk:
    """Stands between the log and the disk: slow, or broken."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.delay_s = 0.0
        self.error: OSError | None = None
        self.syncs = 0
        self.in_sync = threading.Event()
        self._fdatasync: Callable[[int], None] = os.fdatasync
        monkeypatch.setattr(os, "fdatasync", self.fdatasync)

    def fdatasync(self, fd: int) -> None:
        self.syncs += 1
        self.in_sync.set()
        time.sleep(self.delay_s)
        if self.error is not None:
            raise self.error
        self._fdatasync(fd)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


async def test_a_settlement_is_on_disk_when_it_is_done(tmp_path: Path) -> None:
    async with a_log(tmp_path) as log:
        for number in range(20):
            await settle(log, b"record %d" % number)
            assert on_disk(tmp_path)[-1] == b"record %d" % number


async def test_nothing_is_done_before_the_disk_says_so(tmp_path: Path, disk: Disk) -> None:
    disk.delay_s = 0.05
    async with a_log(tmp_path) as log:
        log.reserve()
        began = time.monotonic()
        await log.append(b"x")
        assert time.monotonic() - began >= 0.05


async def test_one_commit_serves_all_that_wait(tmp_path: Path, disk: Disk) -> None:
    disk.delay_s = 0.02
    async with a_log(tmp_path, 1024 * 1024) as log:
        await asyncio.gather(*(settle(log, b"%d" % number) for number in range(500)))
        assert log.records == 500
        assert log.commits == disk.syncs <= 4
    assert sorted(map(int, on_disk(tmp_path))) == list(range(500))


async def test_it_rolls_over_to_the_next_segment(tmp_path: Path) -> None:
    payloads = [b"%03d" % number + bytes(300) for number in range(100)]
    async with a_log(tmp_path, SEGMENT) as log:
        for payload in payloads[:50]:
            await settle(log, payload)
        for at in range(50, 100, 5):  # and within one batch
            for _ in range(5):
                await until_it_takes_more(log)
            await asyncio.gather(*(log.append(payload) for payload in payloads[at : at + 5]))
    assert on_disk(tmp_path) == payloads
    assert len(segment_numbers(tmp_path)) >= 100 * 311 // SEGMENT
    assert all(path.stat().st_size == SEGMENT for path in tmp_path.glob("*.log"))


async def test_a_segment_is_filled_to_the_last_byte(tmp_path: Path) -> None:
    """A frame that leaves just the room of the end mark still fits."""
    async with a_log(tmp_path) as log:
        await settle(log, bytes(4096))
        await settle(log, b"y" * (SEGMENT - 4096 - 3 * HEADER.size))
        await settle(log, b"z")
    assert on_disk(tmp_path) == [bytes(4096), b"y" * (SEGMENT - 4096 - 3 * HEADER.size), b"z"]
    assert [each.after for each in read_frames(tmp_path, START)][-1] == (2, HEADER.size + 1)


async def test_a_new_log_never_writes_into_an_old_ones_segment(tmp_path: Path) -> None:
    for life in range(3):
        async with a_log(tmp_path) as log:
            await settle(log, b"life %d" % life)
    first_of_each = {each.payload: each.after[0] for number in (1, 3, 5) for each in read_frames(tmp_path, (number, 0))}
    assert first_of_each == {b"life 0": 1, b"life 1": 3, b"life 2": 5}


async def test_no_record_is_lost_between_the_two_threads(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record that is handed over while the thread takes what has gathered: it must be in this batch or in the next.

    Between looking up where to append and appending, the loop's thread may lose the processor. Here it does.
    """
    disk.delay_s = 0.01
    stalled = False

    def frame(payload: bytes) -> bytes:
        if payload == b"third":  # the thread is writing the first; stay here until it has taken the second
            nonlocal stalled
            stalled = True
            time.sleep(0.015)
        return make_frame(payload)

    monkeypatch.setattr(log_module, "frame", frame)
    async with a_log(tmp_path) as log:
        for _ in range(3):
            log.reserve()
        first = log.append(b"first")
        assert disk.in_sync.wait(5)
        second = log.append(b"second")
        third = log.append(b"third")
        await asyncio.gather(first, second, third)
        assert stalled
        assert on_disk(tmp_path) == [b"first", b"second", b"third"]


async def test_a_busy_loop_and_a_busy_thread_lose_nothing(tmp_path: Path) -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        async with a_log(tmp_path, 256 * 1024) as log:

            async def client(name: int) -> None:
                for number in range(40):
                    await settle(log, b"%d.%d " % (name, number) + bytes(200))

            await asyncio.gather(*(client(name) for name in range(100)))
    finally:
        sys.setswitchinterval(interval)
    found = [payload.split()[0] for payload in on_disk(tmp_path)]
    assert len(found) == len(set(found)) == 4000


async def test_the_next_segment_is_made_in_time_also_without_a_pause(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something always waits when a commit is done; still nobody is refused for want of a segment."""
    disk.delay_s = 0.001
    async with a_log(tmp_path, 32 * 1024) as log:
        waiting: set[asyncio.Future[None]] = set()
        for _ in range(600):
            while len(waiting) >= 8:
                _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            log.reserve()
            waiting.add(log.append(bytes(500)))
        await asyncio.wait(waiting)
    assert len(on_disk(tmp_path)) == 600


async def test_a_caller_that_gives_up_waiting_changes_nothing(tmp_path: Path, disk: Disk) -> None:
    disk.delay_s = 0.05
    async with a_log(tmp_path) as log:
        log.reserve()
        future = log.append(b"impatient")
        future.cancel()
        await settle(log, b"patient")
    assert on_disk(tmp_path) == [b"impatient", b"patient"]


# Room


async def test_room_is_promised_once(tmp_path: Path) -> None:
    async with a_log(tmp_path) as log:
        promised = 0
        with pytest.raises(LogFull, match="requests cannot be metered and are refused"):
            while True:
                log.reserve()
                promised += 1
        assert promised == 2 * ((SEGMENT - HEADER.size) // RECORD_RESERVE)
        log.release()
        log.reserve()
        with pytest.raises(LogFull) as full:
            log.reserve()
        assert (full.value.status, full.value.code) == (503, "metering_unavailable")


async def test_all_that_was_promised_room_fits_without_another_segment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest records, with the disk full from the first on."""
    largest = bytes(RECORD_RESERVE - HEADER.size)
    async with a_log(tmp_path) as log:
        promised = 0
        with pytest.raises(LogFull):
            while True:
                log.reserve()
                promised += 1
        monkeypatch.setattr(log_module, "allocate_segment", no_space)
        for _ in range(promised):
            await log.append(largest)
        with pytest.raises(LogFull):
            log.reserve()
        monkeypatch.undo()
        await until_it_takes_more(log)
        await log.append(b"goes on")
    assert on_disk(tmp_path) == [largest] * promised + [b"goes on"]


DEAR = Price({component: spec.max_rate for component, spec in CATALOGUE.items()})


def test_the_largest_record_fits_into_what_is_reserved_for_it() -> None:
    """Every field at its longest: an opened record of MAX_OPENED bytes, and the largest figures."""
    request = opened("r" * 48, "t" * 32, price=DEAR, started_us=2**52)
    padding = MAX_OPENED - len(encode_opened(request))
    request = opened("r" * 48, "t" * (32 + padding - 2), price=DEAR, started_us=2**52)
    assert MAX_OPENED - 2 <= len(encode_opened(request)) <= MAX_OPENED
    usage = TokenUsage(2**28, 0, 2**28, {component: spec.most for component, spec in CATALOGUE.items()})
    made = settled(request, usage, hold=2**63 - 1, finished_us=2**53)
    assert HEADER.size + len(encode_settled(made)) <= RECORD_RESERVE


async def test_a_full_disk_refuses_and_an_emptied_one_goes_on(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64) as directory:
        async with a_log(directory) as log:
            filler = fill_up(directory)
            payload = bytes(900)
            done = 0
            with pytest.raises(LogFull):
                while True:
                    await settle(log, payload)  # never an error for what was promised room
                    done += 1
            assert done >= (SEGMENT - HEADER.size) // RECORD_RESERVE
            assert on_disk(directory) == [payload] * done
            filler.unlink()
            await until_it_takes_more(log)
            await log.append(payload)
        assert on_disk(directory) == [payload] * (done + 1)


async def test_without_a_next_segment_nothing_is_written_behind_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record that does not fit is refused, and a shorter one that does is still found by readers."""
    async with a_log(tmp_path) as log:
        await settle(log, bytes(4000))
        await settle(log, bytes(4000))
        monkeypatch.setattr(log_module, "allocate_segment", no_space)
        await settle(log, bytes(4000))  # in the second segment; there is no third
        await settle(log, bytes(4000))  # leaves less than 200 bytes
        log.reserve = lambda: None  # type: ignore[method-assign]
        with pytest.raises(OSError, match="no room for another segment"):
            await log.append(bytes(1000))
        await log.append(b"short")
        assert log.failure is None
        monkeypatch.setattr(log_module, "allocate_segment", allocate_segment)
        await log.append(bytes(1000))
    assert on_disk(tmp_path) == [bytes(4000)] * 4 + [b"short", bytes(1000)]


def no_space(*arguments: Any) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


async def until_it_takes_more(log: UsageLog) -> None:
    deadline = time.monotonic() + 5
    while True:
        try:
            return log.reserve()
        except LogFull:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)


# A disk that fails


async def test_a_failed_commit_is_told_to_all_that_wait_and_ends_the_log(tmp_path: Path, disk: Disk) -> None:
    async with a_log(tmp_path) as log:
        await settle(log, b"good")
        disk.error = OSError(errno.EIO, "Input/output error")
        log.reserve()
        results = await asyncio.gather(*(log.append(b"bad %d" % n) for n in range(3)), return_exceptions=True)
        assert all(isinstance(result, OSError) and result.errno == errno.EIO for result in results)
        assert log.failure is not None
        seen = on_disk(tmp_path)
        disk.error = None
        # The disk seems well again, but what became of the failed bytes cannot be known: a loader may have read
        # them. Their place is never written a second time.
        with pytest.raises(LogFull, match=r"cannot write its usage log \(Input/output error\)"):
            log.reserve()
        with pytest.raises(OSError, match="Input/output error"):
            await log.append(b"late")
        assert on_disk(tmp_path) == seen
    assert seen[0] == b"good"


async def test_a_write_that_takes_only_a_part_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, bytes(data)[:7], at))
    async with a_log(tmp_path) as log:
        await settle(log, bytes(range(100)))
    assert on_disk(tmp_path) == [bytes(range(100))]


async def test_a_write_that_fails_half_way_hides_nothing_that_was_promised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite
    async with a_log(tmp_path) as log:
        await settle(log, b"good")
        calls: Iterator[int | OSError] = iter([10, OSError(errno.EIO, "Input/output error")])

        def failing(fd: int, data: Any, at: int) -> int:
            step = next(calls)
            if isinstance(step, OSError):
                raise step
            return pwrite(fd, bytes(data)[:step], at)

        monkeypatch.setattr(os, "pwrite", failing)
        with pytest.raises(OSError, match="Input/output"):
            await settle(log, b"bad, and more than ten bytes")
        monkeypatch.undo()
    assert on_disk(tmp_path) == [b"good"]


def test_a_directory_without_room_gives_no_log(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64) as directory:
        fill_up(directory)
        loop = asyncio.new_event_loop()
        with pytest.raises(OSError, match="No space left"):
            UsageLog(directory, loop, segment_bytes=SEGMENT)
        loop.close()


async def test_records_that_come_in_numbers_share_commits_and_one_alone_does_not_wait(tmp_path: Path) -> None:
    async with a_log(tmp_path, 1024 * 1024) as log:
        for number in range(20):  # one after the other: each is the only one there is
            await settle(log, b"alone %d" % number)
        assert log.commits == 20

        async def client(number: int) -> None:
            for turn in range(20):
                await settle(log, b"%d, %d" % (number, turn))

        await asyncio.gather(*(client(number) for number in range(32)))
        assert log.records == 20 + 32 * 20
        assert log.commits - 20 < 32 * 20 / 4
    assert len(on_disk(tmp_path)) == log.records


async def test_what_follows_one_record_is_not_the_trouble_of_the_next(tmp_path: Path) -> None:
    async with a_log(tmp_path) as log:
        told: list[OSError | None] = []

        def fails(failure: OSError | None) -> None:
            raise RuntimeError("a fault of ours")

        for durable in (fails, told.append):
            log.reserve()
            log.append_then(b"record", durable)
        async with asyncio.timeout(60):
            while not told:
                await asyncio.sleep(0.001)
        assert told == [None]
        assert log._reserved == 0
