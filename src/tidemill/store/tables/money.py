"""Prices, the books (accounts, transactions, entries), and the slices of balances on lease."""

from sqlalchemy import BigInteger, CheckConstraint, Column, ForeignKey, Index, Integer, String, Table, text

from tidemill.store.tables.metadata import metadata

_CREDITS = text("kind = 'credit_grant'")

prices = Table(
    "prices",
    metadata,
    Column("price_id", String(32), primary_key=True),
    Column("model", String(128), nullable=False),
    Column("currency", String(3), nullable=False),
    Column("valid_from", BigInteger, nullable=False),
    Column("tier", String(16), nullable=False, server_default="standard"),
    Index(None, "model", "currency", "valid_from"),
)
"""Price versions. Rows are added, never changed.

`tier`: `standard`, or `batch` for the lines of batches; each tier of a model has versions of its own.
"""

price_rates = Table(
    "price_rates",
    metadata,
    Column("price_id", String(32), ForeignKey("prices.price_id"), primary_key=True),
    Column("component", String(24), primary_key=True),
    Column("rate", BigInteger, nullable=False),
)
"""What a price version says of each component (`ledger.components`): nanos for so many units as the catalogue says."""

device_prices = Table(
    "device_prices",
    metadata,
    Column("price_id", String(32), primary_key=True),
    Column("kind", String(64), nullable=False),
    Column("currency", String(3), nullable=False),
    Column("tier", String(16), nullable=False),
    Column("hour", BigInteger, nullable=False),
    Column("valid_from", BigInteger, nullable=False),
    Index(None, "kind", "currency", "valid_from"),
)
"""Price versions of device time (`ledger.devices`): nanos per device and hour. Rows are added, never changed."""

accounts = Table(
    "accounts",
    metadata,
    Column("account", String(128), primary_key=True),
    Column("currency", String(3), primary_key=True),
    Column("balance", BigInteger, nullable=False),
)
"""The running sum of each account's entries, kept in the same transaction that adds them."""

transactions = Table(
    "transactions",
    metadata,
    Column("transaction_id", String(32), primary_key=True),
    Column("kind", String(32), nullable=False),
    Column("tenant_id", String(32)),
    Column("currency", String(3), nullable=False),
    Column("at", BigInteger, nullable=False),
    Column("memo", String(512), nullable=False),
    Index(None, "tenant_id", sqlite_where=_CREDITS, postgresql_where=_CREDITS),
)
"""Only credits are looked for by tenant: an index of all charges as well would be most of what they cost to store."""

entries = Table(
    "entries",
    metadata,
    Column("transaction_id", String(32), ForeignKey("transactions.transaction_id"), primary_key=True),
    Column("line", Integer, primary_key=True),
    Column("account", String(128), nullable=False, index=True),
    Column("currency", String(3), nullable=False),
    Column("amount", BigInteger, nullable=False),
)
"""Double entry: the amounts of one transaction add up to zero. Rows are added, never changed."""

leases = Table(
    "leases",
    metadata,
    Column("worker_id", String(48), primary_key=True),
    Column("tenant_id", String(32), ForeignKey("tenants.tenant_id"), primary_key=True),
    Column("amount", BigInteger, nullable=False),
    CheckConstraint("amount >= 0", name="amount_not_negative"),
)
"""Slices of balances that gateway workers may spend without asking. Their sum never exceeds the balance."""
