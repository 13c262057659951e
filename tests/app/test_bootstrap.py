"""The first start, and what every start sees to."""

from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import select

from tests.store.values import assert_clean
from tidemill.app.bootstrap import prepare_store
from tidemill.app.config.schema.platform import Config, FirstTenantConfig, default_config
from tidemill.errors import ConfigError
from tidemill.ledger.components import INPUT
from tidemill.ledger.money import Nanos
from tidemill.ledger.posting import credit_grant
from tidemill.store.accounts import post, tenant_balances
from tidemill.store.engine import Store, open_store, store_url
from tidemill.store.ids import new_id
from tidemill.store.keys import digest_of
from tidemill.store.prices import current_prices, price_versions
from tidemill.store.tables.tenants import keys
from tidemill.store.tenants import list_tenants


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(store_url(None, tmp_path))


def test_the_first_start_makes_a_tenant_with_a_credit_and_a_key(store: Store) -> None:
    kept: list[str] = []
    first = prepare_store(store, default_config(), kept.append)
    assert first is not None and kept == [first.key]
    with store.read() as connection:
        (tenant,) = list_tenants(connection)
        assert (tenant.name, tenant.currency) == ("demo", "USD")
        assert tenant_balances(connection) == {tenant.tenant_id: 100 * 10**9}
        assert connection.execute(select(keys.c.digest)).scalar_one() == digest_of(first.key)
    assert_clean(store)


def test_the_next_start_makes_nothing_new(store: Store) -> None:
    prepare_store(store, default_config(), lambda key: None)
    with store.read() as connection:
        before = price_versions(connection)
    assert prepare_store(store, default_config(), pytest.fail) is None
    with store.read() as connection:
        assert price_versions(connection) == before
        assert len(list_tenants(connection)) == 1


def test_a_first_start_that_dies_over_the_key_is_a_first_start_again(store: Store) -> None:
    """The key is on disk before its tenant is, so no tenant is ever without a key that somebody knows."""

    def dies(key: str) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        prepare_store(store, default_config(), dies)
    with store.read() as connection:
        assert list_tenants(connection) == []
    assert prepare_store(store, default_config(), lambda key: None) is not None


def test_a_first_tenant_without_a_credit_has_no_balance(store: Store) -> None:
    prepare_store(store, Config(first_tenant=FirstTenantConfig("poor", "0")), lambda key: None)
    with store.read() as connection:
        assert tenant_balances(connection) == {}


def test_a_new_price_in_the_file_is_a_new_version(store: Store) -> None:
    config = default_config()
    prepare_store(store, config, lambda key: None)
    (name,) = config.models
    dearer = Config(
        models=config.models, prices={name: {"USD": type(config.prices[name]["USD"])(input="7", output="9")}}
    )
    prepare_store(store, dearer, lambda key: None)
    with store.read() as connection:
        current = current_prices(connection, datetime.now(UTC).replace(year=2200))
        assert any(version.price.rates[INPUT] == 7 * 10**9 for version in current.values())


def test_the_currency_of_an_installation_stays(store: Store) -> None:
    prepare_store(store, default_config(), lambda key: None)
    with pytest.raises(ConfigError, match="this installation uses USD; it cannot be changed to CNY"):
        prepare_store(store, Config(currency="CNY"), lambda key: None)


def _book(store: Store, at: datetime) -> None:
    with store.write() as connection:
        (tenant,) = list_tenants(connection)
        grant = credit_grant(new_id("txn"), tenant_id=tenant.tenant_id, currency="USD", amount=Nanos(1), at=at)
        post(connection, grant)


def test_the_time_zone_may_change_while_no_booking_changes_its_month(store: Store) -> None:
    prepare_store(store, Config(first_tenant=FirstTenantConfig(credit="0")), lambda key: None)
    _book(store, datetime(2026, 1, 15, tzinfo=UTC))
    _book(store, datetime(2026, 3, 1, 0, 0, tzinfo=UTC))
    _book(store, datetime(2026, 3, 31, 15, 59, 59, tzinfo=UTC))
    prepare_store(store, Config(timezone="Asia/Shanghai"), lambda key: None)
    prepare_store(store, Config(), lambda key: None)


@pytest.mark.parametrize("at", [datetime(2026, 2, 28, 16, tzinfo=UTC), datetime(2026, 3, 31, 23, 59, tzinfo=UTC)])
def test_the_time_zone_stays_when_another_would_change_invoices(store: Store, at: datetime) -> None:
    prepare_store(store, Config(first_tenant=FirstTenantConfig(credit="0")), lambda key: None)
    _book(store, at)
    with pytest.raises(
        ConfigError, match=f"already booked at {at:%Y-%m-%d %H:%M} UTC would move to another month's invoice"
    ):
        prepare_store(store, Config(timezone="Asia/Shanghai"), lambda key: None)
    prepare_store(store, Config(), lambda key: None)
