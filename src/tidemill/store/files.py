"""Files of the Files API: what the store knows of them. Their bytes are `store.blobs`."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import msgspec
from sqlalchemy import Connection, Row, delete, exists, func, insert, or_, select, tuple_

from tidemill.clock import from_micros, to_micros
from tidemill.errors import Conflict, NotFound, TidemillError
from tidemill.store.bulk import dialect_insert
from tidemill.store.tables.files import batches, files
from tidemill.store.tables.tenants import tenants

UNFINISHED = ("validating", "in_progress", "finalizing", "cancelling")
"""The states of a batch that still needs its input file."""
IN_CHUNK = 500


class QuotaExceeded(TidemillError):
    """The tenant's room for files is used up."""

    status = 400
    code = "file_quota_exceeded"


class File(msgspec.Struct, frozen=True, kw_only=True):
    """A file of a tenant."""

    file_id: str
    tenant_id: str
    site: str
    """The directory that has its bytes (`BlobStore.site`)."""
    purpose: str
    """`batch`: the input of a batch; `batch_output`: what came of one."""
    filename: str
    bytes: int
    created_at: datetime
    expires_at: datetime | None


class FileQuota(msgspec.Struct, frozen=True):
    """What a tenant may keep."""

    bytes: int
    files: int


def add_file(connection: Connection, file: File, quota: FileQuota) -> None:
    """Enter an uploaded file. Raises QuotaExceeded, and then nothing is entered."""
    # So that two uploads at a time do not both find the last free room (SQLite has locked the whole file already).
    connection.execute(
        select(tenants.c.tenant_id).where(tenants.c.tenant_id == file.tenant_id).with_for_update(key_share=True)
    )
    count, size = file_usage(connection, file.tenant_id)
    check_quota(count + 1, size + file.bytes, quota)
    connection.execute(insert(files).values(**_row(file)))


def add_output(connection: Connection, file: File) -> None:
    """Enter a file that a batch has made. It counts for the quota, and is never refused. May be repeated."""
    connection.execute(dialect_insert(connection, files).values(**_row(file)).on_conflict_do_nothing())


def check_quota(count: int, size: int, quota: FileQuota) -> None:
    """Raises QuotaExceeded when so many files of so many bytes together are too much."""
    if count > quota.files:
        raise QuotaExceeded(
            f"You can keep at most {quota.files} files.",
            hint="Delete files that you no longer need (DELETE /v1/files/ID).",
        )
    if size > quota.bytes:
        raise QuotaExceeded(
            f"You can keep at most {quota.bytes // 2**20} MiB of files, not {-(-size // 2**20)} MiB.",
            hint="Delete files that you no longer need (DELETE /v1/files/ID).",
        )


def file_usage(connection: Connection, tenant_id: str) -> tuple[int, int]:
    """How many files a tenant keeps, and their bytes together."""
    row = connection.execute(select(func.count(), func.sum(files.c.bytes)).where(files.c.tenant_id == tenant_id)).one()
    return row[0], int(row[1] or 0)


def find_file(connection: Connection, *, tenant_id: str, file_id: str, now: datetime) -> File:
    """A file of a tenant. Raises NotFound, also for another tenant's and for one that has expired."""
    row = connection.execute(
        select(files).where(files.c.file_id == file_id, files.c.tenant_id == tenant_id, _alive(now))
    ).first()
    if row is None:
        raise NotFound(f"No such File object: {file_id[:80]}.", hint="GET /v1/files lists yours.", param="id")
    return _file(row)


def list_files(
    connection: Connection,
    *,
    tenant_id: str,
    now: datetime,
    limit: int,
    purpose: str | None = None,
    after: str | None = None,
    ascending: bool = False,
) -> list[File]:
    """A page of a tenant's files by age, behind the file `after`.

    Raises NotFound when there is no such file.
    """
    query = select(files).where(files.c.tenant_id == tenant_id, _alive(now))
    if purpose is not None:
        query = query.where(files.c.purpose == purpose)
    position = tuple_(files.c.created_at, files.c.file_id)
    if after is not None:
        last = find_file(connection, tenant_id=tenant_id, file_id=after, now=now)
        at = (to_micros(last.created_at), last.file_id)
        query = query.where(position > at if ascending else position < at)
    order = (files.c.created_at, files.c.file_id)
    query = query.order_by(*(order if ascending else [column.desc() for column in order])).limit(limit)
    return [_file(row) for row in connection.execute(query)]


def delete_file(connection: Connection, *, tenant_id: str, file_id: str, now: datetime) -> None:
    """Forget a file; its blob is to be removed after the commit.

    Raises NotFound, Conflict while a batch reads it.
    """
    connection.execute(select(files.c.file_id).where(files.c.file_id == file_id).with_for_update())
    find_file(connection, tenant_id=tenant_id, file_id=file_id, now=now)
    reader = connection.execute(
        select(batches.c.batch_id).where(batches.c.input_file_id == file_id, batches.c.status.in_(UNFINISHED)).limit(1)
    ).scalar()
    if reader is not None:
        raise Conflict(
            f"The batch {reader} still uses this file.", hint="Cancel the batch, or wait until it has finished."
        )
    connection.execute(delete(files).where(files.c.file_id == file_id))


def delete_expired(connection: Connection, *, site: str, now: datetime) -> list[str]:
    """Forget the files of a site whose time is over, but for those that a batch reads; gives their ids."""
    used = exists().where(batches.c.input_file_id == files.c.file_id, batches.c.status.in_(UNFINISHED))
    over = (files.c.site == site, files.c.expires_at <= to_micros(now), ~used)
    found = list(connection.execute(select(files.c.file_id).where(*over).limit(IN_CHUNK).with_for_update()).scalars())
    if found:
        connection.execute(delete(files).where(files.c.file_id.in_(found)))
    return found


def known_files(connection: Connection, file_ids: Sequence[str]) -> set[str]:
    """Which of these ids are files."""
    known: set[str] = set()
    for at in range(0, len(file_ids), IN_CHUNK):
        part = file_ids[at : at + IN_CHUNK]
        known.update(connection.execute(select(files.c.file_id).where(files.c.file_id.in_(part))).scalars())
    return known


def _alive(now: datetime) -> Any:
    return or_(files.c.expires_at.is_(None), files.c.expires_at > to_micros(now))


def _row(file: File) -> dict[str, Any]:
    return {
        **msgspec.structs.asdict(file),
        "created_at": to_micros(file.created_at),
        "expires_at": None if file.expires_at is None else to_micros(file.expires_at),
    }


def _file(row: Row[Any]) -> File:
    values = dict(row._mapping)
    values["created_at"] = from_micros(row.created_at)
    values["expires_at"] = None if row.expires_at is None else from_micros(row.expires_at)
    return File(**values)
