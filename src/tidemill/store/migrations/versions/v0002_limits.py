"""Limits: rates, concurrency and budgets, keys with an expiry and policies, tenants with a weight."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("tenants", sa.Column("weight", sa.Integer(), nullable=False, server_default="1"))
    op.add_column("keys", sa.Column("expires_at", sa.BigInteger(), nullable=True))
    op.add_column("keys", sa.Column("allowed_models", sa.String(length=8192), nullable=True))
    op.add_column("keys", sa.Column("allowed_ips", sa.String(length=2048), nullable=True))
    op.add_column("keys", sa.Column("line_id", sa.String(length=32), nullable=True))
    op.create_table(
        "limits",
        sa.Column("limit_id", sa.String(length=32), nullable=False),
        sa.Column("tenant_id", sa.String(length=32), nullable=False),
        sa.Column("key_id", sa.String(length=32), nullable=True),
        sa.Column("model", sa.String(length=128), nullable=True),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("per", sa.String(length=8), nullable=True),
        sa.Column("amount", sa.BigInteger(), nullable=False),
        sa.Column("soft_percent", sa.Integer(), nullable=True),
        sa.Column("scope", sa.String(length=256), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("amount >= 0", name=op.f("ck_limits_amount_not_negative")),
        sa.ForeignKeyConstraint(["key_id"], ["keys.key_id"], name=op.f("fk_limits_key_id")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.tenant_id"], name=op.f("fk_limits_tenant_id")),
        sa.PrimaryKeyConstraint("limit_id", name=op.f("pk_limits")),
        sa.UniqueConstraint("scope", name=op.f("uq_limits_scope")),
    )
    op.create_index(op.f("ix_limits_tenant_id"), "limits", ["tenant_id"], unique=False)
    op.create_table(
        "rate_shares",
        sa.Column("limit_id", sa.String(length=32), nullable=False),
        sa.Column("worker_id", sa.String(length=48), nullable=False),
        sa.Column("booked", sa.String(length=8192), nullable=False),
        sa.PrimaryKeyConstraint("limit_id", "worker_id", name=op.f("pk_rate_shares")),
    )
    op.create_table(
        "slot_shares",
        sa.Column("limit_id", sa.String(length=32), nullable=False),
        sa.Column("worker_id", sa.String(length=48), nullable=False),
        sa.Column("slots", sa.BigInteger(), nullable=False),
        sa.Column("used", sa.BigInteger(), nullable=False),
        sa.Column("valid", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("limit_id", "worker_id", name=op.f("pk_slot_shares")),
    )
    op.create_table(
        "budgets",
        sa.Column("limit_id", sa.String(length=32), nullable=False),
        sa.Column("period", sa.String(length=16), nullable=False),
        sa.Column("spent", sa.BigInteger(), nullable=False),
        sa.Column("warned_at", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("limit_id", "period", name=op.f("pk_budgets")),
    )
    op.create_table(
        "budget_leases",
        sa.Column("worker_id", sa.String(length=48), nullable=False),
        sa.Column("limit_id", sa.String(length=32), nullable=False),
        sa.Column("period", sa.String(length=16), nullable=False),
        sa.Column("amount", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("amount >= 0", name=op.f("ck_budget_leases_amount_not_negative")),
        sa.PrimaryKeyConstraint("worker_id", "limit_id", "period", name=op.f("pk_budget_leases")),
    )
