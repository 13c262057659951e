from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.ledger.values import NOVEMBER, PRICES, months, record, records, version
from tidemill.ledger.components import CACHED_INPUT
from tidemill.ledger.money import MAX_NANOS, Nanos, parse_amount
from tidemill.ledger.period import period_of
from tidemill.ledger.posting import (
    FUNDING_CREDIT,
    REVENUE_USAGE,
    Account,
    Discrepancy,
    Entry,
    PostingError,
    Transaction,
    TransactionKind,
    charge_batches,
    credit_grant,
    discrepancies,
    tenant_account,
    trial_balance,
    usage_charge,
    verify_balance,
)
from tidemill.ledger.usage import RequestStatus, TokenUsage, UsageRecord

NOW = datetime(2026, 11, 24, tzinfo=UTC)


def transaction(*amounts: tuple[str, int], currency: str = "CNY", at: datetime = NOW, memo: str = "") -> Transaction:
    return Transaction(
        transaction_id="txn_1",
        kind=TransactionKind.CREDIT_GRANT,
        currency=currency,
        at=at,
        memo=memo,
        entries=tuple(Entry(Account(account), Nanos(amount)) for account, amount in amounts),
    )


def test_a_grant_credits_the_tenant_and_debits_the_funding() -> None:
    grant = credit_grant("txn_1", tenant_id="acme", currency="CNY", amount=parse_amount("100"), at=NOW, memo="top-up")
    assert grant.amount_on(tenant_account("acme")) == 100 * 10**9
    assert grant.amount_on(FUNDING_CREDIT) == -100 * 10**9
    assert grant.amount_on(REVENUE_USAGE) == 0
    assert (grant.tenant_id, grant.kind, grant.memo) == ("acme", "credit_grant", "top-up")


@pytest.mark.parametrize("amount", [0, -1])
def test_a_grant_is_more_than_nothing(amount: int) -> None:
    with pytest.raises(PostingError, match="must be more than zero"):
        credit_grant("txn_1", tenant_id="acme", currency="CNY", amount=Nanos(amount), at=NOW)


def test_usage_moves_from_the_balance_to_the_revenue() -> None:
    later = NOVEMBER.start + timedelta(days=5)
    batch = [record("req_1"), record("req_2", at=later), record("req_3")]
    charge = usage_charge("txn_2", batch)
    assert charge is not None
    assert charge.amount_on(tenant_account("acme")) == -3 * batch[0].charge
    assert charge.amount_on(REVENUE_USAGE) == 3 * batch[0].charge
    assert charge.at == later
    assert charge.tenant_id == "acme"


@given(months)
def test_a_charge_is_the_exact_sum_of_its_records_and_free_usage_is_none(batch: list[UsageRecord]) -> None:
    charge = usage_charge("txn_2", batch)
    total = sum(one.charge for one in batch)
    if total == 0:
        assert charge is None
    else:
        assert charge is not None
        assert charge.amount_on(REVENUE_USAGE) == total
        assert sum(entry.amount for entry in charge.entries) == 0
        assert charge.at in NOVEMBER


def test_a_charge_covers_one_tenant_and_one_currency() -> None:
    dollars = version("prc_usd", "smollm2", "1 1 1", currency="USD")
    for stranger in (record("req_2", tenant_id="other"), record("req_2", price=dollars)):
        with pytest.raises(PostingError, match="req_2 .* charge each tenant and currency apart"):
            usage_charge("txn_1", [record(), stranger])


def test_a_negative_charge_is_refused() -> None:
    with pytest.raises(PostingError, match="negative"):
        usage_charge("txn_1", [record(), msgspec.structs.replace(record("req_2"), charges={CACHED_INPUT: Nanos(-1)})])


@given(st.lists(st.tuples(records, st.sampled_from(["a", "b"]), st.integers(0, 40)), max_size=20))
def test_batches_keep_every_record_and_can_all_be_charged(rows: list[tuple[UsageRecord, str, int]]) -> None:
    every = [
        msgspec.structs.replace(one, tenant_id=tenant, finished_at=one.finished_at + timedelta(days=days))
        for one, tenant, days in rows
    ]
    batches = charge_batches(every, "Asia/Shanghai")
    assert sorted(r.request_id for batch in batches.values() for r in batch) == sorted(r.request_id for r in every)
    for key, batch in batches.items():
        charge = usage_charge("txn_1", batch)
        if charge is not None:
            assert (charge.tenant_id, charge.currency) == (key.tenant_id, key.currency)
            assert period_of(charge.at, "Asia/Shanghai").month == key.month


