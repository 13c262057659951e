"""Jobs for tests: a store with a tenant and prices, a real backend over the cores of this machine, and a job book."""

import asyncio
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.support.platform import parent_of
from tests.support.stores import migrated_store
from tidemill.clock import JumpTolerantClock
from tidemill.fleet.backend import Device
from tidemill.fleet.local import LocalBackend
from tidemill.ledger.devices import DeviceTier
from tidemill.ledger.money import Nanos, parse_amount
from tidemill.ledger.posting import credit_grant
from tidemill.store.accounts import post, tenant_balance, verify_books
from tidemill.store.balance_leases import leased
from tidemill.store.device_meters import MeterTotals, meter_rows, verify_meters
from tidemill.store.device_prices import set_device_price
from tidemill.store.engine import Store
from tidemill.store.ids import new_id
from tidemill.store.job_files import JobFiles
from tidemill.store.jobs import Attempt, Job, JobSpec, JobState, create_job, find_job, list_attempts, new_job_id
from tidemill.store.tenants import Tenant, create_tenant, list_tenants
from tidemill.work.jobs.controller import JobController

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_classifier.py"
WITHIN_S = 60.0
HOUR = "3.6"
"""So a device-second costs 0.001."""


class Jobs:
    """A small platform that has jobs and nothing else; several lives on one directory."""

    def __init__(
        self, directory: Path, *, balance: str = "100", tick_s: float = 0.2, files: JobFiles | None = None
    ) -> None:
        self.directory = directory
        fresh = not (directory / "tidemill.db").exists()
        self.store: Store = migrated_store(directory)
        if fresh:
            self._found(balance)
        with self.store.read() as connection:
            self.tenant: Tenant = list_tenants(connection)[0]
        self.devices = [Device(f"local/{index}", "local", index, "cpu") for index in range(2)]
        self.backend = LocalBackend(self.devices, owner=f"jobs-{directory}", secret=["SECRET_OF_TEST"])
        self.files = files or JobFiles(directory / "jobs")
        self.skew_s = 0.0
        clock = JumpTolerantClock(lambda: time.time() + self.skew_s)
        self.controller = JobController(self.store, self.backend, self.files, tick_s=tick_s, clock=clock)

    def _found(self, balance: str) -> None:
        now = datetime.now(UTC)
        with self.store.write() as connection:
            tenant = create_tenant(connection, name="acme", currency="USD", now=now)
            for tier in (DeviceTier.STANDARD, DeviceTier.PREEMPTIBLE):
                set_device_price(connection, kind="cpu", currency="USD", tier=tier, hour=parse_amount(HOUR), now=now)
            self.grant(balance, connection=connection, tenant_id=tenant.tenant_id)

    def grant(self, amount: str, *, connection: Any = None, tenant_id: str | None = None) -> None:
        if connection is None:
            with self.store.write() as own:
                self.grant(amount, connection=own)
            return
        if (nanos := parse_amount(amount)) > 0:
            owner = tenant_id or self.tenant.tenant_id
            at = datetime.now(UTC)
            grant = credit_grant(new_id("txn"), tenant_id=owner, currency="USD", amount=Nanos(nanos), at=at)
            post(connection, grant)

    async def open(self) -> "Jobs":
        await self.backend.open()
        await self.controller.open()
        return self

    async def close(self) -> None:
        await self.controller.close()
        await self.backend.close()
        self.store.close()

    def submit(
        self,
        *argv: str,
        preemptible: bool = True,
        deadline_at: datetime | None = None,
        reservation_id: str | None = None,
        **spec: Any,
    ) -> str:
        job = Job(
            job_id=new_job_id(),
            tenant_id=self.tenant.tenant_id,
            site=self.files.site,
            name="test",
            queue="acme",
            spec=JobSpec(argv=argv, **{"grace_s": 5.0, **spec}),
            preemptible=preemptible,
            deadline_at=deadline_at,
            reservation_id=reservation_id,
            submitted_at=datetime.now(UTC),
        )
        with self.store.write() as connection:
            create_job(connection, job, max_open=100)
        self.controller.wake()
        return job.job_id

    def train(self, *arguments: str, **spec: Any) -> str:
        return self.submit(sys.executable, str(EXAMPLE), *arguments, **spec)

    async def start(self, job_id: str, devices: int = 1) -> None:
        """Do what the tide does, as soon as the job waits."""
        await self.until(lambda: any(view.id == job_id and view.phase == "queued" for view in self.controller.views()))
        self.controller.start(job_id, self.devices[:devices], "for a test")

    async def reach(self, job_id: str, *states: JobState) -> Job:
        """Wait until the job is in one of these states."""
        await self.until(lambda: self.job(job_id).state in states, lambda: str(self.job(job_id)))
        return self.job(job_id)

    async def says(self, job_id: str, text: str, *, attempt: int = 1, rank: int = 0) -> None:
        """Wait until it has said that."""
        path = self.files.log(job_id, attempt, rank)
        await self.until(lambda: path.exists() and text in path.read_text(), lambda: path.read_text())

    async def until(self, true: Callable[[], bool], explain: Callable[[], str] = lambda: "") -> None:
        deadline = time.monotonic() + WITHIN_S
        while not true():
            assert time.monotonic() < deadline, explain()
            await asyncio.sleep(0.02)

    def job(self, job_id: str) -> Job:
        with self.store.read() as connection:
            return find_job(connection, job_id)

    def attempts(self, job_id: str) -> list[Attempt]:
        with self.store.read() as connection:
            return list_attempts(connection, job_id)

    def rows(self) -> list[MeterTotals]:
        with self.store.read() as connection:
            return meter_rows(connection, tenant_id=self.tenant.tenant_id)

    def balance(self) -> int:
        with self.store.read() as connection:
            return tenant_balance(connection, self.tenant.tenant_id)

    def check_books(self) -> None:
        """Every device-second is charged once, nothing is held any more, and the ledger balances."""
        with self.store.read() as connection:
            assert verify_meters(connection) == []
            assert all(not found for found in verify_books(connection).values())
            assert leased(connection, self.tenant.tenant_id) == 0


def spawned(job_id: str) -> list[int]:
    """The living processes of a job, found by their environment."""
    found = []
    mark = f"TIDEMILL_JOB_ID={job_id}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environment = (entry / "environ").read_bytes().split(b"\0")
                state = (entry / "stat").read_bytes().rpartition(b")")[2].split()[0]
            except OSError:
                continue
            if mark in environment and state != b"Z":
                found.append(int(entry.name))
    return found


def shims(parent: int) -> list[int]:
    """The shims of a process (see `fleet.shim`), which look after its replicas and jobs."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if parent_of(int(entry.name)) == parent and any(word.endswith(b"shim.py") for word in words):
                    found.append(int(entry.name))
    return found
