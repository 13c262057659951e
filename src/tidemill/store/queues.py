"""Queues of jobs: whose they are, their quota, and what they may borrow (decided upon in `tides`).

A job that names no queue is in the queue of its tenant's name, which need not be set: without, it has no quota and
borrows by the tenant's weight.
"""

from datetime import datetime
from typing import Any

import msgspec
from sqlalchemy import Connection, Row, delete, insert, select, update

from tidemill.clock import from_micros, to_micros
from tidemill.errors import Conflict, NotFound
from tidemill.store.jobs import UNFINISHED
from tidemill.store.tables.jobs import jobs, queues
from tidemill.suggestions import did_you_mean


class Queue(msgspec.Struct, frozen=True, kw_only=True):
    """A queue that an operator has set."""

    name: str
    tenant_id: str | None
    """Only this tenant's jobs; None: anybody's."""
    quota: int = 0
    """Devices of its own."""
    borrow: int | None = None
    """Devices beyond these, of what others leave; None: as many as there are."""
    weight: int = 1
    created_at: datetime


def set_queue(connection: Connection, queue: Queue) -> Queue:
    """Make a queue, or change it. Raises Conflict when it would become another tenant's."""
    known = find_queue(connection, queue.name)
    if known is not None and known.tenant_id != queue.tenant_id:
        raise Conflict(
            f"The queue {queue.name!r} belongs to another tenant.", hint="Choose another name.", param="queue"
        )
    values = msgspec.structs.asdict(queue)
    del values["created_at"]
    if known is None:
        connection.execute(insert(queues).values(**values, created_at=to_micros(queue.created_at)))
        return queue
    connection.execute(update(queues).where(queues.c.name == queue.name).values(**values))
    return msgspec.structs.replace(queue, created_at=known.created_at)


def find_queue(connection: Connection, name: str) -> Queue | None:
    row = connection.execute(select(queues).where(queues.c.name == name)).first()
    return None if row is None else _queue(row)


def list_queues(connection: Connection) -> list[Queue]:
    """The queues that were set, by name."""
    return [_queue(row) for row in connection.execute(select(queues).order_by(queues.c.name))]


def remove_queue(connection: Connection, name: str) -> Queue:
    """Remove a queue. Raises NotFound with the nearest one; Conflict while jobs are in it."""
    queue = find_queue(connection, name)
    if queue is None:
        known = [each.name for each in list_queues(connection)]
        raise NotFound(f"There is no queue {name[:80]!r}.", hint=did_you_mean(name, known), param="queue")
    held = (
        select(jobs.c.job_id)
        .where(jobs.c.queue == name, jobs.c.state.in_([state.value for state in UNFINISHED]))
        .limit(1)
    )
    if connection.execute(held).first() is not None:
        raise Conflict(f"The queue {name!r} has unfinished jobs.", hint="Wait for them, or cancel them.", param="queue")
    connection.execute(delete(queues).where(queues.c.name == name))
    return queue


def _queue(row: Row[Any]) -> Queue:
    return Queue(**{**row._mapping, "created_at": from_micros(row.created_at)})
