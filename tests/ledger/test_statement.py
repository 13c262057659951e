import json
from datetime import timedelta

import msgspec
import pytest
from hypothesis import given

from tests.ledger.values import NOVEMBER, PRICES, months, record
from tidemill.ledger.components import CATALOGUE
from tidemill.ledger.errors import LedgerError
from tidemill.ledger.money import Nanos, parse_amount
from tidemill.ledger.statement import (
    ComponentSum,
    UsageTotals,
    record_to_json,
    statement_of_rows,
    to_json,
    usage_statement,
)
from tidemill.ledger.usage import RequestStatus, TokenUsage, UsageRecord


@given(months)
def test_the_statement_is_the_exact_sum_of_the_records(month: list[UsageRecord]) -> None:
    statement = usage_statement(month, tenant_id="acme", currency="CNY", period=NOVEMBER)
    assert statement.totals == UsageTotals(
        requests=len(month),
        prompt_tokens=sum(r.usage.prompt for r in month),
        cached_tokens=sum(r.usage.cached for r in month),
        completion_tokens=sum(r.usage.completion for r in month),
        charge=Nanos(sum(r.charge for r in month)),
        more={
            component: ComponentSum(
                sum(r.usage.more.get(component, 0) for r in month),
                Nanos(sum(r.charges.get(component, 0) for r in month)),
            )
            for component in CATALOGUE
            if any(component in r.usage.more for r in month)
        },
    )
    assert sum(statement.by_model.values(), UsageTotals()) == statement.totals
    assert list(statement.by_model) == sorted({r.model for r in month})


@given(months, months)
def test_rows_that_a_database_summed_give_the_same(one: list[UsageRecord], other: list[UsageRecord]) -> None:
    parts = [usage_statement(part, tenant_id="acme", currency="CNY") for part in (one, other)]
    rows = [row for part in parts for row in part.by_model.items()]
    whole = usage_statement([*one, *other], tenant_id="acme", currency="CNY")
    assert statement_of_rows(rows, tenant_id="acme", currency="CNY") == whole


def test_what_does_not_belong_is_refused() -> None:
    late = record("req_late", at=NOVEMBER.end)
    for stranger, tenant, currency in (
        (late, "acme", "CNY"),
        (record(), "other", "CNY"),
        (record(), "acme", "USD"),
    ):
        with pytest.raises(LedgerError, match=f"record {stranger.request_id}"):
            usage_statement([stranger], tenant_id=tenant, currency=currency, period=NOVEMBER)
    assert usage_statement([late], tenant_id="acme", currency="CNY").totals.requests == 1


def test_as_json() -> None:
    month = [record("req_1"), record("req_2", price=PRICES["prc_free"], usage=TokenUsage(7, 0, 1))]
    statement = usage_statement(month, tenant_id="acme", currency="CNY", period=NOVEMBER)
    assert to_json(statement) == {
        "tenant_id": "acme",
        "currency": "CNY",
        "month": "2026-11",
        "requests": 2,
        "prompt_tokens": 1007,
        "cached_tokens": 200,
        "completion_tokens": 301,
        "charge": "0.0082",
        "models": {
            "smollm2": {
                "requests": 1,
                "prompt_tokens": 1000,
                "cached_tokens": 200,
                "completion_tokens": 300,
                "charge": "0.0082",
            },
            "tiny": {
                "requests": 1,
                "prompt_tokens": 7,
                "cached_tokens": 0,
                "completion_tokens": 1,
                "charge": "0.00",
            },
        },
        "devices": [],
    }


def test_a_record_as_json() -> None:
    one = record(status=RequestStatus.CLIENT_CLOSED)
    plain = record_to_json(msgspec.structs.replace(one, first_token_at=one.finished_at - timedelta(milliseconds=5)))
    assert json.loads(json.dumps(plain)) == plain
    assert plain["status"] == "client_closed"
    assert plain["finished_at"] == "2026-11-03T16:00:00+00:00"
    assert plain["first_token_at"] == "2026-11-03T15:59:59.995000+00:00"
    parts = [parse_amount(str(plain[name])) for name in ("charge_input", "charge_cached", "charge_output")]
    assert sum(parts) == parse_amount(str(plain["charge"])) == one.charge
    assert record_to_json(one)["first_token_at"] is None
