"""Reconciliation of usage records with the engines' token counters, per replica and life.

llama.cpp and vLLM count prompt and generated tokens themselves. If the meter is right, the records of a replica's
life add up to its counters; what differs is named. An engine may know of more than was billed: the tokens that it
produced between a client's leaving and its noticing (a few a time), prompts of requests that were given up before
their first token, and requests that came to an upstream past Tidemill.
"""

from datetime import datetime

import msgspec
from sqlalchemy import Connection, Integer, func, insert, select, update

from tidemill.clock import from_micros, to_micros
from tidemill.ledger.usage import RequestStatus
from tidemill.store.ids import new_id
from tidemill.store.tables.usage import engine_counters, usage_records


class ReplicaLine(msgspec.Struct, frozen=True, kw_only=True):
    """One life of one replica."""

    replica: str
    life: str
    since: datetime
    until: datetime
    engine_prompt: int
    engine_completion: int
    records: int
    record_prompt: int
    record_completion: int
    given_up: int
    """Records whose client left, or that the engine or the gateway did not survive: where a difference may be."""

    @property
    def prompt_difference(self) -> int:
        """Prompt tokens that the engine counted beyond the records."""
        return self.engine_prompt - self.record_prompt

    @property
    def completion_difference(self) -> int:
        """Generated tokens that the engine counted beyond the records."""
        return self.engine_completion - self.record_completion

    @property
    def verdict(self) -> str:
        """`equal`, or where the difference comes from as far as the figures tell."""
        if self.prompt_difference == 0 and self.completion_difference == 0:
            return "equal"
        if self.prompt_difference < 0 or self.completion_difference < 0:
            return "records exceed the engine: sampled before the engine's last requests, or it died"
        if self.given_up:
            return f"engine exceeds the records: {self.given_up} requests were cut off"
        return "engine exceeds the records: it served requests that did not come through the gateway"


class ReconcileReport(msgspec.Struct, frozen=True):
    """All replicas' lives since a moment."""

    lines: tuple[ReplicaLine, ...]
    unchecked: tuple[str, ...]
    """Replicas that have no counters to compare with."""

    def to_json(self) -> dict[str, object]:
        return {
            "replicas": [
                {
                    "replica": line.replica,
                    "life": line.life,
                    "since": line.since.isoformat(),
                    "until": line.until.isoformat(),
                    "records": line.records,
                    "engine": {"prompt_tokens": line.engine_prompt, "completion_tokens": line.engine_completion},
                    "metered": {"prompt_tokens": line.record_prompt, "completion_tokens": line.record_completion},
                    "difference": {
                        "prompt_tokens": line.prompt_difference,
                        "completion_tokens": line.completion_difference,
                    },
                    "given_up": line.given_up,
                    "verdict": line.verdict,
                }
                for line in self.lines
            ],
            "unchecked": list(self.unchecked),
        }

    def to_text(self) -> str:
        """The report for a terminal, in lines."""
        if not self.lines and not self.unchecked:
            return "No engine has reported a count yet."
        out = []
        for line in self.lines:
            out.append(
                f"{line.replica} (life {line.life}, {line.records} records since {line.since:%Y-%m-%d %H:%M:%S}Z)"
            )
            out.append(f"  {'':12}{'engine':>14}{'metered':>14}{'difference':>14}")
            for name, engine, metered, difference in (
                ("prompt", line.engine_prompt, line.record_prompt, line.prompt_difference),
                ("completion", line.engine_completion, line.record_completion, line.completion_difference),
            ):
                out.append(f"  {name:12}{engine:>14,}{metered:>14,}{difference:>+14,}")
            out.append(f"  {line.verdict}")
        out.extend(f"{name}: has no token counters to compare" for name in self.unchecked)
        return "\n".join(out)


def note_counters(
    connection: Connection, *, replica: str, life: str | None, prompt: int, completion: int, now: datetime
) -> None:
    """Store a sample of an engine's counters.

    `life` names a start of an engine that Tidemill runs; with None, a falling total begins a new life.
    """
    columns = engine_counters.c
    query = select(engine_counters).where(columns.replica == replica)
    query = query.where(columns.life == life) if life is not None else query.where(columns.labelled.is_(False))
    last = connection.execute(query.order_by(columns.sampled_at.desc()).limit(1)).first()
    grown = last is not None and last.prompt <= prompt and last.completion <= completion
    if last is not None and (life is not None or grown):
        connection.execute(
            update(engine_counters)
            .where(columns.life == last.life)
            .values(sampled_at=to_micros(now), prompt=prompt, completion=completion)
        )
        return
    # An engine of our own starts at zero; of an upstream's total we saw only what comes from now on.
    fresh = life is not None or last is not None
    connection.execute(
        insert(engine_counters).values(
            life=life or new_id("life"),
            replica=replica,
            labelled=life is not None,
            started_at=to_micros(now),
            sampled_at=to_micros(now),
            base_prompt=0 if fresh else prompt,
            base_completion=0 if fresh else completion,
            prompt=prompt,
            completion=completion,
        )
    )


def reconcile(connection: Connection, *, replicas: list[str], since: datetime | None = None) -> ReconcileReport:
    """Compare the stored samples with the records. `replicas` are those in service now."""
    query = select(engine_counters).order_by(engine_counters.c.replica, engine_counters.c.started_at)
    if since is not None:
        query = query.where(engine_counters.c.sampled_at >= to_micros(since))
    lives = connection.execute(query).all()
    lines = []
    for life in lives:
        columns = usage_records.c
        where = [columns.replica == (f"{life.replica}#{life.life}" if life.labelled else life.replica)]
        if not life.labelled:
            where += [columns.started_at >= life.started_at, columns.finished_at <= life.sampled_at]
        given_up = func.sum(
            (
                columns.status.in_([RequestStatus.CLIENT_CLOSED, RequestStatus.ENGINE_LOST, RequestStatus.GATEWAY_LOST])
            ).cast(Integer)
        )
        row = connection.execute(
            select(func.count(), func.sum(columns.prompt_tokens), func.sum(columns.completion_tokens), given_up).where(
                *where
            )
        ).one()
        lines.append(
            ReplicaLine(
                replica=life.replica,
                life=life.life,
                since=from_micros(life.started_at),
                until=from_micros(life.sampled_at),
                engine_prompt=life.prompt - life.base_prompt,
                engine_completion=life.completion - life.base_completion,
                records=row[0],
                record_prompt=int(row[1] or 0),
                record_completion=int(row[2] or 0),
                given_up=int(row[3] or 0),
            )
        )
    known = {life.replica for life in lives}
    return ReconcileReport(tuple(lines), tuple(name for name in replicas if name not in known))
