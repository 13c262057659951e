"""The job book against what can go wrong between it and the store: every device-second is billed once."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.support.jobs import Jobs, spawned
from tidemill.errors import Unavailable
from tidemill.ledger.devices import DeviceTier
from tidemill.ledger.money import Nanos, parse_amount
from tidemill.store.device_prices import agreed_price
from tidemill.store.ids import new_id
from tidemill.store.jobs import Attempt, AttemptOutcome, JobState, ask_to_cancel
from tidemill.store.reservations import (
    Reservation,
    ReservationState,
    cancel_reservation,
    create_reservation,
    find_reservation,
)

MICROSECOND = timedelta(microseconds=1)


def book(jobs: Jobs, starts_in_s: float, lasts_s: float) -> Reservation:
    now = datetime.now(UTC)
    with jobs.store.write() as connection:
        price = agreed_price(connection, kind="cpu", currency="USD", hour=Nanos(parse_amount("7.2")), now=now)
        made = Reservation(
            reservation_id=new_id("res"),
            tenant_id=jobs.tenant.tenant_id,
            kind="cpu",
            devices=2,
            starts_at=now + timedelta(seconds=starts_in_s),
            ends_at=now + timedelta(seconds=starts_in_s + lasts_s),
            price_id=price.price_id,
            created_at=now,
        )
        create_reservation(connection, made)
    jobs.controller.wake()
    return made


def state(jobs: Jobs, reservation: Reservation) -> ReservationState:
    with jobs.store.read() as connection:
        return find_reservation(connection, reservation.reservation_id).state


def ran_us(attempt: Attempt) -> int:
    assert attempt.started_at is not None and attempt.ended_at is not None
    return (attempt.ended_at - attempt.started_at) // MICROSECOND


def failing(call: Callable[..., Any], times: int, *, done: bool) -> Callable[..., Any]:
    """The store does not answer so many times; `done`: it has done what it was asked for all the same."""
    left = [times]

    def flaky(*args: Any, **kwargs: Any) -> Any:
        if left[0] == 0:
            return call(*args, **kwargs)
        left[0] -= 1
        if done:
            call(*args, **kwargs)
        raise Unavailable("The database does not answer: a test.")

    return flaky


async def test_time_after_the_end_is_not_billed_while_the_end_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Readings go on meanwhile."""
    jobs = await Jobs(tmp_path, tick_s=0.1).open()
    try:
        monkeypatch.setattr(jobs.controller._ledger, "end", failing(jobs.controller._ledger.end, 2, done=False))
        job = jobs.submit("sleep", "0.3")
        await jobs.start(job)
        await jobs.reach(job, JobState.SUCCEEDED)
        (attempt,) = jobs.attempts(job)
        (row,) = jobs.rows()
        assert row.device_us == ran_us(attempt) == jobs.job(job).ran_us
        assert row.meter.ended_at == attempt.ended_at
        jobs.check_books()
    finally:
        await jobs.close()


async def test_an_end_whose_answer_was_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = await Jobs(tmp_path, tick_s=0.1).open()
    try:
        monkeypatch.setattr(jobs.controller._ledger, "end", failing(jobs.controller._ledger.end, 2, done=True))
        job = jobs.submit("true")
        await jobs.start(job)
        await jobs.reach(job, JobState.SUCCEEDED)
        await jobs.until(lambda: not jobs.controller.views())
        assert [row.device_us for row in jobs.rows()] == [ran_us(jobs.attempts(job)[0])]
        jobs.check_books()
    finally:
        await jobs.close()


@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_beginning_whose_answer_was_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cancelled: bool
) -> None:
    """The store has the job with devices and money held, and nobody works on it: it must not stay so."""
    jobs = await Jobs(tmp_path).open()
    try:
        monkeypatch.setattr(jobs.controller._ledger, "begin", failing(jobs.controller._ledger.begin, 1, done=True))
        job = jobs.submit("sh", "-c", "echo up; sleep 60")
        await jobs.start(job)
        if cancelled:
            await jobs.until(lambda: bool(jobs.attempts(job)))
            with jobs.store.write() as connection:
                ask_to_cancel(connection, job, now=datetime.now(UTC))
            await jobs.reach(job, JobState.CANCELLED)
        else:
            await jobs.until(lambda: any(each.ended_at for each in jobs.attempts(job)))
            assert jobs.attempts(job)[0].outcome is AttemptOutcome.LOST
            jobs.check_books()
            await jobs.start(job)
            await jobs.says(job, "up", attempt=2)
            with jobs.store.write() as connection:
                ask_to_cancel(connection, job, now=datetime.now(UTC))
            await jobs.reach(job, JobState.CANCELLED)
        jobs.check_books()
    finally:
        await jobs.close()


