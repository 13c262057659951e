"""Jobs, their attempts and queues, and reservations of devices."""

from sqlalchemy import BigInteger, Boolean, Column, ForeignKey, Index, Integer, String, Table, Text

from tidemill.store.tables.metadata import metadata

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
"""Jobs (`store.jobs`). `spec` is the submission, JSON; `site` the directory that has its files."""

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
