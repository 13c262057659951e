"""Rows for the store straight from the bytes of the log: no record of the ledger is made on the way.

It reads the same bytes as `meter.records`, and gives what `store.usage` would make of the same record; a test compares
the two.
"""

from collections.abc import Sequence

import msgspec

from tidemill.clock import from_micros, to_micros
from tidemill.ledger.components import Component
from tidemill.ledger.period import period_of
from tidemill.ledger.usage import RequestStatus, UsageLabels
from tidemill.meter.records import FORMAT
from tidemill.store.record_components import components_text
from tidemill.store.record_rows import ChargeRows, RecordRow, WholeRecordRow
from tidemill.store.usage import tags_text


class _Opened(msgspec.Struct, array_like=True, gc=False, tag=FORMAT):
    """As `records.Opened`; what only recovery needs is not decoded."""

    request_id: str
    tenant_id: str
    key_id: str
    model: str
    replica: str
    price_id: str
    currency: str
    price: msgspec.Raw
    streamed: bool
    started_us: int
    tier: msgspec.Raw
    counted: msgspec.Raw
    labels: UsageLabels | None


class _Settled(msgspec.Struct, array_like=True, gc=False, tag=FORMAT):
    """As `records.Settled`."""

    opened: _Opened
    status: str
    prompt: int
    cached: int
    completion: int
    estimated: bool
    hold: int
    charge_input: int
    charge_cached: int
    charge_output: int
    more: dict[Component, tuple[int, int | None]]
    uncollected: int
    first_token_us: int
    finished_us: int
    device_ns: int
    list_amount: int | None


_decode = msgspec.msgpack.Decoder(_Settled).decode
_STATUSES = frozenset(status.value for status in RequestStatus)
_NO_LABELS = UsageLabels()


class SettledRows(msgspec.Struct):
    """What a batch of settled requests is in the store."""

    rows: list[RecordRow]
    charges: list[ChargeRows]
    """By tenant, currency and billing month, where that cost anything."""

    def spent(self) -> list[tuple[str, int]]:
        """What each tenant spent, in order of their ids."""
        sums: dict[str, int] = {}
        for charge in self.charges:
            sums[charge.tenant_id] = sums.get(charge.tenant_id, 0) + charge.amount
        return sorted(sums.items())


class SettledReader:
    """Reads batches of settled requests for the billing months of one time zone."""

    def __init__(self, zone: str) -> None:
        self._zone = zone
        self._month = ""
        self._from_us = self._until_us = 0
        """The bounds of the month that the last record was of."""

    def read(self, payloads: Sequence[bytes]) -> SettledRows | None:
        """The rows of a batch; None when one of its records is not as they are written now, or comes twice."""
        rows: list[RecordRow] = []
        charged: dict[tuple[str, str, str], ChargeRows] = {}
        ids: set[str] = set()
        try:
            settled = [_decode(payload) for payload in payloads]
        except msgspec.DecodeError:
            return None
        for each in settled:
            opened, finished_us = each.opened, each.finished_us
            amount = each.charge_input + each.charge_cached + each.charge_output
            if each.more or opened.labels is not None or each.list_amount is not None:
                row: RecordRow = _whole_row(each, opened)
                amount += sum(part or 0 for _, part in each.more.values())
            else:
                row = _row(each, opened)
            rows.append(row)
            ids.add(row.request_id)
            if row.status not in _STATUSES or (row.charge_input | row.charge_cached | row.charge_output | amount) < 0:
                return None
            if not self._from_us <= finished_us < self._until_us:
                self._find_month(finished_us)
            key = (row.tenant_id, row.currency, self._month)
            charge = charged.get(key)
            if charge is None:
                charged[key] = ChargeRows(row.tenant_id, row.currency, amount, finished_us, [row])
            else:
                charge.amount += amount
                charge.rows.append(row)
                if finished_us > charge.at:
                    charge.at = finished_us
        if len(ids) < len(rows):
            return None
        return SettledRows(rows, [charge for charge in charged.values() if charge.amount])

    def _find_month(self, at_us: int) -> None:
        period = period_of(from_micros(at_us), self._zone)
        self._month = period.month
        self._from_us, self._until_us = to_micros(period.start), to_micros(period.end)


def _row(settled: _Settled, opened: _Opened) -> RecordRow:
    return RecordRow(
        opened.request_id,
        opened.tenant_id,
        opened.key_id,
        opened.model,
        opened.replica,
        settled.prompt,
        settled.cached,
        settled.completion,
        settled.estimated,
        settled.status,
        opened.streamed,
        opened.price_id,
        opened.currency,
        settled.charge_input,
        settled.charge_cached,
        settled.charge_output,
        settled.uncollected,
        settled.hold,
        opened.started_us,
        settled.first_token_us or None,
        settled.finished_us,
        settled.device_ns,
    )


def _whole_row(settled: _Settled, opened: _Opened) -> WholeRecordRow:
    more, labels = settled.more, opened.labels or _NO_LABELS
    return WholeRecordRow(
        **msgspec.structs.asdict(_row(settled, opened)),
        charge_more=sum(amount or 0 for _, amount in more.values()) if more else None,
        components=components_text(more),
        service_class=labels.service_class or None,
        mode=labels.mode or None,
        project=labels.project or None,
        tags=tags_text(labels.tags),
        rule_id=labels.rule_id or None,
        list_amount=settled.list_amount,
    )
