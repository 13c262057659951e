"""Limits and budgets, and what each gateway worker has of them on lease."""

from sqlalchemy import BigInteger, CheckConstraint, Column, ForeignKey, Integer, String, Table

from tidemill.store.tables.metadata import metadata

limits = Table(
    "limits",
    metadata,
    Column("limit_id", String(32), primary_key=True),
    Column("tenant_id", String(32), ForeignKey("tenants.tenant_id"), nullable=False, index=True),
    Column("key_id", String(32), ForeignKey("keys.key_id")),
    Column("model", String(128)),
    Column("kind", String(16), nullable=False),
    Column("per", String(8)),
    Column("amount", BigInteger, nullable=False),
    Column("soft_percent", Integer),
    Column("scope", String(256), nullable=False, unique=True),
    Column("created_at", BigInteger, nullable=False),
    CheckConstraint("amount >= 0", name="amount_not_negative"),
)
"""Limits (`ledger.limits`). `scope` spells out whom and what a limit binds, so that there is one of each."""

rate_shares = Table(
    "rate_shares",
    metadata,
    Column("limit_id", String(32), primary_key=True),
    Column("worker_id", String(48), primary_key=True),
    Column("booked", String(8192), nullable=False),
)
"""What each gateway worker has of a limit per minute: permits by second (`ledger.windows`), as a JSON object."""

slot_shares = Table(
    "slot_shares",
    metadata,
    Column("limit_id", String(32), primary_key=True),
    Column("worker_id", String(48), primary_key=True),
    Column("slots", BigInteger, nullable=False),
    Column("used", BigInteger, nullable=False),
    Column("valid", BigInteger, nullable=False),
)
"""Slots of concurrency limits that gateway workers have on lease until the second `valid` (`ledger.slots`)."""

budgets = Table(
    "budgets",
    metadata,
    Column("limit_id", String(32), primary_key=True),
    Column("period", String(16), primary_key=True),
    Column("spent", BigInteger, nullable=False),
    Column("warned_at", BigInteger),
)
"""What was spent of a budget in a day or month: the charges of the usage records that it binds and that were begun in
that period, kept in the transaction that stores them."""

budget_leases = Table(
    "budget_leases",
    metadata,
    Column("worker_id", String(48), primary_key=True),
    Column("limit_id", String(32), primary_key=True),
    Column("period", String(16), primary_key=True),
    Column("amount", BigInteger, nullable=False),
    CheckConstraint("amount >= 0", name="amount_not_negative"),
)
"""Slices of budgets that gateway workers may spend without asking. With what is spent, never more than the budget."""
