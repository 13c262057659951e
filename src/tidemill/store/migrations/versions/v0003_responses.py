"""Responses of the Responses API that tenants asked to be kept."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "responses",
        sa.Column("response_id", sa.String(length=48), nullable=False),
        sa.Column("tenant_id", sa.String(length=32), nullable=False),
        sa.Column("previous_id", sa.String(length=48), nullable=True),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.Column("input", sa.LargeBinary(), nullable=False),
        sa.Column("response", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.tenant_id"], name=op.f("fk_responses_tenant_id")),
        sa.PrimaryKeyConstraint("response_id", name=op.f("pk_responses")),
    )
    op.create_index(op.f("ix_responses_expires_at"), "responses", ["expires_at"], unique=False)
    op.create_index(op.f("ix_responses_tenant_id_created_at"), "responses", ["tenant_id", "created_at"], unique=False)
