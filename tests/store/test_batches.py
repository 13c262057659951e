"""Files and batches in the store, on both databases; and the records of a line's attempts."""

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from tests.support.prices import token_price
from tidemill.errors import BadInput, Conflict, NotFound
from tidemill.ledger.components import INPUT, OUTPUT
from tidemill.ledger.money import Nanos
from tidemill.ledger.pricing import PriceTier
from tidemill.ledger.usage import RequestStatus, TokenUsage, UsageRecord
from tidemill.store.accounts import verify_books
from tidemill.store.batches import (
    Batch,
    BatchStatus,
    LineCounts,
    LineError,
    TooManyBatches,
    ask_to_cancel,
    create_batch,
    fail_batch,
    find_batch,
    finish_batch,
    list_batches,
    note_counts,
    open_batches,
    seal_batch,
    start_batch,
)
from tidemill.store.engine import Store
from tidemill.store.files import (
    File,
    FileQuota,
    QuotaExceeded,
    add_file,
    add_output,
    delete_expired,
    delete_file,
    file_usage,
    find_file,
    known_files,
    list_files,
)
from tidemill.store.prices import current_prices, set_price
from tidemill.store.tenants import Tenant
from tidemill.store.usage import records_between, store_records

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
QUOTA = FileQuota(bytes=1000, files=4)


def file(tenant: Tenant, name: str = "one", **changes: Any) -> File:
    made = File(
        file_id=f"file_{name}",
        tenant_id=tenant.tenant_id,
        site="here",
        purpose="batch",
        filename="in.jsonl",
        bytes=100,
        created_at=NOW,
        expires_at=None,
    )
    return msgspec.structs.replace(made, **changes)


def batch(tenant: Tenant, name: str = "one", **changes: Any) -> Batch:
    made = Batch(
        batch_id=f"batch_{name}",
        tenant_id=tenant.tenant_id,
        key_id="key_1",
        site="",
        endpoint="/v1/embeddings",
        input_file_id="file_one",
        completion_window="24h",
        metadata={"größe": "1"},
        output_expires_s=3600,
        created_at=NOW,
        expires_at=NOW + timedelta(days=1),
    )
    return msgspec.structs.replace(made, **changes)


def made(store: Store, tenant: Tenant, **changes: Any) -> Batch:
    """A batch in the store, with its file."""
    with store.write() as connection:
        if not known_files(connection, ["file_one"]):
            add_file(connection, file(tenant), QUOTA)
        create_batch(connection, batch(tenant, **changes), max_open=10)
    return found(store, tenant, changes.get("name", "one"))


def found(store: Store, tenant: Tenant, name: str = "one") -> Batch:
    with store.read() as connection:
        return find_batch(connection, tenant_id=tenant.tenant_id, batch_id=f"batch_{name}")


def test_a_file_and_its_quota(store: Store, acme: Tenant) -> None:
    with store.write() as connection:
        for number in range(3):
            add_file(connection, file(acme, str(number), created_at=NOW + timedelta(seconds=number)), QUOTA)
        assert file_usage(connection, acme.tenant_id) == (3, 300)
        with pytest.raises(QuotaExceeded):
            add_file(connection, file(acme, "large", bytes=701), QUOTA)
        add_file(connection, file(acme, "fits", bytes=700), QUOTA)
        with pytest.raises(QuotaExceeded):
            add_file(connection, file(acme, "fifth", bytes=0), QUOTA)
        add_output(connection, file(acme, "output", bytes=5000, purpose="batch_output"))  # is never refused
        add_output(connection, file(acme, "output", bytes=5000, purpose="batch_output"))
        assert file_usage(connection, acme.tenant_id) == (5, 6000)
        ids = [
            each.file_id
            for each in list_files(
                connection, tenant_id=acme.tenant_id, now=NOW, limit=2, purpose="batch", after="file_2"
            )
        ]
        assert ids[0] == "file_1" and len(ids) == 2  # the others are of one age
        assert known_files(connection, ["file_1", "file_none"]) == {"file_1"}


