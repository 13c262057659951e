"""Reading the data of a platform that is stopped: the same answers, from the same queries."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, text
from sqlalchemy.exc import SQLAlchemyError

from tidemill.app.datadir import STORE_FILE
from tidemill.control import batches, jobs, queries, reservations
from tidemill.control import limits as control_limits
from tidemill.control.ledger import check_ledger
from tidemill.errors import Unavailable
from tidemill.store.engine import open_store, store_url
from tidemill.store.migrate import schema_head
from tidemill.store.revision import get_setting

T = TypeVar("T")
Json = dict[str, Any]


class OfflinePlatform:
    """A stopped platform's data directory, read-only. The methods answer as those of `client.AdminClient`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def tenants(self) -> Json:
        return self._read(queries.tenants)

    def keys(self, tenant: str | None) -> Json:
        return self._read(lambda connection: queries.keys(connection, tenant))

    def usage(self, tenant: str, month: str | None, *, records: bool) -> Json:
        """The statement; with `records` all of them."""

        def query(connection: Connection) -> Json:
            zone = _zone(connection)
            limit = queries.MAX_PAGE_RECORDS
            answer = queries.usage(connection, tenant, zone=zone, month=month, records=records, limit=limit)
            after = answer.pop("next", None)
            while after:
                page = queries.usage(connection, tenant, zone=zone, month=month, records=True, after=after, limit=limit)
                after = page.pop("next", None)
                answer["records"] += page["records"]
            return answer

        return self._read(query)

    def invoice(self, tenant: str, month: str | None) -> Json:
        return self._read(
            lambda connection: queries.invoice_json(connection, tenant, month, **_billing(connection), now=_now())
        )

    def invoice_text(self, tenant: str, month: str | None) -> str:
        return self._read(
            lambda connection: queries.invoice_text(connection, tenant, month, **_billing(connection), now=_now())
        )

    def check_ledger(self) -> Json:
        return self._read(lambda connection: check_ledger(connection, zone=_zone(connection)))

    def limits(self, tenant: str | None) -> Json:
        return self._read(
            lambda connection: control_limits.list_limits(connection, tenant, zone=_zone(connection), now=_now())
        )

    def batches(self, tenant: str | None, *, unfinished: bool, limit: int) -> Json:
        return self._read(
            lambda connection: batches.list_batches(connection, tenant, unfinished=unfinished, limit=limit)
        )

    def batch(self, batch: str) -> Json:
        return self._read(lambda connection: batches.show_batch(connection, batch))

    def jobs(self, tenant: str | None, *, state: str | None, unfinished: bool, limit: int) -> Json:
        states = () if state is None else (state,)
        return self._read(
            lambda connection: jobs.list_jobs(connection, tenant, states=states, unfinished=unfinished, limit=limit)
        )

    def job(self, job: str) -> Json:
        return self._read(lambda connection: jobs.show_job(connection, job))

    def queues(self) -> Json:
        return self._read(reservations.list_queues)

    def reservations(self, tenant: str | None, *, over: bool) -> Json:
        return self._read(lambda connection: reservations.list_reservations(connection, tenant, over=over))

    def models(self) -> Json:
        return self._read(lambda connection: queries.models(connection, None, now=_now()))

    def _read(self, query: Callable[[Connection], T]) -> T:
        store = open_store(store_url(_elsewhere(self._directory), self._directory), read_only=True)
        try:
            with store.read() as connection:
                self._check_schema(connection)
                return query(connection)
        except SQLAlchemyError as error:
            raise Unavailable(f"The database in {self._directory} cannot be read: {error}.") from error
        finally:
            store.close()

    def _check_schema(self, connection: Connection) -> None:
        try:
            found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
        except SQLAlchemyError:
            found = None
        if found is None:
            raise Unavailable(
                f"The database in {self._directory} is empty.", hint="Start the platform once with `tidemill up`."
            )
        if found != schema_head():
            raise Unavailable(
                f"The data in {self._directory} is of another version of Tidemill (schema {found}).",
                hint="Read it with that version, or start this one on it once.",
            )


def _elsewhere(directory: Path) -> str | None:
    """Where the store is when it is not in the directory. libpq takes its password from PGPASSWORD or ~/.pgpass."""
    try:
        return (directory / STORE_FILE).read_text().strip()
    except FileNotFoundError:
        return None


def _now() -> datetime:
    return datetime.now(UTC)


def _zone(connection: Connection) -> str:
    return get_setting(connection, "zone") or "UTC"


def _billing(connection: Connection) -> dict[str, str]:
    return {"zone": _zone(connection), "issuer": get_setting(connection, "issuer") or ""}