async def test_an_attempt_that_fails_inside_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its processes end, it is billed, and it waits again."""
    jobs = await Jobs(tmp_path).open()
    try:

        def broken(job_id: str) -> bool:
            monkeypatch.undo()
            raise RuntimeError("a test")

        monkeypatch.setattr(jobs.files, "done", broken)
        job = jobs.submit("sh", "-c", "echo up; sleep 60")
        await jobs.start(job)
        await jobs.says(job, "up")
        jobs.controller.preempt(job, "a test")
        await jobs.until(lambda: all(each.ended_at for each in jobs.attempts(job)))
        await jobs.reach(job, JobState.QUEUED)
        assert spawned(job) == []
        assert sum(row.device_us for row in jobs.rows()) > 0
        jobs.check_books()
    finally:
        await jobs.close()


@pytest.mark.parametrize("lost", [0, 1, 2])
async def test_a_job_is_billed_from_where_its_reservation_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    """Without a gap, and once, also when the answers to the first tries were lost."""
    jobs = await Jobs(tmp_path).open()
    try:
        ledger = jobs.controller._ledger
        monkeypatch.setattr(ledger, "begin_billing", failing(ledger.begin_billing, lost, done=True))
        reservation = book(jobs, 0.0, 2.0)
        await jobs.until(lambda: state(jobs, reservation) is ReservationState.ACTIVE)
        job = jobs.submit("sh", "-c", "echo up; sleep 60", kinds=("cpu",), reservation_id=reservation.reservation_id)
        await jobs.start(job)
        await jobs.says(job, "up")
        await jobs.until(lambda: any(row.meter.job_id == job and row.device_us > 2e5 for row in jobs.rows()))
        jobs.controller.preempt(job, "enough")
        await jobs.reach(job, JobState.QUEUED)
        (attempt,) = jobs.attempts(job)
        (own,) = [row for row in jobs.rows() if row.meter.job_id == job]
        assert own.meter.started_at == reservation.ends_at
        assert attempt.ended_at is not None and own.meter.ended_at is not None
        assert abs(own.meter.ended_at - attempt.ended_at) < timedelta(seconds=0.05)
        jobs.check_books()
    finally:
        await jobs.close()


async def test_a_job_waits_for_its_reservation(tmp_path: Path) -> None:
    """On other devices, before its time, it would be billed by nobody."""
    jobs = await Jobs(tmp_path).open()
    try:
        reservation = book(jobs, 3600.0, 60.0)
        job = jobs.submit("true", kinds=("cpu",), reservation_id=reservation.reservation_id)
        await jobs.until(lambda: bool(jobs.controller.views()) and bool(jobs.controller.reservations()))
        assert jobs.controller.views()[0].not_before == reservation.starts_at.timestamp()
        await jobs.start(job)
        await jobs.until(lambda: jobs.controller.views()[0].phase == "queued")
        assert jobs.job(job).state is JobState.QUEUED and jobs.attempts(job) == []
        jobs.check_books()
    finally:
        await jobs.close()


async def test_a_reservation_cancelled_before_a_kill_is_not_billed_for_the_time_after(tmp_path: Path) -> None:
    jobs = await Jobs(tmp_path).open()
    reservation = book(jobs, 0.0, 60.0)
    await jobs.until(lambda: state(jobs, reservation) is ReservationState.ACTIVE)
    await jobs.close()
    now = datetime.now(UTC)
    jobs = Jobs(tmp_path)
    with jobs.store.write() as connection:
        cancel_reservation(connection, reservation.reservation_id, "enough", now=now)
    await jobs.until(lambda: datetime.now(UTC) > now + timedelta(seconds=1))
    await jobs.open()
    try:
        (row,) = jobs.rows()
        assert row.device_us == 2 * ((now - reservation.starts_at) // MICROSECOND)
        jobs.check_books()
    finally:
        await jobs.close()


@pytest.mark.parametrize("jump_s", [-86_400.0, 86_400.0])
async def test_a_clock_that_jumps_cancels_a_reservation_at_no_other_time(tmp_path: Path, jump_s: float) -> None:
    """The instant of the wish is the wall clock's; what is billed lies between the last reading and now."""
    jobs = await Jobs(tmp_path).open()
    try:
        reservation = book(jobs, 0.0, 3600.0)
        await jobs.until(lambda: sum(row.device_us for row in jobs.rows()) > 0)
        billed_us = jobs.rows()[0].device_us
        with jobs.store.write() as connection:
            wrong = datetime.now(UTC) + timedelta(seconds=jump_s)
            cancel_reservation(connection, reservation.reservation_id, "enough", now=wrong)
        jobs.controller.wake()
        await jobs.until(lambda: jobs.rows()[0].meter.ended_at is not None)
        real_us = 2 * ((datetime.now(UTC) - reservation.starts_at) // MICROSECOND)
        assert billed_us <= jobs.rows()[0].device_us <= real_us
        jobs.check_books()
    finally:
        await jobs.close()


async def test_cancelled_while_it_starts(tmp_path: Path) -> None:
    jobs = await Jobs(tmp_path).open()
    try:
        job = jobs.submit("sh", "-c", "sleep 60")
        await jobs.start(job)
        with jobs.store.write() as connection:
            ask_to_cancel(connection, job, now=datetime.now(UTC))
        jobs.controller.wake()
        await jobs.reach(job, JobState.CANCELLED)
        await jobs.until(lambda: not jobs.controller.views())
        attempts = jobs.attempts(job)
        assert sum(row.device_us for row in jobs.rows()) == sum(ran_us(each) for each in attempts if each.started_at)
        jobs.check_books()
    finally:
        await jobs.close()


async def test_a_job_in_another_currency_waits_and_costs_nothing(tmp_path: Path) -> None:
    jobs = await Jobs(tmp_path).open()
    try:
        with jobs.store.write() as connection:
            connection.exec_driver_sql("UPDATE tenants SET currency = 'EUR'")
        job = jobs.submit("true")
        await jobs.until(lambda: [view.kinds for view in jobs.controller.views()] == [("none-has-a-price",)])
        await jobs.start(job)
        await jobs.until(lambda: "no price for cpu in EUR" in jobs.job(job).reason)
        assert jobs.job(job).state is JobState.QUEUED and jobs.rows() == []
        jobs.check_books()
    finally:
        await jobs.close()


async def test_an_attempt_keeps_its_price(tmp_path: Path) -> None:
    """A reading that straddles a change of the price is at the price of the attempt's beginning."""
    from tidemill.store.device_prices import set_device_price

    jobs = await Jobs(tmp_path, tick_s=0.1).open()
    try:
        job = jobs.submit("sh", "-c", "echo up; sleep 60")
        await jobs.start(job)
        await jobs.says(job, "up")
        with jobs.store.write() as connection:
            tier, now = DeviceTier.PREEMPTIBLE, datetime.now(UTC)
            set_device_price(connection, kind="cpu", currency="USD", tier=tier, hour=parse_amount("9"), now=now)
        await jobs.until(lambda: sum(row.device_us for row in jobs.rows()) > 3e5)
        jobs.controller.preempt(job, "enough")
        await jobs.reach(job, JobState.QUEUED)
        assert [row.meter.hour for row in jobs.rows()] == [parse_amount("3.6")]
        jobs.check_books()
        await jobs.start(job)
        await jobs.says(job, "up", attempt=2)
        jobs.controller.preempt(job, "enough")
        await jobs.until(lambda: all(each.ended_at for each in jobs.attempts(job)))
        assert [row.meter.hour for row in jobs.rows()] == [parse_amount("3.6"), parse_amount("9")]
        jobs.check_books()
    finally:
        await jobs.close()