def test_expiry_of_files(store: Store, acme: Tenant) -> None:
    soon = NOW + timedelta(hours=1)
    with store.write() as connection:
        add_file(connection, file(acme, "one", expires_at=soon), QUOTA)
        add_file(connection, file(acme, "two", expires_at=soon), QUOTA)
        create_batch(connection, batch(acme), max_open=1)
        later = soon + timedelta(seconds=1)
        assert delete_expired(connection, site="there", now=later) == []
        assert delete_expired(connection, site="here", now=later) == ["file_two"]  # the other is read by a batch
        with pytest.raises(NotFound):
            find_file(connection, tenant_id=acme.tenant_id, file_id="file_one", now=later)
        fail_batch(connection, "batch_one", [LineError("empty_file", "The file is empty.")], NOW)
        assert delete_expired(connection, site="here", now=later) == ["file_one"]


def test_a_batch_needs_its_file(store: Store, acme: Tenant) -> None:
    with store.write() as connection:
        with pytest.raises(NotFound):
            create_batch(connection, batch(acme), max_open=10)
        add_file(connection, file(acme, purpose="batch_output"), QUOTA)
        with pytest.raises(BadInput):
            create_batch(connection, batch(acme), max_open=10)


def test_a_batch_keeps_its_file(store: Store, acme: Tenant) -> None:
    made(store, acme)
    with store.write() as connection, pytest.raises(Conflict):
        delete_file(connection, tenant_id=acme.tenant_id, file_id="file_one", now=NOW)
    with store.write() as connection:
        fail_batch(connection, "batch_one", [LineError("empty_file", "The file is empty.")], NOW)
        delete_file(connection, tenant_id=acme.tenant_id, file_id="file_one", now=NOW)


def test_a_life(store: Store, acme: Tenant) -> None:
    first = made(store, acme)
    assert first.site == "here" and first.metadata == {"größe": "1"} and first.status is BatchStatus.VALIDATING
    with store.write() as connection:
        assert start_batch(connection, "batch_one", total=7, model="mock", now=NOW)
        assert not start_batch(connection, "batch_one", total=8, model="mock", now=NOW)
        note_counts(connection, "batch_one", LineCounts(completed=3, input_tokens=2**40))
    running = found(store, acme)
    assert (running.status, running.total, running.model) == (BatchStatus.IN_PROGRESS, 7, "mock")
    assert running.counts == LineCounts(completed=3, input_tokens=2**40) and not running.finished
    with store.write() as connection:
        sealed = seal_batch(connection, running, BatchStatus.COMPLETED, LineCounts(completed=7), NOW)
        assert (sealed.status, sealed.outcome) == (BatchStatus.FINALIZING, BatchStatus.COMPLETED)
        with pytest.raises(Conflict):
            ask_to_cancel(connection, tenant_id=acme.tenant_id, batch_id="batch_one", now=NOW)
        again = seal_batch(connection, running, BatchStatus.EXPIRED, LineCounts(), NOW)
        assert again == sealed
        output = file(acme, "out", purpose="batch_output")
        for first_time in (True, False):
            assert (
                finish_batch(
                    connection, sealed, BatchStatus.COMPLETED, sealed.counts, output=output, error=None, now=NOW
                )
                is first_time
            )
    over = found(store, acme)
    assert over.finished and over.output_file_id == "file_out" and over.completed_at == NOW


def test_cancelling_wins_over_the_end_of_the_lines(store: Store, acme: Tenant) -> None:
    made(store, acme)
    with store.write() as connection:
        start_batch(connection, "batch_one", total=7, model=None, now=NOW)
        cancelling = ask_to_cancel(connection, tenant_id=acme.tenant_id, batch_id="batch_one", now=NOW)
        assert cancelling.status is BatchStatus.CANCELLING
        assert not fail_batch(connection, "batch_one", [], NOW)
        sealed = seal_batch(connection, cancelling, BatchStatus.COMPLETED, LineCounts(completed=7), NOW)
        assert (sealed.status, sealed.outcome) == (BatchStatus.CANCELLING, BatchStatus.CANCELLED)
        finish_batch(connection, sealed, BatchStatus.CANCELLED, sealed.counts, output=None, error=None, now=NOW)
        again = ask_to_cancel(connection, tenant_id=acme.tenant_id, batch_id="batch_one", now=NOW)
    assert again.status is BatchStatus.CANCELLED and again.cancelled_at == NOW


