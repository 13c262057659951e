"""The lifecycle of a batch: opened, sealed, and what becomes of files whose time is over.

Everything here blocks on the disk and the store, and may be repeated after a kill at any moment.
"""

import os
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path

import msgspec
import structlog

from tidemill.clock import PROCESS_CLOCK
from tidemill.store.batches import (
    Batch,
    BatchStatus,
    LineCounts,
    LineError,
    fail_batch,
    find_batch,
    finish_batch,
    note_counts,
    open_batches,
    seal_batch,
    start_batch,
)
from tidemill.store.blobs import BlobStore
from tidemill.store.engine import Store
from tidemill.store.files import File, delete_expired, known_files
from tidemill.work.batches.active_batch import ActiveBatch
from tidemill.work.batches.lines import InvalidBatchInput, LineRules, read_index
from tidemill.work.batches.results import ERRORS, OUTPUT, Results

ANY = LineRules(max_lines=2**31, max_line_bytes=2**31)
"""For a file that was checked when its batch began: the limits may have changed since."""

log = structlog.get_logger()


class Lifecycle:
    """The batches of one site. `keep_s`: how long their files are kept when their owner does not say."""

    def __init__(self, store: Store, blobs: BlobStore, rules: LineRules, *, keep_s: int) -> None:
        self._store = store
        self._blobs = blobs
        self._rules = rules
        self._keep_s = keep_s

    def open(self) -> list[Batch]:
        """The unfinished batches, the most urgent first."""
        with self._store.read() as connection:
            return open_batches(connection, self._blobs.site)

    def take(self, batch: Batch, names: Mapping[str, str]) -> ActiveBatch | None:
        """Open a batch, as a new one or where an earlier runner has left it; None when it is over now.

        `names`: all names that a model can be asked for by, and the models' own.
        """
        with self._store.read() as connection:  # what the caller knows may be older than its end
            batch = find_batch(connection, tenant_id=batch.tenant_id, batch_id=batch.batch_id)
        if batch.finished:
            return None
        if batch.outcome is not None:
            self._finish(batch, batch.outcome, batch.counts)
            return None
        if batch.status is BatchStatus.CANCELLING and batch.in_progress_at is None:
            self._seal(batch, BatchStatus.CANCELLED, LineCounts())
            return None
        new = batch.status is BatchStatus.VALIDATING
        path = self._blobs.path(batch.input_file_id)
        try:
            index = read_index(path, batch.endpoint, self._rules if new else ANY, names if new else None)
            input_fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except InvalidBatchInput as error:
            self._fail(batch, error.errors)
            return None
        except FileNotFoundError:
            self._fail(batch, [LineError("input_file_missing", "The content of the input file is missing.")])
            return None
        if new:
            model = index.models[0] if len(index.models) == 1 else None
            with self._store.write() as connection:
                started = start_batch(
                    connection, batch.batch_id, total=len(index), model=model, now=PROCESS_CLOCK.now()
                )
            batch = msgspec.structs.replace(batch, total=len(index), model=model)
            if not started:  # cancelled meanwhile: the next look finds it so
                os.close(input_fd)
                return None
        index.rename(names)
        try:
            return ActiveBatch(batch, index, input_fd, Results(self._blobs.batch_directory(batch.batch_id)))
        except BaseException:
            os.close(input_fd)
            raise

    def note(self, active: ActiveBatch) -> None:
        """Tell the store how far a batch has come."""
        counts = active.results.counts
        if counts != active.noted:
            with self._store.write() as connection:
                note_counts(connection, active.batch.batch_id, counts)
            active.noted = counts

    def put_away(self, active: ActiveBatch) -> None:
        """End a batch whose lines are all done or given up: its files appear, and its state is final."""
        active.give_up_rest()
        active.results.sync()
        self._seal(active.batch, active.outcome, active.results.counts)
        active.close()

    def sweep(self, *, orphans: bool) -> None:
        """Remove files whose time is over and what killed processes have left.

        `orphans`: blobs without a row too.
        """
        while True:
            with self._store.write() as connection:
                expired = delete_expired(connection, site=self._blobs.site, now=PROCESS_CLOCK.now())
            self._blobs.remove(expired)
            if not expired:
                break
        self._blobs.sweep_incoming()
        if orphans:
            self._blobs.sweep_orphans(self._known)

    def _known(self, file_ids: list[str]) -> set[str]:
        """Files, and what a kill has left between an output file and its row."""
        with self._store.read() as connection:
            known = known_files(connection, file_ids)
            for batch in open_batches(connection, self._blobs.site):
                known.update(_output_ids(batch))
        return known

    def _fail(self, batch: Batch, errors: list[LineError]) -> None:
        with self._store.write() as connection:
            failed = fail_batch(connection, batch.batch_id, errors, PROCESS_CLOCK.now())
        directory = self._blobs.batch_directory(batch.batch_id)
        if failed:
            self._blobs.remove_batch_directory(batch.batch_id)
            log.info("batch failed", batch=batch.batch_id, error=errors[0].code)
        else:  # cancelled meanwhile
            results = Results(directory)
            results.close()
            self._seal(batch, BatchStatus.CANCELLED, results.counts)

    def _seal(self, batch: Batch, outcome: BatchStatus, counts: LineCounts) -> None:
        """Write down what the batch becomes; from here on it is not worked on any more."""
        with self._store.write() as connection:
            sealed = seal_batch(connection, batch, outcome, counts, PROCESS_CLOCK.now())
        assert sealed.outcome is not None
        self._finish(sealed, sealed.outcome, sealed.counts)

    def _finish(self, batch: Batch, outcome: BatchStatus, counts: LineCounts) -> None:
        """Make the results files of the tenant, and the batch's state final."""
        now = PROCESS_CLOCK.now()
        directory = self._blobs.batch_directory(batch.batch_id)
        output_id, error_id = _output_ids(batch)
        output = self._adopt(batch, directory / OUTPUT, output_id, f"{batch.batch_id}_output.jsonl", now)
        error = self._adopt(batch, directory / ERRORS, error_id, f"{batch.batch_id}_error.jsonl", now)
        with self._store.write() as connection:
            finish_batch(connection, batch, outcome, counts, output=output, error=error, now=now)
        self._blobs.remove_batch_directory(batch.batch_id)
        log.info("batch ended", batch=batch.batch_id, outcome=outcome.value, **msgspec.structs.asdict(counts))

    def _adopt(self, batch: Batch, part: Path, file_id: str, name: str, now: datetime) -> File | None:
        if part.exists() and part.stat().st_size == 0:
            return None
        size = self._blobs.adopt(part, file_id)
        if size is None:
            return None
        return File(
            file_id=file_id,
            tenant_id=batch.tenant_id,
            site=self._blobs.site,
            purpose="batch_output",
            filename=name,
            bytes=size,
            created_at=now,
            expires_at=now + timedelta(seconds=batch.output_expires_s or self._keep_s),
        )


def _output_ids(batch: Batch) -> tuple[str, str]:
    """The ids of a batch's output and error file: always the same, so that making them may be repeated."""
    name = batch.batch_id.removeprefix("batch_")
    return f"file_{name}_out", f"file_{name}_err"
