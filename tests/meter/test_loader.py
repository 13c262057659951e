"""The loader: every record once, whatever dies in between."""

import asyncio
import os
import shutil
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import event, func, insert, select

from tests.meter.test_records import FORMAT1, as_before
from tests.meter.values import opened, settled
from tests.store.databases import Databases, FlakyStore
from tests.store.values import ZONE, assert_clean, balance_of, grant
from tidemill.clock import to_micros
from tidemill.errors import Unavailable
from tidemill.ledger.period import parse_period
from tidemill.ledger.usage import RequestStatus, TokenUsage, UsageRecord
from tidemill.meter import loader as loader_module
from tidemill.meter.frames import read_frames, segment_numbers, segment_path
from tidemill.meter.live import LiveTable
from tidemill.meter.loader import LIVE_FILE, Loader, LoadResult, claim_directory, finish_record
from tidemill.meter.log import UsageLog
from tidemill.meter.records import Opened, Settled, encode_settled, to_record
from tidemill.store.balance_leases import extend_lease, leased, leasing_workers
from tidemill.store.engine import Store
from tidemill.store.record_rows import store_rows as store_rows_of_batch
from tidemill.store.tables.money import transactions
from tidemill.store.tables.tenants import tenants
from tidemill.store.tables.usage import log_positions
from tidemill.store.tenants import Tenant
from tidemill.store.usage import records_between

GRANTED = 10**12
ids = count(1)


class Worker:
    """A gateway process, as its files show it. `die` is `kill -9`: the lock is free, all else stays as it is."""

    def __init__(self, meter_dir: Path, store: Store, name: str, *, segment_bytes: int = 64 * 1024) -> None:
        self.name = name
        self._loop = asyncio.new_event_loop()
        self._store = store
        self.directory, self._lock = claim_directory(meter_dir, name)
        self._log = UsageLog(self.directory, self._loop, segment_bytes=segment_bytes)
        self.live = LiveTable(self.directory / LIVE_FILE, 64)
        self.alive = True

    def lease(self, tenant: Tenant, amount: int) -> None:
        with self._store.write() as connection:
            assert extend_lease(connection, worker_id=self.name, tenant_id=tenant.tenant_id, need=amount, slices=10**15)

    def write(self, *records: Settled | msgspec.Raw) -> None:
        async def all_of_them() -> None:
            await asyncio.gather(*(self._log.append(encode_settled(record)) for record in records))

        self._loop.run_until_complete(all_of_them())

    def open(self, request: Opened, *, completion: int = 0, hold: int = 10**9) -> None:
        slot = self.live.open(request, hold)
        if completion:
            self.live.count(slot, 100, 20, completion, request.started_us + 5, hold, False)

    def die(self) -> None:
        if self.alive:
            self._log.close()
            self._loop.close()
            os.close(self._lock)
            self.alive = False


class World:
    """A store with a tenant, a meter directory, and a loader that can be started anew."""

    def __init__(self, databases: Databases, store: Store, tenant: Tenant, meter_dir: Path) -> None:
        self.databases = databases
        self.store = store
        self.tenant = tenant
        self.meter_dir = meter_dir
        self.workers: list[Worker] = []
        meter_dir.mkdir(exist_ok=True)
        with store.write() as connection:
            grant(connection, tenant.tenant_id, GRANTED)

    def worker(self, name: str = "gw0-1", **values: Any) -> Worker:
        worker = Worker(self.meter_dir, self.store, name, **values)
        self.workers.append(worker)
        return worker

    def loader(self, store: Store | None = None) -> Loader:
        return Loader(store or self.store, self.meter_dir, zone=ZONE)

    def request(self, **values: Any) -> Opened:
        return opened(f"req_{next(ids):08}", self.tenant.tenant_id, **values)

    def records(self) -> list[UsageRecord]:
        with self.store.read() as connection:
            return list(records_between(connection, tenant_id=None, start=None, end=None))

    def leased(self) -> int:
        with self.store.read() as connection:
            return leased(connection, self.tenant.tenant_id)

    @property
    def balance(self) -> int:
        return balance_of(self.store, self.tenant.tenant_id)

    def check_all_over(self, expected: list[UsageRecord]) -> None:
        """Nothing is left but these records, once each, and what they cost."""
        assert sorted(self.records(), key=by_id) == sorted(expected, key=by_id)
        assert self.balance == GRANTED - sum(record.charge for record in expected)
        with self.store.read() as connection:
            assert leasing_workers(connection) == set()
            assert connection.execute(select(func.count()).select_from(log_positions)).scalar() == 0
        assert list(self.meter_dir.iterdir()) == []
        assert_clean(self.store)


