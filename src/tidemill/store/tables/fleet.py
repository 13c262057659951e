"""What the tide knows of demand and models, and what the operator took out of the fleet."""

from sqlalchemy import BigInteger, Column, Double, Index, Integer, String, Table

from tidemill.store.tables.metadata import metadata

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
