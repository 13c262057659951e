"""Reservations: billed for their time, used or not; jobs on them are not billed once more."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.support.jobs import Jobs
from tidemill.ledger.devices import DeviceTier
from tidemill.ledger.money import Nanos, parse_amount
from tidemill.store.device_prices import agreed_price
from tidemill.store.ids import new_id
from tidemill.store.jobs import JobState
from tidemill.store.reservations import (
    Reservation,
    ReservationState,
    cancel_reservation,
    create_reservation,
    find_reservation,
)

US = 1_000_000


def book(jobs: Jobs, starts_in_s: float, lasts_s: float, *, devices: int = 2, hour: str = "7.2") -> Reservation:
    now = datetime.now(UTC)
    with jobs.store.write() as connection:
        price = agreed_price(connection, kind="cpu", currency="USD", hour=Nanos(parse_amount(hour)), now=now)
        reservation = Reservation(
            reservation_id=new_id("res"),
            tenant_id=jobs.tenant.tenant_id,
            kind="cpu",
            devices=devices,
            starts_at=now + timedelta(seconds=starts_in_s),
            ends_at=now + timedelta(seconds=starts_in_s + lasts_s),
            price_id=price.price_id,
            created_at=now,
        )
        create_reservation(connection, reservation)
    jobs.controller.wake()
    return reservation


def state(jobs: Jobs, reservation: Reservation) -> ReservationState:
    with jobs.store.read() as connection:
        return find_reservation(connection, reservation.reservation_id).state


async def test_its_whole_time_is_billed_though_nobody_uses_it(tmp_path: Path) -> None:
    jobs = await Jobs(tmp_path).open()
    try:
        reservation = book(jobs, 0.3, 1.5)
        await jobs.until(lambda: [each.id for each in jobs.controller.reservations()] == [reservation.reservation_id])
        assert jobs.controller.reservations()[0].kinds == ("cpu",)
        await jobs.until(lambda: state(jobs, reservation) is ReservationState.ACTIVE)
        await jobs.until(lambda: state(jobs, reservation) is ReservationState.ENDED)
        (row,) = jobs.rows()
        assert (row.device_us, row.amount) == (3 * US, parse_amount("0.006"))
        assert row.meter.tier is DeviceTier.RESERVED
        assert not jobs.controller.reservations()
        jobs.check_books()
    finally:
        await jobs.close()


async def test_one_whose_time_came_while_the_platform_was_stopped(tmp_path: Path) -> None:
    jobs = await Jobs(tmp_path).open()
    reservation = book(jobs, 0.5, 0.5)
    await jobs.close()
    jobs = Jobs(tmp_path)
    await jobs.until(lambda: datetime.now(UTC) > reservation.ends_at)
    await jobs.open()
    assert state(jobs, reservation) is ReservationState.ENDED
    assert [row.device_us for row in jobs.rows()] == [US]
    jobs.check_books()
    await jobs.close()


@pytest.mark.parametrize("after_s", [0.0, 1.0])
async def test_a_cancelled_one_is_billed_until_then(tmp_path: Path, after_s: float) -> None:
    jobs = await Jobs(tmp_path).open()
    try:
        reservation = book(jobs, 0.0 if after_s else 60.0, 60.0)
        await jobs.until(
            lambda: (
                bool(jobs.controller.reservations())
                if not after_s
                else sum(row.device_us for row in jobs.rows()) > 2 * US
            )
        )
        with jobs.store.write() as connection:
            cancel_reservation(
                connection, reservation.reservation_id, "cancelled by the operator", now=datetime.now(UTC)
            )
        jobs.controller.wake()
        await jobs.until(lambda: not jobs.controller.reservations())
        assert sum(row.device_us for row in jobs.rows()) < 60 * US
        jobs.check_books()
    finally:
        await jobs.close()


async def test_without_money_it_is_given_up(tmp_path: Path) -> None:
    """Its tick and slack (20.2 s of two devices) cost 0.0808."""
    poor = await Jobs(tmp_path, balance="0.08").open()
    reservation = book(poor, 0.0, 3600.0)
    await poor.until(lambda: state(poor, reservation) is ReservationState.CANCELLED)
    with poor.store.read() as connection:
        assert "Insufficient balance" in find_reservation(connection, reservation.reservation_id).reason
    assert poor.rows() == []
    poor.grant("0.004")
    again = book(poor, 0.0, 3600.0)
    await poor.until(lambda: state(poor, again) is ReservationState.CANCELLED)
    assert [row.uncollected for row in poor.rows()] == [0] and poor.rows()[0].device_us > 0
    assert poor.balance() > 0
    poor.check_books()
    await poor.close()


async def test_a_job_on_a_reservation_is_billed_from_its_end_on(tmp_path: Path) -> None:
    jobs = await Jobs(tmp_path).open()
    try:
        reservation = book(jobs, 0.0, 2.5)
        await jobs.until(lambda: state(jobs, reservation) is ReservationState.ACTIVE)
        job = jobs.submit("sh", "-c", "echo up; sleep 60", kinds=("cpu",), reservation_id=reservation.reservation_id)
        await jobs.start(job)
        await jobs.says(job, "up")
        assert [view.reservation for view in jobs.controller.views()] == [reservation.reservation_id]
        assert {row.meter.job_id for row in jobs.rows()} <= {None}
        await jobs.until(lambda: state(jobs, reservation) is ReservationState.ENDED)
        await jobs.until(lambda: any(row.meter.job_id == job for row in jobs.rows()))
        assert jobs.job(job).reservation_id is None
        assert [view.reservation for view in jobs.controller.views()] == [None]
        jobs.controller.preempt(job, "enough")
        await jobs.reach(job, JobState.QUEUED)
        own = [row for row in jobs.rows() if row.meter.job_id == job]
        assert sum(row.device_us for row in own) < jobs.job(job).ran_us
        assert own[0].meter.tier is DeviceTier.PREEMPTIBLE
        assert own[0].meter.started_at >= reservation.ends_at
        jobs.check_books()
    finally:
        await jobs.close()
