"""Attempts and their meters in one transaction each: whatever is repeated, lost or done at the same time."""

import threading
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import update

from tests.store.databases import databases, quick_directory, store
from tests.store.values import LONG_AGO, OCTOBER, assert_clean, grant
from tests.support.examples import examples
from tidemill.errors import TidemillError
from tidemill.fleet.backend import Device
from tidemill.ledger.devices import DeviceTier
from tidemill.ledger.money import Nanos, parse_amount
from tidemill.store.balance_leases import leased
from tidemill.store.device_meters import MeterStart, begin_meters, meter_rows, open_meters, verify_meters
from tidemill.store.device_prices import agreed_price, set_device_price
from tidemill.store.engine import Store
from tidemill.store.ids import new_id
from tidemill.store.job_transitions import put_back
from tidemill.store.jobs import (
    Attempt,
    AttemptOutcome,
    Job,
    JobSpec,
    JobState,
    ask_to_cancel,
    create_job,
    find_job,
    new_job_id,
)
from tidemill.store.reservations import (
    Reservation,
    ReservationState,
    cancel_reservation,
    create_reservation,
    find_reservation,
    step_reservation,
)
from tidemill.store.tables.jobs import jobs
from tidemill.store.tenants import Tenant, create_tenant
from tidemill.work.jobs.attempt_store import AttemptEnd, AttemptStore

__all__ = ["databases", "quick_directory", "store"]

HOUR = parse_amount("3.6")
US = 1_000_000


def seconds(count: float) -> timedelta:
    return timedelta(seconds=count)


class World:
    """A tenant with money and prices, and a ledger of jobs."""

    def __init__(self, store: Store, balance: str = "1000000") -> None:
        self.store = store
        self.ledger = AttemptStore(store, "Asia/Shanghai")
        self.devices = [Device(f"n/{index}", "n", index, "cpu") for index in range(4)]
        with store.write() as connection:
            self.tenant: Tenant = create_tenant(connection, name="acme", currency="CNY", now=LONG_AGO)
            grant(connection, self.tenant.tenant_id, parse_amount(balance))
            for tier in (DeviceTier.STANDARD, DeviceTier.PREEMPTIBLE):
                set_device_price(connection, kind="cpu", currency="CNY", tier=tier, hour=Nanos(HOUR), now=LONG_AGO)

    def submit(self, reservation_id: str | None = None) -> Job:
        job = Job(
            job_id=new_job_id(),
            tenant_id=self.tenant.tenant_id,
            site="here",
            name="test",
            queue="acme",
            spec=JobSpec(argv=("true",), devices=2, grace_s=5.0),
            reservation_id=reservation_id,
            submitted_at=OCTOBER,
        )
        with self.store.write() as connection:
            create_job(connection, job, max_open=100)
        return job

    def reserve(self, *, starts_s: float = 0, lasts_s: float = 100, active: bool = True) -> Reservation:
        """A reservation of two devices, with its meter if it is active."""
        starts_at = OCTOBER + seconds(starts_s)
        with self.store.write() as connection:
            price = agreed_price(connection, kind="cpu", currency="CNY", hour=Nanos(HOUR), now=LONG_AGO)
            made = Reservation(
                reservation_id=new_id("res"),
                tenant_id=self.tenant.tenant_id,
                kind="cpu",
                devices=2,
                starts_at=starts_at,
                ends_at=starts_at + seconds(lasts_s),
                price_id=price.price_id,
                created_at=LONG_AGO,
            )
            create_reservation(connection, made)
            if active:
                states = (ReservationState.BOOKED,), ReservationState.ACTIVE
                assert step_reservation(connection, made.reservation_id, *states)
                wish = MeterStart(
                    price=price,
                    tier=DeviceTier.RESERVED,
                    devices=2,
                    hold_s=30,
                    reservation_id=made.reservation_id,
                )
                begin_meters(connection, tenant_id=self.tenant.tenant_id, currency="CNY", starts=[wish], now=starts_at)
        return made

    def end_reservation(self, reservation: Reservation) -> None:
        """As its time is over."""
        from tidemill.store.device_meters import MeterReading, read_meters

        with self.store.write() as connection:
            wishes = [
                MeterReading(meter_id=meter.meter_id, until=reservation.ends_at, final=True)
                for meter in open_meters(connection, reservation_id=reservation.reservation_id)
            ]
            read_meters(connection, self.tenant.tenant_id, wishes, zone="UTC")
            states = (ReservationState.ACTIVE,), ReservationState.ENDED
            assert step_reservation(connection, reservation.reservation_id, *states)

    def run(self, job: Job, devices: int = 2) -> Attempt:
        """Start it at the beginning of October's working day."""
        attempt = self.ledger.begin(job, self.devices[:devices], ranks=1, why="test", now=OCTOBER)
        assert attempt is not None
        self.ledger.start(attempt, OCTOBER)
        return Attempt(**{name: getattr(attempt, name) for name in attempt.__struct_fields__} | {"started_at": OCTOBER})

    def end(self, job: Job, attempt: Attempt, after_s: float, becomes: JobState = JobState.SUCCEEDED) -> None:
        ending = AttemptEnd(
            outcome=AttemptOutcome.SUCCEEDED if becomes is JobState.SUCCEEDED else AttemptOutcome.PREEMPTED,
            exit_code=0,
            reason="ended",
            ran_us=round(after_s * US),
            becomes=becomes,
            job_reason="ended",
        )
        self.ledger.end(job, attempt, round(after_s * US), ending)

    def job(self, job: Job) -> Job:
        with self.store.read() as connection:
            return find_job(connection, job.job_id)

    def billed_us(self, job: Job) -> int:
        with self.store.read() as connection:
            rows = meter_rows(connection, tenant_id=self.tenant.tenant_id, job_id=job.job_id)
        return sum(row.device_us for row in rows)

    def check(self) -> None:
        """Nothing is held any more, nothing open; the books are right."""
        assert_clean(self.store)
        with self.store.read() as connection:
            assert verify_meters(connection) == []
            assert open_meters(connection) == []
            assert leased(connection, self.tenant.tenant_id) == 0