def by_id(record: UsageRecord) -> str:
    return record.request_id


@pytest.fixture
def world(databases: Databases, store: Store, acme: Tenant, tmp_path: Path) -> Iterator[World]:
    world = World(databases, store, acme, tmp_path / "meter")
    yield world
    for worker in world.workers:
        worker.die()


# A process that lives


def test_what_is_settled_is_stored_and_charged_once(world: World) -> None:
    worker = world.worker()
    worker.lease(world.tenant, 10**9)
    first, second = settled(world.request()), settled(world.request())
    loader = world.loader()
    assert loader.drain() == LoadResult(0, 0, 0)
    worker.write(first)
    assert loader.drain() == LoadResult(1, 0, 0)
    assert loader.drain() == LoadResult(0, 0, 0)
    worker.write(second)
    assert world.loader().drain() == LoadResult(1, 0, 0)  # a new one goes on from the stored position
    assert loader.drain() == LoadResult(0, 0, 0)  # and the old one finds that it was overtaken
    assert world.records() == [to_record(first), to_record(second)]
    assert world.balance == GRANTED - first.charge - second.charge
    assert world.leased() == 10**9 - first.charge - second.charge
    assert_clean(world.store)


def test_a_living_process_is_never_finished(world: World) -> None:
    worker = world.worker()
    worker.lease(world.tenant, 10**9)
    worker.open(world.request(), completion=7)
    for _ in range(3):
        assert world.loader().drain() == LoadResult(0, 0, 0)
    assert world.leased() == 10**9
    assert worker.directory.exists()
    worker.die()
    assert world.loader().drain() == LoadResult(1, 1, 1)


def test_segments_that_are_done_with_are_removed(world: World) -> None:
    worker = world.worker(segment_bytes=4096)
    worker.lease(world.tenant, 10**9)
    loader = world.loader()
    made = []
    for _ in range(6):
        batch = [settled(world.request()) for _ in range(10)]
        worker.write(*batch)
        made += batch
        assert loader.drain().records == 10
    numbers = segment_numbers(worker.directory)
    assert len(numbers) <= 3 and numbers[0] > 1
    worker.die()
    assert world.loader().drain() == LoadResult(0, 0, 1)
    world.check_all_over([to_record(each) for each in made])


def test_several_processes_side_by_side(world: World) -> None:
    made = []
    for number in range(3):
        worker = world.worker(f"gw{number}-1")
        worker.lease(world.tenant, 10**9)
        batch = [settled(world.request()) for _ in range(number + 1)]
        worker.write(*batch)
        made += batch
    world.workers[1].die()
    assert world.loader().drain() == LoadResult(6, 0, 1)
    for worker in world.workers:
        worker.die()
    assert world.loader().drain() == LoadResult(0, 0, 2)
    world.check_all_over([to_record(each) for each in made])


# A process that is dead


def test_a_dead_process_is_finished_exactly_once(world: World) -> None:
    worker = world.worker()
    worker.lease(world.tenant, 10**10)
    done, half, untouched = settled(world.request()), world.request(), world.request()
    worker.write(done)
    worker.open(half, completion=7)
    worker.open(untouched)
    worker.die()
    loader = world.loader()
    assert loader.drain() == LoadResult(3, 2, 1)
    assert loader.drain() == world.loader().drain() == LoadResult(0, 0, 0)
    by_request = {record.request_id: record for record in world.records()}
    lost = by_request[half.request_id]
    assert (lost.status, lost.usage, lost.charge) == (
        RequestStatus.GATEWAY_LOST,
        TokenUsage(100, 20, 7),
        80 * 4000 + 20 * 1000 + 7 * 16000,
    )
    assert by_request[untouched.request_id].charge == 0
    world.check_all_over(list(by_request.values()))
    assert set(by_request) == {done.opened.request_id, half.request_id, untouched.request_id}