def test_bounds_order_and_pages(store: Store, acme: Tenant) -> None:
    with store.write() as connection:
        add_file(connection, file(acme), QUOTA)
        for number in range(3):
            later = timedelta(seconds=number)
            one = batch(acme, str(number), created_at=NOW + later, expires_at=NOW + timedelta(days=1) - later)
            create_batch(connection, one, max_open=3)
        with pytest.raises(TooManyBatches):
            create_batch(connection, batch(acme, "fourth"), max_open=3)
        assert [each.batch_id for each in open_batches(connection, "here")] == ["batch_2", "batch_1", "batch_0"]
        assert open_batches(connection, "there") == []
        tenant_id = acme.tenant_id
        page = list_batches(connection, tenant_id=tenant_id, limit=2)
        assert [each.batch_id for each in page] == ["batch_2", "batch_1"]
        rest = list_batches(connection, tenant_id=tenant_id, limit=2, after="batch_1")
        assert [each.batch_id for each in rest] == ["batch_0"]
        with pytest.raises(NotFound):
            find_batch(connection, tenant_id="ten_other", batch_id="batch_1")


def test_each_tier_has_prices_of_its_own(store: Store) -> None:
    with store.write() as connection:
        for amount, tier in (
            (10, PriceTier.STANDARD),
            (5, PriceTier.BATCH),
            (12, PriceTier.STANDARD),
            (5, PriceTier.BATCH),
        ):
            price = token_price(amount, amount, amount)
            set_price(connection, model="m", currency="USD", price=price, now=NOW, tier=tier)
        later = NOW + timedelta(days=1)
        assert current_prices(connection, later)["m", "USD"].price.rates[INPUT] == 12
        assert current_prices(connection, later, PriceTier.BATCH)["m", "USD"].price.rates[INPUT] == 5


def attempt(
    tenant: Tenant, status: RequestStatus, charge: int = 0, *, at: int = 0, request_id: str = "batch_x_1"
) -> UsageRecord:
    return UsageRecord(
        request_id=request_id,
        tenant_id=tenant.tenant_id,
        key_id="key_1",
        model="m",
        replica="m/0",
        usage=TokenUsage(10, 0, 5),
        estimated=False,
        status=status,
        streamed=False,
        price_id="prc_1",
        currency=tenant.currency,
        charges={INPUT: Nanos(charge), OUTPUT: Nanos(0)},
        uncollected=Nanos(0 if charge else 7),
        hold=Nanos(100),
        started_at=NOW,
        first_token_at=None,
        finished_at=NOW + timedelta(seconds=at),
        device_ns=1000,
    )


ORDERS = [
    [RequestStatus.OK],
    [RequestStatus.CLIENT_CLOSED, RequestStatus.OK],
    [RequestStatus.GATEWAY_LOST, RequestStatus.ENGINE_LOST, RequestStatus.OK],
    [RequestStatus.OK, RequestStatus.CLIENT_CLOSED],
    [RequestStatus.OK, RequestStatus.OK],
    [RequestStatus.CLIENT_CLOSED, RequestStatus.OK, RequestStatus.ENGINE_ERROR, RequestStatus.OK],
]


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("order", ORDERS, ids=lambda order: "-".join(order))
def test_the_attempts_at_a_line_are_billed_once(
    store: Store, acme: Tenant, order: list[RequestStatus], together: bool
) -> None:
    """Whatever order the logs of the gateways are read in, and in however many steps."""
    attempts = [
        attempt(acme, status, 50 + number if status is RequestStatus.OK else 0, at=number)
        for number, status in enumerate(order)
    ]
    for part in [attempts] if together else [[each] for each in attempts]:
        for _ in range(2):  # a step may be repeated
            with store.write() as connection:
                store_records(connection, part, zone="UTC")
    with store.read() as connection:
        (record,) = records_between(connection, tenant_id=acme.tenant_id, start=None, end=None)
        assert all(not found for found in verify_books(connection).values())
    first = order.index(RequestStatus.OK)
    assert record.status is RequestStatus.OK and record.charge == 50 + first
    before = len(order[:first])
    assert record.device_ns == 1000 * (1 + before) and record.uncollected == 7 * before


def test_other_requests_are_never_replaced(store: Store, acme: Tenant) -> None:
    lost = attempt(acme, RequestStatus.ENGINE_LOST, request_id="req_1")
    with store.write() as connection:
        store_records(connection, [lost], zone="UTC")
        assert (
            store_records(connection, [attempt(acme, RequestStatus.OK, 50, at=1, request_id="req_1")], zone="UTC") == []
        )
    with store.read() as connection:
        assert list(records_between(connection, tenant_id=acme.tenant_id, start=None, end=None)) == [lost]