@pytest.fixture
def world(store: Store) -> World:
    return World(store)


def test_billing_begins_where_the_reservation_ended(world: World) -> None:
    """However late it is noticed: no moment is billed twice, and none is for nothing."""
    reservation = world.reserve()
    job = world.submit(reservation.reservation_id)
    attempt = world.run(job)
    world.end_reservation(reservation)
    (meter,) = world.ledger.begin_billing(job, attempt, OCTOBER + seconds(160))
    assert meter.started_at == reservation.ends_at
    world.end(job, attempt, 200)
    assert world.billed_us(job) == 2 * 100 * US
    world.check()


def test_a_job_that_began_after_its_reservation_ended_is_billed_from_its_beginning(world: World) -> None:
    reservation = world.reserve(starts_s=-300, lasts_s=200)
    job = world.submit(reservation.reservation_id)
    attempt = world.run(job)
    world.end_reservation(reservation)
    (meter,) = world.ledger.begin_billing(job, attempt, OCTOBER + seconds(1))
    assert meter.started_at == OCTOBER
    world.end(job, attempt, 10)
    assert world.billed_us(job) == 20 * US
    world.check()


def test_billing_that_is_begun_again_is_not_begun_twice(world: World) -> None:
    """The answer to the first commit was lost."""
    reservation = world.reserve()
    job = world.submit(reservation.reservation_id)
    attempt = world.run(job)
    world.end_reservation(reservation)
    first = world.ledger.begin_billing(job, attempt, OCTOBER + seconds(101))
    assert world.ledger.begin_billing(job, attempt, OCTOBER + seconds(102)) == first
    world.end(job, attempt, 150)
    assert world.billed_us(job) == 2 * 50 * US
    world.check()


def test_billing_is_not_begun_for_what_has_ended(world: World) -> None:
    reservation = world.reserve()
    job = world.submit(reservation.reservation_id)
    attempt = world.run(job)
    world.end_reservation(reservation)
    world.end(job, attempt, 150)
    assert world.ledger.begin_billing(job, attempt, OCTOBER + seconds(160)) == []
    world.check()


def test_an_end_while_billing_begins(world: World) -> None:
    """Both at once, in either order, without waiting for each other."""
    for _ in range(10):
        reservation = world.reserve()
        job = world.submit(reservation.reservation_id)
        attempt = world.run(job)
        world.end_reservation(reservation)
        failures: list[BaseException] = []

        def doing(act: Callable[[], object], failures: list[BaseException] = failures) -> threading.Thread:
            def run() -> None:
                try:
                    act()
                except BaseException as error:
                    failures.append(error)

            thread = threading.Thread(target=run)
            thread.start()
            return thread

        threads = [
            doing(lambda j=job, a=attempt: world.ledger.begin_billing(j, a, OCTOBER + seconds(101))),  # type: ignore[misc]
            doing(lambda j=job, a=attempt: world.end(j, a, 150)),  # type: ignore[misc]
        ]
        for thread in threads:
            thread.join()
        assert failures == []
        world.check()


def test_a_reservation_that_is_to_come_runs_nothing_yet(world: World) -> None:
    """Else its jobs would have devices for nothing until then."""
    reservation = world.reserve(starts_s=3600, active=False)
    job = world.submit(reservation.reservation_id)
    with pytest.raises(TidemillError, match="is not in force"):
        world.ledger.begin(job, world.devices[:2], ranks=1, why="test", now=OCTOBER)
    assert world.job(job).state is JobState.QUEUED
    world.check()


