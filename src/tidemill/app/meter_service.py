"""The meter's chores in the supervisor.

What gateways settle is stored, engines' own counters are noted beside it, and the two are compared.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import structlog

from tidemill.app.datadir import DataDir
from tidemill.app.fleet import Fleet, Sample
from tidemill.app.worker import ORPHAN_GRACE_S
from tidemill.errors import TidemillError, Unavailable
from tidemill.meter.loader import Loader
from tidemill.meter.reconcile import ReconcileReport, note_counters, reconcile
from tidemill.store.engine import Store

LOAD_EVERY_S = 0.1
BUSY_LOAD_EVERY_S = 0.4
"""The same while a load finds more than BUSY_RECORDS: each costs a commit and some statements, however many come."""
BUSY_RECORDS = 100
SAMPLE_EVERY_S = 5.0
SAME_FAILURE_S = 300.0
"""How often a failure that lasts is logged."""

log = structlog.get_logger()


class MeterService:
    """Stores the usage logs of this machine's gateways, and samples its engines."""

    def __init__(self, store: Store, data: DataDir, *, zone: str, progress: Callable[[str], None]) -> None:
        self._store = store
        self._data = data
        self._progress = progress
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._tasks: list[asyncio.Task[None]] = []
        self.loader = Loader(store, data.meter, zone=zone)

    def watch(self, fleet: Fleet) -> None:
        """Whose engines are sampled; a replica's last figures come by `keep_samples`."""
        self._fleet = fleet
        fleet.keep = self.keep_samples

    def start(self) -> None:
        """Begin to load and to sample, until `stop`."""
        self._tasks = [asyncio.create_task(self._keep_loading()), asyncio.create_task(self._keep_sampling())]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def close(self) -> None:
        """Load what is left. What cannot be is loaded at the next start."""
        try:
            await self.load()
        except TidemillError as error:
            log.error("the store does not answer; what is left is loaded at the next start", reason=str(error))
        except Exception:
            log.exception("loading failed; what is left is loaded at the next start")
        self._executor.shutdown(wait=True)

    async def drain_usage(self) -> None:
        """All that was settled until now is in the store afterwards, as far as it can be loaded."""
        try:
            await self.load()
        except TidemillError:
            raise
        except Exception as error:  # of one log, which must not keep the others' figures from their readers
            log.debug("loading failed", reason=str(error))  # `_keep_loading` says so

    async def load(self) -> int:
        """Store what is settled by now; gives the number of records."""
        drained = await asyncio.get_running_loop().run_in_executor(self._executor, self.loader.drain)
        return drained.records

    async def reconcile(self) -> ReconcileReport:
        """Sample the engines' counters now and compare them with all records."""
        await self.sample()
        await self.drain_usage()

        def compare() -> ReconcileReport:
            replicas = [replica.name for spec in self._fleet.specs() for replica in spec.replicas]
            with self._store.read() as connection:
                return reconcile(connection, replicas=replicas)

        return await asyncio.to_thread(compare)

    async def recover(self) -> None:
        """Store what an earlier run has settled and finish what it left open.

        After a kill of the supervisor alone its gateways still let their requests finish, for a few seconds; they
        hold the port as well.
        """
        records = recovered = 0
        deadline = time.monotonic() + ORPHAN_GRACE_S + 10.0
        said = False
        while True:
            try:
                drained = await asyncio.to_thread(self.loader.drain)
            except TidemillError:
                raise
            except Exception:  # one log that cannot be loaded must not keep the platform down; it stays where it is
                log.exception("a usage log of the earlier run cannot be loaded")
                break
            records, recovered = records + drained.records, recovered + drained.recovered
            if not any(path.is_dir() for path in self._data.meter.iterdir()) or time.monotonic() > deadline:
                break
            if not said:
                self._progress("waiting for a gateway of the earlier run to finish its requests")
                said = True
            await asyncio.sleep(0.2)
        if records:
            self._progress(f"recovered {records} usage records of the earlier run, {recovered} of them unfinished")

    async def _keep_loading(self) -> None:
        quiet_until = failed_until = 0.0
        failure = ""
        found = 0
        while True:
            await asyncio.sleep(LOAD_EVERY_S if found < BUSY_RECORDS else BUSY_LOAD_EVERY_S)
            try:
                found = await self.load()
            except Unavailable as error:
                if time.monotonic() > quiet_until:
                    quiet_until = time.monotonic() + 10.0
                    log.warning("the store does not answer; records wait in the logs", reason=str(error))
                await asyncio.sleep(1.0)
            except Exception as error:
                reason = repr(error)
                if reason != failure or time.monotonic() > failed_until:
                    failure, failed_until = reason, time.monotonic() + SAME_FAILURE_S
                    log.exception("loading failed; records wait in the logs", told_again_in_s=SAME_FAILURE_S)
                await asyncio.sleep(1.0)

    async def _keep_sampling(self) -> None:
        while True:
            await asyncio.sleep(SAMPLE_EVERY_S)
            try:
                await self.sample()
            except Unavailable as error:
                log.warning("the engines' counters are not noted", reason=str(error))
            except Exception:
                log.exception("sampling the engines' counters failed")

    async def sample(self) -> None:
        samples = await self._fleet.counters()
        if samples:
            await asyncio.to_thread(self.keep_samples, samples)

    def keep_samples(self, samples: list[Sample]) -> None:
        now = datetime.now(UTC)
        with self._store.write() as connection:
            for replica, incarnation, counters in samples:
                note_counters(
                    connection,
                    replica=replica,
                    life=incarnation,
                    prompt=counters.prompt,
                    completion=counters.completion,
                    now=now,
                )
