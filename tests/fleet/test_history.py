"""The tide's memory: a past without gaps from bins that have some, and measures that outlive a restart."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

from msgspec.structs import replace

from tests.ledger.values import record
from tests.support.stores import migrated_store
from tidemill.fleet.history import DemandHistory, pasts_of
from tidemill.ledger.usage import TokenUsage
from tidemill.store.demand import BIN_S, UP, DemandBin
from tidemill.store.engine import Store
from tidemill.store.tenants import create_tenant
from tidemill.store.usage import store_records


def fresh(path: Path) -> Store:
    return migrated_store(path)


def test_what_is_not_known_is_not_nothing() -> None:
    bins = {
        "m": [DemandBin(10, 1, 300), DemandBin(14, 2, 600)],
        UP: [DemandBin(11, 0, 0), DemandBin(12, 0, 0)],
        "other": [DemandBin(12, 1, 3)],
    }
    past = pasts_of(bins, 15)["m"]
    assert past.values == (1.0, 0.0, 0.0, None, 2.0), "in bin 13 the platform was down"
    assert past.end == 15 * BIN_S
    assert pasts_of(bins, 14)["m"].values == (1.0, 0.0, 0.0, None), "the bin that is not over is left out"
    assert pasts_of({}, 15) == {} == pasts_of({"m": [DemandBin(15, 1, 1)]}, 15)


async def test_the_first_start_has_a_past(tmp_path: Path) -> None:
    """Two days of one busy hour each: the same hour is expected to be busy again."""
    store = fresh(tmp_path)
    now = datetime.now(UTC)
    with store.write() as connection:
        tenant = create_tenant(connection, name="acme", currency="CNY", now=now)
        made = []
        for day in (1, 2, 3):
            for minute in range(0, 60, 5):
                at = now - timedelta(days=day) + timedelta(minutes=minute - 20)
                made.append(
                    replace(
                        record(f"req_{day}_{minute}", tenant_id=tenant.tenant_id, usage=TokenUsage(30_000, 0, 0)),
                        model="m",
                        started_at=at,
                        finished_at=at + timedelta(seconds=1),
                    )
                )
        store_records(connection, made, zone="UTC")
    history = DemandHistory(store)
    await history.open(["m", "quiet"])
    assert history.demand("m", 600.0).high >= history.demand("m", 600.0).expected > 20, "100 tokens a second then"
    assert history.demand("quiet", 600.0).high == 0.0
    assert history.demand("unheard of", 600.0).high == 0.0
    store.close()


async def test_measures_outlive_a_restart(tmp_path: Path) -> None:
    store = fresh(tmp_path)
    history = DemandHistory(store)
    await history.open(["m"])
    assert history.measures == {}
    history.measure("m", "capacity", 100.0)
    history.measure("m", "startup_s", 12.5)
    history._refresh()
    history.measure("m", "capacity", 100.5)  # hardly another figure: not worth a write
    assert history._unkept == {}
    later = DemandHistory(store)
    await later.open(["m"])
    assert later.measures == {"m": {"capacity": 100.0, "startup_s": 12.5}}
    store.close()
