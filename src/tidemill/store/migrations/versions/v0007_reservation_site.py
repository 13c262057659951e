"""Reservations belong to a site, as jobs do: two platforms on one store each keep their own devices."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    # Those that were booked before are the first platform's that sees them, as they were.
    op.add_column("reservations", sa.Column("site", sa.String(length=32), nullable=False, server_default=""))
