"""The installation, its tenants and their API keys."""

from sqlalchemy import BigInteger, Column, ForeignKey, Integer, String, Table

from tidemill.store.tables.metadata import metadata

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