def test_a_request_in_the_log_and_in_the_table_counts_as_the_log_says(world: World) -> None:
    """Killed between the commit and the freeing of the slot."""
    worker = world.worker()
    worker.lease(world.tenant, 10**9)
    request = world.request()
    worker.open(request, completion=3)
    done = settled(request, TokenUsage(100, 20, 50))
    worker.write(done)
    worker.die()
    assert world.loader().drain() == LoadResult(1, 0, 1)
    world.check_all_over([to_record(done)])


def test_a_request_that_was_moving_between_replicas_leaves_one_record(world: World) -> None:
    """Killed between the new slot and the freeing of the old one (`Flight.move`)."""
    worker = world.worker()
    worker.lease(world.tenant, 10**9)
    request = world.request()
    worker.open(request)
    worker.open(msgspec.structs.replace(request, replica="m/1#other"))
    worker.die()
    assert world.loader().drain() == LoadResult(1, 1, 1)
    (record,) = world.records()
    assert (record.request_id, record.charge) == (request.request_id, 0)
    world.check_all_over([record])


def test_so_it_does_when_the_log_was_drained_before_the_death(world: World) -> None:
    worker = world.worker()
    worker.lease(world.tenant, 10**9)
    request = world.request()
    worker.open(request, completion=3)
    worker.write(done := settled(request))
    world.loader().drain()
    worker.die()
    assert world.loader().drain() == LoadResult(0, 0, 1)
    world.check_all_over([to_record(done)])


def test_what_lies_behind_a_damage_of_a_dead_log_is_saved(world: World) -> None:
    worker = world.worker(segment_bytes=4096)
    worker.lease(world.tenant, 10**9)
    made = [settled(world.request()) for _ in range(30)]
    for each in made:
        worker.write(each)
    worker.die()
    path = segment_path(worker.directory, 1)
    damaged = bytearray(path.read_bytes())
    damaged[200] ^= 4
    path.write_bytes(damaged)
    drained = world.loader().drain()
    assert (drained.records, drained.workers_closed) == (29, 1)
    assert 0 < drained.recovered < 29
    found = {record.request_id for record in world.records()}
    assert len(found) == 29 and found < {each.opened.request_id for each in made}
    world.check_all_over([to_record(each) for each in made if each.opened.request_id in found])


def test_a_directory_without_a_log_or_a_table_is_cleared_away(world: World) -> None:
    (world.meter_dir / "gw0-bare").mkdir()
    (world.meter_dir / "not a directory").touch()
    assert world.loader().drain() == LoadResult(0, 0, 1)
    assert [path.name for path in world.meter_dir.iterdir()] == ["not a directory"]


