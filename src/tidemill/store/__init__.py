"""The store: tables, migrations and queries, on SQLite or PostgreSQL alike."""
