"""The tables. Amounts are nanos in 64-bit integers; instants are integers of microseconds since 1970 UTC.

Instants are integers because SQLite has no timestamp type and a text form sorts only while every writer agrees
on it. `store.clock` converts at the edge.
"""

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

settings = Table(
    "settings",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("value", String(1024), nullable=False),
)
"""Facts of the installation: `currency`, and `revision`, a counter that rises with each change gateways must see."""

tenants = Table(
    "tenants",
    metadata,
    Column("tenant_id", String(32), primary_key=True),
    Column("name", String(128), nullable=False, unique=True),
    Column("currency", String(3), nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("weight", Integer, nullable=False, server_default="1"),
)
"""`weight`: a tenant's share when a model is full, relative to the others'."""

keys = Table(
    "keys",
    metadata,
    Column("key_id", String(32), primary_key=True),
    Column("tenant_id", String(32), ForeignKey("tenants.tenant_id"), nullable=False, index=True),
    Column("name", String(128), nullable=False),
    Column("digest", String(64), nullable=False, unique=True),
    Column("hint", String(16), nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("revoked_at", BigInteger),
    Column("expires_at", BigInteger),
    Column("allowed_models", String(8192)),
    Column("allowed_ips", String(2048)),
    Column("line_id", String(32)),
)
"""API keys. `digest` is the SHA-256 of the key in hex; `hint` is what of it may be shown (`sk-tm-...abcd`).

`allowed_models` and `allowed_ips` (networks in CIDR notation) are lists with commas; null allows all. `line_id` is the
first key of a line of rotated keys, and null for that itself.
"""

prices = Table(
    "prices",
    metadata,
    Column("price_id", String(32), primary_key=True),
    Column("model", String(128), nullable=False),
    Column("currency", String(3), nullable=False),
    Column("input", BigInteger, nullable=False),
    Column("cached_input", BigInteger, nullable=False),
    Column("output", BigInteger, nullable=False),
    Column("valid_from", BigInteger, nullable=False),
    Column("tier", String(16), nullable=False, server_default="standard"),
    Index(None, "model", "currency", "valid_from"),
)
"""Price versions: nanos per million tokens. Rows are added, never changed.

`tier`: `standard`, or `batch` for the lines of batches; each tier of a model has versions of its own.
"""

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
    Column("tenant_id", String(32), index=True),
    Column("currency", String(3), nullable=False),
    Column("at", BigInteger, nullable=False),
    Column("memo", String(512), nullable=False),
)

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

usage_records = Table(
    "usage_records",
    metadata,
    Column("request_id", String(48), primary_key=True),
    Column("tenant_id", String(32), ForeignKey("tenants.tenant_id"), nullable=False),
    Column("key_id", String(32), nullable=False),
    Column("model", String(128), nullable=False),
    Column("replica", String(160), nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("estimated", Boolean, nullable=False),
    Column("status", String(24), nullable=False),
    Column("streamed", Boolean, nullable=False),
    Column("price_id", String(32), nullable=False),
    Column("currency", String(3), nullable=False),
    Column("charge_input", BigInteger, nullable=False),
    Column("charge_cached", BigInteger, nullable=False),
    Column("charge_output", BigInteger, nullable=False),
    Column("uncollected", BigInteger, nullable=False),
    Column("hold", BigInteger, nullable=False),
    Column("started_at", BigInteger, nullable=False),
    Column("first_token_at", BigInteger),
    Column("finished_at", BigInteger, nullable=False),
    Column("device_ns", BigInteger, nullable=False),
    Column("transaction_id", String(32)),
    Index(None, "tenant_id", "finished_at"),
    Index(None, "finished_at"),
    Index(None, "transaction_id"),
)

log_positions = Table(
    "log_positions",
    metadata,
    Column("worker_id", String(48), primary_key=True),
    Column("segment", BigInteger, nullable=False),
    Column("offset", BigInteger, nullable=False),
)
"""How far the loader has read each worker's usage log; moves in the transaction that stores the records."""

engine_counters = Table(
    "engine_counters",
    metadata,
    Column("life", String(48), primary_key=True),
    Column("replica", String(160), nullable=False),
    Column("labelled", Boolean, nullable=False),
    Column("started_at", BigInteger, nullable=False),
    Column("sampled_at", BigInteger, nullable=False),
    Column("base_prompt", BigInteger, nullable=False),
    Column("base_completion", BigInteger, nullable=False),
    Column("prompt", BigInteger, nullable=False),
    Column("completion", BigInteger, nullable=False),
)
"""The engines' own token totals: the first and the last sample of each life of a replica (for reconciliation).

`labelled`: usage records name this life, as Tidemill started it; otherwise they are found by their time.
"""

files = Table(
    "files",
    metadata,
    Column("file_id", String(40), primary_key=True),
    Column("tenant_id", String(32), ForeignKey("tenants.tenant_id"), nullable=False),
    Column("site", String(32), nullable=False),
    Column("purpose", String(24), nullable=False),
    Column("filename", String(512), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger),
    Index(None, "tenant_id", "created_at"),
    Index(None, "expires_at"),
)
"""Files of the Files API. Their bytes lie on a disk: `site` is the directory (see `store.blobs`)."""

batches = Table(
    "batches",
    metadata,
    Column("batch_id", String(40), primary_key=True),
    Column("tenant_id", String(32), ForeignKey("tenants.tenant_id"), nullable=False),
    Column("key_id", String(32), nullable=False),
    Column("site", String(32), nullable=False),
    Column("endpoint", String(64), nullable=False),
    Column("input_file_id", String(40), nullable=False, index=True),
    Column("completion_window", String(8), nullable=False),
    Column("metadata", Text),
    Column("output_expires_s", BigInteger),
    Column("model", String(128)),
    Column("status", String(16), nullable=False),
    Column("outcome", String(16)),
    Column("errors", Text),
    Column("total", Integer, nullable=False),
    Column("completed", Integer, nullable=False),
    Column("failed", Integer, nullable=False),
    Column("input_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("reasoning_tokens", BigInteger, nullable=False),
    Column("output_file_id", String(40)),
    Column("error_file_id", String(40)),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("in_progress_at", BigInteger),
    Column("finalizing_at", BigInteger),
    Column("completed_at", BigInteger),
    Column("failed_at", BigInteger),
    Column("expired_at", BigInteger),
    Column("cancelling_at", BigInteger),
    Column("cancelled_at", BigInteger),
    Index(None, "tenant_id", "created_at"),
    Index(None, "status", "expires_at"),
)
"""Batches of the Batch API. `metadata` and `errors` are JSON; `outcome` is what a finalizing batch becomes."""

responses = Table(
    "responses",
    metadata,
    Column("response_id", String(48), primary_key=True),
    Column("tenant_id", String(32), ForeignKey("tenants.tenant_id"), nullable=False),
    Column("previous_id", String(48)),
    Column("bytes", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("input", LargeBinary, nullable=False),
    Column("response", LargeBinary, nullable=False),
    Index(None, "tenant_id", "created_at"),
    Index(None, "expires_at"),
)
"""Responses that tenants asked to be kept (`store.responses`): their input items and themselves, JSON under zlib."""

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

device_meters = Table(
    "device_meters",
    metadata,
    Column("meter_id", String(32), primary_key=True),
    Column("tenant_id", String(32), ForeignKey("tenants.tenant_id"), nullable=False, index=True),
    Column("currency", String(3), nullable=False),
    Column("kind", String(64), nullable=False),
    Column("tier", String(16), nullable=False),
    Column("price_id", String(32), nullable=False),
    Column("hour", BigInteger, nullable=False),
    Column("devices", Integer, nullable=False),
    Column("started_at", BigInteger, nullable=False),
    Column("billed_until", BigInteger, nullable=False),
    Column("ended_at", BigInteger),
    Column("hold", BigInteger, nullable=False),
    Column("uncollected", BigInteger, nullable=False),
    Column("job_id", String(32)),
    Column("attempt", Integer),
    Column("reservation_id", String(32)),
    CheckConstraint("hold >= 0", name="hold_not_negative"),
    Index(None, "job_id", "attempt"),
    Index(None, "reservation_id"),
)
"""Devices of one kind that a tenant has or had: by an attempt at a job, or by a reservation.

`billed_until` moves in the transaction that posts the charge; `hold` is kept of the balance, beside the leases, for
what is not billed yet.
"""

device_usage = Table(
    "device_usage",
    metadata,
    Column("meter_id", String(32), ForeignKey("device_meters.meter_id"), primary_key=True),
    Column("month", String(7), primary_key=True),
    Column("tenant_id", String(32), nullable=False),
    Column("device_us", BigInteger, nullable=False),
    Column("amount", BigInteger, nullable=False),
    Column("uncollected", BigInteger, nullable=False),
    Index(None, "tenant_id", "month"),
)
"""What each meter has counted and charged in each billing month: what invoices add up."""

jobs = Table(
    "jobs",
    metadata,
    Column("job_id", String(32), primary_key=True),
    Column("tenant_id", String(32), ForeignKey("tenants.tenant_id"), nullable=False),
    Column("site", String(32), nullable=False),
    Column("name", String(128), nullable=False),
    Column("queue", String(128), nullable=False),
    Column("spec", Text, nullable=False),
    Column("preemptible", Boolean, nullable=False),
    Column("reservation_id", String(32)),
    Column("state", String(16), nullable=False),
    Column("reason", String(512), nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("failures", Integer, nullable=False),
    Column("losses", Integer, nullable=False),
    Column("ran_us", BigInteger, nullable=False),
    Column("exit_code", Integer),
    Column("deadline_at", BigInteger),
    Column("submitted_at", BigInteger, nullable=False),
    Column("not_before", BigInteger),
    Column("cancel_at", BigInteger),
    Column("started_at", BigInteger),
    Column("ended_at", BigInteger),
    Index(None, "site", "state"),
    Index(None, "tenant_id", "submitted_at"),
    Index(None, "submitted_at"),
)
"""Jobs (`store.jobs`). `spec` is the wish as it was submitted, JSON; `site` the directory that has its files."""

job_attempts = Table(
    "job_attempts",
    metadata,
    Column("job_id", String(32), ForeignKey("jobs.job_id"), primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("devices", Text, nullable=False),
    Column("ranks", Integer, nullable=False),
    Column("why", String(512), nullable=False),
    Column("taken_at", BigInteger, nullable=False),
    Column("started_at", BigInteger),
    Column("ended_at", BigInteger),
    Column("outcome", String(16)),
    Column("exit_code", Integer),
    Column("reason", String(512), nullable=False),
)
"""Each time that a job was started: on which devices (JSON), and how it ended."""

queues = Table(
    "queues",
    metadata,
    Column("name", String(128), primary_key=True),
    Column("tenant_id", String(32), ForeignKey("tenants.tenant_id")),
    Column("quota", Integer, nullable=False),
    Column("borrow", Integer),
    Column("weight", Integer, nullable=False),
    Column("created_at", BigInteger, nullable=False),
)
"""Queues of jobs: devices of their own, and what they may borrow. A null `tenant_id` lets every tenant in."""

reservations = Table(
    "reservations",
    metadata,
    Column("reservation_id", String(32), primary_key=True),
    Column("tenant_id", String(32), ForeignKey("tenants.tenant_id"), nullable=False, index=True),
    Column("kind", String(64), nullable=False),
    Column("devices", Integer, nullable=False),
    Column("starts_at", BigInteger, nullable=False),
    Column("ends_at", BigInteger, nullable=False),
    Column("lend", Boolean, nullable=False),
    Column("price_id", String(32), nullable=False),
    Column("state", String(16), nullable=False),
    Column("reason", String(512), nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("site", String(32), nullable=False, server_default=""),
    Index(None, "state", "ends_at"),
)
"""Devices that are kept for a tenant from one instant to another, and billed for that time, used or not."""

demand_bins = Table(
    "demand_bins",
    metadata,
    Column("model", String(128), primary_key=True),
    Column("bin", Integer, primary_key=True),
    Column("arrivals", BigInteger, nullable=False),
    Column("work", BigInteger, nullable=False),
    Index(None, "bin"),
)
"""Interactive demand by five minutes (`store.demand`): sums over `usage_records`, which it can be made from again.
`bin` counts five minutes since 1970; `work` is in tokens of prefill."""

model_measures = Table(
    "model_measures",
    metadata,
    Column("model", String(128), primary_key=True),
    Column("measure", String(32), primary_key=True),
    Column("value", Double, nullable=False),
    Column("measured_at", BigInteger, nullable=False),
)
"""What the tide has measured of a model on this installation's devices: `startup_s`, `capacity`."""

drained = Table(
    "drained",
    metadata,
    Column("name", String(160), primary_key=True),
    Column("why", String(512), nullable=False),
    Column("at", BigInteger, nullable=False),
)
"""Nodes (`NODE`) and devices (`NODE/INDEX`) that the operator has taken out of the fleet."""
