"""What was used: records of requests, time on devices, and the engines' own counters."""

from sqlalchemy import BigInteger, Boolean, CheckConstraint, Column, ForeignKey, Index, Integer, String, Table, Text

from tidemill.store.tables.metadata import metadata

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
    Column("charge_more", BigInteger),
    Column("components", Text),
    Column("service_class", String(16)),
    Column("mode", String(16)),
    Column("project", String(64)),
    Column("tags", String(1024)),
    Column("rule_id", String(32)),
    Column("list_amount", BigInteger),
    Index(None, "tenant_id", "finished_at"),
    Index(None, "finished_at"),
    Index(None, "transaction_id"),
)
"""One row for each request. Tokens of prompt and answer, which every request has, are columns.

`components`: the further components of those that have any, `{"cache_write": [100, 1250], "reasoning_output": [50]}`:
quantity, and the nanos that it costs if it is billed apart (`store.record_components`); `charge_more` is the sum of
these nanos. `service_class` to `rule_id`: `ledger.usage.UsageLabels`, null where empty; `tags` is a JSON list.
"""

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
