"""Prices are rates of any component, and usage records have room for any; they carry labels and a list amount."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"

_BASE = ("input", "cached_input", "output")
_ADDED = ("charge_more", "components", "service_class", "mode", "project", "tags", "rule_id", "list_amount")

_prices = sa.table("prices", sa.column("price_id"), *(sa.column(name) for name in _BASE))
_rates = sa.table("price_rates", sa.column("price_id"), sa.column("component"), sa.column("rate"))
_records = sa.table("usage_records", *(sa.column(name) for name in _ADDED))


def upgrade() -> None:
    connection = op.get_bind()
    rows = connection.execute(sa.select(_prices)).all()
    with op.batch_alter_table("prices") as prices:
        for name in _BASE:
            prices.drop_column(name)
    op.create_table(
        "price_rates",
        sa.Column("price_id", sa.String(length=32), nullable=False),
        sa.Column("component", sa.String(length=24), nullable=False),
        sa.Column("rate", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["price_id"], ["prices.price_id"], name=op.f("fk_price_rates_price_id")),
        sa.PrimaryKeyConstraint("price_id", "component", name=op.f("pk_price_rates")),
    )
    if rows:
        connection.execute(
            sa.insert(_rates),
            [
                {"price_id": row.price_id, "component": name, "rate": getattr(row, name)}
                for row in rows
                for name in _BASE
            ],
        )
    # All of them may be null, so that a table of millions of records is not written anew.
    op.add_column("usage_records", sa.Column("charge_more", sa.BigInteger()))
    op.add_column("usage_records", sa.Column("components", sa.Text()))
    op.add_column("usage_records", sa.Column("service_class", sa.String(length=16)))
    op.add_column("usage_records", sa.Column("mode", sa.String(length=16)))
    op.add_column("usage_records", sa.Column("project", sa.String(length=64)))
    op.add_column("usage_records", sa.Column("tags", sa.String(length=1024)))
    op.add_column("usage_records", sa.Column("rule_id", sa.String(length=32)))
    op.add_column("usage_records", sa.Column("list_amount", sa.BigInteger()))
    op.drop_index("ix_transactions_tenant_id", "transactions")
    credits = sa.text("kind = 'credit_grant'")
    op.create_index(
        "ix_transactions_tenant_id", "transactions", ["tenant_id"], sqlite_where=credits, postgresql_where=credits
    )


def downgrade() -> None:
    connection = op.get_bind()
    _refuse_a_loss(connection)
    rates: dict[str, dict[str, int]] = {}
    for price_id, component, rate in connection.execute(sa.select(_rates)):
        rates.setdefault(price_id, {})[component] = rate
    op.drop_table("price_rates")
    with op.batch_alter_table("prices") as prices:
        for name in _BASE:
            prices.add_column(sa.Column(name, sa.BigInteger(), nullable=False, server_default="0"))
    for price_id, values in rates.items():
        connection.execute(sa.update(_prices).where(_prices.c.price_id == price_id).values(**values))
    with op.batch_alter_table("prices") as prices:
        for name in _BASE:
            prices.alter_column(name, server_default=None)
    op.drop_index("ix_transactions_tenant_id", "transactions")
    op.create_index("ix_transactions_tenant_id", "transactions", ["tenant_id"])
    with op.batch_alter_table("usage_records") as records:
        for name in _ADDED:
            records.drop_column(name)


def _refuse_a_loss(connection: sa.Connection) -> None:
    prices = connection.execute(
        sa.select(sa.func.count(sa.distinct(_rates.c.price_id))).where(_rates.c.component.not_in(_BASE))
    ).scalar_one()
    records = connection.execute(
        sa.select(sa.func.count()).where(sa.or_(*(_records.c[name].is_not(None) for name in _ADDED)))
    ).scalar_one()
    if prices or records:
        raise RuntimeError(
            f"The store cannot go back to schema {down_revision}, which knows no components but {', '.join(_BASE)}:"
            f" {prices} price versions and {records} usage records have others, which would be lost. Keep this version,"
            " or restore a backup of before."
        )
