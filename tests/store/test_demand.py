"""The tide's memory: bins that are sums over usage records, however often they are computed."""

from datetime import UTC, datetime, timedelta
from itertools import count

from msgspec.structs import replace

from tests.ledger.values import record
from tests.store.values import OCTOBER, ZONE
from tidemill.ledger.usage import TokenUsage
from tidemill.store.demand import (
    BIN_S,
    DemandBin,
    bin_of,
    drop_bins,
    keep_measures,
    last_bin,
    read_bins,
    read_measures,
    refresh_bins,
)
from tidemill.store.engine import Store
from tidemill.store.tenants import Tenant
from tidemill.store.usage import store_records

NOON = datetime.fromtimestamp(bin_of(OCTOBER.timestamp()) * BIN_S, UTC)
FIRST = bin_of(NOON.timestamp())
ids = count(1)


def use(store: Store, tenant: Tenant, *at_s: float, name: str = "", model: str = "mock") -> None:
    """Requests that began so long after NOON, each of 100 tokens of work."""
    made = [
        replace(
            record(
                name or f"req_d{next(ids):08}",
                tenant_id=tenant.tenant_id,
                at=NOON + timedelta(seconds=each),
                usage=TokenUsage(80, 30, 10),
            ),
            model=model,
            started_at=NOON + timedelta(seconds=each),
            finished_at=NOON + timedelta(seconds=each + 1),
        )
        for each in at_s
    ]
    with store.write() as connection:
        store_records(connection, made, zone=ZONE)


def bins(store: Store, first: int = FIRST) -> dict[str, list[DemandBin]]:
    with store.write() as connection:
        refresh_bins(connection, first, decode_weight=5)
    with store.read() as connection:
        return read_bins(connection, 0)


def test_requests_are_counted_where_they_began(store: Store, acme: Tenant) -> None:
    use(store, acme, 0, 1, BIN_S - 1, BIN_S, 3 * BIN_S + 7)
    use(store, acme, 2, model="other")
    found = bins(store)
    assert found["mock"] == [DemandBin(FIRST, 3, 300), DemandBin(FIRST + 1, 1, 100), DemandBin(FIRST + 3, 1, 100)]
    assert found["other"] == [DemandBin(FIRST, 1, 100)]
    with store.read() as connection:
        assert last_bin(connection) == FIRST + 3


def test_computing_again_changes_nothing_and_takes_in_what_came_late(store: Store, acme: Tenant) -> None:
    use(store, acme, 0, BIN_S)
    assert bins(store) == bins(store)
    use(store, acme, 1)
    (found,) = bins(store).values()
    assert found == [DemandBin(FIRST, 2, 200), DemandBin(FIRST + 1, 1, 100)]
    (found,) = bins(store, FIRST + 1).values()
    assert found == [DemandBin(FIRST, 2, 200), DemandBin(FIRST + 1, 1, 100)], "earlier ones stay"


def test_lines_of_batches_are_no_demand(store: Store, acme: Tenant) -> None:
    use(store, acme, 0, name="batch_abc_1")
    use(store, acme, 0, name="batchy")  # no line, whatever it looks like
    (found,) = bins(store).values()
    assert found == [DemandBin(FIRST, 1, 100)]


def test_old_bins_are_forgotten(store: Store, acme: Tenant) -> None:
    use(store, acme, 0, BIN_S)
    bins(store)
    with store.write() as connection:
        drop_bins(connection, FIRST + 1)
        (found,) = read_bins(connection, 0).values()
    assert found == [DemandBin(FIRST + 1, 1, 100)]


def test_the_last_measure_counts(store: Store) -> None:
    for value in (3.0, 4.5):
        with store.write() as connection:
            keep_measures(connection, {("m", "startup_s"): value, ("m", "capacity"): 100.0}, OCTOBER)
    with store.read() as connection:
        assert read_measures(connection) == {"m": {"startup_s": 4.5, "capacity": 100.0}}
