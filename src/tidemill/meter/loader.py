"""Draining usage logs into the store.

What a gateway process has settled becomes records, charges and balances.

Exactly once, by two means in one transaction: the position in the log moves with the records, and a request id is
stored at most once. So it may be killed anywhere and started anew from anywhere.
"""

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
from sqlalchemy import Connection, delete, insert, select

from tidemill.errors import Unavailable
from tidemill.ledger.usage import RequestStatus, TokenUsage, UsageRecord
from tidemill.meter.frames import (
    Position,
    read_frames,
    salvage_frames,
    segment_numbers,
    segment_path,
    sync_directory,
)
from tidemill.meter.live import Unfinished, read_unfinished
from tidemill.meter.records import decode_settled, settle, to_record
from tidemill.meter.settled_rows import SettledReader
from tidemill.store.balance_leases import leasing_workers, release_worker, return_lease
from tidemill.store.budgets import charge_budgets
from tidemill.store.bulk import run
from tidemill.store.engine import Store
from tidemill.store.record_rows import NotAllNew, return_leases, store_rows, with_budgets
from tidemill.store.tables.usage import log_positions
from tidemill.store.usage import store_records

BATCH_RECORDS = 2000
"""Records stored in one transaction, so that a long backlog never holds the database for long."""

LIVE_FILE = "live"
LOCK_FILE = "lock"


class LoadResult(msgspec.Struct, frozen=True):
    """The result of one pass over the logs."""

    records: int = 0
    recovered: int = 0
    """Records that had to be finished for a process that died."""
    workers_closed: int = 0


class Loader:
    """Loads the logs of this machine's gateway processes, each in its directory under `meter_dir`.

    Not thread-safe: one thread calls `drain`. `zone` is the operator's time zone, which decides the billing month.
    """

    def __init__(self, store: Store, meter_dir: Path, *, zone: str) -> None:
        self._store = store
        self._meter_dir = meter_dir
        self._zone = zone
        self._reader = SettledReader(zone)
        self._positions: dict[str, Position] = {}
        self.read: dict[str, int] = {}
        """Records taken from the log of each gateway process that is alive, or not finished yet."""
        self.stored = 0
        """Records stored since the start, `recovered` among them."""
        self.recovered = 0
        self.complete_at = time.monotonic()
        """On the monotonic clock: all that was settled by then is in the store."""

    def drain(self) -> LoadResult:
        """Store everything that is settled by now; finish and remove the logs of processes that are gone.

        Raises Unavailable when the store does not answer; nothing is lost then, and the next call goes on. A log that
        cannot be loaded stays as it is and does not hold up the others; its error is raised at the end.
        """
        began = time.monotonic()
        records = recovered = closed = 0
        failure: Exception | None = None
        for directory in sorted(path for path in self._meter_dir.iterdir() if path.is_dir()):
            try:
                # Whether the process is gone must be known before its log is read to the end.
                with _owned(directory) as gone:
                    records += self._drain_log(directory)
                    if gone:
                        finished = self._finish(directory)
                        self.stored += finished
                        self.recovered += finished
                        recovered += finished
                        closed += 1
            except Unavailable:
                raise
            except Exception as error:
                error.add_note(f"in the usage log {directory}")
                failure = failure or error
        if failure is not None:
            raise failure
        self.complete_at = began
        return LoadResult(records + recovered, recovered, closed)

    def release_strays(self) -> int:
        """Give back leases of workers of this store that have no directory here; for an embedded store only.

        Such a lease is left when the power fails between a lease and the directory's own creation. With a shared
        database the directory may be on another machine, so its lease must not be touched.
        """
        here = {path.name for path in self._meter_dir.iterdir() if path.is_dir()}
        with self._store.write() as connection:
            strays = leasing_workers(connection) - here
            for worker_id in strays:
                release_worker(connection, worker_id)
        return len(strays)

    def _drain_log(self, directory: Path) -> int:
        worker_id = directory.name
        position = self._position(worker_id)
        total = 0
        batch: list[bytes] = []
        for each in read_frames(directory, position):
            batch.append(each.payload)
            position = each.after
            if len(batch) >= BATCH_RECORDS:
                total += self._store_batch(worker_id, batch, position)
                batch = []
        if batch:
            total += self._store_batch(worker_id, batch, position)
        for number in segment_numbers(directory):
            if number < self._positions[worker_id][0]:
                segment_path(directory, number).unlink(missing_ok=True)
        return total

    def _position(self, worker_id: str) -> Position:
        position = self._positions.get(worker_id)
        if position is None:
            with self._store.read() as connection:
                row = connection.execute(
                    select(log_positions.c.segment, log_positions.c.offset).where(
                        log_positions.c.worker_id == worker_id
                    )
                ).first()
            position = self._positions[worker_id] = (row[0], row[1]) if row else (1, 0)
        return position

    def _store_batch(self, worker_id: str, batch: list[bytes], position: Position) -> int:
        fresh = self._store_new(worker_id, batch, position)
        if fresh is None:
            records = [to_record(decode_settled(each)) for each in batch]
            with self._store.write() as connection:
                fresh = self._store_and_charge(connection, worker_id, records)
                _move_position(connection, worker_id, position)
        self._positions[worker_id] = position
        self.read[worker_id] = self.read.get(worker_id, 0) + len(batch)
        self.stored += fresh
        return fresh

    def _store_new(self, worker_id: str, batch: list[bytes], position: Position) -> int | None:
        """Store a batch of which nothing is stored yet, as it nearly always is. None, and nothing is stored, when it
        is not so, or there is more to it than rows.
        """
        found = self._reader.read(batch)
        if found is None:
            return None
        spent = found.spent()
        try:
            with self._store.write() as connection:
                store_rows(connection, found.rows, found.charges)
                return_leases(connection, worker_id, spent)
                tenants = with_budgets(connection, [tenant_id for tenant_id, _ in spent]) if spent else ()
                if tenants:
                    records = (to_record(decode_settled(each)) for each in batch)
                    bound = [record for record in records if record.tenant_id in tenants]
                    charge_budgets(connection, worker_id, bound, zone=self._zone)
                _move_position(connection, worker_id, position)
        except NotAllNew:
            return None
        return len(found.rows)

    def _store_and_charge(self, connection: Connection, worker_id: str, batch: list[UsageRecord]) -> int:
        fresh = store_records(connection, batch, zone=self._zone)
        spent: dict[str, int] = {}
        for record in fresh:
            spent[record.tenant_id] = spent.get(record.tenant_id, 0) + record.charge
        for tenant_id in sorted(spent):
            if spent[tenant_id]:
                return_lease(connection, worker_id=worker_id, tenant_id=tenant_id, amount=spent[tenant_id])
        charge_budgets(connection, worker_id, fresh, zone=self._zone)
        return len(fresh)

    def _finish(self, directory: Path) -> int:
        """Write the records that a dead process still owed, give its leases back, and remove its directory."""
        worker_id = directory.name
        # A request may be in both: what the log says of it comes first, and a record is stored once.
        owed = [to_record(decode_settled(each)) for each in salvage_frames(directory, self._position(worker_id))]
        settled = {record.request_id for record in owed}
        left_open = (finish_record(each) for each in read_unfinished(directory / LIVE_FILE))
        owed += [record for record in left_open if record.request_id not in settled]
        with self._store.write() as connection:
            recovered = self._store_and_charge(connection, worker_id, owed)
            release_worker(connection, worker_id)
            connection.execute(delete(log_positions).where(log_positions.c.worker_id == worker_id))
        self._positions.pop(worker_id, None)
        self.read.pop(worker_id, None)
        shutil.rmtree(directory)
        return recovered