def test_a_reservation_pays_for_no_more_devices_than_it_has(world: World) -> None:
    reservation = world.reserve()
    first, second = world.submit(reservation.reservation_id), world.submit(reservation.reservation_id)
    attempt = world.run(first)
    with pytest.raises(TidemillError, match="has 2 devices"):
        world.ledger.begin(second, world.devices[2:], ranks=1, why="test", now=OCTOBER)
    world.end(first, attempt, 10)
    assert world.ledger.begin(second, world.devices[2:], ranks=1, why="test", now=OCTOBER) is not None


def test_a_cancelled_reservation_ends_when_it_was_cancelled(world: World) -> None:
    at = OCTOBER + seconds(30)
    for starts_s, ends_at in ((0, at), (60, OCTOBER + seconds(60)), (-3600, OCTOBER - seconds(3500))):
        reservation = world.reserve(starts_s=starts_s, active=False)
        with world.store.write() as connection:
            cancelled = cancel_reservation(connection, reservation.reservation_id, "enough", now=at)
        assert cancelled.state is ReservationState.CANCELLED and cancelled.ends_at == ends_at
        with world.store.read() as connection:
            assert find_reservation(connection, reservation.reservation_id) == cancelled


def test_a_wish_to_cancel_that_came_while_it_ran_holds_when_it_waits_again(world: World) -> None:
    job = world.submit()
    attempt = world.run(job)
    with world.store.write() as connection:
        assert ask_to_cancel(connection, job.job_id, now=OCTOBER).state is JobState.RUNNING
    world.end(job, attempt, 10, becomes=JobState.QUEUED)
    over = world.job(job)
    assert over.state is JobState.CANCELLED and over.ended_at == OCTOBER + seconds(10)
    world.check()


def test_a_wish_to_cancel_what_never_began_holds_after_a_kill(world: World) -> None:
    job = world.submit()
    with world.store.write() as connection:
        connection.execute(update(jobs).values(state=JobState.STARTING.value))
        ask_to_cancel(connection, job.job_id, now=OCTOBER)
        put_back(connection, job.job_id)
    assert world.job(job).state is JobState.CANCELLED


def test_a_wish_to_cancel_is_not_lost_between_two_states(world: World) -> None:
    """The job is being put back in the queue by somebody whose commit comes meanwhile."""
    job = world.submit()
    with world.store.write() as connection:
        connection.execute(update(jobs).values(state=JobState.RUNNING.value))
    asked: list[Job] = []

    def ask() -> None:
        with world.store.write() as connection:
            asked.append(ask_to_cancel(connection, job.job_id, now=OCTOBER))

    with world.store.write() as connection:
        connection.execute(update(jobs).values(state=JobState.QUEUED.value))
        thread = threading.Thread(target=ask)
        thread.start()
        time.sleep(0.3)  # it waits for this transaction; if it does not yet, the test is only weaker
    thread.join()
    assert asked[0].state is JobState.CANCELLED
    assert world.job(job).state is JobState.CANCELLED


def test_an_end_that_is_written_twice_is_billed_once(world: World) -> None:
    job = world.submit()
    attempt = world.run(job)
    world.end(job, attempt, 10)
    world.end(job, attempt, 99)
    assert world.billed_us(job) == 20 * US
    world.check()


def test_what_is_taken_and_never_runs_costs_nothing(world: World) -> None:
    job = world.submit()
    attempt = world.ledger.begin(job, world.devices[:2], ranks=1, why="test", now=OCTOBER)
    assert attempt is not None
    world.end(job, attempt, 0, becomes=JobState.CANCELLED)
    assert world.billed_us(job) == 0
    world.check()


@examples(0.25)
@given(noticed_s=st.floats(0, 1e5), runs_s=st.integers(0, 10**5), reserved_s=st.integers(1, 10**5))
def test_reservation_and_job_together_bill_each_moment_once(
    world: World, noticed_s: float, runs_s: int, reserved_s: int
) -> None:
    reservation = world.reserve(lasts_s=reserved_s)
    job = world.submit(reservation.reservation_id)
    attempt = world.run(job)
    world.end_reservation(reservation)
    if reserved_s + noticed_s <= runs_s:
        world.ledger.begin_billing(job, attempt, reservation.ends_at + seconds(noticed_s))
        world.end(job, attempt, runs_s)
        assert world.billed_us(job) == 2 * (runs_s - reserved_s) * US
    else:
        world.end(job, attempt, runs_s)
        assert world.billed_us(job) == 0
    world.check()
