"""The tables, by subject.

Amounts are nanos in 64-bit integers; instants are integers of microseconds since 1970 UTC.

Instants are integers because SQLite has no timestamp type and a text form sorts only while every writer agrees
on it. `tidemill.clock` converts at the edge. Importing this package loads every table, as migrations need it.
"""

from tidemill.store.tables import files, fleet, jobs, limits, money, tenants, usage
from tidemill.store.tables.metadata import metadata

__all__ = ["files", "fleet", "jobs", "limits", "metadata", "money", "tenants", "usage"]