def finish_record(left: Unfinished) -> UsageRecord:
    """The record of a request that was open when its gateway died; bills only what had passed.

    Counts that no engine report confirms (no token had passed) are zero: the tenant got nothing.
    """
    finished_us = max(left.first_token_us, left.opened.started_us)
    return to_record(
        settle(
            left.opened,
            TokenUsage(left.prompt, left.cached, left.completion),
            status=RequestStatus.GATEWAY_LOST,
            estimated=left.estimated,
            hold=left.hold,
            first_token_us=left.first_token_us,
            finished_us=finished_us,
            device_ns=0,
        )
    )


def _move_position(connection: Connection, worker_id: str, position: Position) -> None:
    segment, offset = position
    changed = run(
        connection, 'UPDATE log_positions SET segment = ?, "offset" = ? WHERE worker_id = ?', segment, offset, worker_id
    )
    if changed.rowcount == 0:
        connection.execute(insert(log_positions).values(worker_id=worker_id, segment=segment, offset=offset))


@contextlib.contextmanager
def _owned(directory: Path) -> Iterator[bool]:
    """True if no gateway holds the directory's lock, which is then held within the context."""
    fd = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(fd)


def claim_directory(meter_dir: Path, worker_id: str) -> tuple[Path, int]:
    """Create a gateway process's directory and lock it; returns the path and the lock's descriptor.

    The directory appears under its name only once it is locked, so the loader never takes it for a dead one's.
    """
    temporary = meter_dir.parent / f".{worker_id}.new"
    temporary.mkdir(mode=0o700, parents=True)
    fd = os.open(temporary / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX)
    path = meter_dir / worker_id
    temporary.rename(path)
    sync_directory(meter_dir)
    sync_directory(meter_dir.parent)
    return path, fd
