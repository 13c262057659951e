"""Double entry: accounts, entries, and transactions that cannot be unbalanced.

The sign convention of the whole house: an entry's amount is positive when it *credits* its account and
negative when it *debits* it; an account's balance is the sum of its entries. So the figures read as people
say them:

    tenant:<id>      liability   what the operator still owes the tenant in service: the prepaid balance, >= 0
    revenue:usage    income      what has been earned with requests: >= 0
    revenue:devices  income      what has been earned with device time of jobs and reservations: >= 0
    funding:credit   clearing    what was granted against money received or as a gift: <= 0

A grant of 100 is `funding:credit -100, tenant:a +100`; usage worth 3 is `tenant:a -3, revenue:usage +3`. All
accounts of one currency together are always zero. Entries are only ever added; a mistake is mended by another
transaction.
"""

import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from enum import StrEnum
from typing import NamedTuple, NewType

import msgspec

from tidemill.ledger.errors import LedgerError
from tidemill.ledger.money import MAX_NANOS, ZERO, Nanos, check_currency, format_amount
from tidemill.ledger.period import Period, period_of
from tidemill.ledger.usage import UsageRecord

Account = NewType("Account", str)
"""An account's name: a class, a colon, and what it is of."""

REVENUE_USAGE = Account("revenue:usage")
REVENUE_DEVICES = Account("revenue:devices")
FUNDING_CREDIT = Account("funding:credit")

MAX_ACCOUNT = 128
"""Longest account name, characters."""
MAX_MEMO = 512
"""Longest memo, characters."""

_ACCOUNT = re.compile(r"[a-z]+:[^\s:]+")
_TENANT = "tenant:"


class PostingError(LedgerError):
    """Entries that may not be posted: out of balance, empty, mixed or misnamed."""


class TransactionKind(StrEnum):
    """What a transaction is for."""

    CREDIT_GRANT = "credit_grant"
    USAGE_CHARGE = "usage_charge"
    DEVICE_CHARGE = "device_charge"


def tenant_account(tenant_id: str) -> Account:
    """The account of a tenant's prepaid balance."""
    return Account(_TENANT + tenant_id)


class Entry(msgspec.Struct, frozen=True):
    """One amount on one account: positive credits it, negative debits it; never zero."""

    account: Account
    amount: Nanos

    def __post_init__(self) -> None:
        if len(self.account) > MAX_ACCOUNT or not _ACCOUNT.fullmatch(self.account):
            raise PostingError(f"{self.account!r} is not an account; write a class and a name such as tenant:acme")
        if type(self.amount) is not int:
            raise PostingError(f"{self.account}: the amount {self.amount!r} is not an integer of nanos")
        if self.amount == 0:
            raise PostingError(f"{self.account}: an entry must not be zero; leave it out")
        if abs(self.amount) > MAX_NANOS:
            raise PostingError(f"{self.account}: {format_amount(self.amount)} is larger than Tidemill can hold")


class Transaction(msgspec.Struct, frozen=True):
    """Entries of one currency that add up to zero and concern at most one tenant.

    Anything else is refused at construction, with PostingError.
    """

    transaction_id: str
    kind: TransactionKind
    currency: str
    at: datetime
    """When it takes effect on the balances, aware UTC."""
    memo: str
    entries: tuple[Entry, ...]

    def __post_init__(self) -> None:
        if not self.transaction_id:
            raise PostingError("a transaction needs an id")
        name = f"transaction {self.transaction_id}"
        check_currency(self.currency)
        if self.at.utcoffset() is None:
            raise PostingError(f"{name}: {self.at} has no time zone")
        if len(self.memo) > MAX_MEMO:
            raise PostingError(f"{name}: the memo is longer than {MAX_MEMO} characters")
        if not self.entries:
            raise PostingError(f"{name} has no entries")
        total = sum(entry.amount for entry in self.entries)
        if total != 0:
            raise PostingError(f"{name} is out of balance by {format_amount(total)} {self.currency}")
        tenants = {entry.account for entry in self.entries if entry.account.startswith(_TENANT)}
        if len(tenants) > 1:
            raise PostingError(f"{name} mixes tenants: {', '.join(sorted(tenants))}; post one transaction for each")

    @property
    def tenant_id(self) -> str | None:
        """The tenant whose balance it changes, if any."""
        for entry in self.entries:
            if entry.account.startswith(_TENANT):
                return entry.account.removeprefix(_TENANT)
        return None

    def amount_on(self, account: Account) -> Nanos:
        """By how much it changes `account`."""
        return Nanos(sum(entry.amount for entry in self.entries if entry.account == account))


def credit_grant(
    transaction_id: str, *, tenant_id: str, currency: str, amount: Nanos, at: datetime, memo: str = ""
) -> Transaction:
    """Give a tenant `amount` (more than zero) to spend."""
    if amount <= 0:
        raise PostingError(f"a credit grant must be more than zero, not {format_amount(amount)}")
    return Transaction(
        transaction_id=transaction_id,
        kind=TransactionKind.CREDIT_GRANT,
        currency=currency,
        at=at,
        memo=memo,
        entries=(
            Entry(FUNDING_CREDIT, Nanos(-amount)),
            Entry(tenant_account(tenant_id), amount),
        ),
    )


