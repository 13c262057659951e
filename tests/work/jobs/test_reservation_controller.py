"""Two platforms that see to the same reservations in one store: each moment is billed once, nobody waits in a ring."""

import threading
from collections.abc import Callable
from datetime import datetime, timedelta
from functools import partial

import pytest

from tests.store.databases import Databases, databases, quick_directory, store
from tests.store.values import LONG_AGO, ZONE, assert_clean, balance_of, grant
from tidemill.ledger.devices import charge_for
from tidemill.ledger.money import Nanos, parse_amount
from tidemill.ledger.period import parse_period
from tidemill.store.balance_leases import leased
from tidemill.store.device_meters import device_sums, meter_rows, open_meters, verify_meters
from tidemill.store.device_prices import agreed_price
from tidemill.store.engine import Store
from tidemill.store.ids import new_id
from tidemill.store.reservations import (
    Reservation,
    ReservationState,
    cancel_reservation,
    create_reservation,
    find_reservation,
)
from tidemill.store.tenants import Tenant, create_tenant
from tidemill.work.jobs.attempt_store import AttemptStore
from tidemill.work.jobs.reservation_controller import ReservationController

__all__ = ["databases", "quick_directory", "store"]

HOUR = parse_amount("3.6")
US = 1_000_000
NOVEMBER = parse_period("2026-11", ZONE).start


@pytest.fixture
def acme(store: Store) -> Tenant:
    with store.write() as connection:
        tenant = create_tenant(connection, name="acme", currency="CNY", now=LONG_AGO)
        grant(connection, tenant.tenant_id, parse_amount("100"))
    return tenant


@pytest.fixture
def books(databases: Databases, store: Store) -> list[ReservationController]:
    return [book(databases.again(store)) for _ in range(2)]


def book(store: Store, site: str = "here") -> ReservationController:
    return ReservationController(store, AttemptStore(store, ZONE), ZONE, site)


def at(second: float) -> datetime:
    """Counted from the end of October, as the operator has it."""
    return NOVEMBER + timedelta(seconds=second)


def reserve(store: Store, acme: Tenant, start_s: float, end_s: float, site: str = "") -> str:
    with store.write() as connection:
        price = agreed_price(connection, kind="cpu", currency="CNY", hour=Nanos(HOUR), now=LONG_AGO)
        made = Reservation(
            reservation_id=new_id("res"),
            tenant_id=acme.tenant_id,
            kind="cpu",
            devices=2,
            starts_at=at(start_s),
            ends_at=at(end_s),
            price_id=price.price_id,
            created_at=LONG_AGO,
            site=site,
        )
        create_reservation(connection, made)
    return made.reservation_id


def check(store: Store, acme: Tenant) -> None:
    assert_clean(store)
    with store.read() as connection:
        assert verify_meters(connection) == []
        assert open_meters(connection) == []
        assert leased(connection, acme.tenant_id) == 0


def test_each_moment_is_billed_once_and_in_its_month(
    store: Store, acme: Tenant, books: list[ReservationController]
) -> None:
    """Their clocks differ, and one goes back."""
    reserve(store, acme, -100, 200)
    for second, which in ((-101, 0), (-99, 0), (-97, 1), (-50, 1), (-55, 0), (30, 0), (20, 1), (199, 1), (205, 0)):
        books[which].look(at(second))
        books[which].bill(at(second))
    books[1].look(at(206))
    books[1].bill(at(206))
    with store.read() as connection:
        sums = {
            month: [
                (row.device_us, row.amount) for row in device_sums(connection, tenant_id=acme.tenant_id, month=month)
            ]
            for month in ("2026-10", "2026-11")
        }
    assert sums == {
        "2026-10": [(200 * US, charge_for(HOUR, 200 * US))],
        "2026-11": [(400 * US, charge_for(HOUR, 400 * US))],
    }
    assert balance_of(store, acme.tenant_id) == parse_amount("100") - charge_for(HOUR, 600 * US)
    check(store, acme)


def test_cancelled_while_both_look(store: Store, acme: Tenant, books: list[ReservationController]) -> None:
    for _ in range(6):
        reservation_id = reserve(store, acme, 0, 1000)
        failures: list[BaseException] = []
        for each in books:
            each.look(at(1))

        def cancel(reservation_id: str = reservation_id) -> None:
            with store.write() as connection:
                cancel_reservation(connection, reservation_id, "enough", now=at(100))

        def see_to(book: ReservationController) -> None:
            for second in (99, 100, 101):
                book.bill(at(second))
                book.look(at(second))

        def safely(act: Callable[[], None], failures: list[BaseException] = failures) -> None:
            try:
                act()
            except BaseException as error:
                failures.append(error)

        acts = (cancel, partial(see_to, books[0]), partial(see_to, books[1]))
        threads = [threading.Thread(target=safely, args=(act,)) for act in acts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        books[0].look(at(102))
        with store.read() as connection:
            assert find_reservation(connection, reservation_id).state is ReservationState.CANCELLED
            rows = meter_rows(connection, tenant_id=acme.tenant_id)
        (row,) = [row for row in rows if row.meter.reservation_id == reservation_id]
        # By their clocks it came at one of these times; what was read before it came, was read.
        assert 2 * 99 * US <= row.device_us <= 2 * 101 * US
        check(store, acme)


def test_what_was_cancelled_is_not_billed_beyond_it_however_late_it_is_noticed(
    store: Store, acme: Tenant, books: list[ReservationController]
) -> None:
    reservation_id = reserve(store, acme, 0, 1000)
    books[0].look(at(1))
    books[0].bill(at(50))
    with store.write() as connection:
        cancel_reservation(connection, reservation_id, "enough", now=at(100))
    books[0].bill(at(900))  # it has not looked since
    books[1].look(at(950))
    with store.read() as connection:
        assert [row.device_us for row in meter_rows(connection, tenant_id=acme.tenant_id)] == [200 * US]
    check(store, acme)


def test_those_of_an_old_database_belong_to_the_first_platform_that_sees_them(store: Store, acme: Tenant) -> None:
    here, there = book(store, "here"), book(store, "there")
    name = reserve(store, acme, 0, 200)
    here.look(at(-10))
    there.look(at(-10))
    assert [view.id for view in here.views()] == [name] and there.views() == []


def test_one_whose_platform_is_gone_is_ended_by_another(store: Store, acme: Tenant) -> None:
    gone, here = book(store, "gone"), book(store, "here")
    name = reserve(store, acme, 0, 200, site="gone")
    gone.look(at(10))
    here.look(at(201))
    with store.read() as connection:
        assert open_meters(connection, reservation_id=name), "it may come back yet"
    here.look(at(801))
    check(store, acme)
    with store.read() as connection:
        assert find_reservation(connection, name).state is ReservationState.ENDED


def test_a_platform_leaves_the_reservations_of_another_one_on_the_same_store_alone(store: Store, acme: Tenant) -> None:
    here, there = book(store, "here"), book(store, "there")
    name = reserve(store, acme, 0, 200, site="there")

    def meters() -> int:
        with store.read() as connection:
            return len(open_meters(connection, reservation_id=name))

    here.look(at(10))
    assert here.views() == [] and not here.lasts(name) and meters() == 0
    there.look(at(10))
    assert [view.id for view in there.views()] == [name] and meters() == 1
    with store.write() as connection:
        cancel_reservation(connection, name, "enough", now=at(50))
    here.look(at(60))
    assert meters() == 1, "whose devices they are ends it"
    there.look(at(60))
    assert meters() == 0
    check(store, acme)