def test_what_may_not_be_posted() -> None:
    with pytest.raises(PostingError, match=r"out of balance by 0\.00000001 CNY"):
        transaction(("tenant:a", 30), ("funding:credit", -20))
    with pytest.raises(PostingError, match="no entries"):
        transaction()
    with pytest.raises(PostingError, match="mixes tenants: tenant:a, tenant:b"):
        transaction(("tenant:a", 1), ("tenant:b", -1))
    with pytest.raises(ValueError, match="currency code"):
        transaction(("tenant:a", 1), ("funding:credit", -1), currency="yuan")
    with pytest.raises(PostingError, match="no time zone"):
        transaction(("tenant:a", 1), ("funding:credit", -1), at=datetime(2026, 11, 1))
    with pytest.raises(PostingError, match="memo is longer than 512"):
        transaction(("tenant:a", 1), ("funding:credit", -1), memo="x" * 513)


@pytest.mark.parametrize("account", ["", "tenant", "tenant:", "Tenant:a", "tenant:a b", "tenant:a:b", "tenant:a\n"])
def test_misnamed_accounts(account: str) -> None:
    with pytest.raises(PostingError, match="is not an account"):
        Entry(Account(account), Nanos(1))


def test_an_entry_has_an_amount_that_can_be_kept() -> None:
    account = tenant_account("a")
    with pytest.raises(PostingError, match="zero"):
        Entry(account, Nanos(0))
    with pytest.raises(PostingError, match="larger than Tidemill can hold"):
        Entry(account, Nanos(MAX_NANOS + 1))
    with pytest.raises(PostingError, match="not an integer"):
        Entry(account, 0.5)  # type: ignore[arg-type]
    with pytest.raises(PostingError, match="is not an account"):
        Entry(Account("tenant:" + "x" * 128), Nanos(1))


def test_a_balance_that_is_not_the_sum_of_its_entries_is_named() -> None:
    entries = transaction(("tenant:a", 30), ("funding:credit", -30)).entries
    account = tenant_account("a")
    verify_balance(account, Nanos(30), entries)
    with pytest.raises(
        PostingError, match=r"the stored balance of tenant:a is 0\.000000031, but its entries add up to 0\.00000003"
    ):
        verify_balance(account, Nanos(31), entries)
    kept = {account: Nanos(31), Account("revenue:usage"): Nanos(7)}
    assert discrepancies(kept, entries) == (
        Discrepancy(FUNDING_CREDIT, Nanos(0), Nanos(-30)),
        Discrepancy(REVENUE_USAGE, Nanos(7), Nanos(0)),
        Discrepancy(account, Nanos(31), Nanos(30)),
    )
    assert not trial_balance(entries[:1]).balanced


class Books(RuleBasedStateMachine):
    """Grants and charges in any order: balances agree with the entries, all accounts together are zero."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[Entry] = []
        self.kept: dict[Account, Nanos] = {}
        self.granted = {"a": 0, "b": 0}
        self.spent = {"a": 0, "b": 0}

    def post(self, posted: Transaction) -> None:
        for entry in posted.entries:
            self.entries.append(entry)
            self.kept[entry.account] = Nanos(self.kept.get(entry.account, 0) + entry.amount)

    @rule(tenant=st.sampled_from(["a", "b"]), amount=st.integers(1, 10**12))
    def grant(self, tenant: str, amount: int) -> None:
        self.post(credit_grant("txn", tenant_id=tenant, currency="CNY", amount=Nanos(amount), at=NOW))
        self.granted[tenant] += amount

    @rule(
        tenant=st.sampled_from(["a", "b"]),
        tokens=st.integers(0, 10_000),
        price=st.sampled_from(sorted(PRICES)),
    )
    def use(self, tenant: str, tokens: int, price: str) -> None:
        left = Nanos(self.granted[tenant] - self.spent[tenant])
        one = record(
            tenant_id=tenant,
            price=PRICES[price],
            usage=TokenUsage(tokens, tokens // 3, tokens),
            cap=left,
            status=RequestStatus.BALANCE_EXHAUSTED,
        )
        charge = usage_charge("txn", [one])
        if charge is not None:
            self.post(charge)
        self.spent[tenant] += one.charge

    @invariant()
    def books_agree(self) -> None:
        balance = trial_balance(self.entries)
        assert balance.balanced
        assert discrepancies(self.kept, self.entries) == ()
        for tenant, granted in self.granted.items():
            account = tenant_account(tenant)
            assert 0 <= balance.balance(account) == granted - self.spent[tenant]
            verify_balance(account, self.kept.get(account, Nanos(0)), self.entries)
        assert balance.balance(REVENUE_USAGE) == sum(self.spent.values())
        assert balance.balance(FUNDING_CREDIT) == -sum(self.granted.values())


TestBooks = Books.TestCase
