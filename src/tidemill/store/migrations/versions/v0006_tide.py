"""What the tide remembers: demand by the five minutes, and what was measured of each model."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.create_table(
        "demand_bins",
        sa.Column("model", sa.String(length=128), nullable=False),
        sa.Column("bin", sa.Integer(), nullable=False),
        sa.Column("arrivals", sa.BigInteger(), nullable=False),
        sa.Column("work", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("model", "bin", name=op.f("pk_demand_bins")),
    )
    op.create_index(op.f("ix_demand_bins_bin"), "demand_bins", ["bin"], unique=False)
    op.create_table(
        "model_measures",
        sa.Column("model", sa.String(length=128), nullable=False),
        sa.Column("measure", sa.String(length=32), nullable=False),
        sa.Column("value", sa.Double(), nullable=False),
        sa.Column("measured_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("model", "measure", name=op.f("pk_model_measures")),
    )
    op.create_table(
        "drained",
        sa.Column("name", sa.String(length=160), nullable=False),
        sa.Column("why", sa.String(length=512), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_drained")),
    )
