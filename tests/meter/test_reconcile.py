"""Reconciliation, on samples and records that are made up: what differs is named, and nothing else."""

from datetime import datetime, timedelta
from itertools import count
from typing import Any

import msgspec
import pytest

from tests.ledger.values import record
from tests.meter.conftest import OCTOBER
from tests.store.values import ZONE
from tidemill.ledger.usage import RequestStatus, TokenUsage
from tidemill.meter.reconcile import ReconcileReport, ReplicaLine, note_counters, reconcile
from tidemill.store.engine import Store
from tidemill.store.tenants import Tenant
from tidemill.store.usage import store_records

MINUTE = timedelta(minutes=1)
ids = count(1)


def sample(
    store: Store, prompt: int, completion: int, *, at: datetime = OCTOBER, life: str | None = None, replica: str = "m/0"
) -> None:
    with store.write() as connection:
        note_counters(connection, replica=replica, life=life, prompt=prompt, completion=completion, now=at)


def served(
    store: Store,
    acme: Tenant,
    prompt: int,
    completion: int,
    *,
    at: datetime = OCTOBER,
    replica: str = "m/0",
    status: RequestStatus = RequestStatus.OK,
) -> None:
    """A record that took a second and finished at `at`."""
    usage = TokenUsage(prompt, 0, completion)
    made = record(f"req_{next(ids):08}", tenant_id=acme.tenant_id, usage=usage, at=at, status=status)
    with store.write() as connection:
        store_records(connection, [msgspec.structs.replace(made, replica=replica)], zone=ZONE)


def report(store: Store, *replicas: str, since: datetime | None = None) -> ReconcileReport:
    with store.read() as connection:
        return reconcile(connection, replicas=list(replicas or ("m/0",)), since=since)


def only_line(store: Store) -> ReplicaLine:
    (line,) = report(store).lines
    return line


def test_nothing_has_happened(store: Store) -> None:
    with store.read() as connection:
        empty = reconcile(connection, replicas=[])
    assert empty == ReconcileReport((), ())
    assert empty.to_text() == "No engine has reported a count yet."


def test_a_replica_without_counters_is_said_to_be_unchecked(store: Store) -> None:
    found = report(store, "m/0", "other/0")
    assert found.unchecked == ("m/0", "other/0")
    assert "other/0: has no token counters to compare" in found.to_text()


def test_an_engine_of_our_own_agrees_with_its_records(store: Store, acme: Tenant) -> None:
    sample(store, 0, 0, life="one")
    served(store, acme, 100, 20, replica="m/0#one")
    served(store, acme, 50, 7, replica="m/0#one")
    served(store, acme, 999, 999, replica="m/0#another")
    served(store, acme, 999, 999, replica="n/0#one")
    sample(store, 150, 27, life="one", at=OCTOBER + MINUTE)
    line = only_line(store)
    assert (line.verdict, line.records) == ("equal", 2)
    assert (line.engine_prompt, line.engine_completion) == (line.record_prompt, line.record_completion) == (150, 27)
    assert (line.since, line.until) == (OCTOBER, OCTOBER + MINUTE)


def test_each_life_of_an_engine_is_a_line_of_its_own(store: Store, acme: Tenant) -> None:
    for number, life in enumerate(("one", "two")):
        at = OCTOBER + number * MINUTE
        served(store, acme, 10 + number, 5, replica=f"m/0#{life}", at=at)
        sample(store, 10 + number, 5, life=life, at=at)
    assert [(line.life, line.verdict, line.engine_prompt) for line in report(store).lines] == [
        ("one", "equal", 10),
        ("two", "equal", 11),
    ]
    (later,) = report(store, since=OCTOBER + MINUTE).lines
    assert later.life == "two"


@pytest.mark.parametrize(
    ("engine", "status", "verdict"),
    [
        ((100, 20), RequestStatus.OK, "equal"),
        ((100, 23), RequestStatus.CLIENT_CLOSED, "engine exceeds the records: 1 requests were cut off"),
        ((130, 20), RequestStatus.GATEWAY_LOST, "engine exceeds the records: 1 requests were cut off"),
        (
            (130, 20),
            RequestStatus.OK,
            "engine exceeds the records: it served requests that did not come through the gateway",
        ),
        (
            (100, 19),
            RequestStatus.OK,
            "records exceed the engine: sampled before the engine's last requests, or it died",
        ),
        (
            (99, 25),
            RequestStatus.CLIENT_CLOSED,
            "records exceed the engine: sampled before the engine's last requests, or it died",
        ),
    ],
)
def test_a_difference_is_explained_as_far_as_the_figures_tell(
    store: Store, acme: Tenant, engine: tuple[int, int], status: RequestStatus, verdict: str
) -> None:
    served(store, acme, 100, 20, replica="m/0#one", status=status)
    sample(store, *engine, life="one")
    line = only_line(store)
    assert line.verdict == verdict
    assert (line.prompt_difference, line.completion_difference) == (engine[0] - 100, engine[1] - 20)


def test_of_an_upstream_only_what_came_since_the_first_look_counts(store: Store, acme: Tenant) -> None:
    served(store, acme, 999, 999, at=OCTOBER - MINUTE)
    sample(store, 5000, 700)
    assert only_line(store).verdict == "equal"
    served(store, acme, 100, 20, at=OCTOBER + MINUTE)
    sample(store, 5100, 720, at=OCTOBER + 2 * MINUTE)
    served(store, acme, 999, 999, at=OCTOBER + 3 * MINUTE)  # after the last look
    line = only_line(store)
    assert (line.verdict, line.engine_prompt, line.records) == ("equal", 100, 1)


@pytest.mark.parametrize("first_after", [(30, 4), (5200, 4), (30, 800)])
def test_an_upstream_whose_total_falls_was_started_anew(
    store: Store, acme: Tenant, first_after: tuple[int, int]
) -> None:
    """Either total that falls tells, also when the other has overtaken what it was."""
    sample(store, 5000, 700)
    served(store, acme, 100, 20, at=OCTOBER + MINUTE)
    sample(store, 5100, 720, at=OCTOBER + 2 * MINUTE)
    served(store, acme, *first_after, at=OCTOBER + 4 * MINUTE)
    sample(store, *first_after, at=OCTOBER + 3 * MINUTE)  # the new life begins with its first sample
    first, second = report(store).lines
    assert (first.verdict, first.engine_prompt) == ("equal", 100)
    assert (second.engine_prompt, second.engine_completion) == first_after
    assert second.life != first.life


def test_the_report_says_the_same_as_text_and_as_json(store: Store, acme: Tenant) -> None:
    served(store, acme, 1234, 20, replica="m/0#one")
    sample(store, 1334, 21, life="one")
    found = report(store, "m/0", "up/0")
    shown = found.to_text()
    assert "m/0 (life one, 1 records since 2026-10-15 12:00:00Z)" in shown
    assert "1,334" in shown and "+100" in shown and "up/0: has no token counters" in shown
    told: Any = found.to_json()
    (line,) = told["replicas"]
    assert line["difference"] == {"prompt_tokens": 100, "completion_tokens": 1}
    assert line["metered"] == {"prompt_tokens": 1234, "completion_tokens": 20}
    assert told["unchecked"] == ["up/0"]
    msgspec.json.encode(told)