def usage_charge(transaction_id: str, records: Iterable[UsageRecord], *, memo: str = "") -> Transaction | None:
    """Charge a tenant for a batch of its records, in one transaction; None when all of them were free.

    It takes effect when the last of the records finished, not when it is posted: the loader may run after
    midnight of the month's end, and the balance at the month's end must be the one that the month's records
    explain. Batches that `charge_batches` made never straddle a month. Raises PostingError when the records
    differ in tenant or currency, or one has a negative charge.
    """
    batch = list(records)
    if not batch:
        return None
    first = batch[0]
    amount = 0
    for record in batch:
        if record.tenant_id != first.tenant_id or record.currency != first.currency:
            raise PostingError(
                f"record {record.request_id} ({record.tenant_id}, {record.currency}) is in a batch of"
                f" {first.tenant_id}, {first.currency}; charge each tenant and currency apart"
            )
        if min(record.charges.values(), default=0) < 0:
            raise PostingError(f"record {record.request_id} has a negative charge")
        amount += record.charge
    if amount == 0:
        return None
    return Transaction(
        transaction_id=transaction_id,
        kind=TransactionKind.USAGE_CHARGE,
        currency=first.currency,
        at=max(record.finished_at for record in batch),
        memo=memo,
        entries=tuple(Entry(account, Nanos(part)) for account, part in usage_charge_entries(first.tenant_id, amount)),
    )


def usage_charge_entries(tenant_id: str, amount: int) -> tuple[tuple[Account, int], ...]:
    """The accounts and amounts of a usage charge of `amount`, which is more than zero."""
    return (tenant_account(tenant_id), -amount), (REVENUE_USAGE, amount)


def device_charge(
    transaction_id: str, *, tenant_id: str, currency: str, amount: Nanos, at: datetime, memo: str = ""
) -> Transaction:
    """Charge a tenant `amount` (more than zero) for device time that ended at `at`."""
    if amount <= 0:
        raise PostingError(f"a device charge must be more than zero, not {format_amount(amount)}; leave it out")
    return Transaction(
        transaction_id=transaction_id,
        kind=TransactionKind.DEVICE_CHARGE,
        currency=currency,
        at=at,
        memo=memo,
        entries=(
            Entry(tenant_account(tenant_id), Nanos(-amount)),
            Entry(REVENUE_DEVICES, amount),
        ),
    )


class BatchKey(NamedTuple):
    """What the records of one usage charge have in common."""

    tenant_id: str
    currency: str
    month: str


def charge_batches(records: Iterable[UsageRecord], zone: str) -> dict[BatchKey, list[UsageRecord]]:
    """Sort records into batches for one `usage_charge` each: by tenant, currency and billing month."""
    batches: dict[BatchKey, list[UsageRecord]] = {}
    period: Period | None = None
    for record in records:
        if period is None or not period.start <= record.finished_at < period.end:
            period = period_of(record.finished_at, zone)
        key = BatchKey(record.tenant_id, record.currency, period.month)
        batch = batches.get(key)
        if batch is None:
            batches[key] = [record]
        else:
            batch.append(record)
    return batches


class TrialBalance(msgspec.Struct, frozen=True):
    """The balance of every account of one currency."""

    balances: dict[Account, Nanos]

    @property
    def total(self) -> Nanos:
        """The sum of all accounts: zero, or entries are missing."""
        return Nanos(sum(self.balances.values()))

    @property
    def balanced(self) -> bool:
        return self.total == 0

    def balance(self, account: Account) -> Nanos:
        return self.balances.get(account, ZERO)


def trial_balance(entries: Iterable[Entry]) -> TrialBalance:
    """Add up the entries (of one currency) by account, accounts in order of their names."""
    sums: dict[Account, int] = {}
    for entry in entries:
        sums[entry.account] = sums.get(entry.account, 0) + entry.amount
    return TrialBalance({account: Nanos(sums[account]) for account in sorted(sums)})


class Discrepancy(msgspec.Struct, frozen=True):
    """An account whose kept balance is not the sum of its entries."""

    account: Account
    kept: Nanos
    summed: Nanos


def discrepancies(kept: Mapping[Account, Nanos], entries: Iterable[Entry]) -> tuple[Discrepancy, ...]:
    """Compare kept running balances (of one currency) with the sums of all entries; empty when all agree.

    An account that only one side knows counts as zero on the other.
    """
    summed = trial_balance(entries)
    return tuple(
        Discrepancy(account, kept.get(account, ZERO), summed.balance(account))
        for account in sorted(kept.keys() | summed.balances.keys())
        if kept.get(account, ZERO) != summed.balance(account)
    )


def verify_balance(account: Account, balance: Nanos, entries: Iterable[Entry]) -> None:
    """Raise PostingError unless `balance` is the sum of those `entries` that are on `account`."""
    summed = Nanos(sum(entry.amount for entry in entries if entry.account == account))
    if summed != balance:
        raise PostingError(
            f"the stored balance of {account} is {format_amount(balance)}, but its entries add up to"
            f" {format_amount(summed)}"
        )