def test_a_claimed_directory_is_locked_from_the_moment_it_can_be_seen(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def rename_and_look(self: Path, target: Path) -> Path:
        moved = rename(self, target)
        assert world.loader().drain() == LoadResult(0, 0, 0)
        return moved

    monkeypatch.setattr(Path, "rename", rename_and_look)
    path, lock = claim_directory(world.meter_dir, "gw0-1")
    assert path.exists()
    os.close(lock)


# The loader dies, or the store does


class Crash(BaseException):
    """Nothing catches it, like SIGKILL."""


class CrashAt:
    """Ends the process's life before its n-th statement (or its commit)."""

    def __init__(self, store: Store, at: int) -> None:
        self.left = at
        self.statements = 0
        event.listen(store.engine, "before_cursor_execute", self._statement)
        event.listen(store.engine, "commit", self._commit)
        self._store = store

    def _statement(self, *arguments: Any) -> None:
        self._count()

    def _commit(self, *arguments: Any) -> None:
        self._count()

    def _count(self) -> None:
        self.statements += 1
        self.left -= 1
        if self.left == 0:
            raise Crash

    def stop(self) -> None:
        event.remove(self._store.engine, "before_cursor_execute", self._statement)
        event.remove(self._store.engine, "commit", self._commit)


def two_lives(world: World) -> list[UsageRecord]:
    """A living process with something settled, and a dead one with something settled and something open."""
    living, dead = world.worker("gw0-living"), world.worker("gw1-dead")
    made = []
    for worker in (living, dead):
        worker.lease(world.tenant, 10**9)
        batch = [settled(world.request()) for _ in range(3)]
        worker.write(*batch)
        made += [to_record(each) for each in batch]
    both, left = world.request(), world.request()
    dead.open(both, completion=1)
    dead.write(done := settled(both))
    dead.open(left, completion=9)
    dead.die()
    from tidemill.meter.live import read_unfinished

    owed = [finish_record(each) for each in read_unfinished(dead.directory / LIVE_FILE)]
    return [*made, to_record(done), *(record for record in owed if record.request_id == left.request_id)]


@pytest.mark.slow
def test_a_crash_before_any_statement_changes_nothing_in_the_end(databases: Databases, tmp_path: Path) -> None:
    for at in count(1):
        store = databases.migrated()
        with store.write() as connection:
            from tidemill.store.tenants import create_tenant

            tenant = create_tenant(connection, name="acme", currency="CNY", now=to_record(settled(opened())).started_at)
        world = World(databases, store, tenant, tmp_path / f"meter{at}")
        expected = two_lives(world)
        crash = CrashAt(store, at)
        try:
            world.loader().drain()
            over = True
        except Crash:
            over = False
        crash.stop()
        world.loader().drain()
        world.workers[0].die()
        world.loader().drain()
        world.check_all_over(expected)
        if over:
            assert crash.statements > 20
            break


@pytest.mark.parametrize("dies", ["before", "half", "after"])
def test_a_crash_while_a_directory_is_removed(world: World, monkeypatch: pytest.MonkeyPatch, dies: str) -> None:
    expected = two_lives(world)

    def rmtree(path: Path) -> None:
        if dies == "half":
            for each in sorted(path.iterdir())[:2]:
                each.unlink()
        elif dies == "after":
            original(path)
        raise Crash

    original: Callable[[Path], None] = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    with pytest.raises(Crash):
        world.loader().drain()
    monkeypatch.undo()
    world.loader().drain()
    world.workers[0].die()
    world.loader().drain()
    world.check_all_over(expected)


def test_a_store_that_is_away_delays_and_loses_nothing(world: World) -> None:
    flaky = FlakyStore(world.store.engine)
    loader = world.loader(flaky)
    expected = two_lives(world)
    flaky.down = True
    for _ in range(3):
        with pytest.raises(Unavailable):
            loader.drain()
    flaky.down = False
    flaky.lose_commit = True  # stored, but the loader does not know
    with pytest.raises(Unavailable):
        loader.drain()
    loader.drain()
    world.workers[0].die()
    loader.drain()
    world.check_all_over(expected)


def test_a_log_that_cannot_be_loaded_holds_up_no_other(world: World) -> None:
    """Here: a record of a tenant that does not exist. It stays where it is until somebody has looked at it."""
    bad, good = world.worker("gw0-bad"), world.worker("gw1-good")
    bad.write(settled(opened("req_bad", "ten_nobody")))
    good.lease(world.tenant, 10**9)
    good.write(done := settled(world.request()))
    bad.die()
    loader = world.loader()
    for _ in range(2):
        with pytest.raises(Exception, match="(?i)foreign key") as error:
            loader.drain()
        assert any("gw0-bad" in note for note in error.value.__notes__)
    assert world.records() == [to_record(done)]
    assert bad.directory.exists()


# What an older program has left


def test_the_directory_of_a_process_of_an_older_program_is_finished(world: World) -> None:
    """It was killed, and then Tidemill was upgraded: its log and its live table are of the first format."""
    with world.store.write() as connection:
        connection.execute(insert(tenants).values(tenant_id="ten_1", name="old", currency="CNY", created_at=1))
        grant(connection, "ten_1", GRANTED)
    shutil.copytree(FORMAT1, world.meter_dir / "gw0-old")
    assert world.loader().drain() == LoadResult(11, 3, 1)
    expected = {each["request_id"]: each for each in msgspec.json.decode((FORMAT1 / "expected.json").read_bytes())}
    found = {record.request_id: record for record in world.records()}
    assert found.keys() == expected.keys()
    for request_id, record in found.items():
        assert as_before(record) == expected[request_id]
    charged = sum(record.charge for record in found.values())
    assert balance_of(world.store, "ten_1") == GRANTED - charged
    assert list(world.meter_dir.iterdir()) == []
    assert_clean(world.store)


def test_frames_of_both_formats_in_one_log(world: World) -> None:
    """A process writes one format only; but nothing depends on it."""
    worker = world.worker()
    worker.lease(world.tenant, 10**9)
    old = [frame.payload for frame in read_frames(FORMAT1, (1, 0))]
    plain = msgspec.msgpack.decode(old[0])
    plain[0][1] = world.tenant.tenant_id
    worker.write(new := settled(world.request()), msgspec.Raw(msgspec.msgpack.encode(plain)))
    assert world.loader().drain() == LoadResult(2, 0, 0)
    assert {record.request_id for record in world.records()} == {new.opened.request_id, "req_plain"}


# Months, and masses


def test_a_month_ends_at_its_own_midnight_however_late_the_loader_is(world: World) -> None:
    midnight = parse_period("2026-11", ZONE).start
    worker = world.worker()
    worker.lease(world.tenant, 10**9)
    last, first = to_micros(midnight) - 1, to_micros(midnight)
    batch = [settled(world.request(started_us=last - 10**6), finished_us=at) for at in (last, first, last, first)]
    worker.write(*batch)
    world.loader().drain()
    with world.store.read() as connection:
        at = connection.execute(
            select(transactions.c.at).where(transactions.c.kind == "usage_charge").order_by(transactions.c.at)
        )
        assert at.scalars().all() == [last, first]
        for month, start, end in (
            ("2026-10", midnight - timedelta(days=31), midnight),
            ("2026-11", midnight, midnight + timedelta(days=30)),
        ):
            period = parse_period(month, ZONE)
            assert (period.start, period.end) == (start, end)
            found = list(records_between(connection, tenant_id=None, start=start, end=end))
            assert len(found) == 2
    assert_clean(world.store)


def test_a_backlog_is_stored_in_batches_and_goes_on_where_it_broke_off(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = world.worker(segment_bytes=256 * 1024)
    worker.lease(world.tenant, GRANTED)
    made = [settled(world.request()) for _ in range(5000)]
    worker.write(*made)
    batches: list[int] = []

    def store_rows(connection: Any, rows: Any, charges: Any) -> None:
        batches.append(len(rows))
        if len(batches) == 2:
            raise Unavailable("The database does not answer.")
        store_rows_of_batch(connection, rows, charges)

    monkeypatch.setattr(loader_module, "store_rows", store_rows)
    loader = world.loader()
    with pytest.raises(Unavailable):
        loader.drain()
    assert len(world.records()) == 2000
    assert loader.drain() == LoadResult(3000, 0, 0)
    assert batches == [2000, 2000, 2000, 1000]
    worker.die()
    loader.drain()
    world.check_all_over([to_record(each) for each in made])


# Leases without a directory


def test_leases_of_processes_that_left_no_trace_are_given_back(world: World) -> None:
    worker = world.worker()
    worker.lease(world.tenant, 300)
    with world.store.write() as connection:
        extend_lease(connection, worker_id="gw9-gone", tenant_id=world.tenant.tenant_id, need=500, slices=10**15)
    assert world.leased() == 800
    assert world.loader().release_strays() == 1
    assert world.leased() == 300
    assert world.loader().release_strays() == 0


def test_the_lease_of_a_dead_process_is_no_stray_before_its_log_was_drained(world: World) -> None:
    worker = world.worker()
    worker.lease(world.tenant, 10**9)
    worker.write(settled(world.request()))
    worker.die()
    assert world.loader().release_strays() == 0
    assert world.leased() == 10**9
