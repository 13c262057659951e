"""Alembic's entry.

Migrations run on the connection that `store.migrate` hands over, in its transaction.
"""

from alembic import context

from tidemill.store.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
    transactional_ddl=True,
    transaction_per_migration=False,
)
with context.begin_transaction():
    context.run_migrations()
